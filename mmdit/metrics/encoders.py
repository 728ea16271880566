"""Ablation of text encoders: pipelines that use only some of them (App. B.2)."""

import copy
import itertools
from collections.abc import Collection

from mmdit.pipeline import Pipeline
from mmdit.text.conditioning import ENCODERS, AbsentEncoder, TextConditioner, TextEncoder

SUBSETS = [  # all three first, none last
    tuple(kind for kind, used in zip(ENCODERS, mask, strict=True) if used)
    for mask in itertools.product((True, False), repeat=3)
]


def with_encoders(
    pipeline: Pipeline, kept: Collection[str], *, empty_prompt: str | None = None
) -> Pipeline:
    """A view of a pipeline with shared weights, in which encoders not in `kept` give zeros.

    Args:
        pipeline: the pipeline.
        kept: the encoders to use, from `ENCODERS`.
        empty_prompt: 'zeros' or 'encoded', as in `TextConditioner`; None keeps the pipeline's.
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
