"""Public files to models and back: match the format, build on meta, check every key, assign.

No tensor is read before all keys and shapes have been checked, and none is copied from the mapped
file unless another dtype is requested.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
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
from mmdit.checkpoints.headers import Info
from mmdit.checkpoints.matches import ENTRY, Match, find, own_description
from mmdit.checkpoints.tables import Slot, correspondence
from mmdit.checkpoints.values import computed_in, is_finite, not_finite, same
from mmdit.dtypes import at_least_float32
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.controlnet import ControlNet, ParallelControlNet
from mmdit.models.interval import IntervalMMDiT
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.nn.network import Network
from mmdit.printable import logger
from mmdit.registry import describe

log = logger("mmdit.checkpoints")

FLOATS = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
ALWAYS_CHECKED = 1 << 30  # bytes; weights below this are always searched for NaN, in 0.1 s


def load(
    archive: Archive,
    kind: str,
    *,
    layout: str | None = None,
    hints: Description | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> Network:
    """Load the model of this kind from an archive.

    Args:
        archive: the file or files.
        kind: see `Format.kind`.
        layout: see `find`.
        hints: arguments that shapes do not determine (num_heads, activation, scale, shift).
        dtype: the dtype the model computes in; None keeps the file's, except that 8-bit floats
            become bfloat16, and tensors of mixed dtypes take that of most matrix values.
        verify: always search the weights for NaN and infinite values. Otherwise weights of a
            gigabyte or more are only searched if they are converted to another dtype.

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
    load_into(module, match, dtype=dtype, verify=verify)
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
    module: Network, match: Match, *, dtype: torch.dtype | None = None, verify: bool = False
) -> None:
    """Assign the tensors of a match to a module, on meta or not; on an error it stays unchanged.

    Args:
        module: its `compute_dtype` is set, too.
        match: a model of the module's architecture.
        dtype: see `load`.
        verify: see `load`.

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
    stored = {key: match.tensor(source) for key, source in sources.items()}
    compute_dtype = common_dtype(stored, format) if dtype is None else dtype
    dtypes = dict.fromkeys(stored, compute_dtype)
    if dtype is None and compute_dtype == torch.float16:
        # The model computes with these in float32, so they are not rounded to float16.
        for key in wide_keys(stored, format):
            dtypes[key] = torch.promote_types(computed_in(stored[key], None), compute_dtype)
    read_anyway = any(dtypes[key] != tensor.dtype for key, tensor in stored.items())
    small = sum(tensor.nbytes for tensor in stored.values()) < ALWAYS_CHECKED
    if not (verify or read_anyway or small):
        log.debug("%s: not searched for NaN; verify=True does so", match.archive.name)
    else:
        # Large weights that may not be needed soon do not stay in memory for the search alone.
        searched = match if read_anyway or small else match.reopened()
        if bad := not_finite({key: searched.tensor(source) for key, source in sources.items()}):
            raise UserError(explain_infinite(match.archive.name, bad, None))
    tensors: dict[str, Tensor] = {}
    too_large = []
    for key, slot in slots.items():
        theirs = stored[key].to(dtypes[key])
        if theirs.dtype == torch.float16 != stored[key].dtype and not is_finite(theirs):
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


def wide_keys(stored: Mapping[str, Tensor], format: Format) -> set[str]:
    """Keys of the tensors that a format keeps in float32 when the others are float16."""
    return {key for key in stored if re.fullmatch(format.wide, key)}


def common_dtype(stored: Mapping[str, Tensor], format: Format) -> torch.dtype:
    """The dtype of most values in the matrices.

    A model computes in one dtype, but files may keep matrices in one and norms or biases in
    another. Tensors that the format keeps in float32 are not counted.
    """
    wide = wide_keys(stored, format)
    votes: Counter[torch.dtype] = Counter()
    for key in [key for key in stored if key not in wide and stored[key].ndim > 1] or stored:
        votes[computed_in(stored[key], None)] += stored[key].numel()
    return votes.most_common(1)[0][0]


def warn_of_mixed_dtypes(
    name: object, stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Warn that tensors of mixed dtypes were converted, which loses precision or takes memory."""
    changed = {d for key, d in dtypes.items() if computed_in(stored[key], None) != d}
    if changed:
        there = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()}
        log.warning(
            "%s: its tensors are %s; all are loaded as %s, like most of its matrices. dtype= "
            "chooses another",
            name,
            " and ".join(sorted(there)),
            " and ".join(str(dtype).removeprefix("torch.") for dtype in changed),
        )


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
        UserError: the layout has no keys for such a model.
    """
    kind = kind_of(module) if kind is None else kind
    format = next((f for f in FORMATS if f.kind == kind and f.layout == layout), None)
    if format is None:
        raise UserError(f"a {type(module).__name__} has no {layout} layout, only the other one")
    prefix = format.prefixes[0] if prefixed else ""
    ours = module.state_dict()
    tensors = {key: slot.write(ours) for key, slot in slots_of(module, format).items()}
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


def descriptions(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Metadata entry with the full description of each model, which shapes alone do not give."""
    return {ENTRY: json.dumps({kind: describe(module) for kind, module in modules.items()})}
