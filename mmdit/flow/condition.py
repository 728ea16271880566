"""What conditions a network, and the velocities that follow: the words that guidance speaks in."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from mmdit.errors import UserError


class Condition(NamedTuple):
    """What conditions a network, sample by sample: text, and whatever else it reads.

    `extra` holds the rest (a control latent, a mask) by the name under which the network's
    `forward` takes it; each tensor has one row per sample, as the text has. So all of it is
    indexed, moved and joined together, and a new kind of condition is a new name.

    Example:
        >>> condition = text.encode(["a red circle", "a blue square"])
        >>> condition = condition._replace(extra={"control": latents})  # (2, c, h, w)
        >>> first = condition.map(lambda part: part[:1])
    """

    c_vec: Tensor  # pooled text (b, p)
    c_ctxt: Tensor  # text tokens (b, l, d)
    extra: Mapping[str, Tensor] = {}  # each (b, ...)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same of every tensor: part of the batch, another device, rows repeated."""
        extra = {name: function(part) for name, part in self.extra.items()}
        return self._replace(c_vec=function(self.c_vec), c_ctxt=function(self.c_ctxt), extra=extra)


def joined(conditions: Sequence[Condition]) -> Condition:
    """One batch of several conditions, in their order.

    Raises:
        UserError: they do not hold the same kinds of tensors.
    """
    names = [sorted(condition.extra) for condition in conditions]
    if any(others != names[0] for others in names):
        raise UserError(
            f"conditions with different extra tensors cannot be joined, but have {names}: give "
            "each of them all of these"
        )
    return Condition(
        torch.cat([condition.c_vec for condition in conditions]),
        torch.cat([condition.c_ctxt for condition in conditions]),
        {name: torch.cat([c.extra[name] for c in conditions]) for name in names[0]},
    )


# (z, t, condition) -> velocity
ConditionalVelocity = Callable[[Tensor, float, Condition], Tensor]


class LayeredVelocity(Protocol):
    """The velocity of a network whose blocks can be passed by."""

    def __call__(self, z_t: Tensor, t: float, condition: Condition, /) -> Tensor:
        """dz/dt, shape of z_t."""

    def skipping(self, layers: Collection[int]) -> ConditionalVelocity:
        """The velocity of the same network without some of its blocks."""
