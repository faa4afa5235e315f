"""Room 3 of 4. H&E in, IHC out: tensors in, tensors out. Not here: files of pixels, colour fits."""
