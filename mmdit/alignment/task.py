"""Post-training as a task of the training loop: an algorithm's loss on the images of a round."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmdit.alignment.algorithm import Algorithm
from mmdit.alignment.models import Reference, conditioned
from mmdit.alignment.rollouts import Rollouts
from mmdit.data.order import Order
from mmdit.engine.rounds import Collector
from mmdit.engine.tasks import Work
from mmdit.engine.validation import TextToImage, Validation
from mmdit.errors import UserError
from mmdit.flow.objective import Draw
from mmdit.keys import generator_for
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast


class Drawn(NamedTuple):
    """An example of `AlignmentTask`."""

    step: int
    numbers: Tensor  # (b,), positions among all samples of the run
    draw: Draw
    seed: int  # of what layers draw, as dropout in an adapter


class Rounds(Collector, Protocol):
    """A collector of images with rewards."""

    @property
    def rollouts(self) -> Rollouts:
        """Those of the newest round."""

    @property
    def guidance(self) -> float:
        """Scale of the guidance that the images were sampled with."""

    @property
    def steps(self) -> int | None:
        """Steps of the sampler; None where nothing is sampled."""

    @property
    def evaluations(self) -> int:
        """Network evaluations of a round."""


class AlignmentTask(TextToImage):
    """Trains on what the model samples itself.

    Args:
        module: the pipeline that is trained.
        old: the average, which samples the images.
        reference: what training started from.
        collector: of the images.
        algorithm: the loss.
        validation, seed, autocast: as in `TextToImage`.
        batch_size: samples of a step, over all processes.

    Raises:
        UserError: the algorithm trains at the sampler's steps, but the images were not sampled.
    """

    def __init__(
        self,
        *,
        module: Pipeline,
        old: Pipeline,
        reference: Reference,
        collector: Rounds,
        algorithm: Algorithm,
        validation: Validation,
        seed: int,
        batch_size: int,
        autocast: Autocast,
    ) -> None:
        super().__init__(module=module, validation=validation, seed=seed, autocast=autocast)
        self.old, self.reference = old, reference
        self.collector, self.algorithm, self.batch_size = collector, algorithm, batch_size
        self._levels = self._sampled_levels() if algorithm.levels == "sampler" else None
        self._chosen: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of a latent, (c, h, w)."""
        side = self.module.image_size
        return (self.module.mmdit.latent_channels, *self.module.latent_size(side, side))

    def order(self, *, batch_size: int, seed: int) -> Order:
        """Positions themselves: which image is meant is known when the round has its images."""
        return lambda start, count: list(range(start, start + count))

    def example(self, step: int, indices: Sequence[int]) -> Drawn:
        generators = [generator_for(self.seed, "alignment", step, index) for index in indices]
        draw = self.module.objective.draw(self.latent_shape, generators)
        if self._levels is not None:
            count = len(self._levels)
            steps = torch.cat([torch.randint(count, (1,), generator=g) for g in generators])
            draw = draw._replace(t=self._levels[steps])
        seed = generator_for(self.seed, "layers", step, *indices).initial_seed()
        return Drawn(step, torch.tensor(indices), draw, seed)

    def _sampled_levels(self) -> Tensor:
        """The times of the network that the sampler evaluates it at, float32."""
        if self.collector.steps is None:
            raise UserError(
                "algorithm.levels=sampler trains at the sampler's steps, but these images were not "
                "sampled here: choose algorithm.levels=objective"
            )
        objective = self.module.objective
        return objective.path.time_at(objective.times(self.collector.steps)[:-1]).float()

    def loss(self, example: Drawn) -> Tensor:
        rollouts = self.collector.rollouts
        chosen = self.chosen(example)
        device = self.module.device
        draw = Draw(*(part.to(device, non_blocking=True) for part in example.draw))
        torch.manual_seed(example.seed)
        with self.autocast():
            compared = conditioned(
                self.module,
                self.old,
                self.reference,
                rollouts.text_of(chosen[:, 0] if len(chosen) else example.numbers * 0),
                guidance=self.collector.guidance,
            )
            if not len(chosen):  # nothing in the round is better than the rest
                return 0 * compared.policy.output(draw.epsilon, draw).float().flatten(1).mean(1)
            losses, figures = self.algorithm(compared, rollouts, chosen, draw)
        self.note(figures)
        return losses

    def chosen(self, example: Drawn) -> Tensor:
        """The rows of the algorithm's choice that these samples are, (b, r); none if it chose none.

        Those of a round come in an order of its own, and again where there are fewer than samples.
        """
        round_, _ = divmod(example.step, self.collector.updates)
        if self._chosen[0] != round_:
            rows = self.algorithm.select(self.collector.rollouts)
            generator = generator_for(self.seed, "chosen", round_)
            self._chosen = round_, rows[torch.randperm(len(rows), generator=generator)]
        rows = self._chosen[1]
        if not len(rows):
            return rows
        first = round_ * self.collector.updates * self.batch_size
        return rows[(example.numbers - first) % len(rows)]

    def times(self, example: Drawn) -> None:
        return None

    def work(self, example: Drawn) -> Work:
        """Cost of the losses, and of sampling the images as far as it falls to one sample."""
        tokens, forward = self.cost_of(self.latent_shape)
        per_sample = self.collector.evaluations / (self.collector.updates * self.batch_size)
        return Work(tokens, forward * (self.algorithm.forward_passes + per_sample))
