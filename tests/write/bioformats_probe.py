"""What Bio-Formats sees in files: run as a program, in a process of its own.

A Java machine inside the test process would take over its signals. Arguments: the jar, a folder
for the answer, then the files. Writes facts.json and ``<number>_<level>.npy``, uint8 (h, w, 3).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jpype
import numpy as np


def main(jar: str, folder: Path, files: list[str]) -> None:
    jpype.startJVM("-Xmx1g", "-Djava.awt.headless=true", classpath=[jar])
    jpype.JClass("loci.common.DebugTools").setRootLevel("ERROR")
    facts = [_facts(file, folder, number) for number, file in enumerate(files)]
    (folder / "facts.json").write_text(json.dumps(facts))


def _facts(file: str, folder: Path, number: int) -> dict[str, Any]:
    store = jpype.JClass("loci.formats.MetadataTools").createOMEXMLMetadata()
    reader = jpype.JClass("loci.formats.ImageReader")()
    reader.setFlattenedResolutions(False)
    reader.setMetadataStore(store)
    reader.setId(file)
    sizes = []
    for level in range(int(reader.getResolutionCount())):
        reader.setResolution(level)
        width_px, height_px = int(reader.getSizeX()), int(reader.getSizeY())
        data = np.array(reader.openBytes(0, 0, 0, width_px, height_px), np.int8).view(np.uint8)
        shape = (height_px, width_px, 3) if reader.isInterleaved() else (3, height_px, width_px)
        pixels = data.reshape(shape)
        if not reader.isInterleaved():
            pixels = np.moveaxis(pixels, 0, -1)
        np.save(folder / f"{number}_{level}.npy", pixels)
        sizes.append([width_px, height_px])
    reader.setResolution(0)
    facts = {
        "series": int(reader.getSeriesCount()),
        "levels": sizes,
        "rgb": bool(reader.isRGB()),
        "channels": int(reader.getRGBChannelCount()),
        "mpp": [
            float(size(0).value(jpype.JClass("ome.units.UNITS").MICROMETER).doubleValue())
            for size in (store.getPixelsPhysicalSizeX, store.getPixelsPhysicalSizeY)
        ],
        "name": str(store.getImageName(0)),
    }
    reader.close()
    return facts


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
