"""The networks: MM-DiT (Figure 2), the other backbones of Figure 4, autoencoder, CLIP, T5."""

from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.concat import ConcatMMDiT
from mmdit.models.cross_dit import CrossDiT
from mmdit.models.dit import DiT
from mmdit.models.interval import IntervalMMDiT
from mmdit.models.mmdit import MMDiT
from mmdit.models.mmdit_three import MMDiTThree
from mmdit.models.t5 import T5Encoder
from mmdit.models.uvit import UViT

__all__ = [
    "Autoencoder",
    "CLIPTextModel",
    "ConcatMMDiT",
    "CrossDiT",
    "DiT",
    "IntervalMMDiT",
    "MMDiT",
    "MMDiTThree",
    "T5Encoder",
    "UViT",
]
