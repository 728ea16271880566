"""What post-training gains and what it costs: accuracy and diversity, over training."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.alignment.prompts import expect_shapes
from mmdit.checks import MOST_STEPS, expect, number, seed_number, whole_number
from mmdit.data.captions import TASKS, Scene, short_caption
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.flow.solvers import Solver, dpmpp_2m, euler
from mmdit.metrics.compositional import judge
from mmdit.metrics.diversity import LEAST, CaptionDiversity, pixel_deviation
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast
from mmdit.request import Request
from mmdit.study.curves import Comparison, Mean, Recipe

MOST_CAPTIONS = 200
GAINS = ("accuracy", "accuracy_held_out", "accuracy_other_sampler")
VARIETY = ("diversity", "diversity_place", "diversity_colour", "pixel_deviation")
BY_TASK = tuple(f"accuracy_{task}" for task in TASKS)
# What post-training gains and what it costs: eval/alignment.py.
ALIGNMENT = Comparison(
    experiment="alignment",
    probe="AlignmentProbe",
    figures={name: name for name in (*GAINS, *VARIETY, "diversity_left_out", *BY_TASK)},
    order=("accuracy",),
    required=("accuracy", "accuracy_other_sampler", "pixel_deviation"),
)
# What a post-trained model of shapes should reach.
ENOUGH_ACCURACY, ENOUGH_DIVERSITY = 0.93, 0.8


class AlignmentProbe:
    """Compositional accuracy, and the diversity of the images of one prompt.

    All models are asked the same prompts with the same noise, so that their differences are those
    of paired samples.

    A reward can be gained without being earned: by one answer for each prompt, which diversity
    shows; by learning the errors of one sampler, which accuracy under another sampler shows; by
    learning the prompts by heart, which combinations held out of training show.

    By default 1,476 images with 17,760 evaluations of the network.

    Args:
        data: the shapes: validation scenes, and those of the split held_out, are asked for.
        prompts_per_task: number of images for each task that the data has.
        diversity_prompts: number of prompts of which diversity is measured, of different short
            captions, cycling through the tasks.
        members: number of images of each of these, at least 8.
        steps: of Euler's method.
        guidance: scale of classifier-free guidance; None is the model's default.
        other_solver, other_steps: the other sampler.
        seed: image i of a task or of a prompt starts from the noise of seed + i.
        batch_size: number of images per batch.
        autocast: context that sets the model's precision.

    Raises:
        UserError: a value is out of range, or the data has no scenes.
    """

    higher_is_better = frozenset({*GAINS, *VARIETY})

    def __init__(
        self,
        *,
        data: Shapes,
        prompts_per_task: int = 50,
        diversity_prompts: int = 24,
        members: int = 24,
        steps: int = 10,
        guidance: float | None = 1.0,
        other_solver: Solver = dpmpp_2m,
        other_steps: int = 20,
        seed: int = 0,
        batch_size: int = 96,
        autocast: Autocast = nullcontext,
    ) -> None:
        expect_shapes("probe.data", data)
        whole_number("probe.prompts_per_task", prompts_per_task)
        whole_number("probe.diversity_prompts", diversity_prompts, most=MOST_CAPTIONS)
        whole_number("probe.members", members, LEAST)
        for name, value in (("steps", steps), ("other_steps", other_steps)):
            whole_number(f"probe.{name}", value, most=MOST_STEPS)
        whole_number("probe.batch_size", batch_size)
        seed_number("probe.seed", seed, images=max(prompts_per_task, members))
        expect(callable(other_solver), "probe.other_solver", other_solver, "must be a solver")
        if guidance is not None:
            number("probe.guidance", guidance)
        self.world = data.view("validation")
        self.tasks = [task for task, weight in data.task_weights.items() if weight]
        self.prompts_per_task, self.members, self.seed = prompts_per_task, members, seed
        self.steps, self.guidance, self.batch_size = steps, guidance, batch_size
        self.other_solver, self.other_steps = other_solver, other_steps
        self.autocast = autocast
        self.measure = CaptionDiversity(
            data=self.world,
            scenes=different_captions(self.world, self.tasks, diversity_prompts),
            members=members,
        )

    @torch.no_grad()
    def __call__(self, pipe: Pipeline) -> dict[str, float]:
        """The metrics.

        `accuracy` is the mean of `accuracy_<task>`; `accuracy_held_out` is missing where the data
        holds out nothing. `diversity` is the mean of `diversity_place` and `diversity_colour`, of
        which 1 is that of the data; `diversity_left_out` prompts have fewer than 8 right images,
        and what no prompt is left for is missing. `pixel_deviation` is that within a prompt, of all
        its images.
        """
        scenes = self._scenes(self.world)
        by_task = self._accuracy(scenes, self._sample(pipe, scenes))
        found = {"accuracy": mean(by_task)}
        found |= {f"accuracy_{task}": own for task, own in zip(self.tasks, by_task, strict=True)}
        if self.world.held_out_fraction:
            held_out = self._scenes(self.world.view("held_out"))
            right = self._accuracy(held_out, self._sample(pipe, held_out))
            found["accuracy_held_out"] = mean(right)
        images = self._sample(pipe, scenes, solver=self.other_solver, steps=self.other_steps)
        found["accuracy_other_sampler"] = mean(self._accuracy(scenes, images))
        repeated = [scene for scene in self.measure.scenes for _ in range(self.members)]
        images = self._sample(pipe, repeated, group=self.members)
        diversity = self.measure(images)
        free = {
            "diversity": diversity.mean,
            "diversity_place": diversity.place,
            "diversity_colour": diversity.colour,
        }
        return {
            **found,
            **{name: value for name, value in free.items() if not math.isnan(value)},
            "diversity_left_out": float(diversity.left_out),
            "pixel_deviation": pixel_deviation(images, self.members),
        }

    def _scenes(self, data: Shapes) -> list[Scene]:
        """The scenes of which accuracy is measured, tasks outermost."""
        return [
            data.scene_for_task(task, i)
            for task in self.tasks
            for i in range(self.prompts_per_task)
        ]

    def _accuracy(self, scenes: Sequence[Scene], images: Tensor) -> list[float]:
        """The accuracy of each task."""
        n, right = self.prompts_per_task, judge(self.world, scenes, images)
        return [mean(right[start : start + n]) for start in range(0, len(right), n)]

    def _sample(
        self,
        pipe: Pipeline,
        scenes: Sequence[Scene],
        *,
        group: int | None = None,
        solver: Solver = euler,
        steps: int | None = None,
    ) -> Tensor:
        """One image for each scene; the seeds begin anew after `group` images."""
        prompts = [short_caption(scene) for scene in scenes]
        group = self.prompts_per_task if group is None else group
        seeds = [self.seed + i % group for i in range(len(prompts))]
        images = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            request = Request(
                prompts[batch],
                seeds=seeds[batch],
                steps=steps or self.steps,
                guidance=self.guidance,
                solver=solver,
            )
            with self.autocast():
                images.append(pipe.sample(request).images.cpu())
        return torch.cat(images)


def different_captions(data: Shapes, tasks: Sequence[str], count: int) -> list[Scene]:
    """`count` scenes of different short captions, cycling through the tasks.

    Raises:
        UserError: the data has too few.
    """
    found: dict[str, Scene] = {}
    for index in range(50 * count):
        for task in tasks:
            scene = data.scene_for_task(task, index)
            found.setdefault(short_caption(scene), scene)
            if len(found) == count:
                return list(found.values())
    raise UserError(
        f"probe.diversity_prompts={count} is more than the {len(found)} short captions of the data"
    )


class Best(NamedTuple):
    """The highest accuracy of a recipe, and its step."""

    step: int
    accuracy: Mean


def best_diverse(recipe: Recipe) -> Best | None:
    """The evaluation of the highest mean accuracy among those of enough mean diversity.

    All seeds must have a diversity there.
    """
    accuracy, diversity = recipe.figures["accuracy"], recipe.figures["diversity"]
    enough = [s for s in recipe.steps if whole_mean(diversity[s], recipe) >= ENOUGH_DIVERSITY]
    if not enough:
        return None
    step = max(enough, key=lambda step: accuracy[step].mean)
    return Best(step, accuracy[step])


def shared_compute(recipes: Sequence[Recipe]) -> float:
    """The compute in TFLOP that all recipes have had at their ends; NaN if none was counted."""
    ends = [recipe.tflop_per_step * recipe.steps[-1] for recipe in recipes]
    return min((end for end in ends if not math.isnan(end)), default=math.nan)


def at_compute(recipe: Recipe, figure: str, start: float, tflop: float) -> float:
    """The mean of a figure after so much compute, between the evaluations before and after it.

    NaN if one of these lacks the figure, or has it of some seeds alone: what has collapsed is not
    hidden by what was before.

    Args:
        start: the figure of the initial model; NaN if it is missing.
        tflop: at most that of the whole recipe.
    """
    steps = [0, *recipe.steps]
    means = [start, *(whole_mean(mean, recipe) for mean in recipe.figures[figure].values())]
    at = tflop / recipe.tflop_per_step
    if math.isnan(at) or at > steps[-1] * (1 + 1e-9):
        return math.nan
    after = next((i for i, step in enumerate(steps) if step >= at), len(steps) - 1)
    before = max(after - 1, 0)
    if steps[after] <= at:
        return means[after]
    share = (at - steps[before]) / (steps[after] - steps[before])
    return means[before] + share * (means[after] - means[before])


def whole_mean(mean: Mean, recipe: Recipe) -> float:
    """A mean over all seeds of a recipe; NaN if some of them lack the figure."""
    return mean.mean if mean.seeds == len(recipe.seeds) else math.nan


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers."""
    return sum(values) / len(values)
