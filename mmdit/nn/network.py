"""Networks that state the dtype they compute in, so that no layer has to be asked."""

from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A module that states its dtype, `compute_dtype`, and casts its inputs to it.

    Its layers receive that dtype, and no code asks a weight for its own. So any layer may be
    replaced, for instance by one that stores 8-bit weights and dequantizes them to the dtype of
    its input:

        >>> pipe.mmdit.context_embedding = Int8Linear(pipe.mmdit.context_embedding)

    The compute dtype starts as PyTorch's default dtype and follows `.to()`, `.half()` and the like.
    Code that assigns tensors of another dtype sets it too, as loaders do.
    """

    compute_dtype: torch.dtype

    def __init__(self) -> None:
        super().__init__()
        self.compute_dtype = torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return next(chain(self.buffers(), self.parameters())).device

    def cast(self, x: Tensor) -> Tensor:
        """x on the device of this network, in the dtype that it computes in."""
        return x.to(self.device, self.compute_dtype)

    def _apply(self, fn, recurse=True) -> Self:  # what .to(), .cuda() and .half() go through
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device="cpu")).dtype
        return self


def set_compute_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """State the dtype of all networks in a module, where e.g. FSDP casts their weights to it."""
    for network in module.modules():
        if isinstance(network, Network):
            network.compute_dtype = dtype
