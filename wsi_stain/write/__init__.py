"""Room 4 of 4: the picture out. Patches to row bands, bands to a pyramid, and its check."""
