"""Which other programs read our single files correctly.

ComfyUI and diffusers derive some sizes from a file's shapes and assume those of the published
models for the others. They refuse any other model or compute it wrongly, so we say so on saving.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mmdit.registry import describe

# The values that ComfyUI and diffusers assume.
FIXED: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "latent_channels": 16,
        "width": 128,
        "multipliers": [1, 2, 4, 4],
        "blocks": 2,
        "scale": 1.5305,
        "shift": 0.0609,
    },
    "clip_l": {
        "vocabulary_size": 49408,
        "width": 768,
        "depth": 12,
        "num_heads": 12,
        "length": 77,
        "activation": "quick_gelu",
        "projection_width": None,
    },
    "clip_g": {
        "vocabulary_size": 49408,
        "width": 1280,
        "depth": 32,
        "num_heads": 20,
        "length": 77,
        "activation": "gelu",
        "projection_width": 1280,
    },
    "t5": {
        "vocabulary_size": 32128,
        "width": 4096,
        "depth": 24,
        "num_heads": 64,
        "head_width": 64,
        "hidden": 10240,
    },
    "controlnet": {
        "width": 2432,
        "num_heads": 38,
        "mlp_ratio": 4.0,
        "latent_channels": 16,
        "patch_size": 2,
        "pooled_width": 2048,
    },
}
# Assumed for the transformer; ComfyUI reads its other sizes from the shapes.
MMDIT = {"mlp_ratio": 4.0, "latent_channels": 16, "context_width": 4096, "pooled_width": 2048}
# (depth, qk_norm, dual_attention, position_size) of the published transformers.
PUBLISHED = [
    (24, False, [], 192),
    (24, True, list(range(13)), 384),
    (38, True, [], 192),
]


REMARK = "mmdit.readers"  # metadata key with the remark, in our own files


def remark(models: Mapping[str, nn.Module], unsaid: Sequence[str] = ()) -> str | None:
    """Which programs read a single file of these models correctly; None if all do.

    Args:
        models: the models in the file, by kind.
        unsaid: settings of a pipeline that the file cannot hold.
    """
    parts = []
    if clauses := misread(models):
        parts.append(
            "ComfyUI and diffusers refuse this file or compute something else from it: "
            f"{'; '.join(clauses)}. This project reads its models as they are, by the description "
            "in the file's header"
        )
    elif reason := only_in_comfyui(models):
        parts.append(f"ComfyUI and this project read this file, diffusers does not: {reason}")
    if unsaid:
        parts.append(
            f"The file has no place for settings of the pipeline: {'; '.join(unsaid)}. A run, or "
            "its native export (python -m mmdit.export), keeps them"
        )
    return ". ".join(parts) or None


def misread(models: Mapping[str, nn.Module]) -> list[str]:
    """What ComfyUI and diffusers would get wrong in a single file of these models.

    Returns:
        One clause for each model that they would not read as it is; empty if they read all
        correctly.
    """
    clauses = []
    for kind, model in models.items():
        a = describe(model)
        assumed = dict(FIXED.get(kind, {}))
        if kind == "mmdit":
            heads = a["width"] // 64  # ComfyUI derives heads and blocks from the width
            assumed = {**MMDIT, "width": 64 * heads, "depth": heads, "num_heads": heads}
        wrong = [
            f"{name} {a[name]} for {value}"
            for name, value in assumed.items()
            if (list(a[name]) if isinstance(value, list) else a[name]) != value
        ]
        if wrong:
            clauses.append(f"{kind} has {', '.join(wrong)}")
    return clauses


def only_in_comfyui(models: Mapping[str, nn.Module]) -> str | None:
    """Why diffusers would not read a transformer that ComfyUI reads; None if it would."""
    if "mmdit" not in models:
        return None
    a = describe(models["mmdit"])
    sizes = (a["depth"], a["qk_norm"], list(a["dual_attention"]), a["position_size"])
    if sizes in PUBLISHED and a["patch_size"] == 2:
        return None
    return "its transformer is not one of the published ones, the only ones it opens from a file"
