"""Show H&E beside virtual IHC, also in a notebook, where the returned picture draws itself.

    from side_by_side import side_by_side
    side_by_side("slide.svs", "slide_ki67.ome.tiff", mpp=4)

python examples/side_by_side.py slide.svs slide_ki67.ome.tiff both.png
"""

import sys

from PIL import Image, ImageDraw

from wsi_stain import SlideSource

GAP_PX, BAR_UM = 16, 500


def side_by_side(he: str, ihc: str, mpp: float = 4.0) -> Image.Image:
    """Both slides at one pixel size, with a scale bar; at 4 um/px some 2,500 px a side."""
    pictures = []
    for path in (he, ihc):
        with SlideSource.open(path) as slide:
            pictures.append(Image.fromarray(slide.thumbnail(mpp)))
    width, height = pictures[0].size
    both = Image.new("RGB", (width + GAP_PX + pictures[1].width, height), "white")
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[1], (width + GAP_PX, 0))
    draw, y = ImageDraw.Draw(both), height - 12
    draw.line([(12, y), (12 + BAR_UM / mpp, y)], fill="black", width=4)
    draw.text((12, y - 16), f"{BAR_UM} um", fill="black")
    draw.text((width + GAP_PX + 12, 4), "virtual stain, research use only", fill="black")
    return both


if __name__ == "__main__":
    side_by_side(*sys.argv[1:3]).save(sys.argv[3])
