"""The adapters that a config may ask for, each by its name: `adapter=lora adapter.rank=16`."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from mmdit.adapters import layers
from mmdit.adapters.adapter import Adapter
from mmdit.adapters.layers import LoKr, LoRA


def lora(
    root: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str = "attention",
    parts: Sequence[str] = ("mmdit",),
    blocks: Sequence[int] | str | None = None,
    base: Mapping[str, str] | None = None,
) -> Adapter:
    """A new LoRA for a pipeline.

    Args:
        root: the pipeline.
        rank, alpha, dropout: see `LoRA`.
        targets, parts, blocks: the layers, see `targeted`.
        base: see `Adapter`.

    Example:
        pipe.load_lora(lora(pipe, rank=16, targets="attention+mlp"))
    """
    make = partial(LoRA, rank=rank, alpha=alpha, dropout=dropout)
    return Adapter.over(root, make, targets=targets, parts=parts, blocks=blocks, base=base)


def dora(
    root: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str = "attention",
    parts: Sequence[str] = ("mmdit",),
    blocks: Sequence[int] | str | None = None,
    base: Mapping[str, str] | None = None,
) -> Adapter:
    """A new DoRA for a pipeline; arguments are those of `lora`."""
    make = partial(layers.dora, rank=rank, alpha=alpha, dropout=dropout)
    return Adapter.over(root, make, targets=targets, parts=parts, blocks=blocks, base=base)


def lokr(
    root: nn.Module,
    *,
    factor: int | None = 16,
    rank: int | None = None,
    alpha: float | None = None,
    targets: str = "attention",
    parts: Sequence[str] = ("mmdit",),
    blocks: Sequence[int] | str | None = None,
    base: Mapping[str, str] | None = None,
) -> Adapter:
    """A new LoKr for a pipeline.

    Args:
        factor, rank, alpha: see `LoKr`.

    Other arguments are those of `lora`.
    """
    make = partial(LoKr, factor=factor, rank=rank, alpha=alpha)
    return Adapter.over(root, make, targets=targets, parts=parts, blocks=blocks, base=base)
