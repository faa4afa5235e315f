"""Room 2 of 4: what the colors mean.

In: tissue pixels of one slide and the color reference of a bundle. Out: a `StainTransform` and a
`StartTransform`, fitted once per slide, that any worker applies to any tile.

`density` is the one optical-density convention, `white` finds the slide's glass, `separate` finds
two stains, `normalize` fits and applies the color map, `start` makes the start images,
`reference` measures the training IHC.
"""
