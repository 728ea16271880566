"""The autoencoder, in single files and in `vae/` of a folder."""

import re
from collections import Counter
from collections.abc import Callable

from mmdit.checkpoints.formats.format import (
    Description,
    Format,
    Infos,
    Reader,
    count,
    shapes,
)
from mmdit.checkpoints.tables import Rule, reshaped
from mmdit.errors import UserError


def autoencoder_reader(level: str, block: str) -> Reader:
    """A reader of an autoencoder's architecture, given a layout's names of levels and blocks.

    The shapes of an encoder without residual blocks, like that of the toy, do not give its widths;
    the description in our own header does.
    """

    def describe(infos: Infos, hints: Description) -> Description:
        width = next((s[0] for s in shapes(infos, r"encoder\.conv_in\.weight", 4)), 128)
        channels = next((s[0] // 2 for s in shapes(infos, r"encoder\.conv_out\.weight", 4)), 16)
        convolutions = [
            shapes(infos, rf"encoder\.{level}\.{i}\.{block}\.\d+\.conv1\.weight", 4)
            for i in range(count(infos, rf"encoder\.{level}\.(\d+)\."))
        ]
        multipliers = [
            max(1, Counter(s[0] for s in level or [(width,)]).most_common(1)[0][0] // width)
            for level in convolutions
        ]
        bare = not shapes(infos, rf"encoder\.{level}\.\d+\.{block}\.\d+\.conv1\.weight", 4)
        if bare and hints.get("blocks") == 0:
            return {"class": "Autoencoder", **hints, "latent_channels": channels, "width": width}
        if channels != 16 and "scale" not in hints:
            raise UserError(
                f"an autoencoder of {channels} channels: the file does not state scale and shift "
                "of its latents, which are known only for the 16 channels of SD3"
            )
        return {
            "class": "Autoencoder",
            "latent_channels": channels,
            "width": width,
            "multipliers": multipliers,
            "blocks": count(infos, rf"encoder\.{level}\.\d+\.{block}\.(\d+)\."),
            "scale": hints.get("scale", 1.5305),
            "shift": hints.get("shift", 0.0609),
        }

    return describe


def original_autoencoder(description: Description) -> list[Rule]:
    """Rules for `first_stage_model.` of single files, where levels count from the image."""
    top, blocks = len(description["multipliers"]) - 1, description["blocks"]

    def up(what: str) -> Callable[[re.Match[str]], str]:
        return lambda match: match.expand(f"decoder.up.{top - int(match[1])}.{what}")

    return [
        Rule(rf"^encoder\.levels\.(\d+)\.{blocks}\.", r"encoder.down.\1.downsample."),
        Rule(r"^encoder\.levels\.(\d+)\.(\d+)\.", r"encoder.down.\1.block.\2."),
        Rule(rf"^decoder\.levels\.(\d+)\.{blocks + 1}\.", up("upsample.")),
        Rule(r"^decoder\.levels\.(\d+)\.(\d+)\.", up(r"block.\2.")),
        Rule(r"middle\.0", "mid.block_1"),
        Rule(r"middle\.1", "mid.attn_1"),
        Rule(r"middle\.2", "mid.block_2"),
        Rule(r"shortcut", "nin_shortcut"),
        Rule(r"\.proj\.", ".proj_out."),
    ]


def diffusers_autoencoder(description: Description) -> list[Rule]:
    """Rules for `vae/` of a folder."""
    blocks = description["blocks"]
    return [
        Rule(rf"^encoder\.levels\.(\d+)\.{blocks}\.", r"encoder.down_blocks.\1.downsamplers.0."),
        Rule(r"^encoder\.levels\.(\d+)\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
        Rule(rf"^decoder\.levels\.(\d+)\.{blocks + 1}\.", r"decoder.up_blocks.\1.upsamplers.0."),
        Rule(r"^decoder\.levels\.(\d+)\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
        Rule(r"norm_out", "conv_norm_out"),
        Rule(r"shortcut", "conv_shortcut"),
        Rule(r"middle\.0", "mid_block.resnets.0"),
        Rule(r"middle\.2", "mid_block.resnets.1"),
        Rule(r"middle\.1\.norm", "mid_block.attentions.0.group_norm"),
        Rule(r"middle\.1\.([qkv])\.weight", r"middle.1.\1.weight", MATRIX),
        Rule(r"middle\.1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
        Rule(r"middle\.1\.proj\.weight", "middle.1.proj.weight", MATRIX),
        Rule(r"middle\.1\.proj", "mid_block.attentions.0.to_out.0"),
    ]


# Our convolution with a 1 x 1 kernel is their matrix.
MATRIX = reshaped(lambda ours: ours[:2])

FORMATS = [
    Format(
        kind="autoencoder",
        layout="original",
        prefixes=("first_stage_model.", ""),
        mark=r"(encoder\.down|decoder\.up)\.\d+\.",
        describe=autoencoder_reader("down", "block"),
        rules=original_autoencoder,
        constants=("scale", "shift"),
    ),
    Format(
        kind="autoencoder",
        layout="diffusers",
        prefixes=("",),
        mark=r"(encoder\.down_blocks|decoder\.up_blocks)\.\d+\.",
        describe=autoencoder_reader("down_blocks", "resnets"),
        rules=diffusers_autoencoder,
        constants=("scale", "shift"),
    ),
]
