"""What the network is told, and the velocities that follow: the words that guidance speaks in."""

from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from torch import Tensor


class Condition(NamedTuple):
    """What the network is told: pooled text and text tokens."""

    c_vec: Tensor  # (b, p)
    c_ctxt: Tensor  # (b, l, d)


# (z, t, condition) -> velocity
ConditionalVelocity = Callable[[Tensor, float, Condition], Tensor]


class LayeredVelocity(Protocol):
    """The velocity of a network whose blocks can be passed by."""

    def __call__(self, z_t: Tensor, t: float, condition: Condition, /) -> Tensor:
        """dz/dt, shape of z_t."""

    def skipping(self, layers: Collection[int]) -> ConditionalVelocity:
        """The velocity of the same network without some of its blocks."""
