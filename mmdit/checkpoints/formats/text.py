"""The two towers of CLIP and the encoder of T5, whose keys are the same in both layouts."""

import math
from collections import Counter
from collections.abc import Callable, Mapping

from mmdit.checkpoints.formats.format import (
    Description,
    Format,
    Infos,
    Reader,
    count,
    shapes,
)
from mmdit.checkpoints.tables import Rule
from mmdit.errors import UserError

WIDTHS = {"clip_l": 768, "clip_g": 1280}
TOKENS = r"text_model\.embeddings\.token_embedding\.weight"


def read_clip(infos: Infos, hints: Description) -> Description:
    """Describe the architecture of a text tower; shapes give neither activation nor heads."""
    positions = shapes(infos, r"text_model\.embeddings\.position_embedding\.weight", 2)
    tokens = shapes(infos, TOKENS, 2)
    norms = shapes(infos, r"text_model\..*layer_norm[12]?\.weight", 1)
    projections = shapes(infos, r"text_projection\.weight", 2)
    if not norms:
        raise UserError("all tensors that determine a CLIP text tower's width are missing")
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


def read_clip_l(infos: Infos, hints: Description) -> Description:
    """Describe CLIP-L in the original layout, where it has no projection.

    The published files have none. Other programs write one that was never initialized and that
    nothing reads, so only the description in our own header shows that there is one.
    """
    description = read_clip({k: v for k, v in infos.items() if k != PROJECTION}, hints)
    return {**description, "projection_width": hints.get("projection_width")}


def other_tower(kind: str) -> Callable[[Infos], bool]:
    """A test by width whether a text tower is the other of SD3's two."""
    widths = {width for other, width in WIDTHS.items() if other != kind}
    return lambda infos: any(shape[1] in widths for shape in shapes(infos, TOKENS, 2))


def clip(_: Description) -> list[Rule]:
    """Rules for stand-alone files, `text_encoders.clip_l.transformer.` and `text_encoder/`."""
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
    """Describe the architecture of the image tower."""
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
    """Rules for the image tower of files like openai/clip-vit-large-patch14."""
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


def t5_reader(names: Mapping[str, str]) -> Reader:
    """A reader of a T5 encoder's architecture, which follows from the shapes alone.

    Args:
        names: a layout's names of the tensors that give the sizes.
    """

    def describe(infos: Infos, hints: Description) -> Description:
        width, hidden = (
            Counter(s[axis] for s in shapes(infos, names["gate"], 2)) for axis in (1, 0)
        )
        inner = Counter(s[0] for s in shapes(infos, names["q"], 2))
        bias = shapes(infos, names["bias"], 2)
        if not (width and inner):
            raise UserError("all tensors that determine a T5 encoder's sizes are missing")
        tokens = shapes(infos, names["tokens"], 2)
        num_heads = bias[0][1] if bias else 64
        return {
            "class": "T5Encoder",
            "vocabulary_size": tokens[0][0] if tokens else 32128,
            "width": width.most_common(1)[0][0],
            "depth": count(infos, names["block"]),
            "num_heads": num_heads,
            "head_width": inner.most_common(1)[0][0] // num_heads,
            "hidden": hidden.most_common(1)[0][0],
        }

    return describe


T5_BLOCK = r"encoder\.block\.\d+\.layer\."
T5_NAMES = {
    "gate": T5_BLOCK + r"1\.DenseReluDense\.wi_0\.weight",
    "q": T5_BLOCK + r"0\.SelfAttention\.q\.weight",
    "bias": T5_BLOCK + r"0\.SelfAttention\.relative_attention_bias\.weight",
    "tokens": r"shared\.weight|encoder\.embed_tokens\.weight",
    "block": r"encoder\.block\.(\d+)\.",
}
T5_GGUF_NAMES = {
    "gate": r"enc\.blk\.\d+\.ffn_gate\.weight",
    "q": r"enc\.blk\.\d+\.attn_q\.weight",
    "bias": r"enc\.blk\.\d+\.attn_rel_b\.weight",
    "tokens": r"token_embd\.weight",
    "block": r"enc\.blk\.(\d+)\.",
}


