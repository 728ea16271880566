"""Changes of a linear layer W x, with few weights of their own: LoRA, DoRA and LoKr.

    LoRA   W + s B A               A (r, in), B (out, r), s = alpha / r   (Hu et al. 2021)
    DoRA   m (W + s B A) / |W + s B A|         one norm for each output   (Liu et al. 2024)
    LoKr   W + s kron(W_1, W_2)                     W_1 and W_2 are small (Yeh et al. 2023)

A new change is exactly zero, so that training starts from the outputs of the model itself.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mmdit.checks import number, whole_number
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.nn.stored import linear
from mmdit.registry import register


class Change(nn.Module, ABC):
    """A change of the weight of a linear layer.

    Args:
        inputs, outputs: widths of the layer.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

    @abstractmethod
    def of_weight(self, weight: Tensor) -> Tensor:
        """What is added to a weight (out, in), in float32 or wider."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What is added to the output of a layer.

        Args:
            x: input (..., in).
            y: output (..., out) of the layer itself.
            weight, bias: of the layer.
        """

    def reset_parameters(self, weight: Tensor) -> None:
        """Draw the weights of a new change, which is zero; `weight` is that of the layer."""


@register
class LoRA(Change):
    """B A, scaled by alpha / rank.

    Args:
        inputs, outputs: widths of the layer.
        rank: of B A.
        alpha: the scale is alpha / rank; None is the rank, a scale of 1.
        dropout: probability with which an input of A is zeroed in training.

    Raises:
        UserError: the rank is not from 1 to the layer's larger width, alpha is not positive, or
            dropout is not in [0, 1).
    """

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(inputs, outputs)
        whole_number("rank", rank, most=max(inputs, outputs))
        alpha = rank if alpha is None else number("alpha", alpha, above=0)
        self.dropout = number("dropout", dropout, 0, below=1)
        self.rank, self.scale = rank, alpha / rank
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor) -> None:
        """A as in the paper's code, B zero."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def of_weight(self, weight: Tensor) -> Tensor:
        return self.scale * (wide(self.up.weight) @ wide(self.down.weight))

    def forward(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.linear(x, self.down.weight.to(x.dtype))
        return self.scale * F.linear(hidden, self.up.weight.to(hidden.dtype))


@register
class DoRA(Change):
    """A change of the weight's directions, and a trained norm for each output.

    Norms are of the changed weight, and constants for the gradient, as in PEFT and LyCORIS.

    Args:
        change: of the directions: a `LoRA` or a `LoKr`.
        per_input: whether norms are those of columns, one for each input; older LyCORIS files.
    """

    def __init__(self, *, change: Change, per_input: bool = False) -> None:
        super().__init__(change.inputs, change.outputs)
        self.change, self.axis = change, 0 if per_input else 1
        self.magnitude = nn.Parameter(torch.ones(self.inputs if per_input else self.outputs))

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor) -> None:
        self.change.reset_parameters(weight)
        self.magnitude.copy_(self.norm(weight).flatten())

    def norm(self, weight: Tensor) -> Tensor:
        """The norms of the changed weight, (out, 1) or (1, in)."""
        with torch.autocast(weight.device.type, enabled=False):
            changed = dense(weight) + self.change.of_weight(weight)
            return torch.linalg.vector_norm(changed, dim=self.axis, keepdim=True)

    def _ratio(self, weight: Tensor) -> Tensor:
        """m over the norms, (out, 1) or (1, in); exactly one in a new change.

        Also where the changed weight is zero, as that of a new modulation is: it has no direction.
        """
        norm = self.norm(weight).detach()
        ratio = wide(self.magnitude).view_as(norm) / torch.where(norm > 0, norm, 1)
        return torch.where(norm > 0, ratio, 1)

    def of_weight(self, weight: Tensor) -> Tensor:
        ratio = self._ratio(weight)
        return (ratio - 1) * dense(weight) + ratio * self.change.of_weight(weight)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ratio = self._ratio(weight).flatten().to(y.dtype)
        if self.axis == 0:  # of inputs: the layer itself sees other inputs
            own = F.linear((ratio - 1) * x, weight.to(x.dtype))
            return own + self.change(ratio * x, y, weight, bias)
        without_bias = y if bias is None else y - bias
        return (ratio - 1) * without_bias + ratio * self.change(x, y, weight, bias)


@register
class LoKr(Change):
    """A Kronecker product, of which the larger factor may be of low rank.

    Args:
        inputs, outputs: widths of the layer.
        factor: the first matrix is (a, b), where a and b are the largest divisors of `outputs` and
            `inputs` up to `factor`; None takes the most even split, with the smallest product.
        rank: of the second matrix; None leaves it whole.
        alpha: the scale is alpha / rank; of whole matrices it is 1. None is the rank.
        first: shape (a, b) of the first matrix where a file states it, instead of `factor`.
        first_rank: rank of the first matrix, in files that split it as well.

    Raises:
        UserError: a number is out of range, or the shapes do not give the layer's.
    """

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        factor: int | None = 16,
        rank: int | None = None,
        alpha: float | None = None,
        first: Sequence[int] | None = None,
        first_rank: int | None = None,
    ) -> None:
        super().__init__(inputs, outputs)
        if first is None:
            first = [split(outputs, factor), split(inputs, factor)]
        (a, b), self.rank = first, rank
        if outputs % a or inputs % b:
            raise UserError(
                f"LoKr: {a} x {b} does not divide a layer of {outputs} x {inputs} into blocks"
            )
        c, d = outputs // a, inputs // b
        for name, value in (("rank", rank), ("first_rank", first_rank)):
            if value is not None:
                whole_number(f"LoKr: {name}", value)
        own = rank or first_rank
        alpha = float(own or 1) if alpha is None else number("alpha", alpha, above=0)
        self.alpha, self.scale = alpha, alpha / own if own else 1.0
        self.first = Factor(a, b, first_rank)
        self.second = Factor(c, d, rank)

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor) -> None:
        """The first matrix is drawn, the second is zero."""
        self.first.reset_parameters(zero=False)
        self.second.reset_parameters(zero=True)

    def of_weight(self, weight: Tensor) -> Tensor:
        return self.scale * torch.kron(wide(self.first()), wide(self.second()))

    def forward(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        first, second = (matrix().to(x.dtype) for matrix in (self.first, self.second))
        blocks = rearrange(x, "... (b d) -> ... b d", b=first.shape[1])
        # kron(W_1, W_2) x = W_1 X W_2^T, with x as the rows of X.
        return self.scale * rearrange(first @ F.linear(blocks, second), "... a c -> ... (a c)")


class Factor(nn.Module):
    """A matrix (m, n), whole or as a product of two of a low rank."""

    def __init__(self, m: int, n: int, rank: int | None) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.empty(m, n)) if rank is None else None
        self.up = None if rank is None else nn.Parameter(torch.empty(m, rank))
        self.down = None if rank is None else nn.Parameter(torch.empty(rank, n))

    def reset_parameters(self, *, zero: bool) -> None:
        last = self.whole if self.up is None else self.up
        assert last is not None
        if self.down is not None:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        if zero:
            nn.init.zeros_(last)
        else:
            nn.init.kaiming_uniform_(last, a=math.sqrt(5))

    def forward(self) -> Tensor:
        if self.whole is not None:
            return self.whole
        assert self.up is not None and self.down is not None
        return self.up @ self.down


def dora(*, inputs: int, outputs: int, **options: Any) -> DoRA:
    """A low-rank change with trained norms; options are those of `LoRA`."""
    return DoRA(change=LoRA(inputs=inputs, outputs=outputs, **options))


@register
class Whole(Change):
    """A change of full rank, as files store where nothing smaller is exact.

    Args:
        inputs, outputs: widths of the layer.
    """

    def __init__(self, *, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.matrix = nn.Parameter(torch.zeros(outputs, inputs))

    def of_weight(self, weight: Tensor) -> Tensor:
        return wide(self.matrix)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.matrix.to(x.dtype))


def dense(weight: Tensor) -> Tensor:
    """A weight in float32 or wider, that of a quantized layer as it is computed with."""
    quantized = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    return wide(weight.dequantize() if quantized else weight)


def split(width: int, factor: int | None) -> int:
    """The largest divisor of a width up to `factor`; None is up to its square root."""
    most = math.isqrt(width) if factor is None else whole_number("factor", factor)
    return max(divisor for divisor in range(1, min(most, width) + 1) if width % divisor == 0)


class AdaptedLinear(nn.Linear):
    """A linear layer with the changes of adapters; its weight and bias are those of another.

    So the keys of a model stay as they are, and those of adapters come beside them.

    Args:
        layer: the layer that it takes the place of.

    Attributes:
        changes: by the name of their adapter.
        scales: factor of each change.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.changes = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y = changed = linear(x, self.weight, self.bias)
        for name, change in self.changes.items():
            changed = changed + self.scales[name] * change(x, y, self.weight, self.bias)
        return changed

    @torch.no_grad()
    def fused_weight(self) -> Tensor:
        """The weight with all changes added in float32, in its own dtype."""
        total = dense(self.weight).clone()
        for name, change in self.changes.items():
            assert isinstance(change, Change)
            total += self.scales[name] * change.of_weight(self.weight)
        return total.to(self.weight.dtype)

    def without(self) -> nn.Linear:
        """The layer that this one took the place of."""
        return _linear(self.weight, self.bias).train(self.training)


class FusedLinear(nn.Linear):
    """A linear layer whose weight contains the changes of adapters, which it can take out again.

    Args:
        layer: the layer with the changes.

    Attributes:
        scales: factor of each change.
    """

    def __init__(self, layer: AdaptedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.fused_weight(), layer.weight.requires_grad)
        self.bias = layer.bias
        self.scales: dict[str, float] = layer.scales
        # Detached, so that it is not registered as a parameter.
        self._own: Tensor = layer.weight.detach()
        self.train(layer.training)

    def without(self) -> nn.Linear:
        """The layer without the changes, to the last bit."""
        own = nn.Parameter(self._own.to(self.weight), self.weight.requires_grad)
        return _linear(own, self.bias).train(self.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around a weight and a bias that exist."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer
