"""Read adapter files of all programs: strictly, so that nothing in them is passed over.

A key is `<prefix><layer>.<role>`: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`. The
layers are those of `mmdit.adapters.homes`; the roles are below.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.adapters.adapter import Adapter, check_fits, weight_of
from mmdit.adapters.homes import Home, homes, spelled
from mmdit.adapters.layers import Change, DoRA, LoKr, LoRA, Whole
from mmdit.bounds import LONGEST_JSON, parse_json, read_bounded
from mmdit.checkpoints.archive import Archive, open_file
from mmdit.checkpoints.tables import Form, Slot
from mmdit.checkpoints.values import not_finite
from mmdit.checks import did_you_mean, nearest
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.printable import logger
from mmdit.runs.checkpoint import is_native, read_weights

log = logger("mmdit.adapters")

# What a tensor is, by the end of its key.
ROLES = {
    "down": r"lora_A(\.default)?\.weight|lora[._]down\.weight|lora_linear_layer\.down\.weight",
    "up": r"lora_B(\.default)?\.weight|lora[._]up\.weight|lora_linear_layer\.up\.weight",
    "alpha": r"alpha",
    "magnitude": r"dora_scale|lora_magnitude_vector(\.default)?(\.weight)?",
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
    "lora_mid": "LoCon with a third matrix",
    "diff_b": "a change of biases",
    "lora_embedding": "an embedding",
}
CONFIG = "adapter_config.json"  # of PEFT, beside adapter_model.safetensors
WEIGHTS = "adapter_model.safetensors"
NORM = "mmdit.dora_norm"  # metadata key: 'base' where norms are relative to those of the base


class Scaling(NamedTuple):
    """Ranks and alphas that PEFT states beside the weights, by layer name without its prefix."""

    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = {}
    alphas: Mapping[str, float] = {}
    by_root: bool = False  # alpha is divided by the root of the rank (rsLoRA)

    def of(self, stem: str, rank: int, where: str) -> float | None:
        """The alpha of a layer, as if divided by its rank.

        Raises:
            UserError: the weights have another rank than is stated.
        """
        stated = _matching(self.ranks, stem) or self.rank
        if stated is not None and stated != rank:
            raise UserError(f"{where}: its weights have rank {rank}, but {stated} is stated")
        alpha = _matching(self.alphas, stem) or self.alpha
        return alpha * math.sqrt(rank) if alpha and self.by_root else alpha


def _matching(table: Mapping[str, Any], stem: str) -> Any:
    """The entry of PEFT's patterns that a layer's name ends with."""
    return next((v for k, v in table.items() if re.fullmatch(rf"(.*\.)?({k})", stem)), None)


def read_adapter(source: str | Path, root: nn.Module, *, weights: str = "ema") -> Adapter:
    """Read an adapter for a pipeline: of a run, from a file, or from a folder as PEFT saves it.

    LoRA and DoRA of diffusers, PEFT, sd-scripts, ComfyUI, OneTrainer and SimpleTuner, and LoKr of
    LyCORIS, are read for the network and the text encoders. A scale alpha / rank is that of the
    file; without alpha it is 1, as everywhere.

    Args:
        source: a run that trained one, a safetensors file, or a folder with
            adapter_model.safetensors.
        root: the pipeline, which stays as it is.
        weights: 'ema' or 'raw', of a run.

    Raises:
        UserError: a key has no place in this model, weights contradict each other or are not
            finite, or the source is a whole model. Nothing was loaded.
    """
    path = Path(source).expanduser()
    if is_native(path):
        module = read_weights(path, weights).module()
        if not isinstance(module, Adapter):
            raise UserError(
                f"{source} holds a {type(module).__name__}, not an adapter: open it with "
                "checkpoint="
            )
        return module
    config: dict[str, Any] = {}
    if path.is_dir():
        config = peft_config(path)
        path = path / WEIGHTS
    archive = open_file(path)
    archive.verify()
    return Adapter(changes=changes_in(archive, root, config))


def peft_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        UserError: it is missing, damaged, or of another kind of adapter.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} is not an adapter: a folder of PEFT holds {CONFIG} and {WEIGHTS}"
        )
    try:
        config = dict(parse_json(read_bounded(folder / CONFIG, LONGEST_JSON)))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read as JSON ({error})") from None
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{folder} holds an adapter of the kind {kind}: LORA is read")
    return config


def changes_in(archive: Archive, root: nn.Module, config: Mapping[str, Any]) -> dict[str, Change]:
    """The changes in an archive, by our names of the layers.

    Raises:
        UserError: see `read_adapter`.
    """
    name = str(archive.name)
    found = grouped(archive)
    known = spelled(homes(root))
    if missing := [stem for stem in found if stem not in known]:
        raise UserError(explain_homeless(name, missing, known, root))
    tensors = {
        stem: {role: archive[key] for role, key in roles.items()} for stem, roles in found.items()
    }
    flat = {found[stem][role]: t for stem, part in tensors.items() for role, t in part.items()}
    if bad := not_finite(flat):
        raise UserError(
            f"{name}: {bad[0]} has NaN or infinite values ({len(bad)} of {len(flat)} tensors do)"
        )
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
    warn_of_a_third(name, archive, found, known)
    layers = {n: part for n, part in root.named_modules() if isinstance(part, nn.Linear)}
    check_fits(changes, layers, name)
    return changes


@torch.no_grad()
def restore_norms(change: DoRA, weight: Tensor) -> None:
    """Make norms that are relative to those of the base those of the changed weight."""
    own = torch.linalg.vector_norm(wide(weight), dim=change.axis)
    change.magnitude.mul_(change.norm(weight).flatten() / own)


def grouped(archive: Archive) -> dict[str, dict[str, str]]:
    """The keys of an archive by layer and role.

    Raises:
        UserError: a key is of no adapter, or two have the same role.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
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
        kind = next((what for end, what in OTHERS.items() for key in strange if end in key), "")
        if kind:
            reason = f"{strange[0]} is of {kind}, which is not read"
        elif not found:
            reason = "it is not an adapter; weights of a model are opened with checkpoint="
        else:
            reason = f"{strange[0]} is not a tensor of an adapter ({len(strange)} such keys)"
        raise UserError(f"{archive.name}: {reason}. Nothing was loaded")
    if not found:
        raise UserError(f"{archive.name} is empty: it holds no tensors")
    return dict(found)


