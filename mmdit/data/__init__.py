"""Data sets: what training sees as batches of images and captions.

Three stories share `dataset.py`, which says what training asks of any of them (`Data`, `Batch`):

*Toy shapes* are drawn on the fly. `shapes.py` draws a sample from its index, with the scenes'
captions (`captions.py`), pixels (`drawing.py`) and held-out combinations (`composition.py`).

*A folder of images.* `folder.py` finds the files and decodes each once (`images.py` says how);
`caption_sources.py` reads their captions. `folder_index.py` remembers what was decoded,
`missing.py` guesses why a name in a table has no file, `bad_images.py` reports what was set aside.

*Tar shards.* `shards.py` reads samples out of tar files: `tar.py` finds their members, `samples.py`
puts together those of a sample, `shard_index.py` keeps where each lies, `patterns.py` their names.
The commands `pack.py`, `hub.py` and `index.py`, with the options of `commands.py`, make shards of a
folder or of Parquet files, and index shards from elsewhere.

Folders and shards are `Files` (`files.py`), opened once. `captioned.py` views them as a training
and a validation split, in the sizes of `buckets.py`. `order.py` has the order of the samples.
"""

from mmdit.data.caption_sources import ClassNames, Sidecars, Table
from mmdit.data.captioned import CaptionedImages, ImageOptions, opener
from mmdit.data.captions import vocabulary
from mmdit.data.dataset import Batch, Data
from mmdit.data.files import Files
from mmdit.data.folder import Folder, image_folder
from mmdit.data.shapes import Shapes
from mmdit.data.shards import TarShards, tar_shards

__all__ = [
    "Batch",
    "CaptionedImages",
    "ClassNames",
    "Data",
    "Files",
    "Folder",
    "ImageOptions",
    "Shapes",
    "Sidecars",
    "Table",
    "TarShards",
    "image_folder",
    "opener",
    "tar_shards",
    "vocabulary",
]
