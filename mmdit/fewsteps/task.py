"""Training of a student of few steps: a flow's task with another loss and further figures."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdit.engine.ema import copied
from mmdit.engine.tasks import Captioned, FlowTask, Validation, Work
from mmdit.fewsteps.student import Student
from mmdit.fewsteps.teacher import Teacher
from mmdit.flow.condition import Condition
from mmdit.flow.guidance import ClassifierFreeGuidance
from mmdit.flow.objective import Draw
from mmdit.latents.sources import LatentSource
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast


class StudentTask(FlowTask):
    """A student learns from the model that it starts as.

    No text encoder is dropped, since the student samples without guidance. An evaluation also
    measures how far samples of few steps, from the same noise, are from those of the teacher:
    `distance_<steps>`, the mean square over the values of normalized latents.

    Args:
        module: the student, whose weights are still those of the teacher.
        student: how it learns.
        guidance, steps: the teacher's.
        opponent: what the student made to be trained beside it, if anything.
        source, validation, seed, autocast: as in `FlowTask`.
    """

    def __init__(
        self,
        *,
        module: Pipeline,
        student: Student,
        guidance: float,
        steps: int,
        opponent: nn.Module | None = None,
        source: LatentSource,
        validation: Validation,
        seed: int,
        autocast: Autocast,
    ) -> None:
        super().__init__(
            module=module, source=source, validation=validation, seed=seed, autocast=autocast
        )
        self.student = student
        self.teacher: Teacher | None = None
        if student.taught:
            with torch.no_grad(), autocast():
                unconditional = module.encode([""])
            network = copied(module.mmdit)
            self.teacher = Teacher(network, unconditional, guidance, opponent)
        self._shown_steps = sorted({1, 2, module.steps})
        self._taught = self._sampled(module, steps, guidance)

    def draw(self, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Draw:
        drawn: Draw = self.student.draw(self.module.objective, shape, generators)
        return drawn

    def example(self, step: int, indices: Sequence[int]) -> Captioned:
        captioned = super().example(step, indices)
        return captioned._replace(kept=torch.ones_like(captioned.kept))

    def losses(self, x: Tensor, condition: Condition, draw: Draw) -> Tensor:
        objective, model = self.module.objective, self.module.mmdit
        lesson = self.student.loss(objective, self.teacher, model, x, condition, draw)
        self.note(lesson.figures)
        return lesson.losses

    def work(self, example: Captioned) -> Work:
        tokens, flops = super().work(example)
        return Work(tokens, flops * self.student.forwards() / 3)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Pipeline)
        figures = super().evaluate(module)
        for steps in self._shown_steps:
            sampled = self._sampled(module, steps, module.guidance)
            figures[f"distance_{steps}"] = (sampled - self._taught).square().mean().item()
        return figures

    @torch.no_grad()
    def _sampled(self, pipe: Pipeline, steps: int, scale: float) -> Tensor:
        """Latents of the prompts that are sampled at every evaluation, from the same noise."""
        prompts, side = self.validation.prompts, pipe.image_size
        times, guidance = pipe.objective.times(steps), ClassifierFreeGuidance(scale=scale)
        z = times[0].item() * pipe.noise(range(len(prompts)), side, side)
        extra = {n: x[: len(prompts)] for n, x in self.read(self.validation.extra).items()}
        with self.autocast():
            positive, negative = pipe.encode(prompts)._replace(extra=extra), None
            if guidance.reads_negative:
                negative = pipe.encode([""] * len(prompts))._replace(extra=extra)
            return pipe.denoise(z, times, positive, negative, guidance=guidance).latents
