"""Public files to models and back: match the format, build on meta, check every key, assign.

No tensor is read before all keys and shapes have been checked, and none is copied from the mapped
file unless another dtype is requested. Tensors in codes are decoded one after another.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.checkpoints.archive import Archive
from mmdit.checkpoints.building import build_on_meta
from mmdit.checkpoints.diagnosis import (
    KIND_NAMES,
    UNMERGED,
    UNMERGED_MEANS,
    Faults,
    explain_absent,
    explain_faults,
    explain_infinite,
)
from mmdit.checkpoints.formats import FORMATS, Description, Format
from mmdit.checkpoints.headers import DTYPES, Info
from mmdit.checkpoints.matches import ENTRY, Match, find, own_description
from mmdit.checkpoints.tables import Slot, correspondence
from mmdit.checkpoints.values import is_finite, loaded_bytes, loaded_in, not_finite, same
from mmdit.dtypes import at_least_float32
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.controlnet import ControlNet, ParallelControlNet
from mmdit.models.interval import IntervalMMDiT
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.models.tabulated import expect_whole
from mmdit.nn.block_codes import BLOCK_TYPES, Codes
from mmdit.nn.network import Network
from mmdit.nn.stored import CodedWeight, plain
from mmdit.printable import logger
from mmdit.registry import describe

log = logger("mmdit.checkpoints")

FLOATS = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", *BLOCK_TYPES}
ALWAYS_CHECKED = 1 << 30  # bytes; weights below this are always searched for NaN, in 0.1 s


def load(
    archive: Archive,
    kind: str,
    *,
    layout: str | None = None,
    hints: Description | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    keep_quantized: bool = False,
) -> Network:
    """Load the model of this kind from an archive.

    Args:
        archive: the file or files.
        kind: see `Format.kind`.
        layout: see `find`.
        hints: arguments that shapes do not determine (num_heads, activation, scale, shift).
        dtype: the dtype the model computes in; None keeps the file's, except that codes of up to
            8 bits become bfloat16, and tensors of mixed dtypes take that of most matrix values.
        verify: always search the weights for NaN and infinite values. Otherwise weights of a
            gigabyte or more are only searched if they are converted to another dtype.
        keep_quantized: linear layers keep the codes that the file has, and decode them whenever
            they compute (see `CodedWeight`).

    Returns:
        The model in eval mode, on the CPU, with memory-mapped weights.

    Raises:
        UserError: the archive holds no such model; keys are missing, unexpected or misshapen;
            weights are not finite.
    """
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(f"dtype {dtype} must be torch.float16, bfloat16, float32 or float64")
    match = find(archive, kind, layout=layout)
    if match is None:
        raise UserError(explain_absent(archive, kind))
    refuse_unmerged(match)
    if match.wrapper:
        log.warning(
            "%s: reading the %s from the keys under %r%s",
            archive.name,
            KIND_NAMES[kind],
            match.prefix,
            f"; the file has these parts: {', '.join(archive.parts)}" if archive.parts else "",
        )
    infos, hints = match.needed, hints or {}
    own = own_description(archive, kind)
    stored = {
        argument.name: argument.read(match.tensor(key))
        for key, argument in match.format.arguments.items()
        if key in infos
    }
    try:
        read = match.format.describe(infos, {**own, **stored, **hints})
        for name, value in hints.items():
            if read.get(name, value) != value:
                raise UserError(f"{name} {value} contradicts the weights, which have {read[name]}")
        module = build_on_meta({**own, **stored, **hints, **read})
    except UserError as error:
        raise UserError(f"{archive.name}: {error}. Nothing was loaded") from None
    load_into(module, match, dtype=dtype, verify=verify, keep_quantized=keep_quantized)
    return module.eval()


def refuse_unmerged(match: Match) -> None:
    """Refuse base weights with unmerged adapters beside them, as PEFT saves them.

    Raises:
        UserError: the keys are of this kind.
    """
    if unmerged := [key for key in match.infos if UNMERGED.search(key)]:
        raise UserError(
            f"{match.archive.name}: its {KIND_NAMES[match.format.kind]} is {UNMERGED_MEANS} "
            f"({len(unmerged)} such keys: {', '.join(unmerged[:3])}, ...). Nothing was loaded"
        )


def load_into(
    module: Network,
    match: Match,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    keep_quantized: bool = False,
) -> None:
    """Assign the tensors of a match to a module, on meta or not; on an error it stays unchanged.

    Args:
        module: its `compute_dtype` is set, too.
        match: a model of the module's architecture.
        dtype, verify, keep_quantized: see `load`.

    Raises:
        UserError: as in `load`.
    """
    format, infos = match.format, match.needed
    slots = slots_of(module, format)
    sources = dict(zip(slots, slots, strict=True))
    for copy, primary in format.copies.items():
        if primary in slots and primary not in infos and copy in infos:
            sources[primary] = copy
    check(match, type(module).__name__, slots, sources, infos)
    stored = {key: infos[source] for key, source in sources.items()}
    compute_dtype = common_dtype(stored, format) if dtype is None else dtype
    dtypes = dict.fromkeys(stored, compute_dtype)
    if dtype is None and compute_dtype == torch.float16:
        # The model computes with these in float32, so they are not rounded to float16.
        for key in wide_keys(stored, format):
            dtypes[key] = torch.promote_types(loaded_in(stored[key]), compute_dtype)
    expect_finite(match, sources, dtypes, verify=verify)
    matrices = linear_weights(module) if keep_quantized else set()
    tensors: dict[str, Tensor] = {}
    too_large = []
    for key, slot in slots.items():
        if (codes := kept_codes(match, sources[key], slot, matrices)) is not None:
            wide = compute_dtype == torch.float16 and re.fullmatch(format.wide, key)
            kept_as = torch.float32 if wide else compute_dtype
            expect_finite_codes(match, key, codes, kept_as)
            tensors |= kept(slot, codes, kept_as)
            continue
        read = match.tensor(sources[key])
        if match.decodes(sources[key]) and not is_finite(read):
            raise UserError(explain_infinite(match.archive.name, [key], None))
        theirs = read.to(dtypes[key])
        if theirs.dtype == torch.float16 != read.dtype and not is_finite(theirs):
            too_large.append(key)
        if theirs.dtype == torch.float16 and re.fullmatch(format.wide, key):
            theirs = theirs.float()
        tensors |= slot.read(theirs)
    if too_large:
        raise UserError(explain_infinite(match.archive.name, too_large, torch.float16))
    if dtype is None:
        warn_of_mixed_dtypes(match.archive.name, stored, dtypes)
    for name in format.constants:
        value = torch.tensor(float(describe(module)[name]), dtype=torch.float64)
        tensors[name] = value.to(at_least_float32(compute_dtype))
    module.load_state_dict(tensors, assign=True)
    module.compute_dtype = compute_dtype
    for part in module.parameters():
        if isinstance(part, CodedWeight):
            part.requires_grad_(False)


def expect_finite(
    match: Match, sources: Mapping[str, str], dtypes: Mapping[str, torch.dtype], *, verify: bool
) -> None:
    """Search the tensors that are views of the file for NaN; the others, when they are decoded.

    Raises:
        UserError: a value is NaN or infinite.
    """
    infos = {key: match.needed[source] for key, source in sources.items()}
    read_anyway = any(dtypes[key] != DTYPES.get(info.dtype) for key, info in infos.items())
    small = sum(map(loaded_bytes, infos.values())) < ALWAYS_CHECKED
    if not (verify or read_anyway or small):
        log.debug("%s: not searched for NaN; verify=True does so", match.archive.name)
        return
    # Large weights that may not be needed soon do not stay in memory for the search alone.
    searched = match if read_anyway or small else match.reopened()
    views = {key: source for key, source in sources.items() if not match.decodes(source)}
    if bad := not_finite({key: searched.tensor(source) for key, source in views.items()}):
        raise UserError(explain_infinite(match.archive.name, bad, None))


def linear_weights(module: nn.Module) -> set[str]:
    """Keys of the weights of linear layers."""
    return {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def kept_codes(match: Match, source: str, slot: Slot, matrices: set[str]) -> Codes | None:
    """The codes of a tensor that linear layers keep as it is stored; None of all others.

    Layers keep whole rows: a tensor that is stored in another shape is decoded.
    """
    whole_rows = all(len(shape) == 2 and shape[1:] == slot.shape[1:] for _, shape, _ in slot.parts)
    if not whole_rows or not matrices.issuperset(key for key, _, _ in slot.parts):
        return None
    codes = match.codes(source)
    fits = codes is not None and codes.decodable and codes.shape == slot.shape
    return codes if fits else None


def expect_finite_codes(match: Match, key: str, codes: Codes, dtype: torch.dtype) -> None:
    """Search a matrix that is kept in codes for NaN.

    Raises:
        UserError: a value is NaN or infinite, or overflows in the dtype.
    """
    if not codes.is_finite():
        raise UserError(explain_infinite(match.archive.name, [key], None))
    if dtype == torch.float16 and not is_finite(codes.decoded(dtype)):
        raise UserError(explain_infinite(match.archive.name, [key], dtype))


def kept(slot: Slot, codes: Codes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that a matrix in codes consists of, in codes themselves."""
    width = codes.rows.shape[1]
    rows = {key: form.read(codes.rows, (shape[0], width)) for key, shape, form in slot.parts}
    return {
        key: nn.Parameter(CodedWeight(codes._replace(rows=part), dtype), requires_grad=False)
        for key, part in rows.items()
    }


