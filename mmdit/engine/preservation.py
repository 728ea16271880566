"""Prior preservation without class images: the model is taught what it predicts itself.

DreamBooth (Ruiz et al. 2023) trains on images that the model made of the class. This form needs
none: some samples of a batch are read with the class prompt as their caption, and their target is
what the model predicts for them with its adapter off. Whatever the adapter does to the class
prompt is pulled back to nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mmdit.adapters.adapter import adapted
from mmdit.adapters.layers import AdaptedLinear
from mmdit.checks import number, text
from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Draw, squared_error
from mmdit.pipeline import Pipeline
from mmdit.text.conditioning import Encoding, Encodings


class OwnPrediction:
    """Keeps what the model predicts for a class prompt.

    Args:
        prompt: what the model already knows: "a photo of a dog".
        share: of the samples, in (0, 1).

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, *, prompt: str, share: float = 0.5) -> None:
        text("prior.prompt", prompt)
        self.prompt, self.share = prompt, number("prior.share", share, above=0, below=1)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw which samples are read with the class prompt, each with its generator: bool (b,)."""
        draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        return draws < self.share

    def condition(self, pipe: Pipeline, own: Condition, chosen: Tensor, kept: Tensor) -> Condition:
        """The conditions of a batch, those of the chosen samples replaced by the class prompt's.

        Args:
            own: the conditions of the captions.
            chosen: of `draw`.
            kept: bool (b, 3), the encoders that are not dropped.
        """
        one = pipe.text.encodings(pipe.text.tokenize([self.prompt]))
        many = Encodings(*(Encoding(*(repeated(x, len(kept)) for x in part)) for part in one))
        known = pipe.text.join(many, kept)

        def mixed(ours: Tensor, theirs: Tensor) -> Tensor:
            rows = chosen.to(ours.device).view(-1, *[1] * (ours.ndim - 1))
            return torch.where(rows, theirs.to(ours), ours)

        return own._replace(
            c_vec=mixed(own.c_vec, known.c_vec), c_ctxt=mixed(own.c_ctxt, known.c_ctxt)
        )

    def loss(
        self,
        pipe: Pipeline,
        x_0: Tensor,
        condition: Condition,
        draw: Draw,
        chosen: Tensor,
        kept: Tensor,
    ) -> Tensor:
        """The losses of a batch (b,), where the targets of chosen samples are the model's own.

        Args:
            x_0, draw: as in `Objective`.
            condition, chosen, kept: as in `condition`.

        Raises:
            UserError: the model has no adapter that could be turned off.
        """
        objective = pipe.objective
        with adapters_off(pipe), torch.no_grad():
            unchanged = self.condition(pipe, condition, chosen, kept)
            own = objective.predict(pipe.mmdit, x_0, unchanged, draw)
        conditioned = self.condition(pipe, condition, chosen, kept)
        output = objective.predict(pipe.mmdit, x_0, conditioned, draw)
        target = objective.target(x_0, draw)
        rows = chosen.to(target.device).view(-1, 1, 1, 1)
        return squared_error(output, torch.where(rows, own.to(target), target))


def repeated(x: Tensor, count: int) -> Tensor:
    """One row, (1, ...), as many: (count, ...)."""
    return x.expand(count, *x.shape[1:])


def changed_layers(pipe: Pipeline) -> list[AdaptedLinear]:
    """The layers that adapters change.

    Raises:
        UserError: there are none.
    """
    layers = [layer for layer in adapted(pipe).values() if isinstance(layer, AdaptedLinear)]
    if not layers:
        raise UserError(
            "prior=prediction and algorithm= compare with the model without its adapter, but none "
            "changes a layer: choose adapter=lora, or prior=class_images"
        )
    return layers


@contextmanager
def adapters_off(pipe: Pipeline) -> Iterator[None]:
    """The model without the changes of its adapters, within the block.

    Raises:
        UserError: it has none.
    """
    layers = changed_layers(pipe)
    kept = [dict(layer.scales) for layer in layers]
    for layer in layers:
        layer.scales.update(dict.fromkeys(layer.scales, 0.0))
    try:
        yield
    finally:
        for layer, scales in zip(layers, kept, strict=True):
            layer.scales.update(scales)
