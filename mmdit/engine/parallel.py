"""How a model is spread over processes, applied from outside: no network knows of it.

    Single   one process
    DDP      each process holds all; gradients are averaged
    FSDP     each holds a share of every weight, gradient, moment and average (ZeRO-3)

Weights stay float32 in all of them. Frozen parts (the autoencoder, encoders that are not trained)
are not spread: every process holds them, in whatever precision they were given.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmdit.checks import whole_number
from mmdit.engine.activations import blocks_of
from mmdit.errors import UserError
from mmdit.nn.network import set_compute_dtype
from mmdit.programs import command

Loss = Callable[[Any], Tensor]


class Parallel(Protocol):
    """A way to spread a model over processes."""

    def place(
        self, module: nn.Module, average: nn.Module, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Spread what is trained and its moving average, before the optimizer is made.

        Args:
            module, average: alike; on `device`.
            device: of this process.
            dtype: of the forward pass.

        Raises:
            UserError: there are too many processes, or too few.
        """

    def losses(self, module: nn.Module, loss: Loss) -> Loss:
        """`loss`, which uses the weights of `module`, with its gradients averaged."""

    def quiet(self) -> AbstractContextManager[None]:
        """Gradients of backward passes in here are kept, and not yet exchanged."""


class Single:
    """Each process for itself: there should be only one."""

    def place(
        self, module: nn.Module, average: nn.Module, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        if (count := world_size()) > 1:
            raise UserError(
                f"parallel=single is for one process, and torchrun started {count}: choose "
                "parallel=ddp or fsdp"
            )

    def losses(self, module: nn.Module, loss: Loss) -> Loss:
        return loss

    def quiet(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Loss(nn.Module):
    """A loss as the module that DDP wraps; outside of the model, whose keys stay as they are."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, example: Any) -> Tensor:
        return self.loss(example)


class DDP:
    """Every process holds the whole model, and sees its share of each batch."""

    def __init__(self) -> None:
        self._wrapped: DistributedDataParallel | None = None

    def place(
        self, module: nn.Module, average: nn.Module, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        check_started("ddp")

    def losses(self, module: nn.Module, loss: Loss) -> Loss:
        with warnings.catch_warnings():  # PyTorch 2.13 renames an argument that 2.11 needs
            warnings.simplefilter("ignore", FutureWarning)
            self._wrapped = DistributedDataParallel(
                _Loss(module, loss), broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return self._wrapped

    def quiet(self) -> AbstractContextManager[None]:
        assert self._wrapped is not None, "losses() comes first"
        return self._wrapped.no_sync()


class FSDP:
    """Every process holds a share of each block, and gathers a block when it is its turn.

    Weights travel in the precision of the forward pass, gradients in float32.

    Args:
        replicas: groups that each hold the whole model (HSDP): weights are gathered within a group,
            e.g. a machine, and gradients averaged between groups.
    """

    def __init__(self, *, replicas: int = 1) -> None:
        whole_number("parallel.replicas", replicas)
        self.replicas = replicas
        self._roots: list[FSDPModule] = []

    def place(
        self, module: nn.Module, average: nn.Module, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        check_started("fsdp")
        self.mesh = self._mesh(device)
        self.policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # autocast does, and leaves in float32 what needs it
        )
        for name, part in list(module.named_children()):
            if any(weight.requires_grad for weight in part.parameters()):
                self._roots.append(self._shard(part))
                self._shard(average.get_submodule(name))

    def _mesh(self, device: torch.device) -> DeviceMesh:
        count = world_size()
        if count % self.replicas:
            raise UserError(
                f"parallel.replicas {self.replicas} must divide the number of processes, {count}"
            )
        if self.replicas == 1:
            return init_device_mesh(device.type, (count,), mesh_dim_names=("shard",))
        shape = (self.replicas, count // self.replicas)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))

    def _shard(self, part: nn.Module) -> FSDPModule:
        if self.policy.param_dtype is not None:
            set_compute_dtype(part, self.policy.param_dtype)
        for block in blocks_of(part):
            fully_shard(block, mesh=self.mesh, mp_policy=self.policy)
        return fully_shard(part, mesh=self.mesh, mp_policy=self.policy)

    def losses(self, module: nn.Module, loss: Loss) -> Loss:
        return loss

    def quiet(self) -> AbstractContextManager[None]:
        return _Quiet(self._roots)


class _Quiet(AbstractContextManager[None]):
    def __init__(self, roots: Sequence[FSDPModule]) -> None:
        self.roots = roots

    def __enter__(self) -> None:
        for root in self.roots:
            root.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        for root in self.roots:
            root.set_requires_gradient_sync(True)


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_started(name: str) -> None:
    """Raises UserError where nobody started several processes, or one as they are started."""
    if not dist.is_initialized():
        raise UserError(
            f"parallel={name} is for processes that torchrun starts: "
            f"{command('train', processes='<GPUs>')} parallel={name}"
        )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a share; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