def t5(_: Description) -> list[Rule]:
    """Rules for stand-alone files, `text_encoders.t5xxl.transformer.` and `text_encoder_3/`."""
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


def t5_gguf(_: Description) -> list[Rule]:
    """Rules for GGUF files, in the names of llama.cpp."""
    return [
        Rule(r"^token_embedding", "token_embd"),
        Rule(r"^position_bias\.embedding", "enc.blk.0.attn_rel_b"),
        Rule(r"^layers\.(\d+)\.norm1", r"enc.blk.\1.attn_norm"),
        Rule(r"^layers\.(\d+)\.norm2", r"enc.blk.\1.ffn_norm"),
        Rule(r"^layers\.(\d+)\.attention_in\.([qkv])", r"enc.blk.\1.attn_\2"),
        Rule(r"^layers\.(\d+)\.attention_out", r"enc.blk.\1.attn_o"),
        Rule(r"^layers\.(\d+)\.(gate|up|down)", r"enc.blk.\1.ffn_\2"),
        Rule(r"^final_norm", "enc.output_norm"),
    ]


TEXT_LAYERS = r"text_model\.encoder\.layers\.\d+\."
PROJECTION = "text_projection.weight"
OLD_BUFFERS = (r"(text_model\.)?embeddings\.position_ids", r"logit_scale")
IMAGE_TOWER = (r"vision_model\..*", r"visual_projection\.weight")  # also in a whole CLIP

FORMATS = [
    Format(
        kind="clip_l",
        layout="original",
        prefixes=("text_encoders.clip_l.transformer.", ""),
        mark=TEXT_LAYERS,
        describe=read_clip_l,
        rules=clip,
        another=other_tower("clip_l"),
        extras=(*OLD_BUFFERS, *IMAGE_TOWER, r"text_projection(\.weight)?"),
    ),
    Format(
        kind="clip_g",
        layout="original",
        prefixes=("text_encoders.clip_g.transformer.", ""),
        mark=TEXT_LAYERS,
        describe=read_clip,
        rules=clip,
        identity=PROJECTION,
        another=other_tower("clip_g"),
        extras=(*OLD_BUFFERS, *IMAGE_TOWER),
    ),
    *(
        Format(
            kind=kind,
            layout="diffusers",
            prefixes=("",),
            mark=TEXT_LAYERS,
            describe=read_clip,
            rules=clip,
            identity=PROJECTION,
            another=other_tower(kind),
            extras=(*OLD_BUFFERS, *IMAGE_TOWER),
        )
        for kind in ("clip_l", "clip_g")
    ),
    Format(
        kind="t5",
        layout="original",
        prefixes=("text_encoders.t5xxl.transformer.", ""),
        mark=r"encoder\.block\.\d+\.layer\.",
        describe=t5_reader(T5_NAMES),
        rules=t5,
        wide=r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo\.weight",
        copies={"encoder.embed_tokens.weight": "shared.weight"},
    ),
    Format(
        kind="t5",
        layout="diffusers",
        prefixes=("",),
        mark=r"encoder\.block\.\d+\.layer\.",
        describe=t5_reader(T5_NAMES),
        rules=t5,
        wide=r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo\.weight",
    ),
    Format(
        kind="t5",
        layout="gguf",
        prefixes=("",),
        mark=r"enc\.blk\.\d+\.",
        describe=t5_reader(T5_GGUF_NAMES),
        rules=t5_gguf,
        wide=r"enc\.blk\.\d+\.ffn_down\.weight",
    ),
    Format(
        kind="clip_image",
        layout="diffusers",
        prefixes=("",),
        mark=r"vision_model\.encoder\.layers\.\d+\.",
        describe=read_clip_image,
        rules=clip_image,
        # The text tower of a whole CLIP.
        extras=(
            r"text_model\..*",
            r"text_projection\.weight",
            r"logit_scale",
            r"vision_model\.embeddings\.position_ids",
        ),
    ),
]
