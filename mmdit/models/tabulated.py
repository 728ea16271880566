"""Modulation as tables: a third of a network's weights that need not be in memory to sample.

Modulation depends on y = embed(t) + embed(c_vec), never on the image. The times of a grid and the
pooled vectors of a few prompts are known before sampling starts, so all that modulation layers will
give is a table with a row for each pair of them. Nothing is approximated.

Row numbers take the place of the embeddings, and add up as these do; tables take the place of the
modulation layers, and receive the number of a row as y. Forward passes stay as they are.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmdit.checks import expect, expect_finite, listed, number, whole_number
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.models.controlnet import ParallelControlNet
from mmdit.nn.embeddings import VectorEmbedding
from mmdit.nn.modulation import Modulation
from mmdit.nn.network import Network

EMBEDDINGS = ("timestep_embedding", "pooled_embedding", "interval_embedding")
TIME, POOLED, LENGTH = EMBEDDINGS
AGAIN = (
    "load the model again, and make tables of all that will be sampled "
    "(pipe.tabulate(request), or tables=true on the command line)"
)


class Tables(nn.Module):
    """Takes the place of a layer, for sampling alone.

    Args:
        replaced: the layer whose place it takes.

    Attributes:
        scales: of the adapters that had changed that layer, by name.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        changed = [getattr(part, "scales", {}) for part in replaced.modules()]
        self.scales: dict[str, float] = dict(chain.from_iterable(c.items() for c in changed))
        self.train(replaced.training)


