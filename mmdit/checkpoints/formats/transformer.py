"""The MMDiT, MMDiT-X included, in single files and in `transformer/` of a folder."""

import math
import re
from collections import Counter
from collections.abc import Mapping

from mmdit.checkpoints.formats.format import (
    Description,
    Format,
    Infos,
    Reader,
    convolution,
    count,
    fused,
    heads,
    numbers,
    shapes,
)
from mmdit.checkpoints.tables import SWAPPED, Rule, reshaped
from mmdit.errors import UserError


def mmdit_reader(names: Mapping[str, str]) -> Reader:
    """A reader of an MMDiT's architecture, given a layout's names of the tensors with its sizes.

    Where several tensors give the same size, the majority decides: a single damaged tensor is then
    reported as misshapen, rather than all the others.
    """

    def describe(infos: Infos, hints: Description) -> Description:
        widths = Counter(
            shape[axis]
            for key, axis, dims in (
                ("patch", 0, 4),
                ("context", 0, 2),
                ("fc2", 0, 2),
                ("output", 1, 2),
            )
            for shape in shapes(infos, names[key], dims)
        )
        if not widths:
            raise UserError("all tensors that determine an MMDiT's width are missing")
        width = widths.most_common(1)[0][0]
        patches = shapes(infos, names["patch"], 4)
        _, channels, p, _ = patches[0] if patches else (width, 16, 2, 2)
        depth = count(infos, names["block"])
        sides = [math.isqrt(shape[-2]) for shape in shapes(infos, names["positions"], 3)]
        norms = Counter(shape[0] for shape in shapes(infos, names["q_norm"], 1))
        qk_norm = norms.total() > 2 * depth  # every block has 4 of them
        hidden = Counter(shape[0] for shape in shapes(infos, names["mlp"], 2))
        # A second attention has tensors of its own, and the modulation then has nine parts.
        dual = {int(key) for key in numbers(infos, names["dual"])} | {
            int(match[1])
            for key, info in infos.items()
            if (match := re.fullmatch(names["modulation"], key)) and info.shape[:1] == (9 * width,)
        }
        return {
            "class": "MMDiT",
            "depth": depth,
            "width": width,
            "num_heads": heads("MMDiT", width, depth, norms if qk_norm else {}, hints),
            "mlp_ratio": hidden.most_common(1)[0][0] / width if hidden else 4.0,
            "latent_channels": channels,
            "patch_size": p,
            "context_width": next((s[1] for s in shapes(infos, names["context"], 2)), 4096),
            "pooled_width": next((s[1] for s in shapes(infos, names["pooled"], 2)), 2048),
            "qk_norm": qk_norm,
            "dual_attention": sorted(i for i in dual if i < depth - 1),
            "position_size": sides[0] if sides else 192,
        }

    return describe


# Our table (size, size, d) is their sequence (1, size * size, d).
POSITIONS = reshaped(lambda ours: (1, ours[0] * ours[1], ours[2]))


def original_mmdit(description: Description) -> list[Rule]:
    """Rules for `model.diffusion_model.` of single files."""
    last, p = description["depth"] - 1, description["patch_size"]
    return [
        Rule(r"^patch_embedding\.proj\.weight", "x_embedder.proj.weight", convolution(p)),
        Rule(r"^patch_embedding", "x_embedder"),
        Rule(r"^positions", "pos_embed", POSITIONS),
        Rule(r"^timestep_embedding", "t_embedder"),
        Rule(r"^pooled_embedding", "y_embedder"),
        Rule(r"_embedder\.fc1", "_embedder.mlp.0"),
        Rule(r"_embedder\.fc2", "_embedder.mlp.2"),
        Rule(r"^context_embedding", "context_embedder"),
        Rule(r"^blocks\.", "joint_blocks."),
        Rule(r"^last_block\.", f"joint_blocks.{last}."),
        Rule(r"\.text\.", ".context_block."),
        Rule(r"\.image\.", ".x_block."),
        *fused(r"attention(2?)_in\.", r"attn\1."),
        Rule(r"attention(2?)_in\.([qk])_norm", r"attn\1.ln_\2"),
        Rule(r"attention(2?)_out", r"attn\1.proj"),
        Rule(r"^output\.", "final_layer."),
        Rule(r"modulation\.linear", "adaLN_modulation.1"),
    ]


