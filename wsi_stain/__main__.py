"""`python -m wsi_stain`: the command line."""

from wsi_stain.cli import main

if __name__ == "__main__":
    main()
