"""The adapters that a config may ask for, each by its name: `adapter=lora adapter.rank=16`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from mmdit.adapters import layers
from mmdit.adapters.adapter import Adapter
from mmdit.adapters.layers import LoKr, LoRA
from mmdit.adapters.words import embedding_of, new_words
from mmdit.checks import listed, one_of
from mmdit.errors import UserError
from mmdit.text.conditioning import ENCODERS, TextEncoder


def lora(
    root: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str = "attention",
    parts: Sequence[str] = ("mmdit",),
    blocks: Sequence[int] | str | None = None,
    base: Mapping[str, Any] | None = None,
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
    base: Mapping[str, Any] | None = None,
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
    base: Mapping[str, Any] | None = None,
) -> Adapter:
    """A new LoKr for a pipeline.

    Args:
        factor, rank, alpha: see `LoKr`.

    Other arguments are those of `lora`.
    """
    make = partial(LoKr, factor=factor, rank=rank, alpha=alpha)
    return Adapter.over(root, make, targets=targets, parts=parts, blocks=blocks, base=base)


def textual_inversion(
    root: nn.Module,
    *,
    words: Sequence[str],
    vectors: int | None = None,
    start: str | None = None,
    parts: Sequence[str] = ENCODERS,
    base: Mapping[str, Any] | None = None,
) -> Adapter:
    """New words for the text encoders of a pipeline, and nothing else (Gal et al. 2022).

    Args:
        root: the pipeline.
        words: what prompts call them: a new one, "<cat-toy>", or one whose meaning is to change.
        vectors, start: see `new_words`.
        parts: the encoders; those that the pipeline lacks are left out.
        base: see `Adapter`.

    Raises:
        UserError: an argument makes no sense, or none of the encoders is there.

    Example:
        pipe.load_lora(textual_inversion(pipe, words=["<cat-toy>"], start="toy"))
    """
    listed("words", words)
    listed("parts", parts)
    changes = {}
    for part in parts:
        one_of("parts", part, ENCODERS)
        encoder = root.get_submodule(f"text.{part}")
        if isinstance(encoder, TextEncoder):
            found = new_words(encoder, words, vectors=vectors, start=start)
            changes[embedding_of(part)] = found
    if not changes:
        raise UserError(f"parts={list(parts)}: the model has none of these text encoders")
    return Adapter(changes=changes, base=base)
