"""What each text encoder is worth: a pipeline in which only some of them speak (App. B.2)."""

import copy
import itertools
from collections.abc import Collection

from mmdit.pipeline import Pipeline
from mmdit.text.conditioning import ENCODERS, AbsentEncoder, TextConditioner, TextEncoder

SUBSETS = [  # all three first, none last
    tuple(kind for kind, speaks in zip(ENCODERS, speaking, strict=True) if speaks)
    for speaking in itertools.product((True, False), repeat=3)
]


def speaking(
    pipeline: Pipeline, kept: Collection[str], *, empty_prompt: str | None = None
) -> Pipeline:
    """The same pipeline, weights shared, in which the encoders not kept contribute zeros.

    Args:
        kept: of `ENCODERS`.
        empty_prompt: 'zeros' or 'encoded', as in `TextConditioner`; None leaves it as it is.
    """
    text = pipeline.text
    parts: dict[str, TextEncoder | AbsentEncoder] = {
        kind: encoder if kind in kept else AbsentEncoder.instead_of(encoder)
        for kind, encoder in zip(ENCODERS, text.encoders, strict=True)
    }
    view = copy.copy(pipeline)
    conditioner = TextConditioner(
        **parts,
        dropout=text.dropout,
        empty_prompt=text.empty_prompt if empty_prompt is None else empty_prompt,
    )
    view._modules = {**pipeline._modules, "text": conditioner.train(text.training)}
    return view
