"""Translate one slide: python examples/one_slide.py slide.svs results [bundle]."""

import sys
from pathlib import Path

from wsi_stain import RunConfig, translate_slide


def main(slide: str, out: str, bundle: str = "ki67") -> None:
    """Run the whole road with default settings."""
    result = translate_slide(Path(slide), Path(out), RunConfig(bundle=bundle))
    print(result.files.output)


if __name__ == "__main__":  # worker processes import this file: keep the work below this line
    main(*sys.argv[1:])
