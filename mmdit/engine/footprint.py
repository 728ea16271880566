"""What a training step keeps in memory, found by rehearsing it on tensors that hold no values.

The real modules run forward and backward on the meta device, or as fake tensors of a CPU; a ledger
counts the storages that are alive at each moment. What a process of many would do beside that,
gather weights and reduce gradients, is rehearsed at the moments at which FSDP2 does it.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from mmdit.engine.activations import blocks_of

WEIGHTS, CAST, GRADIENTS, KEPT = "weights", "weights in use", "gradients", "activations"


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive, by what they hold; and all of it at the peak.

    What nobody claims is an activation; a weight cast to another precision is a weight in use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()  # each kind at its own peak
        self._kinds: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        casts = func is torch.ops.aten._to_copy.default and self._kind(args[0]) == WEIGHTS
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.claim(tensor, CAST if casts else KEPT, again=False)
        return out

    def _kind(self, tensor: Tensor) -> str | None:
        return self._kinds.get(id(tensor.untyped_storage()), (None, 0))[0]

    def claim(self, tensor: Tensor, kind: str, *, counted: bool = True, again: bool = True) -> None:
        """Say what a storage holds.

        Args:
            counted: whether its bytes are.
            again: whether a storage that is known is something else from now on.
        """
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._kinds.get(key)
        if known is not None and not again:
            return
        if known is None:
            weakref.finalize(storage, self._forget, key).atexit = False
        else:
            self.held[known[0]] -= known[1]
        size = storage.nbytes() if counted else 0
        self._kinds[key] = (kind, size)
        self.held[kind] += size
        self.largest[kind] = max(self.largest[kind], self.held[kind])
        if self.held.total() > self.peak.total():
            self.peak = self.held.copy()

    def _forget(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.held[kind] -= size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the storages of these tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum(s.nbytes() for s in {id(s): s for s in storages}.values())


# As on CUDA


PRODUCTS = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
}
# What autocast computes in float32.
WIDE = {
    *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.mse_loss, F.cosine_similarity),
    *(torch.softmax, torch.exp, torch.log, torch.rsqrt, torch.pow, torch.square, torch.sum),
    *(Tensor.softmax, Tensor.exp, Tensor.log, Tensor.rsqrt, Tensor.pow, Tensor.square, Tensor.sum),
    *(torch.cumsum, Tensor.cumsum, torch.norm, Tensor.norm, Tensor.__pow__),
}


class AsOnCUDA(TorchFunctionMode):
    """Lets tensors on the meta device, which knows neither, have CUDA's autocast and attention.

    Attention keeps queries, keys, values, its output and a number for each query, and no
    probabilities.

    Args:
        dtype: of products; float32 is no autocast.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self._depth = dtype, 0
        self._cast: dict[int, Tensor] = {}  # weights, kept until the end as autocast does

    def __enter__(self) -> Self:
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._cast.clear()
        super().__exit__(*error)

    def enter_again(self, module: nn.Module) -> None:
        """Let blocks that are recomputed enter this: a backward pass turns such modes off.

        To be called before `recompute`.
        """
        for block in blocks_of(module):
            block.forward = partial(self._entered, block.forward)

    def _entered(self, forward: Callable[..., Any], *args: Any) -> Any:
        with nullcontext() if self._depth else self:
            return forward(*args)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and func in PRODUCTS | WIDE:
            dtype = self.dtype if func in PRODUCTS else torch.float32
            args, kwargs = tree_map(partial(self._in, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)

    def _in(self, dtype: torch.dtype, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._cast:
            self._cast[id(value)] = value.to(dtype)
        return self._cast[id(value)]


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What CUDA's attention keeps: flash, or where it cannot, the memory-efficient one."""
    aten = torch.ops.aten
    if attn_mask is None and q.dtype != torch.float32:
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
    else:
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        out = aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, True, 0.0, is_causal, scale=scale
        )
    return out[0]


# As one of many processes


class Share:
    """Of a weight among `count` processes: rows of the first axis, as FSDP2 deals them out."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, shape: torch.Size) -> torch.Size:
        """Shape of the largest share; others hold as much, filled up."""
        first, *rest = shape or (1,)
        return torch.Size((math.ceil(first / self.count), *rest))

    def gathered(self, weight: Tensor) -> int:
        """Values of all shares, filled up."""
        return self.count * math.prod(self(weight.shape))


class _Group:
    """The weights that are gathered together: a block's, or those of a part outside of blocks."""

    def __init__(self, module: nn.Module, weights: list[nn.Parameter], share: Share) -> None:
        self.module, self.weights = module, weights
        self.own = sum(math.prod(share(weight.shape)) for weight in weights)
        self.size = self.own * share.count
        self.arriving: Tensor | None = None  # all shares, as they arrive
        self.gathered: Tensor | None = None
        self.summed: Tensor | None = None  # gradients of the parts of a batch so far
        self.reduced: Tensor | None = None  # this process's share of the gradient
        self.missing = 0  # gradients that the backward pass still owes


class Gathering:
    """What FSDP2 allocates around the computation of one part of a model, at the same moments.

    A block's weights arrive in one buffer and are copied out of it; they go when the block has
    computed, and come again for its backward pass, while those of the block before arrive already.
    Gradients are copied into one float32 buffer, which stays until the next block's; of the result
    a share stays. Weights outside of blocks stay gathered from the forward pass to the end.

    Args:
        part: what is trained, in the precision of the forward pass.
        ledger: told of all this.
        share: of each process.
        gloo: whether tensors travel by gloo, which makes a copy of what it exchanges.
    """

    def __init__(self, part: nn.Module, ledger: Ledger, share: Share, *, gloo: bool) -> None:
        self.ledger, self.gloo = ledger, gloo
        self.quiet = False  # gradients are kept whole and not yet reduced
        self._leaving: Tensor | None = None  # the buffer of the group gathered last
        self._reducing: Tensor | None = None
        blocks = list(blocks_of(part))
        inside = {weight for block in blocks for weight in block.parameters()}
        outside = [weight for weight in part.parameters() if weight not in inside]
        self.groups = [_Group(block, list(block.parameters()), share) for block in blocks]
        self.groups.append(_Group(part, outside, share))
        for index, group in enumerate(self.groups):
            group.module.register_forward_pre_hook(partial(self._before, index))
            group.module.register_forward_hook(partial(self._after, index))
            for weight in group.weights:
                ledger.claim(weight, WEIGHTS, counted=False)
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(partial(self._arrived, group))

    def _new(self, size: int, dtype: torch.dtype, kind: str) -> Tensor:
        buffer = torch.empty(size, dtype=dtype, device=self.groups[-1].weights[0].device)
        self.ledger.claim(buffer, kind)
        return buffer

    def _gather(self, group: _Group) -> None:
        if group.gathered is not None or group.arriving is not None:
            return
        dtype = group.weights[0].dtype
        leaving = self._new(group.own, dtype, CAST) if dtype != torch.float32 else None
        group.arriving = self._new(group.size, dtype, CAST)
        if self.gloo:
            self._new(group.size, dtype, CAST)
        del leaving

    def _copy_out(self, group: _Group) -> None:
        if group.gathered is None:
            group.gathered = self._new(group.size, group.weights[0].dtype, CAST)

    def _before(self, index: int, *_: Any) -> None:
        group = self.groups[index]
        self._gather(group)
        self._leaving = None
        self._copy_out(group)
        self._leaving, group.arriving = group.arriving, None

    def _after(self, index: int, _: nn.Module, given: Any, out: Any) -> None:
        group = self.groups[index]
        group.missing = sum(weight.requires_grad for weight in group.weights)
        if group is self.groups[-1]:
            self._leaving = None
        else:
            group.gathered = None
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._before_backward, index))

    def _before_backward(self, index: int, _: Tensor) -> None:
        group = self.groups[index]
        if not group.missing:
            return
        self._gather(group)
        self._copy_out(group)
        group.arriving = None
        if index:
            self._gather(self.groups[index - 1])

    def _arrived(self, group: _Group, weight: Tensor) -> None:
        assert weight.grad is not None
        self.ledger.claim(weight.grad, GRADIENTS)
        group.missing -= 1
        if group.missing == 0:
            self._reduce(group)

    def _reduce(self, group: _Group) -> None:
        group.missing, group.gathered = 0, None
        if self.quiet:
            if group.summed is None:
                group.summed = self._new(group.size, torch.float32, GRADIENTS)
        else:
            self._reducing = None
            self._reducing = self._new(group.size, torch.float32, GRADIENTS)
        for weight in group.weights:
            weight.grad = None
        if not self.quiet:
            group.summed = None
            if group.reduced is None:
                group.reduced = self._new(group.own, torch.float32, GRADIENTS)
            if self.gloo:
                self._new(group.size, torch.float32, GRADIENTS)

    def finish(self) -> None:
        """At the end of a backward pass: also reduce groups of which a weight had no gradient."""
        for group in self.groups:
            if any(weight.grad is not None for weight in group.weights):
                self._reduce(group)
            group.arriving = group.gathered = None
        self._reducing = None
