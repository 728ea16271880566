"""What is wrong with a file, and why, in one message."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mmdit.checkpoints.archive import Archive, Info
from mmdit.checkpoints.tables import Slot

NAMES = {
    "mmdit": "SD3 transformer",
    "autoencoder": "SD3 autoencoder",
    "clip_l": "CLIP-L text tower",
    "clip_g": "CLIP-G text tower",
    "t5": "T5 encoder",
    "controlnet": "SD3.5 ControlNet",
}

# Keys that give away what a file is when it is not what was asked for.
STRANGERS = [
    (
        r"lora_|\.lora[._]|\.(lokr|hada)_|\.dora_scale$",
        "a LoRA or another adapter: it changes a model and is none; load the model itself",
    ),
    (
        r"\.(absmax|quant_map|qweight|qzeros|scale_weight|weight_scale|comfy_quant)\b|^scaled_fp8$",
        "a quantized model, whose weights are codes; use the fp16, bf16 or plain fp8 file",
    ),
    (r"conditioner\.embedders\.", "Stable Diffusion XL (a U-Net), which is another architecture"),
    (
        r"(model\.diffusion_model\.)?(input_blocks|output_blocks|middle_block)\.|^(down|up)_blocks\.",
        "a U-Net (Stable Diffusion 1, 2 or XL), which is another architecture",
    ),
    (
        r"(double_blocks|single_blocks|single_transformer_blocks)\.",
        "Flux, which is another architecture",
    ),
    (r"controlnet_blocks\.|control_add_embedding\.", "a ControlNet: load it as one"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "the SD3 transformer (original layout)"),
    (
        r"transformer_blocks\.\d+\.(attn\.add_|norm1_context)",
        "the SD3 transformer (diffusers layout)",
    ),
    (r"vision_model\.|visual\.", "a CLIP image tower"),
    (r"decoder\.block\.\d+\.layer\.|lm_head\.", "a whole T5 with its decoder: use the encoder"),
    (r"(text_encoders\.t5xxl\.)?(transformer\.)?encoder\.block\.", "the T5 encoder"),
    (r"(text_encoders\.clip_[lg]\.)?(transformer\.)?text_model\.", "a CLIP text tower"),
    (
        r"(first_stage_model\.)?(encoder\.(down|mid)|decoder\.(up|mid))[._]",
        "an autoencoder",
    ),
    (r"(exp_avg|exp_avg_sq|optimizer)\b", "the state of an optimizer, which is no model"),
]
WRAPPERS = ("module.", "_orig_mod.", "model.", "transformer.", "diffusion_model.", "ema.")


class Faults(NamedTuple):
    """What does not fit, each as it is shown."""

    missing: list[str]
    unexpected: list[str]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # key: (is, should be)
    mistyped: dict[str, str]

    def __bool__(self) -> bool:
        return any(len(part) for part in self)


def explain_stranger(archive: Archive, kind: str) -> str:
    """Message for a file in which no model of this kind was found."""
    keys = list(archive.infos)
    what = f"{archive.name} holds no {NAMES[kind]}"
    if not keys:
        return f"{what}: it holds no tensors at all"
    for wrapper in WRAPPERS:
        bare = [key.removeprefix(wrapper) for key in keys]
        if all(key.startswith(wrapper) for key in keys) and (found := recognize(bare)):
            return (
                f"{what} under a known name: all keys begin with {wrapper!r}, as training wrappers "
                f"leave them; without that prefix it would be {found}. Strip it and save again"
            )
    if found := recognize(keys):
        return f"{what}; it looks like {found}"
    return f"{what}, nor anything known; its keys begin with {', '.join(sorted(keys)[:5])}"


def recognize(keys: Iterable[str]) -> str | None:
    """What a file with these keys probably is."""
    keys = list(keys)
    for pattern, what in STRANGERS:
        compiled = re.compile(pattern)
        if any(compiled.search(key) if "^" in pattern else compiled.match(key) for key in keys):
            return what
    compiled = re.compile(STRANGERS[0][0])
    return STRANGERS[0][1] if any(compiled.search(key) for key in keys) else None


def explain_faults(
    source: object, what: str, faults: Faults, slots: Mapping[str, Slot], infos: Mapping[str, Info]
) -> str:
    """The first ten keys of each fault, and the likely cause."""
    shown = {
        "missing": faults.missing,
        "unexpected": faults.unexpected,
        "misshapen": [
            f"{key} {list(has)} instead of {list(needs)}"
            for key, (has, needs) in faults.misshapen.items()
        ],
        "not of a floating-point type": [f"{k} ({t})" for k, t in faults.mistyped.items()],
    }
    told = "; ".join(
        f"{len(keys)} {fault}: {', '.join(keys[:10])}{', ...' if len(keys) > 10 else ''}"
        for fault, keys in shown.items()
        if keys
    )
    cause = likely_cause(faults, slots, infos)
    return f"{source} does not fit {what}: {told}. {cause}. Nothing was loaded"


def likely_cause(faults: Faults, slots: Mapping[str, Slot], infos: Mapping[str, Info]) -> str:
    """One sentence: what probably happened to the file."""
    for pattern, what in STRANGERS[:2]:
        if any(re.search(pattern, key) for key in faults.unexpected):
            return f"The unexpected keys are those of {what}"
    if faults.mistyped:
        return "Its weights are integers or codes: a quantized model is not read here"
    if renamed := _renamed(faults, infos, slots):
        return "It looks as if keys were renamed: " + ", ".join(
            f"{new} for {old}" for old, new in renamed[:3]
        )
    transposed = [k for k, (has, needs) in faults.misshapen.items() if has == needs[::-1]]
    if transposed and len(transposed) == len(faults.misshapen):
        return f"{'It is' if len(transposed) == 1 else 'They are'} transposed"
    if cut := _last_block(faults):
        return cut
    if faults.missing and not faults.unexpected and not faults.misshapen:
        blocks = sorted({m[0] for key in faults.missing if (m := re.search(r"blocks?\.\d+", key))})
        if len(blocks) == 1:
            return f"The file is incomplete: tensors of {blocks[0]} were left out when it was saved"
        if len(faults.missing) > 0.9 * len(slots):
            return "Nearly all is missing: it is another model, or a part of one"
        return "The file is incomplete: tensors were left out when it was saved"
    if faults.unexpected and not faults.missing and not faults.misshapen:
        first = faults.unexpected[0].split(".")[0]
        return f"Something was added to the model ({first}...), which it would not use"
    if faults.misshapen and not faults.missing and not faults.unexpected:
        return "Tensors of another model, or resized ones, are mixed in"
    return "It is another variant of the model, or a mixture of two"


def _renamed(
    faults: Faults, infos: Mapping[str, Info], slots: Mapping[str, Slot]
) -> list[tuple[str, str]]:
    """Pairs (missing key, unexpected key of the same shape and nearly the same name)."""
    if not faults.missing or len(faults.missing) != len(faults.unexpected):
        return []
    pairs = []
    for key in faults.missing[:50]:
        same = [k for k in faults.unexpected if k in infos and infos[k].shape == slots[key].shape]
        near = difflib.get_close_matches(key, same, n=1, cutoff=0.6)
        if not near:
            return []
        pairs.append((key, near[0]))
    return pairs


def _last_block(faults: Faults) -> str | None:
    """The text stream of the last block is short; a longer one says that blocks are missing."""
    longer: Sequence[str] = [
        key
        for key in faults.unexpected
        if re.search(
            r"blocks\.\d+\.(context_block\.(mlp|attn\.proj)|ff_context|attn\.to_add_out)", key
        )
    ]
    if longer and (match := re.search(r"blocks\.(\d+)\.", longer[0])):
        return (
            f"Block {match[1]} is the last one there but not a last block (its text goes on): "
            "the blocks after it are missing"
        )
    return None
