"""The public formats: what their keys are called, and how an architecture is read from a file.

Two families. "original" is the layout of the published single files, where each model has its
prefix (`model.diffusion_model.`, `first_stage_model.`, ...) or stands bare in a file of its own.
"diffusers" is the layout of folders with one subfolder per model.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.checkpoints.archive import Info
from mmdit.checkpoints.tables import SWAPPED, Rule, reshaped, rows
from mmdit.errors import UserError
from mmdit.models.controlnet import CONTROL_RANGES

log = logging.getLogger("mmdit.checkpoints")

Infos = Mapping[str, Info]
Description = dict[str, Any]


class Argument(NamedTuple):
    """An argument of a model that a format stores as a tensor."""

    name: str
    read: Callable[[Tensor], Any]
    write: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Format:
    """One model in one layout.

    Attributes:
        kind: which model: mmdit, autoencoder, clip_l, clip_g, t5, controlnet.
        layout: 'original' or 'diffusers'.
        prefixes: under which its keys may stand in a file; the first is written.
        mark: regular expression of keys that only this format has.
        describe: description of the architecture (see `mmdit.registry`) from shapes and hints.
        rules: the table, which may depend on the architecture.
        constants: tensors of ours that the format does not store, from the description instead.
        arguments: their key -> the argument of the model that it holds; it may be missing.
        copies: their key -> their key of which it is an exact copy.
        identity: their key of a projection that they store as the identity where we have none.
        wide: regular expression of keys whose tensors overflow in float16; float32 instead.
        extras: keys that published files may carry and no model needs; dropped by name.
    """

    kind: str
    layout: str
    prefixes: tuple[str, ...]
    mark: str
    describe: Callable[[Infos, Description], Description]
    rules: Callable[[Description], list[Rule]]
    constants: tuple[str, ...] = ()
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""
    wide: str = r"(?!)"
    extras: tuple[str, ...] = ()

    def prefix_in(self, keys: Iterable[str]) -> str | None:
        """The prefix under which this model stands among `keys`; None when it is not there."""
        found = set()
        for prefix in self.prefixes:
            pattern = re.compile(re.escape(prefix) + self.mark)
            if any(pattern.match(key) for key in keys):
                found.add(prefix)
        return next((prefix for prefix in self.prefixes if prefix in found), None)


# The transformer


def mmdit_reader(names: Mapping[str, str]) -> Callable[[Infos, Description], Description]:
    """Reader of an MMDiT's architecture, given what a format calls the telling tensors.

    Where several tensors tell the same size, the majority is believed: one damaged tensor is then
    reported as misshapen, instead of all the others.
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
            raise UserError("none of the tensors that tell an MMDiT's width is there")
        width = widths.most_common(1)[0][0]
        patches = shapes(infos, names["patch"], 4)
        _, channels, p, _ = patches[0] if patches else (width, 16, 2, 2)
        depth = count(infos, names["block"])
        sides = [math.isqrt(shape[-2]) for shape in shapes(infos, names["positions"], 3)]
        norms = Counter(shape[0] for shape in shapes(infos, names["q_norm"], 1))
        qk_norm = norms.total() > 2 * depth  # of the 4 that every block has then
        hidden = Counter(shape[0] for shape in shapes(infos, names["mlp"], 2))
        # A second attention shows in its own tensors and in the nine parts of the modulation.
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


