"""Post-training: `algorithm=` in place of the loss of pretraining, on images that a model makes."""

from typing import NamedTuple

from hydra.utils import instantiate

from mmdit.alignment.algorithm import Algorithm
from mmdit.alignment.models import Reference, reference_of
from mmdit.alignment.task import AlignmentTask, Rounds
from mmdit.cli.build import Parts
from mmdit.cli.reading import TrainingRequest
from mmdit.engine.rounds import check_rounds
from mmdit.engine.validation import Validation
from mmdit.errors import UserError


class PostTraining(NamedTuple):
    """What post-training needs beside a model."""

    algorithm: Algorithm
    collector: Rounds
    reference: Reference

    def task(self, request: TrainingRequest, parts: Parts, validation: Validation) -> AlignmentTask:
        """The task of the training loop."""
        return AlignmentTask(
            module=parts.pipeline,
            old=parts.state.ema.module,
            reference=self.reference,
            collector=self.collector,
            algorithm=self.algorithm,
            validation=validation,
            seed=request.config.seed,
            batch_size=request.settings.batch_size,
            autocast=request.precision,
        )


def post_training(request: TrainingRequest, parts: Parts) -> PostTraining | None:
    """Build what a config asks for; None if it asks for no algorithm.

    To be called before weights are loaded or trained: the reference is what they are now.

    Raises:
        UserError: a value makes no sense, or something is missing.
    """
    config = request.config
    if config.get("algorithm") is None:
        return None
    if request.initial is None:
        raise UserError("algorithm= trains a model further: give its weights, initial=<run>")
    collector: Rounds = instantiate(config.collector)(
        autocast=request.precision, processes=request.processes
    )
    check_rounds(collector, request.settings)
    return PostTraining(instantiate(config.algorithm), collector, reference_of(parts.pipeline))