def wide_keys(stored: Iterable[str], format: Format) -> set[str]:
    """Keys of the tensors that a format keeps in float32 when the others are float16."""
    return {key for key in stored if re.fullmatch(format.wide, key)}


def common_dtype(stored: Mapping[str, Info], format: Format) -> torch.dtype:
    """The dtype of most values in the matrices.

    A model computes in one dtype, but files may keep matrices in one and norms or biases in
    another. Tensors that the format keeps in float32 are not counted.
    """
    wide = wide_keys(stored, format)
    votes: Counter[torch.dtype] = Counter()
    for key in [key for key in stored if key not in wide and len(stored[key].shape) > 1] or stored:
        votes[loaded_in(stored[key])] += math.prod(stored[key].shape)
    return votes.most_common(1)[0][0]


def warn_of_mixed_dtypes(
    name: object, stored: Mapping[str, Info], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Warn that tensors of mixed dtypes were converted, which loses precision or takes memory.

    Where weights are in blocks of codes, the others have other dtypes by design.
    """
    kinds = {info.dtype for info in stored.values()}
    changed = {d for key, d in dtypes.items() if loaded_in(stored[key]) != d}
    if changed and not kinds & BLOCK_TYPES.keys():
        there = {str(DTYPES[kind]).removeprefix("torch.") for kind in kinds}
        log.warning(
            "%s: its tensors are %s; all are loaded as %s, like most of its matrices. dtype= "
            "chooses another",
            name,
            " and ".join(sorted(there)),
            " and ".join(str(dtype).removeprefix("torch.") for dtype in changed),
        )


def matrices_of(module: nn.Module, layout: str, kind: str) -> set[str]:
    """Keys, in a layout, of the matrices that linear layers of a model multiply with."""
    linear = linear_weights(module)
    return {
        key
        for key, slot in slots_of(module, format_of(kind, layout)).items()
        if len(slot.shape) == 2 and linear.issuperset(part for part, _, _ in slot.parts)
    }


def slots_of(module: nn.Module, format: Format) -> dict[str, Slot]:
    """The tensors in which a format stores a module, by their keys without prefix."""
    stored = {k: v for k, v in module.state_dict().items() if k not in format.constants}
    return correspondence(stored, format.rules(describe(module)))


def check(
    match: Match,
    name: str,
    slots: Mapping[str, Slot],
    sources: Mapping[str, str],
    infos: Mapping[str, Info],
) -> None:
    """Compare the keys, shapes and dtypes of a file with what a module needs.

    Args:
        match: where the model is in the file.
        name: class of the module, for messages.
        slots: what the module needs, by key.
        sources: the key in the file that each of these is read from.
        infos: what the file has.

    Raises:
        UserError: they differ.
    """
    copies = match.format.copies
    extras = re.compile("|".join(match.format.extras) or r"(?!)")
    known = {*sources.values(), *copies, *match.format.arguments}
    there = {key: infos[source] for key, source in sources.items() if source in infos}
    faults = Faults(
        missing=[key for key, source in sources.items() if source not in infos],
        unexpected=[key for key in infos if key not in known and not extras.fullmatch(key)],
        misshapen={
            key: (info.shape, slots[key].shape)
            for key, info in there.items()
            if info.shape != slots[key].shape
        },
        mistyped={key: info.dtype for key, info in there.items() if info.dtype not in FLOATS},
    )
    if not faults:
        for copy, key in copies.items():
            if copy in infos and key in infos and not same(match.tensor(copy), match.tensor(key)):
                raise UserError(
                    f"{match.archive.name}: {copy} and {key} are one tensor stored twice, but they "
                    "differ: the file was edited or is damaged. Nothing was loaded"
                )
        if unused := [key for key in infos if key not in known]:
            log.info(
                "%s: ignoring unused tensors: %s",
                match.archive.name,
                ", ".join(unused),
            )
        return
    what = f"the {KIND_NAMES[match.format.kind]} ({name}, {match.format.layout} layout)"
    own = f"{match.format.kind} {match.format.layout}"
    raise UserError(explain_faults(match.archive.name, what, own, faults, slots, infos))


# Saving


def kind_of(module: nn.Module) -> str:
    """The kind of a module (see `Format.kind`).

    Raises:
        UserError: it has no public format.
    """
    match module:
        case MMDiT() if not module.reads and not isinstance(module, IntervalMMDiT):
            return "mmdit"
        case Autoencoder():
            return "autoencoder"
        case CLIPTextModel():
            return "clip_l" if describe(module)["activation"] == "quick_gelu" else "clip_g"
        case T5Encoder():
            return "t5"
        case ControlNet() if not isinstance(module, ParallelControlNet):
            return "controlnet"
        case CLIPImageModel():
            return "clip_image"
    raise UserError(f"a {type(module).__name__} has no public format")


def exported(
    module: Network, layout: str, *, kind: str | None = None, prefixed: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's tensors under the keys of a public layout.

    Args:
        module: the model.
        layout: 'original' or 'diffusers'.
        kind: see `Format.kind`; None infers it from the module.
        prefixed: begin the keys with the model's prefix in single files.

    Raises:
        UserError: the layout has no keys for such a model, or it has tables in place of weights.
    """
    expect_whole(module)
    kind = kind_of(module) if kind is None else kind
    format = format_of(kind, layout)
    prefix = format.prefixes[0] if prefixed else ""
    ours = module.state_dict()
    tensors = {
        key: slot.write({part: plain(ours[part]) for part, _, _ in slot.parts})
        for key, slot in slots_of(module, format).items()
    }
    dtype = module.compute_dtype
    for key in wide_keys(tensors, format):
        if same(tensors[key].to(dtype).to(tensors[key].dtype), tensors[key]):
            tensors[key] = tensors[key].to(dtype)  # it fits: only the computation needs float32
    if layout == "diffusers" and format.identity and format.identity not in tensors:
        assert isinstance(module, CLIPTextModel)
        tensors[format.identity] = module.cast(torch.eye(module.width))
    for key, argument in format.arguments.items():
        tensors[key] = argument.write(describe(module)[argument.name])
    for copy, primary in format.copies.items():
        tensors[copy] = tensors[primary].clone()  # safetensors stores no tensor twice
    yield from ((prefix + key, tensor) for key, tensor in tensors.items())


def format_of(kind: str, layout: str) -> Format:
    """The format of a kind of model in a layout.

    Raises:
        UserError: there is none.
    """
    for format in FORMATS:
        if (format.kind, format.layout) == (kind, layout):
            return format
    layouts = " and ".join(format.layout for format in FORMATS if format.kind == kind)
    raise UserError(f"the {KIND_NAMES[kind]} has no {layout} layout, only {layouts}")


def descriptions(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Metadata entry with the full description of each model, which shapes alone do not give."""
    return {ENTRY: json.dumps({kind: describe(module) for kind, module in modules.items()})}
