"""Explain in one message what is wrong with a file, and the likely cause."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from mmdit.checkpoints.archive import Archive
from mmdit.checkpoints.formats import ADAPTERS, FORMATS, WRAPPERS
from mmdit.checkpoints.headers import Info
from mmdit.checkpoints.tables import Slot

KIND_NAMES = {
    "mmdit": "SD3 transformer",
    "autoencoder": "SD3 autoencoder",
    "clip_l": "CLIP-L text tower",
    "clip_g": "CLIP-G text tower",
    "t5": "T5 encoder",
    "controlnet": "SD3.5 ControlNet",
    "clip_image": "CLIP image tower",
}


class Trace(NamedTuple):
    """A pattern of keys that shows what a file is, or what was added to it."""

    pattern: str  # searched in the keys
    what: str
    own: tuple[str, ...] = ()  # formats, as "kind layout", for which this key pattern is expected


UNET = r"^(model\.diffusion_model\.)?(input_blocks|output_blocks|middle_block)\."
FLUX = r"^(model\.diffusion_model\.)?(double_blocks|single_blocks|single_transformer_blocks)\."
CODES = "absmax|quant_map|quant_state|qweight|qzeros|SCB|comfy_quant"
SCALES = "scale_(weight|input)|(weight|input)_scale"
# Names that PEFT gives to base weights beside adapters, and to layers that it has replaced.
UNMERGED = re.compile(r"\.(base_layer|original_module|modules_to_save)\.")
UNMERGED_MEANS = (
    "a PEFT model whose adapters are not merged; only base weights can be loaded: merge it with "
    "merge_and_unload() and save it again, or give the base model instead"
)
TRACES = [
    Trace(UNMERGED.pattern, UNMERGED_MEANS),
    Trace(
        ADAPTERS.pattern,
        "a LoRA or another adapter, which changes a model and is not one: only base weights can be "
        "loaded",
    ),
    Trace(
        rf"\.({CODES}|{SCALES})\b|(^|\.)scaled_fp8$",
        "a quantized model in another format than GGUF and scaled fp8 (with a tensor scaled_fp8): "
        "use one of these, or the fp16, bf16 or plain fp8 file",
    ),
    Trace(
        r"(^|\.)(exp_avg(_sq)?|momentum_buffer|max_exp_avg_sq)(\.|$)|^optimizer\.",
        "the state of an optimizer, which is not a model",
    ),
    Trace(
        r"^(emb_params|string_to_(param|token)(\..*)?|<[^<>]+>|clip_[lgh]|t5xxl)$",
        "the embedding of a word (textual inversion), which is not a model",
    ),
    Trace(r"^(image_proj|ip_adapter)\.", "an IP-Adapter, which changes a model and is not one"),
    Trace(r"^(taesd_)?(encoder|decoder)\.layers\.\d+\.", "a tiny autoencoder for previews (TAESD)"),
    Trace(r"^conditioner\.embedders\.", "Stable Diffusion XL, which is another architecture"),
    Trace(
        rf"{UNET}|^(down|mid|up)_blocks?\.|^control_model\.",
        "a U-Net (Stable Diffusion 1, 2 or XL), which is another architecture",
    ),
    Trace(FLUX, "Flux, which is another architecture"),
    Trace(
        r"^controlnet_blocks\.",
        "a ControlNet: load it with load_controlnet",
        ("controlnet original", "controlnet diffusers"),
    ),
    Trace(
        r"^(model\.diffusion_model\.)?joint_blocks\.",
        "the SD3 transformer (original layout)",
        ("mmdit original",),
    ),
    Trace(
        r"^transformer_blocks\.\d+\.(attn\.add_|norm1_context\.|ff_context\.)",
        "the SD3 transformer (diffusers layout)",
        ("mmdit diffusers",),
    ),
    Trace(
        r"^(vision_model|visual|visual_projection)\.",
        "a CLIP image tower: use the text tower",
        ("clip_image diffusers",),
    ),
    Trace(r"^(transformer\.)?resblocks\.", "a CLIP in the layout of OpenCLIP: convert it first"),
    Trace(
        r"^decoder\.block\.\d+\.layer\.|^lm_head\.|^dec\.blk\.\d+\.",
        "a T5 decoder: use a file of the encoder",
    ),
    Trace(r"^enc\.blk\.\d+\.", "the T5 encoder (GGUF)", ("t5 gguf",)),
    Trace(r"^blk\.\d+\.", "a language model (GGUF)"),
    Trace(
        r"^(text_encoders\.t5xxl\.transformer\.)?encoder\.block\.\d+\.layer\.",
        "the T5 encoder",
        ("t5 original", "t5 diffusers"),
    ),
    Trace(
        r"^(text_encoders\.clip_[lg]\.transformer\.)?text_model\.",
        "a CLIP text tower",
        ("clip_l original", "clip_l diffusers", "clip_g original", "clip_g diffusers"),
    ),
    Trace(
        r"^(first_stage_model\.)?(encoder\.(down|mid)|decoder\.(up|mid))\.",
        "an autoencoder (original layout)",
        ("autoencoder original",),
    ),
    Trace(
        r"^(encoder\.(down|mid)|decoder\.(up|mid))_blocks?\.",
        "an autoencoder (diffusers layout)",
        ("autoencoder diffusers",),
    ),
]
PUBLISHED = tuple(prefix for format in FORMATS for prefix in format.prefixes if prefix)
# What a wrapper around each block leaves inside the keys.
WITHIN = re.compile(r"\.(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
WRAPPED = re.compile(rf"^((?:{'|'.join(WRAPPERS)})\.){{1,4}}")

BLOCK = re.compile(r"(?:blocks?|layers|down|up)\.(\d+)\.")
# Parts of the text stream that every block has except the last.
TEXT_CONTINUES = re.compile(
    r"blocks\.(\d+)\.(context_block\.(mlp|attn\.proj)\.|ff_context\.|attn\.to_add_out\.)"
)
TEXT_MODULATION = re.compile(r"blocks\.(\d+)\.(context_block\.adaLN_modulation|norm1_context)\.")


class Faults(NamedTuple):
    """How a file differs from what a model needs, by key."""

    missing: list[str]
    unexpected: list[str]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # (is, should be)
    mistyped: dict[str, str]

    def __bool__(self) -> bool:
        return any(len(part) for part in self)


def explain_absent(archive: Archive, kind: str) -> str:
    """Message for a file in which no model of this kind was found."""
    keys = list(archive.infos)
    what = f"{archive.name} holds no {KIND_NAMES[kind]}"
    if not keys:
        return f"{what}: it holds no tensors at all"
    if archive.parts:
        held = "; ".join(f"{part!r} holds {_held(keys, part)}" for part in archive.parts)
        return f"{what}; of its parts, {held}"
    if elsewhere := _elsewhere(keys, kind):
        named = ", ".join(f"{prefix!r}" for prefix in elsewhere)
        return (
            f"{what} under a known prefix, but there are keys like its own under {named}: to read "
            f"those, give {archive.name}:{elsewhere[0].removesuffix('.')}"
        )
    if wrapped := _wrapped_within(keys):
        return f"{what} as it is. {wrapped}"
    bare = [WRAPPED.sub("", key) for key in keys]
    if found := recognize(keys) or recognize(bare):
        return f"{what}; it holds {found}{_other_tower(kind, found)}{_besides(keys)}"
    return f"{what}, nor any other known model; its keys begin with {', '.join(sorted(keys)[:5])}"


def _wrapped_within(keys: Iterable[str]) -> str | None:
    """One sentence about keys that a wrapper has changed; None if there are none."""
    found = next((match for key in keys if (match := WITHIN.search(key))), None)
    if found is None:
        return None
    return (
        f"A training program has put {found[0][1:]!r} inside the keys, as in {found.string}: "
        "save it again without that"
    )


def _held(keys: Sequence[str], part: str) -> str:
    """What a nested dict of a pickle holds."""
    below = [key.removeprefix(f"{part}.") for key in keys if key.startswith(f"{part}.")]
    return recognize(below) or f"keys like {min(below)}"


def _elsewhere(keys: Sequence[str], kind: str) -> list[str]:
    """Unknown prefixes, neither published nor of a known wrapper, of keys like those of a kind."""
    marks = "|".join(format.mark for format in FORMATS if format.kind == kind)
    pattern = re.compile(rf"((?:[^.]+\.){{1,6}}?)(?:{marks})")
    matches = [match for key in keys if (match := pattern.match(key))]
    found = {match[1] for match in matches if not ADAPTERS.search(match.string)}
    return sorted(found - set(PUBLISHED))[:5]


def _other_tower(kind: str, found: str) -> str:
    which = {"clip_l": "clip_g", "clip_g": "clip_l"}.get(kind)
    if which is None or found != "a CLIP text tower":
        return ""
    return f" (by its width, the other of SD3's two: which={which!r})"


def _besides(keys: Sequence[str]) -> str:
    """A clause about keys under no known prefix, in a file whose models have their prefixes."""
    unknown = sorted(key for key in keys if not key.startswith(PUBLISHED))
    if not unknown or len(unknown) == len(keys):
        return ""
    return f"; it also holds {len(unknown)} unknown tensors, such as {unknown[0]}"


def recognize(keys: Iterable[str], own: str = "") -> str | None:
    """What keys like these probably belong to; None if unknown, or to the format `own`."""
    # The keys of a model's blocks differ only in the number; none is longer than 200 characters.
    keys = {re.sub(r"(?<![^._])\d+(?![^._])", "0", key[:200]) for key in keys}
    for trace in TRACES:
        compiled = re.compile(trace.pattern)
        if own not in trace.own and any(compiled.search(key) for key in keys):
            return trace.what
    return None


def explain_infinite(name: object, keys: Sequence[str], dtype: torch.dtype | None) -> str:
    """Message for weights that are not finite, or overflow in the requested `dtype`."""
    what = f"{name}: {len(keys)} tensors have values that are"
    listed = f"{', '.join(keys[:10])}{', ...' if len(keys) > 10 else ''}"
    if dtype is not None:
        return (
            f"{what} too large for {str(dtype).removeprefix('torch.')}: {listed}. "
            "Use bfloat16 or float32. Nothing was loaded"
        )
    return (
        f"{what} NaN or infinite: {listed}. The training that wrote them diverged, or the file is "
        "damaged. Nothing was loaded"
    )


def explain_faults(
    source: object,
    what: str,
    own: str,
    faults: Faults,
    slots: Mapping[str, Slot],
    infos: Mapping[str, Info],
) -> str:
    """Message with the first ten keys of each fault, and the likely cause.

    Args:
        source: the file.
        what: the model that it should be.
        own: the model's format, "kind layout".
        faults: what differs.
        slots: what the model needs.
        infos: what the file has.
    """
    shown = {
        "missing": faults.missing,
        "unexpected": faults.unexpected,
        "misshapen": [
            f"{key} {list(has)} instead of {list(needs)}"
            for key, (has, needs) in faults.misshapen.items()
        ],
        "not of a floating-point type": [f"{k} ({t})" for k, t in faults.mistyped.items()],
    }
    listed = "; ".join(
        f"{len(keys)} {fault}: {', '.join(keys[:10])}{', ...' if len(keys) > 10 else ''}"
        for fault, keys in shown.items()
        if keys
    )
    if recognized := recognize(faults.unexpected, own):
        cause = f"The unexpected keys are those of {recognized}"
    else:
        cause = _wrapped_within(faults.unexpected) or likely_cause(faults, slots, infos)
    return f"{source} does not fit {what}: {listed}. {cause}. Nothing was loaded"


def likely_cause(faults: Faults, slots: Mapping[str, Slot], infos: Mapping[str, Info]) -> str:
    """One sentence on what probably happened to the file."""
    if faults.mistyped:
        return "Its weights are integers: models quantized in this way are not supported"
    if renamed := _renamed(faults, infos, slots):
        return "It looks as if keys were renamed: " + ", ".join(
            f"{new} for {old}" for old, new in renamed[:3]
        )
    if cause := _ends(faults, slots):
        return cause
    missing, unexpected, misshapen = (bool(part) for part in faults[:3])
    if missing and not unexpected and not misshapen:
        return _incomplete(faults.missing, slots)
    if unexpected and not missing and not misshapen:
        first = faults.unexpected[0].split(".")[0]
        return f"Something was added to the model ({first}...), which it would not use"
    if misshapen and not missing and not unexpected:
        return _resized(faults)
    if missing and misshapen and not unexpected:
        return f"{_incomplete(faults.missing, slots)}, and others are those of another model"
    return "It is another variant of the model, or a mixture of two"


def _renamed(
    faults: Faults, infos: Mapping[str, Info], slots: Mapping[str, Slot]
) -> list[tuple[str, str]]:
    """Pairs (missing key, unexpected key of the same shape and nearly the same name)."""
    if faults.misshapen or len(faults.missing) != len(faults.unexpected):
        return []
    pairs = []
    for key in faults.missing[:50]:
        same = [k for k in faults.unexpected if k in infos and infos[k].shape == slots[key].shape]
        near = difflib.get_close_matches(key, same, n=1, cutoff=0.6)
        if not near:
            return []
        pairs.append((key, near[0]))
    return pairs


def _ends(faults: Faults, slots: Mapping[str, Slot]) -> str | None:
    """A cause found from the last block, the only one without a full text stream."""
    last = max((int(m[1]) for key in slots if (m := BLOCK.search(key))), default=0)
    continues = {int(m[1]) for key in faults.unexpected if (m := TEXT_CONTINUES.search(key))}
    stops = {int(m[1]) for key in faults.missing if (m := TEXT_CONTINUES.search(key))}
    short = {int(m[1]) for key in faults.misshapen if (m := TEXT_MODULATION.search(key))}
    if inner := sorted(i for i in stops & short if i < last):
        return (
            f"Block {inner[0]} is built as a last block (its text ends there), but others follow "
            "it: blocks were added or reordered"
        )
    if last in continues:
        return (
            f"Block {last} is the last one in the file but not the model's last (its text "
            "continues): the blocks after it are missing"
        )
    return None


def _incomplete(missing: Sequence[str], slots: Mapping[str, Slot]) -> str:
    if len(missing) > 0.9 * len(slots):
        return "Nearly all tensors are missing: it is another model, or a part of one"
    blocks = {key[: m.end() - 1] for key in missing if (m := BLOCK.search(key))}
    if len(blocks) != 1 or not all(BLOCK.search(key) for key in missing):
        return "The file is incomplete: tensors were left out when it was saved"
    block = blocks.pop()
    if len(missing) == sum(key.startswith(f"{block}.") for key in slots):
        return f"The file is incomplete: {block} is missing completely"
    return f"The file is incomplete: tensors of {block} were left out when it was saved"


def _resized(faults: Faults) -> str:
    shapes = list(faults.misshapen.values())
    if all(len(has) > 1 and has == needs[::-1] for has, needs in shapes):
        return f"{'It is' if len(shapes) == 1 else 'They are'} transposed"
    if all(
        key.endswith("pos_embed") and has[-1:] == needs[-1:]
        for key, (has, needs) in faults.misshapen.items()
    ):
        return "The position table is not square: it was cropped or resized"
    if all(has[1:] == needs[1:] and has[:1] < needs[:1] for has, needs in shapes):
        return "Rows were cut off: the tensors are part of the model's, or those of a smaller model"
    return "Tensors of another model, or resized ones, are mixed in"
