"""Read adapter files of all programs: strictly, so that nothing in them is passed over.

A key is `<prefix><layer>.<role>`: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`. The
layers are those of `mmdit.adapters.homes`; the roles are below.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.adapters.adapter import Adapter, check_fits, layers_of, weight_of
from mmdit.adapters.homes import Home, homes, spelled
from mmdit.adapters.layers import Change, DoRA, dense
from mmdit.adapters.matrices import changes_of, sized
from mmdit.adapters.stated import WEIGHTS, peft_config, scaling_of
from mmdit.adapters.words import is_inversion, words_in
from mmdit.checkpoints.archive import Archive, open_file
from mmdit.checkpoints.values import computed_in, not_finite
from mmdit.checks import did_you_mean, expanded, nearest
from mmdit.errors import UserError
from mmdit.models.tabulated import is_tabulated
from mmdit.printable import logger
from mmdit.runs.checkpoint import is_native, read_weights

log = logger("mmdit.adapters")

# What a tensor is, by the end of its key.
ROLES = {
    "down": r"lora_A(\.\w+)?\.weight|lora[._]down\.weight|lora_linear_layer\.down\.weight",
    "up": r"lora_B(\.\w+)?\.weight|lora[._]up\.weight|lora_linear_layer\.up\.weight",
    "alpha": r"alpha",
    "magnitude": r"dora_scale|lora_magnitude_vector(\.\w+){0,2}",
    "whole": r"diff",
    **{f"w{i}": rf"lokr_w{i}" for i in (1, 2)},
    **{f"w{i}_{side}": rf"lokr_w{i}_{side}" for i in (1, 2) for side in "ab"},
    "t2": r"lokr_t2",
}
ENDS = {role: re.compile(rf"(.*)\.(?:{pattern})") for role, pattern in ROLES.items()}
# Adapters that are known by name, and not read.
OTHERS = {
    "hada_": "LoHa",
    "oft_": "OFT",
    "boft": "BOFT",
    "ia3": "IA3",
    "vera_": "VeRA",
    "lokr_t1": "LoKr with a third matrix",
    "lora_mid": "LoCon with a third matrix",
    "lora_embedding": "an embedding",
    "diff_b": "a change of biases",
    ".bias": "a change of biases",
    "w_norm": "a change of normalization",
    "emb_params": "textual inversion",
}
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # dtypes of weights
INTEGERS = {"I8", "I16", "I32", "I64", "U8"}  # of alpha as well
CHANGING = ("up", "magnitude", "whole", "w2", "w2_a", "w2_b")  # zero before training, or norms
SAVED = "pytorch_lora_weights.safetensors"  # in a folder that diffusers wrote
NORM = "mmdit.dora_norm"  # metadata key: 'base' where norms are relative to those of the base


def read_adapter(source: str | Path, root: nn.Module, *, weights: str = "ema") -> Adapter:
    """Read an adapter for a pipeline: of a run, from a file, or from a folder as PEFT saves it.

    LoRA and DoRA of diffusers, PEFT, sd-scripts, ComfyUI, OneTrainer and SimpleTuner, and LoKr of
    LyCORIS, are read for the network and the text encoders; and new words, one embedding file for
    each, as ComfyUI and diffusers keep them. A scale alpha / rank is that of the
    file; without alpha it is 1, as everywhere.

    Args:
        source: a run that trained one, a safetensors file, or a folder of PEFT or diffusers.
        root: the pipeline, which stays as it is.
        weights: 'ema' or 'raw', of a run.

    Raises:
        UserError: a key has no place in this model, weights contradict each other or are not
            finite, or the source is a whole model. Nothing was loaded.
    """
    path = expanded(source)
    if is_native(path):
        module = read_weights(path, weights).module()
        if not isinstance(module, Adapter):
            raise UserError(
                f"{source} holds a {type(module).__name__}, not an adapter: open it with "
                "checkpoint="
            )
        return module
    config: dict[str, Any] = {}
    if path.is_dir() and (path / SAVED).is_file():
        path = path / SAVED
    elif path.is_dir():
        config = peft_config(path)
        path = path / WEIGHTS
    archive = open_file(path)
    archive.verify()
    if is_inversion(archive):
        words = words_in(archive)
        check_fits(words, layers_of(root), str(archive.name))
        return Adapter(changes=words)
    return Adapter(changes=changes_in(archive, root, config))


def changes_in(archive: Archive, root: nn.Module, config: Mapping[str, Any]) -> dict[str, Change]:
    """The changes in an archive, by our names of the layers.

    Raises:
        UserError: see `read_adapter`.
    """
    name = str(archive.name)
    found = grouped(archive)
    known = spelled(homes(root))
    missing = [stem for stem in found if stem not in known]
    if missing and is_tabulated(root):
        raise UserError(
            f"{name}: {missing[0]} has no place in this model, whose modulation layers are tables: "
            "load the model again, and adapters before the tables are made. Nothing was loaded"
        )
    if missing:
        raise UserError(explain_homeless(name, missing, known))
    expect_readable(archive, found, known)
    flat = {key: archive[key] for roles in found.values() for key in roles.values()}
    flat = {key: x if x.is_floating_point() else x.double() for key, x in flat.items()}
    if bad := not_finite(flat):
        raise UserError(
            f"{name}: {bad[0]} has NaN or infinite values ({len(bad)} of {len(flat)} tensors do)"
        )
    tensors = {
        stem: in_one_dtype({role: flat[key] for role, key in roles.items()})
        for stem, roles in found.items()
    }
    stated = scaling_of(archive, config, name)
    changes: dict[str, Change] = {}
    for stem, parts in tensors.items():
        home = known[stem]
        where = f"{name}: {stem}"
        for layer, change in changes_of(home, parts, stated.get(home.part), where).items():
            if layer in changes:
                raise UserError(f"{where} changes {layer}, which another layer of the file does")
            changes[layer] = change
    if archive.metadata.get(NORM) == "base":
        for layer, change in changes.items():
            if isinstance(change, DoRA):
                restore_norms(change, weight_of(root, layer))
    warn_of_a_third(name, archive, tensors, known)
    if not any(
        tensor.any()
        for part in tensors.values()
        for role, tensor in part.items()
        if role in CHANGING
    ):
        log.warning("%s changes nothing: the matrices that training moves are all zero", name)
    check_fits(changes, layers_of(root), name)
    return changes


def in_one_dtype(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer in one dtype to compute in, which holds all values of its matrices."""
    dtypes = [computed_in(tensor, None) for role, tensor in parts.items() if role != "alpha"]
    dtype = reduce(torch.promote_types, dtypes or [torch.float32])
    return {role: x if role == "alpha" else x.to(dtype) for role, x in parts.items()}


