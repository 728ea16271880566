"""Frozen weights that are stored in fewer bits than they are multiplied in, one layer at a time.

A processor without bfloat16 instructions multiplies bfloat16 matrices four times slower than
float32 ones, and convolves with them hundreds of times slower; converting a weight when it is
needed costs little, and takes no memory for a second copy of the model. Weights in codes
(`mmdit.nn.block_codes`) take a quarter to a half of the memory of 16 bits.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmdit.dtypes import wide
from mmdit.nn.block_codes import Codes
from mmdit.nn.network import Network

HALVES = (torch.float16, torch.bfloat16)


class CodedWeight(Tensor):
    """The frozen weight of a linear layer that is kept in codes, and decoded whenever it is needed.

    It takes the place of a `Parameter`: it has the shape of the matrix and the dtype that the model
    computes in, so that adapters attach to its layer as to any other. Operations other than
    products read its values; none can change them. Its values are those of the decoded matrix,
    rounded to the dtype.

    Args:
        codes: the matrix.
        dtype: of the values that others see.
    """

    codes: Codes

    @staticmethod
    def __new__(cls, codes: Codes, dtype: torch.dtype) -> Self:
        device = codes.rows.device
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=device)
        made.codes = codes
        return made

    def __init__(self, codes: Codes, dtype: torch.dtype) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CodedWeight({self.codes.kind}, {tuple(self.shape)}, {self.dtype})"

    def dequantize(self) -> Tensor:
        """The values, in the dtype of this weight."""
        return self.codes.decoded(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """The memory that the codes take."""
        return self.codes.rows.nbytes

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["_rows"] if self.codes.scale is None else ["_rows", "_scale"]
        return names, (self.codes.kind, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> "CodedWeight":
        kind, dtype = context
        return CodedWeight(Codes(kind, inner["_rows"], inner.get("_scale")), dtype)

    @property
    def _rows(self) -> Tensor:
        return self.codes.rows

    @property
    def _scale(self) -> Tensor | None:
        return self.codes.scale

    def _with(self, change: Any, dtype: torch.dtype) -> "CodedWeight":
        """The same weight, with a change of the tensors that hold it."""
        kind, rows, scale = self.codes
        return CodedWeight(
            Codes(kind, change(rows), None if scale is None else change(scale)), dtype
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance([*args, kwargs.get("weight")][1], CodedWeight):
            return product(*args, **kwargs)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in (torch.ops.aten.detach, torch.ops.aten.alias):
            return args[0]._with(lambda tensor: tensor.detach(), args[0].dtype)
        if packet is torch.ops.aten.clone:
            return args[0]._with(lambda tensor: tensor.clone(), args[0].dtype)
        if packet is torch.ops.aten._to_copy:
            device, dtype = kwargs.get("device"), kwargs.get("dtype") or args[0].dtype
            blocking = {"non_blocking": kwargs.get("non_blocking", False)}
            return args[0]._with(lambda tensor: tensor.to(device, **blocking), dtype)
        if func._schema.is_mutable:
            raise RuntimeError(f"{func}: a weight that is kept in codes cannot be changed")
        args, kwargs = tree_map_only(CodedWeight, CodedWeight.dequantize, (args, kwargs))
        return func(*args, **kwargs)


class Product(torch.autograd.Function):
    """x W^T + b, where frozen W and b are converted to the dtype of x whenever they are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, as_dtype(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        to_bias = ctx.needs_input_grad[2]
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if to_bias else None
        return gradient @ as_dtype(weight, gradient.dtype), None, bias


def as_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype, decoded if it is kept in codes."""
    if isinstance(weight, CodedWeight):
        return weight.codes.decoded(dtype)
    return weight.to(dtype)


def plain(weight: Tensor) -> Tensor:
    """A weight as a tensor of numbers, decoded if it is kept in codes."""
    return weight.dequantize() if isinstance(weight, CodedWeight) else weight


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for a frozen weight that is stored in another form than that of its input."""
    result: Tensor = Product.apply(input, weight, bias)
    return result


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
        return product(x, weight, bias)
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
    """Whether a layer's weight is frozen in 16 bits, or kept in codes."""
    coded = isinstance(layer.weight, CodedWeight)
    return coded or (layer.weight.dtype in HALVES and not layer.weight.requires_grad)
