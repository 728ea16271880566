"""One layer of an adapter file: from its tensors to the changes of our layers.

A layer of a file may be several of ours (Q, K and V), have its rows in another order, or be a
convolution.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmdit.adapters.homes import Home
from mmdit.adapters.layers import Change, DoRA, LoKr, LoRA, Whole
from mmdit.adapters.stated import Scaling
from mmdit.checkpoints.tables import Form, Slot
from mmdit.dtypes import wide
from mmdit.errors import UserError

SCALES = 1e-8, 1e4  # least and most that a change is multiplied by


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
            matrix = _matrix(where, "diff", given["whole"], (rows, columns), home.slot)
            made = _whole(home.slot, matrix)
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
    if stated is not None and stated.normed not in (None, magnitude is not None):
        has = "no norms (DoRA)" if magnitude is None else "norms (DoRA)"
        raise UserError(
            f"{where} has {has}, but use_dora={stated.normed} is stated. Nothing was loaded"
        )
    if magnitude is None:
        return made
    return _with_norms(home.slot, made, magnitude, where, rows, columns)


def _alpha(tensor: Tensor, where: str) -> float:
    value = float(tensor)
    if value <= 0:
        raise UserError(f"{where}: alpha is {value:g}, not a positive number. Nothing was loaded")
    return value


def _scale(alpha: float, rank: int, where: str) -> float:
    """alpha / rank, unless that is beyond all that is ever trained."""
    least, most = SCALES
    if not least <= alpha / rank <= most:
        raise UserError(
            f"{where}: alpha is {alpha:g} of a rank of {rank}, so that its change would be "
            f"multiplied by {alpha / rank:g}; {least:g} to {most:g} is read. Nothing was loaded"
        )
    return alpha / rank


def _matrix(where: str, what: str, tensor: Tensor, size: tuple[int, int], slot: Slot) -> Tensor:
    """A matrix of this size, which may be stored as the kernel of a convolution."""
    kernels = {(size[1],), (size[1], 1, 1)}
    if what != "up matrix":
        kernels.add(slot.shape[1:])
    if tensor.shape[0] != size[0] or tuple(tensor.shape[1:]) not in kernels:
        raise UserError(
            f"{where}: its {what} is {sized(tuple(tensor.shape))} where this model needs "
            f"{sized(size)}: the adapter is for another model. Nothing was loaded"
        )
    return tensor.flatten(1)


def sized(shape: tuple[int, ...]) -> str:
    """A shape as text: 4 x 64."""
    return " x ".join(map(str, shape))


def rows_of(slot: Slot, form: Form, tensor: Tensor) -> Tensor:
    """The rows of one of our layers in a tensor whose rows are the outputs of a public layer."""
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
    rank = given["down"].shape[0]
    if given["up"].shape[1] != rank:
        raise UserError(
            f"{where}: its rank is {rank} in the down matrix and {given['up'].shape[1]} in the up "
            "matrix. Nothing was loaded"
        )
    down = _matrix(where, "down matrix", given["down"], (rank, columns), home.slot)
    up = _matrix(where, "up matrix", given["up"], (rows, rank), home.slot)
    beside = stated.of(home.stem, rank, where) if stated else None
    if alpha is not None and beside is not None and not math.isclose(alpha, beside):
        raise UserError(f"{where}: alpha is {alpha:g}, but {beside:g} is stated beside the weights")
    scale = _scale(alpha or beside or rank, rank, where)
    changes: dict[str, Change] = {}
    for layer, shape, form in home.slot.parts:
        own_up, own_down = rows_of(home.slot, form, up), down
        if len(home.slot.parts) > 1:
            # Stacked matrices, each with an up matrix of its own: what the others use is zero.
            used = own_up.abs().amax(0) > 0
            if used.any() and not used.all():
                own_up, own_down = own_up[:, used], own_down[used]
        own = own_down.shape[0]
        if own > max(shape):
            raise UserError(
                f"{where}: its rank of {own} is above the widths of the layer, {sized(shape)}. "
                "Nothing was loaded"
            )
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
            f"{where}: its matrices give {sized(whole)} where this model needs "
            f"{sized((rows, columns))}: the adapter is for another model. Nothing was loaded"
        )
    own = rank or first_rank
    scale = _scale(alpha, own, where) if alpha and own else 1.0
    if rank and "whole" in second:  # of three matrices, which are multiplied here
        first = {"whole": scale * _product(first)}
        own, rank, first_rank, scale = None, None, None, 1.0
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
    whole, up, down = (given.get(name + end) for end in ("", "_a", "_b"))
    core = given.get("t2") if name == "w2" else None
    if whole is not None and up is None and down is None and core is None:
        return {"whole": whole.flatten(1)}, None
    if up is None or down is None or whole is not None:
        raise UserError(f"{where}: lokr_{name} is incomplete or given twice. Nothing was loaded")
    if core is not None:  # of a convolution: t2 (r, r, k, k), a (r, m), b (r, n)
        if core.shape[:2] != (len(up), len(down)) or core.ndim != 4 or up.ndim + down.ndim != 4:
            raise UserError(f"{where}: lokr_t2 does not fit lokr_w2_a and _b. Nothing was loaded")
        matrix = torch.einsum("ijkl,ip,jr->prkl", wide(core), wide(up), wide(down))
        return {"whole": matrix.flatten(1)}, len(down)
    if up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise UserError(
            f"{where}: the rank of lokr_{name} is {up.shape[1]} in one matrix and "
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
    size, convolution = tuple(magnitude.shape), len(slot.shape) > 2
    # LyCORIS has norms of outputs as a column, of inputs as a row; PEFT has those of outputs alone.
    per_output = magnitude.numel() == rows and (size[0] == rows or convolution)
    per_input = size == (1, columns) and not per_output and not convolution
    of_channels = convolution and size == (1, *slot.shape[1:2], 1, 1)
    if of_channels or (per_input and len(slot.parts) > 1):
        raise UserError(
            f"{where}: norms for each input of a fused matrix or a convolution are not supported. "
            "Nothing was loaded"
        )
    if not (per_output or per_input):
        raise UserError(
            f"{where}: its norms (DoRA) are {sized(size)}, neither {rows} outputs nor {columns} "
            "inputs. Nothing was loaded"
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
