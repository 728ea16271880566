"""The ControlNets of SD3.5 Large, whose original files already have some of diffusers' names."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from mmdit.checkpoints.formats.format import (
    Argument,
    Description,
    Format,
    Infos,
    convolution,
    count,
    fused,
    shapes,
)
from mmdit.checkpoints.tables import Rule
from mmdit.errors import UserError
from mmdit.models.controlnet import CONTROL_RANGES
from mmdit.printable import logger

log = logger("mmdit.checkpoints")


def read_controlnet(infos: Infos, hints: Description) -> Description:
    """Describe the architecture of a ControlNet of SD3.5 Large."""
    widths = Counter(s[0] for s in shapes(infos, r"controlnet_blocks\.\d+\.weight", 2))
    patches = shapes(infos, r"pos_embed_input\.proj\.weight", 4)
    hidden = Counter(
        s[0]
        for s in shapes(infos, r"transformer_blocks\.\d+\.(mlp\.fc1|ff\.net\.0\.proj)\.weight", 2)
    )
    pooled = shapes(infos, r"time_text_embed\.text_embedder\.linear_1\.weight", 2)
    if not widths:
        raise UserError("all tensors that determine a ControlNet's width are missing")
    if "control_type" not in hints:
        log.warning(
            "the file does not state the control_type of this ControlNet (%s): it is taken for "
            "blur, which is treated like depth; give control_type= otherwise",
            ", ".join(CONTROL_RANGES),
        )
    width = widths.most_common(1)[0][0]
    depth = count(infos, r"(?:controlnet|transformer)_blocks\.(\d+)\.")
    if "num_heads" not in hints and width % 64:
        raise UserError(
            f"a ControlNet of width {width}: the file does not state the number of heads, and its "
            "width does not split into heads of 64 as in the public ones; give num_heads="
        )
    return {
        "class": "ControlNet",
        "depth": depth,
        "width": width,
        "num_heads": hints.get("num_heads", width // 64),
        "mlp_ratio": hidden.most_common(1)[0][0] / width if hidden else 4.0,
        "latent_channels": patches[0][1] if patches else 16,
        "patch_size": patches[0][2] if patches else 2,
        "pooled_width": pooled[0][1] if pooled else 2048,
        "control_type": hints.get("control_type", "blur"),
    }


def read_control_type(tensor: Tensor) -> str:
    """The control type that a public file stores as a number; "number ..." if unknown."""
    stored = tensor.flatten()[:1].tolist()
    names = [name for i, name in enumerate(CONTROL_RANGES) if stored == [i]]
    return names[0] if names else f"number {stored}"


CONTROL_TYPE = Argument(
    "control_type",
    read_control_type,
    lambda name: torch.tensor([list(CONTROL_RANGES).index(name)], dtype=torch.int32),
)


def controlnet(attention: list[Rule], mlp: list[Rule], modulation: Rule) -> Any:
    """Rules of a ControlNet, given those of a layout for the parts of its blocks."""

    def rules(description: Description) -> list[Rule]:
        kernel = convolution(description["patch_size"])
        return [
            Rule(r"^control_embedding\.proj\.weight", "pos_embed_input.proj.weight", kernel),
            Rule(r"^control_embedding", "pos_embed_input"),
            Rule(r"^timestep_embedding\.fc", "time_text_embed.timestep_embedder.linear_"),
            Rule(r"^pooled_embedding\.fc", "time_text_embed.text_embedder.linear_"),
            Rule(r"^to_residuals", "controlnet_blocks"),
            Rule(r"^blocks\.", "transformer_blocks."),
            *attention,
            *mlp,
            modulation,
        ]

    return rules


original_controlnet = controlnet(
    [*fused(r"attention_in\.", "attn."), Rule(r"attention_out", "attn.proj")],
    [],
    Rule(r"modulation\.linear", "adaLN_modulation.1"),
)
diffusers_controlnet = controlnet(
    [
        Rule(r"attention_in\.([qkv])\.", r"attn.to_\1."),
        Rule(r"attention_out", "attn.to_out.0"),
    ],
    [Rule(r"mlp\.fc1", "ff.net.0.proj"), Rule(r"mlp\.fc2", "ff.net.2")],
    Rule(r"modulation\.linear", "norm1.linear"),
)


FORMATS = [
    Format(
        kind="controlnet",
        layout="original",
        prefixes=("",),
        mark=r"transformer_blocks\.\d+\.attn\.qkv\.",
        describe=read_controlnet,
        rules=original_controlnet,
        arguments={"control_type": CONTROL_TYPE},
        # An embedder for text, which the blocks do not read.
        extras=(r"context_embedder\.(weight|bias)",),
    ),
    Format(
        kind="controlnet",
        layout="diffusers",
        prefixes=("",),
        mark=r"controlnet_blocks\.\d+\.",
        describe=read_controlnet,
        rules=diffusers_controlnet,
    ),
]
