"""What conditions a network, and the types of conditional velocities that guidance works on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from mmdit.errors import UserError


class Condition(NamedTuple):
    """Conditioning of a batch: the text, and whatever else a network reads.

    `extra` holds other inputs (control latents, a mask), keyed by argument of the network's
    `forward`. Like the text, each tensor has one row per sample, so that everything is indexed,
    moved and concatenated together; a new kind of condition needs only a new key.

    Example:
        >>> condition = text.encode(["a red circle", "a blue square"])
        >>> condition = condition._replace(extra={"control": latents})  # (2, c, h, w)
        >>> first = condition.map(lambda part: part[:1])
    """

    c_vec: Tensor  # pooled text (b, p)
    c_ctxt: Tensor  # text tokens (b, l, d)
    extra: Mapping[str, Tensor] = {}  # each (b, ...)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor: select samples, change the device, repeat rows."""
        extra = {name: function(part) for name, part in self.extra.items()}
        return self._replace(c_vec=function(self.c_vec), c_ctxt=function(self.c_ctxt), extra=extra)


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Concatenate several conditions into one batch, in order.

    Raises:
        UserError: their extra tensors have different names.
    """
    names = [sorted(condition.extra) for condition in conditions]
    if any(others != names[0] for others in names):
        raise UserError(
            f"conditions with different extra tensors cannot be concatenated; they have {names}: "
            "give each of them all of these"
        )
    return Condition(
        torch.cat([condition.c_vec for condition in conditions]),
        torch.cat([condition.c_ctxt for condition in conditions]),
        {name: torch.cat([c.extra[name] for c in conditions]) for name in names[0]},
    )


# (z, t, condition) -> velocity
ConditionalVelocity = Callable[[Tensor, float, Condition], Tensor]


class LayeredVelocity(Protocol):
    """The velocity of a network that can skip some of its blocks."""

    def __call__(self, z_t: Tensor, t: float, condition: Condition, /) -> Tensor:
        """dz/dt, shape of z_t."""

    def skipping(self, layers: Collection[int]) -> ConditionalVelocity:
        """The velocity of the same network without the blocks with these indices."""
