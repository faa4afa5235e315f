"""The stages of a run; `pipeline` calls them in order.

In: a plan. Out: shards, transforms, the pyramid, the manifest. Not here: how any of it is done
(that is in the four rooms), nor which verbs exist.

Nothing waits for what it does not need. The color is fitted on tiles read straight from the slide
while workers start; a shard is translated as soon as it is read; bands are stitched and encoded
as soon as their shards are there.

Each stage asks the store what is still pending under its key, so a run that was killed goes on
where it stopped. A key holds the identity of all that the shard depends on.
"""

from wsi_stain.stages.begin import begin, cuda_devices, prepare, refuse_outputs
from wsi_stain.stages.beside import Beside
from wsi_stain.stages.keys import digest
from wsi_stain.stages.picture import PictureWriter
from wsi_stain.stages.run import Run

__all__ = [
    "Beside",
    "PictureWriter",
    "Run",
    "begin",
    "cuda_devices",
    "digest",
    "prepare",
    "refuse_outputs",
]
