"""Is a tile's compressed stream whole? Decoders paint what is missing grey and say nothing.

Room 1 of 4. In: bytes of one JPEG or JPEG 2000 stream. Out: what is wrong with them. Not here:
decoding.
"""

from __future__ import annotations

import re

__all__ = ["stream_fault"]

JPEG = frozenset({6, 7})  # TIFF's numbers of compressions
JPEG_2000 = frozenset({33003, 33005, 34712})
END = b"\xff\xd9"  # of both
START_OF_SCAN = 0xDA
# In a scan 0xFF is followed by 0 (a byte of data) or a restart's number; between the scans of a
# progressive picture come tables, comments and the next scan. Anything else is no JPEG.
_STRANGE = re.compile(rb"\xff[\x01-\xc3\xc5-\xcf\xd8]")


def stream_fault(data: bytes, compression: int) -> str:
    """Tell what is wrong with a stream that a decoder would take; nothing: "".

    libjpeg fills what is cut off with grey and only warns; OpenSlide takes that warning for an
    error, imagecodecs does not pass it on. OpenJPEG decodes as far as it gets.

    Parameters
    ----------
    data
        The whole stream.
    compression
        TIFF's number; of others than JPEG and JPEG 2000 nothing is told.
    """
    if compression not in JPEG | JPEG_2000:
        return ""
    end = data.rfind(END)
    if end < 0:
        return "its stream is cut off"
    if compression in JPEG and _STRANGE.search(data, _first_scan(data), end):
        return "its stream holds bytes that are none of a picture"
    return ""


def _first_scan(data: bytes) -> int:
    """Find where the first scan's data begin, walking over the tables before it."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        at += 2 + length
        if marker == START_OF_SCAN:
            return at
    return len(data)  # no scan: the decoder will say so