def shapes(infos: Infos, pattern: str, dims: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors whose whole key matches, but for empty ones and those of other dims."""
    compiled = re.compile(pattern)
    return [
        info.shape
        for key, info in infos.items()
        if len(info.shape) == dims and all(info.shape) and compiled.fullmatch(key)
    ]


def count(infos: Infos, pattern: str) -> int:
    """How many blocks there are, by the number in their keys.

    A number is believed when at least half of those up to it are there: a block that is missing
    still counts, a stray `blocks.999999` does not.
    """
    there = sorted({int(number) for number in numbers(infos, pattern)})
    return 1 + max((n for i, n in enumerate(there, start=1) if n < 2 * i), default=0)


def numbers(infos: Infos, pattern: str) -> list[str]:
    """First group of the keys that begin with the pattern."""
    compiled = re.compile(pattern)
    return [match[1] for key in infos if (match := compiled.match(key))]


def heads(name: str, width: int, depth: int, norms: Mapping[int, int], hints: Description) -> int:
    """Number of attention heads: no shape tells it, unless the heads are normalized."""
    if norms:
        return max(1, width // max(norms, key=lambda size: norms[size]))
    if "num_heads" in hints:
        return hints["num_heads"]
    if width == 64 * depth:  # the paper's rule (Sec. 4)
        return depth
    raise UserError(
        f"{name} of width {width} and depth {depth}: the file does not tell the number of heads, "
        "and the rule of the public models (width = 64 depth) does not hold; give num_heads="
    )


def original_mmdit(description: Description) -> list[Rule]:
    """`model.diffusion_model.` of the single files."""
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
    """`transformer/` of a folder."""
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


def convolution(p: int) -> Any:
    """Our matrix over patches is their convolution with a p x p kernel."""
    return reshaped(lambda ours: (ours[0], ours[1] // p**2, p, p))


# Our table (size, size, d) is their sequence (1, size * size, d).
POSITIONS = reshaped(lambda ours: (1, ours[0] * ours[1], ours[2]))


def fused(ours: str, theirs: str) -> list[Rule]:
    """Our Q, K and V are the thirds of their one matrix."""
    return [Rule(f"{ours}{part}\\.", f"{theirs}qkv.", rows(i, 3)) for i, part in enumerate("qkv")]


# The autoencoder


def autoencoder_reader(level: str, block: str) -> Callable[[Infos, Description], Description]:
    """Reader of an autoencoder's architecture, given what a format calls levels and blocks."""

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
        if channels != 16 and "scale" not in hints:
            raise UserError(
                f"an autoencoder of {channels} channels: the file tells neither scale nor shift of "
                "its latents, which are known for the 16 channels of SD3 only"
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
    """`first_stage_model.` of the single files, where the decoder counts levels from the image."""
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
    """`vae/` of a folder."""
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


# A convolution with a kernel of 1 x 1 is a matrix.
MATRIX = reshaped(lambda ours: ours[:2])


# The text encoders, whose keys are the same in both layouts


def read_clip(infos: Infos, hints: Description) -> Description:
    """Architecture of a text tower. Activation and heads leave no trace in the shapes."""
    positions = shapes(infos, r"text_model\.embeddings\.position_embedding\.weight", 2)
    tokens = shapes(infos, r"text_model\.embeddings\.token_embedding\.weight", 2)
    norms = shapes(infos, r"text_model\..*layer_norm[12]?\.weight", 1)
    projections = shapes(infos, r"text_projection\.weight", 2)
    if not norms:
        raise UserError("none of the tensors that tell a CLIP text tower's width is there")
    width = Counter(shape[0] for shape in norms).most_common(1)[0][0]
    known = {768: "quick_gelu", 1280: "gelu"}
    if "activation" not in hints and width not in known:
        raise UserError(
            f"a CLIP text tower of width {width} is neither CLIP-L (768) nor CLIP-G (1280): its "
            "activation and number of heads must come from a config.json beside it"
        )
    return {
        "class": "CLIPTextModel",
        "vocabulary_size": tokens[0][0] if tokens else 49408,
        "width": width,
        "depth": count(infos, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_heads": hints.get("num_heads", max(1, width // 64)),
        "length": positions[0][0] if positions else 77,
        "activation": hints.get("activation", known.get(width)),
        "projection_width": projections[0][0] if projections else None,
    }


def clip(_: Description) -> list[Rule]:
    """Stand-alone files, `text_encoders.clip_l.transformer.`, `text_encoder/` and `_2/`."""
    return [
        Rule(r"^token_embedding", "text_model.embeddings.token_embedding"),
        Rule(r"^position_embedding", "text_model.embeddings.position_embedding.weight"),
        Rule(r"^layers\.", "text_model.encoder.layers."),
        Rule(r"attention_in\.([qkv])", r"self_attn.\1_proj"),
        Rule(r"attention_out", "self_attn.out_proj"),
        Rule(r"\.norm([12])", r".layer_norm\1"),
        Rule(r"^final_norm", "text_model.final_layer_norm"),
        Rule(r"^projection", "text_projection"),
    ]


def read_clip_image(infos: Infos, hints: Description) -> Description:
    """Architecture of the image tower."""
    patches = shapes(infos, r"vision_model\.embeddings\.patch_embedding\.weight", 4)
    positions = shapes(infos, r"vision_model\.embeddings\.position_embedding\.weight", 2)
    projections = shapes(infos, r"visual_projection\.weight", 2)
    if not patches:
        raise UserError("vision_model.embeddings.patch_embedding.weight, a convolution, is missing")
    width, _, p, _ = patches[0]
    return {
        "class": "CLIPImageModel",
        "image_size": p * math.isqrt(positions[0][0] - 1) if positions else 224,
        "patch_size": p,
        "width": width,
        "depth": count(infos, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_heads": hints.get("num_heads", width // 64),
        "projection_width": projections[0][0] if projections else 768,
    }


def clip_image(_: Description) -> list[Rule]:
    """The half of openai/clip-vit-large-patch14 that sees."""
    return [
        Rule(r"^position_embedding", "embeddings.position_embedding.weight"),
        Rule(r"^(class|patch)_embedding", r"embeddings.\1_embedding"),
        Rule(r"^layers\.", "encoder.layers."),
        Rule(r"attention_in\.([qkv])", r"self_attn.\1_proj"),
        Rule(r"attention_out", "self_attn.out_proj"),
        Rule(r"\.norm([12])", r".layer_norm\1"),
        Rule(r"^first_norm", "pre_layrnorm"),
        Rule(r"^final_norm", "post_layernorm"),
        Rule(r"^(?!projection)", "vision_model."),
        Rule(r"^projection", "visual_projection"),
    ]


def read_t5(infos: Infos, hints: Description) -> Description:
    """Architecture of the encoder, all of it in the shapes."""
    block = r"encoder\.block\.\d+\.layer\."
    width, hidden = (
        Counter(s[axis] for s in shapes(infos, block + r"1\.DenseReluDense\.wi_0\.weight", 2))
        for axis in (1, 0)
    )
    inner = Counter(s[0] for s in shapes(infos, block + r"0\.SelfAttention\.q\.weight", 2))
    bias = shapes(infos, block + r"0\.SelfAttention\.relative_attention_bias\.weight", 2)
    if not (width and inner):
        raise UserError("none of the tensors that tell a T5 encoder's sizes is there")
    tokens = shapes(infos, r"shared\.weight|encoder\.embed_tokens\.weight", 2)
    num_heads = bias[0][1] if bias else 64
    return {
        "class": "T5Encoder",
        "vocabulary_size": tokens[0][0] if tokens else 32128,
        "width": width.most_common(1)[0][0],
        "depth": count(infos, r"encoder\.block\.(\d+)\."),
        "num_heads": num_heads,
        "head_width": inner.most_common(1)[0][0] // num_heads,
        "hidden": hidden.most_common(1)[0][0],
    }


def t5(_: Description) -> list[Rule]:
    """Stand-alone files, `text_encoders.t5xxl.transformer.`, `text_encoder_3/`."""
    relative = r"encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    return [
        Rule(r"^token_embedding", "shared"),
        Rule(r"^position_bias\.embedding", relative),
        Rule(r"^layers\.(\d+)\.norm1", r"encoder.block.\1.layer.0.layer_norm"),
        Rule(r"^layers\.(\d+)\.norm2", r"encoder.block.\1.layer.1.layer_norm"),
        Rule(
            r"^layers\.(\d+)\.attention_in\.([qkv])",
            r"encoder.block.\1.layer.0.SelfAttention.\2",
        ),
        Rule(r"^layers\.(\d+)\.attention_out", r"encoder.block.\1.layer.0.SelfAttention.o"),
        Rule(r"^layers\.(\d+)\.gate", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
        Rule(r"^layers\.(\d+)\.up", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
        Rule(r"^layers\.(\d+)\.down", r"encoder.block.\1.layer.1.DenseReluDense.wo"),
        Rule(r"^final_norm", "encoder.final_layer_norm"),
    ]


# The ControlNets of SD3.5 Large, whose own file already leans towards diffusers' names


def read_controlnet(infos: Infos, hints: Description) -> Description:
    """Architecture of a ControlNet of the 8B kind."""
    widths = Counter(s[0] for s in shapes(infos, r"controlnet_blocks\.\d+\.weight", 2))
    patches = shapes(infos, r"pos_embed_input\.proj\.weight", 4)
    hidden = Counter(
        s[0]
        for s in shapes(infos, r"transformer_blocks\.\d+\.(mlp\.fc1|ff\.net\.0\.proj)\.weight", 2)
    )
    pooled = shapes(infos, r"time_text_embed\.text_embedder\.linear_1\.weight", 2)
    if not widths:
        raise UserError("none of the tensors that tell a ControlNet's width is there")
    if "control_type" not in hints:
        log.warning(
            "this ControlNet does not tell its control_type (%s): taken as blur, which is treated "
            "like depth; give control_type= otherwise",
            ", ".join(CONTROL_RANGES),
        )
    width = widths.most_common(1)[0][0]
    depth = count(infos, r"(?:controlnet|transformer)_blocks\.(\d+)\.")
    if "num_heads" not in hints and width % 64:
        raise UserError(
            f"a ControlNet of width {width}: the file does not tell the number of heads, and its "
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
    """Name of the number that the public files store; of another number, the number."""
    stored = tensor.flatten()[:1].tolist()
    names = [name for i, name in enumerate(CONTROL_RANGES) if stored == [i]]
    return names[0] if names else f"number {stored}"


CONTROL_TYPE = Argument(
    "control_type",
    read_control_type,
    lambda name: torch.tensor([list(CONTROL_RANGES).index(name)], dtype=torch.int32),
)


def controlnet(attention: list[Rule], mlp: list[Rule], modulation: Rule) -> Any:
    """Rules of a ControlNet, given how a layout calls the parts of its blocks."""

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
OLD_BUFFERS = (r"(text_model\.)?embeddings\.position_ids", r"logit_scale")

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
    *(
        Format(
            kind=kind,
            layout=layout,
            prefixes=prefixes,
            mark=r"text_model\.encoder\.layers\.\d+\.",
            describe=read_clip,
            rules=clip,
            identity="text_projection.weight",
            extras=OLD_BUFFERS,
        )
        for kind in ("clip_l", "clip_g")
        for layout, prefixes in (
            ("original", (f"text_encoders.{kind}.transformer.", "")),
            ("diffusers", ("",)),
        )
    ),
    Format(
        kind="t5",
        layout="original",
        prefixes=("text_encoders.t5xxl.transformer.", ""),
        mark=r"encoder\.block\.\d+\.layer\.",
        describe=read_t5,
        rules=t5,
        wide=r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo\.weight",
        copies={"encoder.embed_tokens.weight": "shared.weight"},
    ),
    Format(
        kind="t5",
        layout="diffusers",
        prefixes=("",),
        mark=r"encoder\.block\.\d+\.layer\.",
        describe=read_t5,
        rules=t5,
        wide=r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo\.weight",
    ),
    Format(
        kind="controlnet",
        layout="original",
        prefixes=("",),
        mark=r"transformer_blocks\.\d+\.attn\.qkv\.",
        describe=read_controlnet,
        rules=original_controlnet,
        arguments={"control_type": CONTROL_TYPE},
        # The embedder of a text that the blocks do not see.
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
    Format(
        kind="clip_image",
        layout="diffusers",
        prefixes=("",),
        mark=r"vision_model\.encoder\.layers\.\d+\.",
        describe=read_clip_image,
        rules=clip_image,
        # The other half, which reads.
        extras=(
            r"text_model\..*",
            r"text_projection\.weight",
            r"logit_scale",
            r"vision_model\.embeddings\.position_ids",
        ),
    ),
]
