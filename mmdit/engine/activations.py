"""Activation checkpointing: which activations are kept, and which are recomputed."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mmdit.checks import one_of
from mmdit.engine.optimizers import HIDDEN

# Products and attention: expensive to recompute, cheap to store.
SAVED_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operation in SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, _policy)},
    "full": {},
}


def recompute(module: nn.Module, activations: str) -> None:
    """Let the blocks of a module recompute activations in the backward pass.

    Args:
        module: what is trained; its copies for the moving average must have been made.
        activations: 'none' recomputes nothing; 'selective' all but products and attention; 'full'
            everything inside a block, which costs about a third more time.

    Raises:
        UserError: `activations` is none of these.
    """
    one_of("activation_checkpointing", activations, ACTIVATIONS)
    options = ACTIVATIONS[activations]
    if options is None:
        return
    for block in blocks_of(module):
        if any(weight.requires_grad for weight in block.parameters()):
            # In place: a wrapping module would change the names of the weights.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **options
            )


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that a transformer repeats: what is gathered, recomputed, compiled at a time."""
    return (part for part in module.modules() if isinstance(part, HIDDEN))
