"""Frozen weights that are stored in 16 bits and multiplied in float32, one layer at a time.

A processor without bfloat16 instructions multiplies bfloat16 matrices four times slower than
float32 ones, and convolves with them hundreds of times slower; converting a weight when it is
needed costs little, and takes no memory for a second copy of the model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.dtypes import wide
from mmdit.nn.network import Network

HALVES = (torch.float16, torch.bfloat16)


class Product(torch.autograd.Function):
    """x W^T + b, where frozen W and b are converted to the dtype of x whenever they are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class StoredLinear(nn.Linear):
    """A linear layer whose weight is frozen, and stored in another dtype than its input's."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for a weight that may be stored in 16 bits where x has more."""
    if weight.dtype in HALVES and x.dtype not in HALVES:
        product: Tensor = Product.apply(x, weight, bias)
        return product
    return F.linear(x, weight, bias)


def compute_in_float32(module: nn.Module) -> None:
    """Let the networks in a module compute in float32.

    Linear layers and embeddings that are frozen stay stored as they are. All other weights become
    float32, convolutions included.
    """
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and is_stored(layer):
            module.set_submodule(name, StoredLinear(layer))
    for part in module.modules():
        if isinstance(part, Network):
            part.compute_dtype = torch.promote_types(part.compute_dtype, torch.float32)
        if isinstance(part, nn.Linear | nn.Embedding) and is_stored(part):
            continue
        for weight in part.parameters(recurse=False):
            weight.data = wide(weight.data)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.dtype in HALVES:
                setattr(part, name, wide(buffer))


def is_stored(layer: nn.Linear | nn.Embedding) -> bool:
    """Whether a layer's weight is frozen in 16 bits."""
    return layer.weight.dtype in HALVES and not layer.weight.requires_grad
