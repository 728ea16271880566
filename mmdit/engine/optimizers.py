"""Optimizers, and what of them a checkpoint keeps.

Which weights decay, and which ones Muon turns, follows from the kind of layer that holds them and
from their dimensions, never from names.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mmdit.checks import expect, listed, number
from mmdit.errors import UserError
from mmdit.models.blocks import Block
from mmdit.models.clip import CLIPLayer
from mmdit.models.t5 import T5Layer

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
HIDDEN = (Block, CLIPLayer, T5Layer)  # the layers that a transformer repeats


class Kinds(NamedTuple):
    """The trainable weights of a module, each once."""

    hidden: list[nn.Parameter]  # matrices (m, n) inside a transformer's layers
    matrices: list[nn.Parameter]  # other matrices and kernels: they too map activations
    others: list[nn.Parameter]  # biases, norms, gains, embeddings, positions


def by_kind(module: nn.Module) -> Kinds:
    """Sort the weights of a module; one that two layers share is what both take it for."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for owner in module.modules():
        for weight in owner.parameters(recurse=False):
            if weight.requires_grad:
                owners.setdefault(weight, []).append(owner)
    blocks = [block for block in module.modules() if isinstance(block, HIDDEN)]
    inside = {layer for block in blocks for layer in block.modules()}
    kinds = Kinds([], [], [])
    for weight, layers in owners.items():
        if weight.ndim < 2 or not all(isinstance(layer, MATRICES) for layer in layers):
            kinds.others.append(weight)
        elif weight.ndim == 2 and inside.issuperset(layers):
            kinds.hidden.append(weight)
        else:
            kinds.matrices.append(weight)
    return kinds


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups in which matrices and kernels decay, and all else does not."""
    kinds = by_kind(module)
    return [
        {"params": [*kinds.hidden, *kinds.matrices], "weight_decay": weight_decay},
        {"params": kinds.others, "weight_decay": 0.0},
    ]


def _checked_betas(
    lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> tuple[float, float]:
    """The betas of AdamW; raises UserError where they or other arguments make no sense."""
    for field, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        number(f"optimizer.{field}", value, 0)
    listed("optimizer.betas", betas)
    expect(len(betas) == 2, "optimizer.betas", betas, "must be two numbers")
    for i, beta in enumerate(betas):
        number(f"optimizer.betas[{i}]", beta, 0, below=1)
    return betas[0], betas[1]


def adamw(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable weights; decay is for matrices, not for embeddings and vectors.

    Args:
        module: its parameters that require gradients are trained.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
    """
    beta_1, beta_2 = _checked_betas(lr, betas, eps, weight_decay)
    groups = decay_groups(module, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(beta_1, beta_2), eps=eps, fused=True)


