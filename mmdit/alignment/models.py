"""The three models of post-training: the one that is trained, the old one, and the reference."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.adapters.adapter import attached
from mmdit.engine.ema import copied
from mmdit.engine.preservation import adapters_off
from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Draw
from mmdit.latents.encoding import condition
from mmdit.nn.attention import as_in_training
from mmdit.pipeline import Pipeline
from mmdit.text.conditioning import Encodings, TokenIds

Within = Callable[[], AbstractContextManager[None]]


class Reference(NamedTuple):
    """What training started from: a model, and the block within which it is that."""

    pipe: Pipeline
    within: Within


@contextmanager
def without_gradient() -> Iterator[None]:
    """The block of what is compared with the trained model: equal weights give equal bits."""
    with torch.no_grad(), as_in_training():
        yield


class Conditioned:
    """A model with the conditions of a batch.

    Args:
        pipe: the model.
        text: the captions, one row each.
        guidance: scale of classifier-free guidance in `velocity`.
        within: the block within which it computes.
    """

    def __init__(
        self,
        pipe: Pipeline,
        text: TokenIds | Encodings,
        *,
        guidance: float = 1.0,
        within: Within = nullcontext,
    ) -> None:
        self.pipe, self.guidance, self.within = pipe, guidance, within
        self._text = text

    @cached_property
    def condition(self) -> Condition:
        """The conditions; no encoder is dropped."""
        first = self._text[0]
        rows = len(first if isinstance(first, Tensor) else first[0])
        with self.within():
            return condition(self.pipe.text, self._text, torch.ones(rows, 3, dtype=torch.bool))

    def output(self, x_0: Tensor, draw: Draw) -> Tensor:
        """What the network predicts for z_t, (b, c, h, w), without guidance."""
        with self.within():
            return self.pipe.objective.predict(self.pipe.mmdit, x_0, self.condition, draw)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """dz/dt on the straight path, (b, c, h, w), at the noise levels t (b,).

        The unconditional half of guidance has no gradient, as in Flow-GRPO.
        """
        objective, network = self.pipe.objective, self.pipe.mmdit
        with self.within():
            v = objective.velocity(network, z, t, self.condition)
            if self.guidance == 1.0:
                return v
            with torch.no_grad():
                none = self.pipe.encode([""])
                none = none.map(lambda part: part.expand(len(z), *part.shape[1:]))
                base = objective.velocity(network, z, t, none)
            return base + self.guidance * (v - base)


class Models(NamedTuple):
    """What a loss compares, for one batch; only `policy` has a gradient."""

    policy: Conditioned  # what is trained
    old: Conditioned  # what sampled the images of the round
    reference: Conditioned  # what training started from


def conditioned(
    policy: Pipeline,
    old: Pipeline,
    reference: Reference,
    text: TokenIds | Encodings,
    *,
    guidance: float,
) -> Models:
    """The three models with the conditions of a batch; arguments as in `Conditioned`."""
    return Models(
        Conditioned(policy, text, guidance=guidance, within=as_in_training),
        Conditioned(old, text, guidance=guidance, within=without_gradient),
        Conditioned(reference.pipe, text, guidance=guidance, within=reference.within),
    )


def reference_of(pipe: Pipeline) -> Reference:
    """What training starts from: the model without its adapters, or a copy of its weights.

    To be called before any weight is trained or loaded.

    Raises:
        UserError: the weights are spread over processes, so that they cannot be copied.
    """
    if attached(pipe):

        @contextmanager
        def without_adapters() -> Iterator[None]:
            with adapters_off(pipe), without_gradient():
                yield

        return Reference(pipe, without_adapters)
    if any(hasattr(weight, "to_local") for weight in pipe.parameters()):
        raise UserError(
            "parallel=fsdp spreads the weights over processes, and the reference would be a copy "
            "of them: train an adapter (adapter=lora), or choose parallel=ddp"
        )
    return Reference(copied(pipe), without_gradient)
