"""Captioned images: shapes drawn on the fly, folders, shards."""

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