class Rows(Tables):
    """Numbers of table rows, in place of an embedding: one for each known input.

    Args:
        replaced: the embedding.
        known: the number of inputs.
        stride: distance between their rows.
    """

    rows: Tensor  # buffer (known, 1)

    def __init__(self, replaced: nn.Module, known: int, stride: int, device: torch.device) -> None:
        super().__init__(replaced)
        rows = stride * torch.arange(known, device=device)[:, None]
        self.register_buffer("rows", rows, persistent=False)

    def expect_sampling(self, x: Tensor) -> None:
        """Raise UserError where a network is trained, or differentiated by what it looks up."""
        if self.training:
            raise UserError(
                "the modulation layers of this network are tables, which serve sampling alone, but "
                "it is in training mode: call eval() to sample, or load the weights again to train"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError(
                "the modulation layers of this network are tables, through which there is no "
                "gradient by t or c_vec: load the weights again to compute it"
            )


class TimeRows(Rows):
    """Row numbers of times.

    Args:
        replaced, stride, device: as in `Rows`.
        name: of the time, for messages.
        times: those that are known.
    """

    def __init__(
        self,
        replaced: nn.Module,
        times: Sequence[float],
        *,
        name: str,
        stride: int,
        device: torch.device,
    ) -> None:
        super().__init__(replaced, len(times), stride, device)
        self.name, self.index = name, {time: i for i, time in enumerate(times)}

    def forward(self, t: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:  # (b,) -> (b, 1)
        self.expect_sampling(t)
        asked = t.float().tolist()
        for time in asked:
            if time not in self.index:
                known = sorted(self.index, reverse=True)
                near = min(known, key=lambda other: abs(other - time))
                raise UserError(
                    f"{self.name}={time:.9g} is not in the modulation tables of this network: they "
                    f"have {len(known)} times from {known[0]:.9g} to {known[-1]:.9g}, of which "
                    f"{near:.9g} is nearest. Other steps, another solver, grid or strength need "
                    f"other times: {AGAIN}"
                )
        return self.rows[[self.index[time] for time in asked]]


class PooledRows(Rows):
    """Row numbers of pooled text.

    Args:
        replaced, device: as in `Rows`.
        pooled: the vectors that are known (p, width), before they are cast to a network's dtype.
    """

    def __init__(self, replaced: nn.Module, pooled: Tensor, *, device: torch.device) -> None:
        super().__init__(replaced, len(pooled), 1, device)
        # Not buffers: to(dtype) must not round them.
        self._pooled = pooled.cpu()
        self._index: dict[torch.dtype, dict[bytes, int]] = {}

    def forward(self, c_vec: Tensor) -> Tensor:  # (b, p) -> (b, 1)
        self.expect_sampling(c_vec)
        if c_vec.dtype not in self._index:
            keys = fingerprints(self._pooled.to(c_vec.dtype))
            self._index[c_vec.dtype] = {key: i for i, key in reversed([*enumerate(keys)])}
        index, asked = self._index[c_vec.dtype], fingerprints(c_vec)
        for i, key in enumerate(asked):
            if key not in index:
                raise UserError(
                    f"the pooled text c_vec[{i}], of {len(asked)}, is not in the modulation tables "
                    f"of this network: they have {len(self._pooled)} pooled texts. Another prompt "
                    f"or negative prompt needs its own: {AGAIN}"
                )
        return self.rows[[index[key] for key in asked]]


def fingerprints(x: Tensor) -> list[bytes]:
    """A key for each row of x (b, p): equal rows have equal keys."""
    zero_is_positive = x.detach().cpu() + 0  # -0.0 + 0 = 0.0
    return [row.tobytes() for row in zero_is_positive.contiguous().view(torch.uint8).numpy()]


class TabulatedModulation(Tables):
    """What a modulation layer gives, looked up: (b, 1) numbers of rows -> parts x (b, ...).

    Args:
        replaced: the layer.
        table: its results (rows, parts, ...).
    """

    table: Tensor

    def __init__(self, replaced: nn.Module, table: Tensor) -> None:
        super().__init__(replaced)
        self.register_buffer("table", table, persistent=False)

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return self.table[rows[:, 0]].unbind(1)


# Making them


def modulation_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that tables replace, by name: modulation, and the embeddings that it reads."""
    kinds = (Modulation, VectorEmbedding)
    return {name: part for name, part in network.named_modules() if isinstance(part, kinds)}


@torch.no_grad()
def tabulate(
    network: Network,
    times: Sequence[float] | Tensor,
    pooled: Tensor,
    *,
    lengths: Sequence[float] | Tensor = (0.0,),
    layers: Mapping[str, nn.Module] | None = None,
    device: torch.device | None = None,
) -> None:
    """Replace the modulation layers of a network by tables, in place and one by one.

    Each layer is freed as soon as its table is there, unless something else refers to it. The
    network then computes what it did, at these times and with these pooled vectors, and refuses
    others. Its results differ by rounding alone, since a layer multiplies all rows at once. Changes
    by adapters are part of the tables. In a surrounding `torch.autocast` they are what the layers
    give in it.

    Args:
        network: a backbone, or a `ControlledMMDiT`, in eval mode.
        times: at which it will be evaluated, as its `forward` receives them.
        pooled: the vectors c_vec with which it will be evaluated, (p, pooled_width).
        lengths: of the intervals t - r of an `IntervalMMDiT`, which has rows for all combinations;
            others ignore it.
        layers: what `modulation_layers` returned before there were tables, to make others of it;
            None takes the layers that are in the network.
        device: where tables are computed and stored, for which layers elsewhere are moved one at a
            time; None is that of the network.

    Example:
        layers = modulation_layers(network)  # only if other tables are to be made later
        tabulate(network, [1.0, 0.5], text.encode(["a cat", ""]).c_vec)

    Raises:
        UserError: there are no such layers; times or vectors are missing or impossible; or the
            tables would be larger than the layers. The network is as it was.
    """
    layers = dict(modulation_layers(network) if layers is None else layers)
    device = network.device if device is None else device
    t, r = _times("times", times), _times("lengths", lengths)
    pooled = _distinct(pooled, network)
    _check(network, layers)
    expect_smaller(table_sizes(network, len(t), len(pooled), len(r), layers=layers))
    embeds_first = layers.get(f"base.{POOLED}")
    for prefix in _prefixes(layers):
        part = network.get_submodule(prefix.rstrip("."))
        assert isinstance(part, Network)
        known, given = pooled, pooled.to(device, part.compute_dtype)
        if isinstance(part, ParallelControlNet):  # reads what its base model embeds
            assert embeds_first is not None
            known, given = torch.arange(len(pooled))[:, None], run_on(device, embeds_first, given)
        own = {name: layers.pop(prefix + name) for name in EMBEDDINGS if prefix + name in layers}
        y = _vectors(own, part, t, r, given, device)
        for name, rows in _rows(own, t, r, known, device).items():
            network.set_submodule(prefix + name, rows)
        own.clear()
        for name in [name for name in layers if name.startswith(prefix)]:
            layer = layers.pop(name)
            table = torch.stack(run_on(device, layer, y), dim=1)
            network.set_submodule(name, TabulatedModulation(layer, table))


def _vectors(
    own: Mapping[str, nn.Module],
    part: Network,
    t: Sequence[float],
    r: Sequence[float],
    given: Tensor,
    device: torch.device,
) -> Tensor:
    """The y of every row (rows, d): lengths outermost, then times, then pooled vectors."""

    def cast(x: Tensor) -> Tensor:
        return x.to(device, part.compute_dtype)

    y = run_on(device, own[TIME], torch.tensor(t, device=device), cast)[:, None]
    y = y + run_on(device, own[POOLED], given)
    if LENGTH in own:
        y = y + run_on(device, own[LENGTH], torch.tensor(r, device=device), cast)[:, None, None]
    return y.flatten(0, -2)


def _rows(
    own: Mapping[str, nn.Module],
    t: Sequence[float],
    r: Sequence[float],
    known: Tensor,
    device: torch.device,
) -> dict[str, Rows]:
    """What takes the place of the embeddings; their numbers add up to those of `_vectors`."""
    stride = len(known)
    rows: dict[str, Rows] = {
        TIME: TimeRows(own[TIME], t, name="t", stride=stride, device=device),
        POOLED: PooledRows(own[POOLED], known, device=device),
    }
    if LENGTH in own:
        far = stride * len(t)
        rows[LENGTH] = TimeRows(own[LENGTH], r, name="t - r", stride=far, device=device)
    return rows


def run_on(device: torch.device, layer: nn.Module, *given: Any) -> Any:
    """The output of a layer on a device, to which its tensors are copied for this call alone."""
    tensors = dict(chain(layer.named_parameters(), layer.named_buffers()))
    if all(tensor.device == device for tensor in tensors.values()):
        return layer(*given)
    return functional_call(layer, {name: x.to(device) for name, x in tensors.items()}, given)


# Sizes


class Sizes(NamedTuple):
    """Bytes of tables, and of the layers that they replace."""

    tables: int
    layers: int


def table_sizes(
    network: Network,
    times: int,
    pooled: int,
    lengths: int = 1,
    *,
    dtype: torch.dtype | None = None,
    layers: Mapping[str, nn.Module] | None = None,
) -> Sizes:
    """How much memory the tables of a network take, and how much they save.

    Args:
        network: also on the meta device.
        times, pooled, lengths: how many of each, see `tabulate`.
        dtype: of both; None is the compute dtype for tables, and what layers are stored in.
        layers: as in `tabulate`.

    Example:
        with torch.device("meta"):
            network = MMDiT(depth=24, width=1536, num_heads=24)
        table_sizes(network, times=28, pooled=2, dtype=torch.bfloat16)
    """
    for name, count in (("times", times), ("pooled", pooled), ("lengths", lengths)):
        whole_number(name, count)
    layers = modulation_layers(network) if layers is None else layers
    tables = stored = 0
    for name, layer in layers.items():
        tensors = chain(layer.parameters(), layer.buffers())
        stored += sum(x.numel() * (dtype or x.dtype).itemsize for x in tensors)
        if isinstance(layer, Modulation):
            intervals = any(name.startswith(p) and p + LENGTH in layers for p in _prefixes(layers))
            rows = times * pooled * (lengths if intervals else 1)
            tables += rows * layer.values * (dtype or network.compute_dtype).itemsize
    return Sizes(tables, stored)


# Which rows are needed


class Evaluations:
    """Takes the place of a network in a rehearsal, to find out what it will be evaluated with.

    Its output is zero. Solvers of this project choose their times whatever that is.
    """

    def __init__(self) -> None:
        self._times: dict[float, None] = {}
        self._lengths: dict[float, None] = {}
        self._pooled: dict[bytes, Tensor] = {}

    def __call__(
        self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor, **extra: Tensor
    ) -> Tensor:
        r = extra.get("r")
        length = torch.zeros_like(t) if r is None else t - r
        self._times |= dict.fromkeys(t.float().tolist())
        self._lengths |= dict.fromkeys(length.float().tolist())
        c_vec = wide(c_vec)
        self._pooled |= dict(zip(fingerprints(c_vec), c_vec, strict=True))
        return torch.zeros_like(z_t)

    def skipping(self, layers: Collection[int]) -> Self:
        """The network without some blocks, which has the same tables."""
        return self

    @property
    def times(self) -> list[float]:
        """Each t, in the order of evaluation."""
        return [*self._times]

    @property
    def lengths(self) -> list[float]:
        """Each t - r, in the order of evaluation; 0 without r."""
        return [*self._lengths]

    @property
    def pooled(self) -> Tensor:
        """Each c_vec (p, width)."""
        return torch.stack([*self._pooled.values()])


# Checks


def _times(name: str, given: Sequence[float] | Tensor) -> list[float]:
    """Distinct times as networks embed them, in float32."""
    values = given.tolist() if isinstance(given, Tensor) else given
    listed(name, values)
    exact = [number(f"{name}[{i}]", value) for i, value in enumerate(values)]
    expect(bool(exact), name, given, "must have at least one time")
    return [*dict.fromkeys(torch.tensor(exact, dtype=torch.float64).float().tolist())]


def _distinct(pooled: Tensor, network: nn.Module) -> Tensor:
    """Distinct pooled vectors, in float32 or wider."""
    width = getattr(network, "pooled_width", None)
    fits = isinstance(pooled, Tensor) and pooled.ndim == 2 and len(pooled) > 0
    if not fits or width not in (None, pooled.shape[1]):
        has = tuple(pooled.shape) if isinstance(pooled, Tensor) else repr(pooled)
        raise UserError(f"pooled: {has} must be vectors c_vec in a tensor, (p, {width or 'width'})")
    expect_finite("the source of pooled", pooled)
    vectors = wide(pooled.detach())
    return torch.stack([*dict(zip(fingerprints(vectors), vectors, strict=True)).values()])


def _prefixes(layers: Iterable[str]) -> list[str]:
    """Where networks with embeddings of their own are, like "base." and "control_net."."""
    return [name.removesuffix(TIME) for name in layers if name.split(".")[-1] == TIME]


def _check(network: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check that layers are those of a network, which can be replaced and is not trained."""
    name = type(network).__name__
    if any(layer.training for layer in layers.values()):
        raise UserError(f"{name} is in training mode, but tables serve sampling alone: call eval()")
    if not layers and is_tabulated(network):
        raise UserError(f"the modulation layers of {name} are tables already: {AGAIN}")
    prefixes = _prefixes(layers)
    embeddings = [at for at, layer in layers.items() if isinstance(layer, VectorEmbedding)]
    known = {prefix + embedding for prefix in prefixes for embedding in EMBEDDINGS}
    present = {at for at, _ in network.named_modules()}
    if not prefixes or {*embeddings} - known or {p + POOLED for p in prefixes} - {*embeddings}:
        raise UserError(
            f"{name} cannot be tabulated: its modulation must depend on `{TIME}` and `{POOLED}`, "
            f"but it has the embeddings {', '.join(embeddings) or 'of nothing'}"
        )
    if missing := [at for at in layers if at not in present]:
        raise UserError(f"layers: {name} has no {missing[0]}: they are those of another network")
    if isinstance(network, ParallelControlNet):
        raise UserError(f"{name} reads its base model: tabulate the ControlledMMDiT of both")


def expect_smaller(sizes: Sizes) -> None:
    """Raise UserError if tables would take more memory than the layers that they replace."""
    if sizes.tables > sizes.layers:
        raise UserError(
            f"the modulation tables would take {sizes.tables:,} bytes, more than the layers that "
            f"they replace, {sizes.layers:,}: sample with fewer prompts or steps at once, or "
            "without tables"
        )


def is_tabulated(module: nn.Module) -> bool:
    """Whether a network, or one in a module, has tables in place of modulation layers."""
    return any(isinstance(part, Tables) for part in module.modules())


def tabulated_adapters(module: nn.Module) -> dict[str, float]:
    """The adapters whose changes are part of tables, with their scales."""
    found: dict[str, float] = {}
    for part in module.modules():
        if isinstance(part, Tables):
            found |= part.scales
    return found


def expect_whole(network: nn.Module) -> None:
    """Raise UserError if a network lacks weights that a file of it would have."""
    if is_tabulated(network):
        raise UserError(
            f"this {type(network).__name__} has tables in place of its modulation layers, and "
            "cannot be saved: load the model again"
        )
