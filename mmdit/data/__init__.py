"""Captioned images: shapes drawn on the fly, folders, shards."""

from mmdit.data.caption_sources import ClassNames, Sidecars, Table
from mmdit.data.captions import vocabulary
from mmdit.data.folder import ImageFolder
from mmdit.data.shapes import Shapes
from mmdit.data.shards import Shards

__all__ = [
    "ClassNames",
    "ImageFolder",
    "Shapes",
    "Shards",
    "Sidecars",
    "Table",
    "vocabulary",
]
