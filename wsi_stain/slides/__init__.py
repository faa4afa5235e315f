"""Room 1 of 4: where the pixels are.

In: a slide file. Out: tissue patches in a store, and the grid that says where each belongs.

`image` opens slides (through `openslide_read` and `tiff_read`; `identity` and `pixel_size` check
the file and settle its scale), `mask` finds tissue, `plan` cuts the grid, `store` keeps patches,
`fill` reads them in, `sample` fetches a small real slide.
"""