def explain_homeless(
    name: str, missing: list[str], known: Mapping[str, Home], root: nn.Module
) -> str:
    """Why layers of a file are not in a model."""
    first, absent = missing[0], {"lora_te": "text encoder", "text_encoder": "text encoder"}
    part = next((what for start, what in absent.items() if first.startswith(start)), None)
    count = f"{len(missing)} of its layers have no place in this model, such as {first}"
    numbers = re.sub(r"\d+", "0", first)
    if any(re.sub(r"\d+", "0", stem) == numbers for stem in known):
        reason = "it was trained for a model with more or other blocks"
    elif part:
        reason = "it changes a text encoder that is not loaded here, or not one of SD3"
    else:
        reason = (
            f"it is for another architecture.{did_you_mean(nearest(first, list(known)[:2000]))}"
        )
    return f"{name}: {count}: {reason}. Nothing was loaded"


def scaling_of(archive: Archive, config: Mapping[str, Any], name: str) -> dict[str, Scaling]:
    """What is stated about ranks and alphas for each part of a pipeline.

    Args:
        config: PEFT's adapter_config.json, for the network; diffusers writes the same into the
            header, for each part.

    Raises:
        UserError: what is stated makes no sense.
    """
    stated: dict[str, dict[str, Any]] = {"mmdit": dict(config)} if config else {}
    if text := archive.metadata.get("lora_adapter_metadata"):
        parts = {"transformer": "mmdit", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        try:
            entries = dict(parse_json(text.encode()))
        except (ValueError, TypeError):
            raise UserError(f"{name}: its header's lora_adapter_metadata is damaged") from None
        for key, value in entries.items():
            start, _, rest = str(key).partition(".")
            if start in parts:
                stated.setdefault(parts[start], {})[rest] = value
    return {part: scaling(entries, f"{name}, {part}") for part, entries in stated.items()}


def scaling(entries: Mapping[str, Any], where: str) -> Scaling:
    """PEFT's ranks and alphas.

    Raises:
        UserError: one is not a positive number; or a setting is not supported.
    """
    for key in ("fan_in_fan_out", "lora_bias"):
        if entries.get(key):
            raise UserError(f"{where}: {key}={entries[key]} is not supported")

    def positive(key: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{where}: {key} is {value!r}, not a positive number")
        return value

    def table(key: str) -> dict[str, Any]:
        found = entries.get(key) or {}
        if not isinstance(found, dict):
            raise UserError(f"{where}: {key} is {found!r}, not a table")
        return {re.escape(str(k)): positive(f"{key} of {k}", v) for k, v in found.items()}

    rank, alpha = entries.get("r"), entries.get("lora_alpha")
    return Scaling(
        rank=None if rank is None else positive("r", rank),
        alpha=None if alpha is None else positive("lora_alpha", alpha),
        ranks=table("rank_pattern"),
        alphas=table("alpha_pattern"),
        by_root=bool(entries.get("use_rslora")),
    )


# One layer of a file


def changes_of(
    home: Home, parts: Mapping[str, Tensor], stated: Scaling | None, where: str
) -> dict[str, Change]:
    """The changes of our layers that a layer of a file consists of.

    Args:
        parts: its tensors by role.
        stated: ranks and alphas from beside the weights.
        where: for messages.

    Raises:
        UserError: tensors are missing, superfluous, or do not fit each other or the layer.
    """
    given = dict(parts)
    alpha = given.pop("alpha", None)
    magnitude = given.pop("magnitude", None)
    value = None if alpha is None else _alpha(alpha, where)
    rows, columns = home.slot.shape[0], math.prod(home.slot.shape[1:])
    match sorted(given):
        case ["down", "up"]:
            made = _low_rank(home, given, value, stated, where, rows, columns)
        case ["whole"]:
            _expect_shape(where, "diff", given["whole"].flatten(1), (rows, columns))
            made = _whole(home.slot, given["whole"].flatten(1))
        case roles if any(role.startswith("w1") for role in roles):
            made = _kronecker(home, given, value, where, rows, columns)
        case ["down"] | ["up"]:
            other = "up" if "down" in given else "down"
            raise UserError(f"{where}: its {other} matrix is missing. Nothing was loaded")
        case roles:
            raise UserError(
                f"{where}: {', '.join(roles) or 'alpha alone'} is not a change that is known. "
                "Nothing was loaded"
            )
    if magnitude is None:
        return made
    return _with_norms(home.slot, made, magnitude, where, rows, columns)


def _alpha(tensor: Tensor, where: str) -> float:
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{where}: alpha is {value:g}, not a positive number. Nothing was loaded")
    return value


def _expect_shape(where: str, what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{where}: its {what} is {_size(tensor.shape)} where this model needs {_size(shape)}: "
            "the adapter is for another model. Nothing was loaded"
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def rows_of(slot: Slot, form: Form, tensor: Tensor) -> Tensor:
    """Of a tensor whose rows are outputs of a public layer, those of one of our layers."""
    if len(slot.shape) > 2:  # a convolution, whose kernel has other columns alone
        return tensor
    return form.read(tensor, tuple(tensor.shape))


def _low_rank(
    home: Home,
    given: Mapping[str, Tensor],
    alpha: float | None,
    stated: Scaling | None,
    where: str,
    rows: int,
    columns: int,
) -> dict[str, Change]:
    down, up = given["down"].flatten(1), given["up"].flatten(1)
    rank = down.shape[0]
    if rank == 0 or up.shape[1] != rank:
        raise UserError(
            f"{where}: its rank is {rank} in the down matrix and {up.shape[1]} in the up matrix. "
            "Nothing was loaded"
        )
    _expect_shape(where, "down matrix", down, (rank, columns))
    _expect_shape(where, "up matrix", up, (rows, rank))
    beside = stated.of(home.stem, rank, where) if stated else None
    if alpha is not None and beside is not None and not math.isclose(alpha, beside):
        raise UserError(f"{where}: alpha is {alpha:g}, but {beside:g} is stated beside the weights")
    scale = (alpha or beside or rank) / rank
    changes: dict[str, Change] = {}
    for layer, shape, form in home.slot.parts:
        own_up, own_down = rows_of(home.slot, form, up), down
        if len(home.slot.parts) > 1:
            # Stacked matrices, each with an up matrix of its own: what the others use is zero.
            used = own_up.abs().amax(0) > 0
            if used.any() and not used.all():
                own_up, own_down = own_up[:, used], own_down[used]
        own = own_down.shape[0]
        with torch.device("meta"):
            change = LoRA(inputs=shape[1], outputs=shape[0], rank=own, alpha=scale * own)
        changes[layer] = _filled(change, {"down.weight": own_down, "up.weight": own_up})
    return changes


def _whole(slot: Slot, matrix: Tensor) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for layer, shape, form in slot.parts:
        with torch.device("meta"):
            change = Whole(inputs=shape[1], outputs=shape[0])
        changes[layer] = _filled(change, {"matrix": rows_of(slot, form, matrix)})
    return changes


def _kronecker(
    home: Home,
    given: Mapping[str, Tensor],
    alpha: float | None,
    where: str,
    rows: int,
    columns: int,
) -> dict[str, Change]:
    first, first_rank = _factor(given, "w1", where)
    second, rank = _factor(given, "w2", where)
    if left := given.keys() - {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"}:
        raise UserError(f"{where}: {', '.join(sorted(left))} beside LoKr. Nothing was loaded")
    shape = {key: _product(factor).shape for key, factor in (("1", first), ("2", second))}
    whole = (shape["1"][0] * shape["2"][0], shape["1"][1] * shape["2"][1])
    if whole != (rows, columns):
        raise UserError(
            f"{where}: its matrices give {_size(whole)} where this model needs "
            f"{_size((rows, columns))}: the adapter is for another model. Nothing was loaded"
        )
    own = rank or first_rank
    scale = alpha / own if alpha and own else 1.0
    changes: dict[str, Change] = {}
    top = next(iter(first.values()))  # the matrix whose rows are blocks of the layer's
    for layer, size, form in home.slot.parts:
        pieces = max(2, len(home.slot.parts))
        moved = rows_of(home.slot, form, torch.arange(rows)[:, None])[:, 0]
        kept = torch.equal(moved, torch.arange(rows))
        if not kept and top.shape[0] % pieces:
            matrix = scale * torch.kron(_product(first), _product(second))
            with torch.device("meta"):
                dense = Whole(inputs=size[1], outputs=size[0])
            changes[layer] = _filled(dense, {"matrix": rows_of(home.slot, form, matrix)})
            continue
        own_first = {**first, next(iter(first)): rows_of(home.slot, form, top)}
        with torch.device("meta"):
            change = LoKr(
                inputs=size[1],
                outputs=size[0],
                first=list(_product(own_first).shape),
                first_rank=first_rank,
                rank=rank,
                alpha=scale * own if own else None,
            )
        tensors = {f"first.{k}": v for k, v in own_first.items()}
        changes[layer] = _filled(change, tensors | {f"second.{k}": v for k, v in second.items()})
    return changes


def _factor(
    given: Mapping[str, Tensor], name: str, where: str
) -> tuple[dict[str, Tensor], int | None]:
    """A matrix of LoKr under the names of `Factor`, the one with its rows first; and its rank."""
    up, down, core = (given.get(f"{name}_a"), given.get(f"{name}_b"), given.get("t2"))
    if (whole := given.get(name)) is not None and up is None and down is None:
        return {"whole": whole.flatten(1)}, None
    if up is None or down is None or whole is not None:
        raise UserError(f"{where}: lokr_{name} is incomplete or given twice. Nothing was loaded")
    if name == "w2" and core is not None:  # of a convolution: t2 (r, r, k, k), a (r, m), b (r, n)
        matrix = torch.einsum("ijkl,ip,jr->prkl", core, up, down)
        return {"whole": matrix.flatten(1)}, None
    if up.shape[-1] != down.shape[0]:
        raise UserError(
            f"{where}: the rank of lokr_{name} is {up.shape[-1]} in one matrix and "
            f"{down.shape[0]} in the other. Nothing was loaded"
        )
    return {"up": up, "down": down.flatten(1)}, int(down.shape[0])


def _product(factor: Mapping[str, Tensor]) -> Tensor:
    return factor["whole"] if "whole" in factor else factor["up"] @ factor["down"]


def _with_norms(
    slot: Slot,
    changes: Mapping[str, Change],
    magnitude: Tensor,
    where: str,
    rows: int,
    columns: int,
) -> dict[str, Change]:
    per_output = magnitude.numel() == rows and magnitude.shape[0] == rows
    per_input = magnitude.numel() == columns and not per_output
    if not (per_output or per_input):
        raise UserError(
            f"{where}: its norms (DoRA) are {_size(tuple(magnitude.shape))}, neither {rows} outputs"
            f" nor {columns} inputs. Nothing was loaded"
        )
    if per_input and (len(slot.parts) > 1 or len(slot.shape) > 2):
        raise UserError(
            f"{where}: norms for each input of a fused matrix or a convolution are not supported. "
            "Nothing was loaded"
        )
    normed: dict[str, Change] = {}
    for layer, _, form in slot.parts:
        own = magnitude.flatten()
        own = rows_of(slot, form, own[:, None])[:, 0] if per_output else own
        with torch.device("meta"):
            change = DoRA(change=changes[layer], per_input=per_input)
        change.magnitude = nn.Parameter(own.clone())
        normed[layer] = change
    return normed


def _filled(change: Change, tensors: Mapping[str, Tensor]) -> Change:
    """A change with copies of these tensors as its weights."""
    copies = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    change.load_state_dict(copies, assign=True)
    return change


def warn_of_a_third(
    name: str,
    archive: Archive,
    found: Mapping[str, Mapping[str, str]],
    known: Mapping[str, Home],
) -> None:
    """Warn of a known fault of sd-scripts: Q, K and V were trained apart, and alpha not adapted.

    Their matrices of rank r are then stacked to rank 3 r, while alpha is still that of rank r. All
    programs divide by 3 r, so that these layers act at a third of the strength they were trained
    at.
    """
    dimensions = archive.metadata.get("ss_network_dim"), archive.metadata.get("ss_network_alpha")
    ranks: dict[bool, set[tuple[int, float | None]]] = {True: set(), False: set()}
    for stem, roles in found.items():
        if {"down", "up"} <= roles.keys():
            alpha = float(archive[roles["alpha"]]) if "alpha" in roles else None
            fused = len(known[stem].slot.parts) > 1
            if not fused or _block_diagonal(archive[roles["up"]].flatten(1)):
                ranks[fused].add((archive.infos[roles["down"]].shape[0], alpha))
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
