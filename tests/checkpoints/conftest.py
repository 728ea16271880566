"""Tiny models of every kind that has a public format."""

from collections.abc import Callable

import pytest
from torch import nn

from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder

MMDIT = {"depth": 3, "width": 192, "num_heads": 3, "context_width": 12, "pooled_width": 10}
MMDIT |= {"position_size": 6}
CLIP = {"vocabulary_size": 99, "width": 32, "depth": 2, "num_heads": 2, "length": 9}

TINY: dict[str, Callable[[], nn.Module]] = {
    "mmdit": lambda: MMDiT(**MMDIT),
    "mmdit_qk_norm": lambda: MMDiT(**MMDIT, qk_norm=True),
    "mmditx": lambda: MMDiT(**MMDIT, qk_norm=True, dual_attention=[0, 1]),
    "autoencoder": lambda: Autoencoder(width=32, multipliers=[1, 2, 2], blocks=1),
    "clip_l": lambda: CLIPTextModel(**CLIP),
    "clip_g": lambda: CLIPTextModel(**CLIP, activation="gelu", projection_width=24),
    "t5": lambda: T5Encoder(
        vocabulary_size=50, width=16, depth=2, num_heads=2, head_width=8, hidden=24
    ),
    "clip_image": lambda: CLIPImageModel(
        width=64, depth=2, num_heads=2, image_size=28, patch_size=14, projection_width=24
    ),
    "controlnet": lambda: ControlNet(
        depth=2, width=128, num_heads=2, pooled_width=10, control_type="canny"
    ),
}


def kind_named(name: str) -> str:
    """The kind of a tiny model, of which the MMDiT has three."""
    return "mmdit" if name.startswith("mmdit") else name


@pytest.fixture
def tiny(randomize) -> Callable[[str], nn.Module]:
    """`tiny(name)`: one of `TINY`, no parameter at its initial value."""
    return lambda name: randomize(TINY[name](), seed=0)
