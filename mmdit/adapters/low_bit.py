"""Frozen weights in 8 bits, under adapters that are trained: a quarter of the memory of float32."""

import torch
from torch import nn

from mmdit.errors import UserError

KINDS = ("int8", "fp8")


def quantize(module: nn.Module, kind: str) -> None:
    """Store the linear layers of a module's blocks in 8 bits, by torchao; they compute in bfloat16.

    Layers outside of blocks (embeddings, the output), norms and biases become bfloat16.

    Args:
        module: a network; changed in place.
        kind: 'int8' (a scale for each output) or 'fp8' (e4m3).

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(
            f'base_dtype={kind} needs torchao, which is not installed: pip install "sd3-mmdit'
            '[low_bit]", or choose base_dtype=bf16'
        ) from error
    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]()
    module.to(torch.bfloat16)
    inside = ("blocks", "last_block")
    quantize_(
        module,
        config,
        lambda layer, name: (
            isinstance(layer, nn.Linear)
            and name.split(".")[0] in inside
            and bool(layer.weight.any())  # of zeros, the scale would be zero
        ),
    )