def adamw_8bit(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """The same with moments of 8 bits in blocks of 256 (Dettmers et al. 2022), by torchao.

    Moments of fewer than 4096 values, or of a number that 256 does not divide, stay float32.

    Raises:
        UserError: torchao is not installed, or the weights are spread over processes.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer=adamw_8bit needs torchao, which is not installed: pip install torchao, or "
            "choose optimizer=adamw"
        ) from error
    if any(isinstance(weight, DTensor) for weight in module.parameters()):
        raise UserError(
            "optimizer=adamw_8bit keeps moments that FSDP cannot spread: choose parallel=ddp, or "
            "optimizer=adamw"
        )
    beta_1, beta_2 = _checked_betas(lr, betas, eps, weight_decay)
    return AdamW8bit(decay_groups(module, weight_decay), lr=lr, betas=(beta_1, beta_2), eps=eps)


def muon(
    module: nn.Module,
    *,
    lr: float,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> "MuonWithAdamW":
    """Muon for the matrices inside a transformer's layers, AdamW for the rest (Jordan et al. 2024).

    One learning rate serves both: Muon's steps are scaled to the root mean square of AdamW's, as in
    Liu et al. 2025 ("Muon is scalable for LLM training").

    Args:
        module: its parameters that require gradients are trained.
        lr, weight_decay: of both; what decays is what decays in `adamw`.
        momentum: Muon's, with Nesterov's look ahead.
        betas, eps: AdamW's.

    Raises:
        UserError: the module has no transformer layers to train.
    """
    kinds = by_kind(module)
    if not kinds.hidden:
        raise UserError(
            f"optimizer=muon is for the matrices of transformer layers, and {type(module).__name__}"
            " has none to train: choose optimizer=adamw"
        )
    number("optimizer.momentum", momentum, 0, below=1)
    beta_1, beta_2 = _checked_betas(lr, betas, eps, weight_decay)
    rest = [
        {"params": kinds.matrices, "weight_decay": weight_decay},
        {"params": kinds.others, "weight_decay": 0.0},
    ]
    return MuonWithAdamW(
        torch.optim.Muon(
            kinds.hidden,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=lr, betas=(beta_1, beta_2), eps=eps, fused=True),
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers as one: groups and state are those of both, one after the other."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        self._sizes = tuple(len(part.param_groups) for part in self.parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts see the same groups and state, whatever is written into them."""
        split = self._sizes[0]
        for part, groups in zip(
            self.parts, (self.param_groups[:split], self.param_groups[split:]), strict=True
        ):
            part.param_groups, part.state = groups, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:  # called by load_state_dict, too
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Both parts, on gradients that the closure, where there is one, makes once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    """The rate of each parameter group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_lr(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Give each parameter group its rate."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):  # where the step is compiled: a new number would be too
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<weight>:<moment>` -> tensor, of every trained weight.

    Moments of 8 bits are several tensors, `<weight>:<moment>.<part>`.
    """
    found: dict[str, Tensor] = {}
    for name, weight in module.named_parameters():
        for moment, value in optimizer.state.get(weight, {}).items():
            if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
                parts = value.__tensor_flatten__()[0]
                found |= {f"{name}:{moment}.{part}": getattr(value, part) for part in parts}
            else:
                found[f"{name}:{moment}"] = value
    return found


def room_for(
    module: nn.Module, facts: Mapping[str, tuple[Sequence[int], torch.dtype]]
) -> dict[str, Tensor]:
    """Tensors that what `moments` gave can be read into, spread over processes as weights are.

    Args:
        facts: of each of them, shape and dtype.
    """
    weights = dict(module.named_parameters())
    room: dict[str, Tensor] = {}
    for key, (shape, dtype) in facts.items():
        weight = weights.get(key.rpartition(":")[0])
        if isinstance(weight, DTensor) and weight.shape == torch.Size(shape):
            room[key] = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        else:
            room[key] = torch.empty(tuple(shape), dtype=dtype)
    return room


def load_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `moments` gave, onto the device of each weight."""
    names = {weight: name for name, weight in module.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, moment = key.rpartition(":")
        by_name[name][moment] = value
    packed = optimizer.state_dict()
    indices = [index for group in packed["param_groups"] for index in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    packed["state"] = {
        index: _joined(by_name[names[weight]], weight)
        for index, weight in zip(indices, weights, strict=True)
        if names[weight] in by_name
    }
    optimizer.load_state_dict(packed)


def _joined(state: Mapping[str, Tensor], weight: nn.Parameter) -> dict[str, Tensor]:
    """The moments of one weight, those of 8 bits put together from their parts."""
    whole = {moment: value for moment, value in state.items() if "." not in moment}
    for moment in {moment.partition(".")[0] for moment in state} - whole.keys():
        from torchao.optim.subclass_8bit import OptimState8bit

        parts = {part: state[f"{moment}.{part}"] for part in ("codes", "scale", "qmap")}
        signed = bool(parts["qmap"].min() < 0)
        whole[moment] = OptimState8bit(**parts, signed=signed, dtype=weight.dtype)
    return whole