def diffusers_mmdit(description: Description) -> list[Rule]:
    """Rules for `transformer/` of a folder."""
    last, p = description["depth"] - 1, description["patch_size"]
    return [
        Rule(r"^patch_embedding\.proj\.weight", "pos_embed.proj.weight", convolution(p)),
        Rule(r"^patch_embedding", "pos_embed"),
        Rule(r"^positions", "pos_embed.pos_embed", POSITIONS),
        Rule(r"^timestep_embedding\.fc", "time_text_embed.timestep_embedder.linear_"),
        Rule(r"^pooled_embedding\.fc", "time_text_embed.text_embedder.linear_"),
        Rule(r"^context_embedding", "context_embedder"),
        Rule(r"^output\.modulation\.linear", "norm_out.linear", SWAPPED),
        Rule(r"^output\.linear", "proj_out"),
        Rule(r"^last_block\.text\.modulation", "last_block.text.modulation", SWAPPED),
        Rule(r"^blocks\.", "transformer_blocks."),
        Rule(r"^last_block\.", f"transformer_blocks.{last}."),
        Rule(r"text\.modulation", "norm1_context"),
        Rule(r"image\.modulation", "norm1"),
        Rule(r"text\.attention_in\.([qkv])\.", r"attn.add_\1_proj."),
        Rule(r"text\.attention_in\.([qk])_norm", r"attn.norm_added_\1"),
        Rule(r"text\.attention_out", "attn.to_add_out"),
        Rule(r"image\.attention(2?)_in\.([qkv])\.", r"attn\1.to_\2."),
        Rule(r"image\.attention(2?)_in\.([qk])_norm", r"attn\1.norm_\2"),
        Rule(r"image\.attention(2?)_out", r"attn\1.to_out.0"),
        Rule(r"text\.mlp\.", "ff_context.net."),
        Rule(r"image\.mlp\.", "ff.net."),
        Rule(r"net\.fc1", "net.0.proj"),
        Rule(r"net\.fc2", "net.2"),
    ]


# The tensors that give the sizes, by their names in the two layouts.
ORIGINAL_NAMES = {
    "patch": r"x_embedder\.proj\.weight",
    "context": r"context_embedder\.weight",
    "fc2": r"[ty]_embedder\.mlp\.2\.weight",
    "pooled": r"y_embedder\.mlp\.0\.weight",
    "output": r"final_layer\.linear\.weight",
    "positions": r"pos_embed",
    "block": r"joint_blocks\.(\d+)\.",
    "q_norm": r"joint_blocks\.\d+\.\w+\.attn\.ln_[qk]\.weight",
    "mlp": r"joint_blocks\.\d+\.\w+\.mlp\.fc1\.weight",
    "dual": r"joint_blocks\.(\d+)\.x_block\.attn2\.",
    "modulation": r"joint_blocks\.(\d+)\.x_block\.adaLN_modulation\.1\.weight",
}
DIFFUSERS_NAMES = {
    "patch": r"pos_embed\.proj\.weight",
    "context": r"context_embedder\.weight",
    "fc2": r"time_text_embed\.\w+\.linear_2\.weight",
    "pooled": r"time_text_embed\.text_embedder\.linear_1\.weight",
    "output": r"proj_out\.weight",
    "positions": r"pos_embed\.pos_embed",
    "block": r"transformer_blocks\.(\d+)\.",
    "q_norm": r"transformer_blocks\.\d+\.attn\.norm_(?:added_)?[qk]\.weight",
    "mlp": r"transformer_blocks\.\d+\.ff(?:_context)?\.net\.0\.proj\.weight",
    "dual": r"transformer_blocks\.(\d+)\.attn2\.",
    "modulation": r"transformer_blocks\.(\d+)\.norm1\.linear\.weight",
}

FORMATS = [
    Format(
        kind="mmdit",
        layout="original",
        prefixes=("model.diffusion_model.", ""),
        mark=r"joint_blocks\.\d+\.",
        describe=mmdit_reader(ORIGINAL_NAMES),
        rules=original_mmdit,
    ),
    Format(
        kind="mmdit",
        layout="diffusers",
        prefixes=("",),
        mark=r"transformer_blocks\.\d+\.(attn\.add_|norm1_context\.|ff_context\.)",
        describe=mmdit_reader(DIFFUSERS_NAMES),
        rules=diffusers_mmdit,
    ),
]
