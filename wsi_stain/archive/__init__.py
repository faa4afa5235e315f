"""Many slides in one command: which, what is done already, who works on what, what came of it.

In: a folder, pattern or list of slides. Out: their pyramids, `archive.json`, `archive.csv`. Not
here: how one slide is translated (`pipeline`).

`source` finds slides, `jobs` names their outputs, `past` looks for finished ones, `queue` says
whose turn it is, `run` does the work, `record` keeps what came of it, `watch` tells how far it is.
"""
