"""Random weights of the published sizes, as files in the published layout.

Every tensor is drawn with a generator of its own key and written immediately: the largest tensor
determines the memory needed, and a tensor that a format stores twice has the same values twice.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdit.checkpoints.building import Unfilled
from mmdit.checkpoints.formats import FORMATS
from mmdit.checkpoints.presets import PRESETS
from mmdit.checkpoints.public import descriptions, slots_of
from mmdit.keys import generator_for
from mmdit.registry import build

SIZES = (*PRESETS, "tiny")
FULL_SIZE = ("mmdit", "autoencoder")  # the default at published sizes: T5 alone has 9.5 GB

ENCODERS: dict[str, dict[str, Any]] = {
    "clip_l": {"class": "CLIPTextModel", "width": 768, "depth": 12, "num_heads": 12},
    "clip_g": {
        "class": "CLIPTextModel",
        "width": 1280,
        "depth": 32,
        "num_heads": 20,
        "activation": "gelu",
        "projection_width": 1280,
    },
    "t5": {
        "class": "T5Encoder",
        "vocabulary_size": 32128,
        "width": 4096,
        "depth": 24,
        "num_heads": 64,
        "hidden": 10240,
    },
}
TINY: dict[str, dict[str, Any]] = {
    "mmdit": {
        "class": "MMDiT",
        "depth": 4,
        "width": 64,
        "num_heads": 4,
        "qk_norm": True,
        "dual_attention": [0, 1],
        "context_width": 48,
        "pooled_width": 40,
        "position_size": 24,
    },
    "autoencoder": {"class": "Autoencoder", "width": 32, "multipliers": [1, 1, 2, 2], "blocks": 1},
    "clip_l": {
        "class": "CLIPTextModel",
        "vocabulary_size": 520,
        "width": 16,
        "depth": 3,
        "num_heads": 2,
    },
    "clip_g": {
        "class": "CLIPTextModel",
        "vocabulary_size": 520,
        "width": 24,
        "depth": 3,
        "num_heads": 3,
        "activation": "gelu",
        "projection_width": 24,
    },
    "t5": {
        "class": "T5Encoder",
        "vocabulary_size": 300,
        "width": 48,
        "depth": 3,
        "num_heads": 4,
        "head_width": 64,
        "hidden": 96,
    },
    "controlnet": {
        "class": "ControlNet",
        "depth": 2,
        "width": 64,
        "num_heads": 4,
        "pooled_width": 40,
    },
}


def models_of_size(name: str, kinds: Sequence[str]) -> dict[str, nn.Module]:
    """The models of a size, limited to the given kinds, on the meta device."""
    described = TINY if name == "tiny" else published(name)
    with torch.device("meta"), Unfilled():
        return {kind: build(described[kind]) for kind in kinds if kind in described}


def published(name: str) -> dict[str, dict[str, Any]]:
    """Descriptions of the models of a preset."""
    preset = PRESETS[name]
    size = {"depth": preset.depth, "width": 64 * preset.depth, "num_heads": preset.depth}
    mmdit = {
        "class": "MMDiT",
        **size,
        "qk_norm": preset.qk_norm,
        "dual_attention": list(range(13)) if preset.dual else [],
        "position_size": 384 if preset.dual else 192,
    }
    models: dict[str, dict[str, Any]] = {
        "mmdit": mmdit,
        "autoencoder": {"class": "Autoencoder"},
        **ENCODERS,
    }
    if preset.depth == 38:  # the only published ControlNets
        models["controlnet"] = {"class": "ControlNet", **size, "depth": 19}
    return models


def size_of(model: nn.Module) -> int:
    """Bytes of the model in bfloat16."""
    return 2 * sum(tensor.numel() for tensor in model.state_dict().values())


def write_random(
    models: Mapping[str, nn.Module], folder: Path, *, seed: int, name: str
) -> dict[str, Path]:
    """Write random bfloat16 weights; a ControlNet gets a file of its own, as when published.

    For the tiny size, headers contain what cannot be inferred from shapes; for published sizes the
    preset determines it.

    Args:
        models: models by kind, on the meta device.
        folder: an existing folder.
        seed: seed of the weights.
        name: of SIZES; part of the files' names.

    Returns:
        Paths by kind.
    """
    together = {kind: model for kind, model in models.items() if kind != "controlnet"}
    apart = {kind: model for kind, model in models.items() if kind == "controlnet"}
    written: dict[str, Path] = {}
    for group, title in ((together, name), (apart, f"{name}-controlnet")):
        if group:
            path = folder / f"{title}.safetensors"
            write(path, drawn_tensors(group), seed, descriptions(group) if name == "tiny" else {})
            written |= dict.fromkeys(group, path)
    return written


def drawn_tensors(models: Mapping[str, nn.Module]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Keys of the original layout, each with the key that seeds its values, and its shape."""
    tensors = {}
    for kind, model in models.items():
        format = next(f for f in FORMATS if f.kind == kind and f.layout == "original")
        slots = slots_of(model, format)
        own = {**dict.fromkeys(slots), **format.copies}
        for key, primary in own.items():
            source = primary or key
            tensors[format.prefixes[0] + key] = (source, slots[source].shape)
    return tensors


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    seed: int,
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key, (_, shape) in tensors.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    bar = tqdm(total=end, desc=f"writing {path.name}", unit="B", unit_scale=True, disable=None)
    with path.open("wb") as file, bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for source, shape in tensors.values():
            data = draw(source, shape, seed).view(torch.int16).numpy().data
            file.write(data)
            bar.update(data.nbytes)


def draw(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random values that keep activations near 1, none of them an initial value."""
    generator = generator_for(seed, "weights", key)
    noise = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
    if len(shape) == 1:  # norm weights around 1, biases around 0
        return noise.mul_(0.1).add_(1.0 if key.endswith("weight") else 0.0)
    if key == "pos_embed":
        return noise
    if key.endswith("SelfAttention.q.weight"):  # T5 does not scale its logits
        noise.mul_(0.125)
    return noise.mul_(noise[0].numel() ** -0.5)
