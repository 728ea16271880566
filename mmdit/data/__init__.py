"""Data sets: batches of images and captions for training.

`dataset.py` defines the interface that training uses (`Data`, `Batch`). Four kinds implement it:

*Toy shapes* are drawn on the fly. `shapes.py` draws a sample from its index, using captions from
`captions.py`, pixels from `drawing.py` and held-out combinations from `composition.py`.

*A folder of images.* `folder.py` finds the files and decodes each once (see `images.py`);
`caption_sources.py` reads their captions. `folder_index.py` remembers what was decoded,
`missing.py` guesses why a name in a table has no file, `bad_images.py` reports what was set aside.

*Tar shards.* `shards.py` reads samples from tar files: `tar.py` finds their members, `samples.py`
groups the members of a sample, `shard_index.py` records where each sample starts, `patterns.py`
expands file patterns. The commands `pack.py`, `hub.py` and `index.py` (shared options in
`commands.py`) write shards from a folder or from Parquet files, and index existing shards.

*A mixture* (`mixture.py`) of other data sets, in fixed shares.

Folders and shards are `Files` (`files.py`), opened once. `captioned.py` views them as a training
and a validation split, in the sizes of `buckets.py`. `order.py` determines the order of samples.
"""

from mmdit.data.caption_sources import ClassNames, Constant, Sidecars, Table
from mmdit.data.captioned import CaptionedImages, ImageOptions, opener
from mmdit.data.captions import vocabulary
from mmdit.data.dataset import Batch, Data
from mmdit.data.files import Files
from mmdit.data.folder import Folder, image_folder
from mmdit.data.mixture import Mixture
from mmdit.data.shapes import Shapes
from mmdit.data.shards import TarShards, tar_shards

__all__ = [
    "Batch",
    "CaptionedImages",
    "ClassNames",
    "Constant",
    "Data",
    "Files",
    "Folder",
    "ImageOptions",
    "Mixture",
    "Shapes",
    "Sidecars",
    "Table",
    "TarShards",
    "image_folder",
    "opener",
    "tar_shards",
    "vocabulary",
]