@torch.no_grad()
def restore_norms(change: DoRA, weight: Tensor) -> None:
    """Make norms that are relative to those of the base those of the changed weight."""
    change.magnitude.mul_(change.norm(weight).flatten() / base_norms(weight, change.axis))


def base_norms(weight: Tensor, axis: int = 1) -> Tensor:
    """Norms of a weight as ComfyUI computes them: none is zero."""
    norms = torch.linalg.vector_norm(dense(weight), dim=axis)
    return norms + torch.finfo(norms.dtype).eps


def grouped(archive: Archive) -> dict[str, dict[str, str]]:
    """The keys of an archive by layer and role.

    Raises:
        UserError: a key is of no adapter, or two have the same role.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    strange: list[str] = []
    for key in archive.infos:
        ends = ((role, end.fullmatch(key)) for role, end in ENDS.items())
        role, match = next(((r, m) for r, m in ends if m), ("", None))
        if match is None:
            strange.append(key)
        elif role in found[match[1]]:
            raise UserError(f"{archive.name}: {key} and {found[match[1]][role]} are the same")
        else:
            found[match[1]][role] = key
    if strange:
        first = strange[0]
        kinds = ((key, what) for end, what in OTHERS.items() for key in strange if end in key)
        key, kind = next(kinds, (first, ""))
        if found or kind not in ("", "a change of biases"):
            what = f"of {kind}, which is not read" if kind else "not a tensor of an adapter"
            reason = f"{key} is {what} ({len(strange)} such keys)"
        elif all("." not in key and len(archive.infos[key].shape) <= 2 for key in strange):
            reason = f"{first} is of textual inversion, which is not read"
        else:
            reason = (
                f"{first} is not a tensor of an adapter; weights of a model are opened with "
                "checkpoint="
            )
        raise UserError(f"{archive.name}: {reason}. Nothing was loaded")
    if not found:
        raise UserError(f"{archive.name} is empty: it holds no tensors")
    return dict(found)


def expect_readable(
    archive: Archive, found: Mapping[str, Mapping[str, str]], known: Mapping[str, Home]
) -> None:
    """Check dtypes and sizes, before anything is read.

    Raises:
        UserError: a tensor can not be one of its layer's.
    """
    for stem, roles in found.items():
        shape = known[stem].slot.shape
        rows, columns = shape[0], math.prod(shape[1:])
        for role, key in roles.items():
            size, dtype = archive.infos[key]
            dimensions = {"alpha": 0, "magnitude": 1}.get(role, 2)
            if dtype not in (FLOATS | INTEGERS if role == "alpha" else FLOATS):
                reason = (
                    f"has dtype {dtype}, where weights of an adapter are floating-point numbers"
                )
            elif math.prod(size) == 0:
                reason = f"is empty: it is {sized(size)}"
            elif role == "alpha" and math.prod(size) > 1:
                reason = f"is {sized(size)}, where one number is expected"
            elif not dimensions <= len(size) <= 4:
                reason = f"has {len(size)} dimensions, where {dimensions} are expected"
            elif math.prod(size) > 4 * max(rows, columns) ** 2:
                reason = f"is {sized(size)}, far too large for a layer of {rows} x {columns}"
            else:
                continue
            raise UserError(f"{archive.name}: {key} {reason}. Nothing was loaded")


def explain_homeless(name: str, missing: list[str], known: Mapping[str, Home]) -> str:
    """Why layers of a file are not in a model."""
    first = missing[0]
    count = f"{len(missing)} of its layers have no place in this model, such as {first}"
    numbers = re.sub(r"\d+", "0", first)
    if any(re.sub(r"\d+", "0", stem) == numbers for stem in known):
        reason = "it was trained for a model with more or other blocks"
    elif first.startswith(("lora_te", "text_encoder")):
        reason = "it changes a text encoder that is not loaded here, or not one of SD3"
    else:
        reason = (
            f"it is for another architecture.{did_you_mean(nearest(first, list(known)[:2000]))}"
        )
    return f"{name}: {count}: {reason}. Nothing was loaded"


def warn_of_a_third(
    name: str,
    archive: Archive,
    tensors: Mapping[str, Mapping[str, Tensor]],
    known: Mapping[str, Home],
) -> None:
    """Warn of a known fault of sd-scripts: Q, K and V were trained apart, and alpha not adapted.

    Their matrices of rank r are then stacked to rank 3 r, while alpha is still that of rank r. All
    programs divide by 3 r, so that these layers act at a third of the strength they were trained
    at.
    """
    dimensions = archive.metadata.get("ss_network_dim"), archive.metadata.get("ss_network_alpha")
    ranks: dict[bool, set[tuple[int, float | None]]] = {True: set(), False: set()}
    for stem, parts in tensors.items():
        if {"down", "up"} <= parts.keys():
            alpha = float(parts["alpha"]) if "alpha" in parts else None
            fused = len(known[stem].slot.parts) > 1
            if not fused or _block_diagonal(parts["up"].flatten(1)):
                ranks[fused].add((len(parts["down"]), alpha))
    stacked = ranks[True]
    others = ranks[False]
    try:
        stated = {(int(dimensions[0] or 0), float(dimensions[1] or 0))}
    except ValueError:
        stated = set()
    if any((rank // 3, alpha) in (others | stated) for rank, alpha in stacked if alpha):
        log.warning(
            "%s: its Q, K and V act at a third of the strength that they were trained at, here as "
            "in other programs: sd-scripts stacked their matrices (split_qkv) and left alpha as it "
            "was",
            name,
        )


def _block_diagonal(up: Tensor) -> bool:
    """Whether each third of the rows uses a third of the columns of its own."""
    if up.shape[0] % 3 or up.shape[1] % 3:
        return False
    blocks = [part.chunk(3, dim=1) for part in up.chunk(3)]
    return not any(bool(blocks[i][j].any()) for i in range(3) for j in range(3) if i != j)
