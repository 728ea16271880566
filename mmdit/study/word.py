"""How well a model knows one word of shapes, and what else it still knows, over training."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from mmdit.checks import number, seed_number, whole_number
from mmdit.data.captions import TASKS, short_caption
from mmdit.data.shapes import Shapes
from mmdit.metrics.compositional import judge
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast
from mmdit.request import Request
from mmdit.study.curves import Comparison

TAUGHT = "colours"  # the task whose prompts are the phrase "a red star"
# What finetuning taught and what it cost: eval/forgetting.py.
FORGETTING = Comparison(
    experiment="shapes_new_word",
    probe="WordAccuracy",
    figures={name: f"accuracy_{name}" for name in ("taught", "word", "old")},
    order=("word", "taught"),
    required=("taught", "word", "old"),
)


class WordAccuracy:
    """Compositional accuracy on the six tasks of GenEval, without a word and with it.

    All models are asked the same prompts with the same noise, so that their differences are those
    of paired samples.

    Args:
        data: the old data, whose validation scenes are asked for.
        word: the shape or texture that every scene of the other prompts contains.
        prompts_per_task: number of images for each task, of each kind.
        steps: of the solver.
        guidance: scale of classifier-free guidance; None is the model's default.
        seed: image i of a task starts from the noise of seed + i.
        batch_size: number of images per batch.
        autocast: context that sets the model's precision.

    Raises:
        UserError: a value is out of range.
    """

    higher_is_better = frozenset({"accuracy_old", "accuracy_taught", "accuracy_word"})

    def __init__(
        self,
        *,
        data: Shapes,
        word: str,
        prompts_per_task: int = 50,
        steps: int = 10,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 100,
        autocast: Autocast = nullcontext,
    ) -> None:
        whole_number("probe.prompts_per_task", prompts_per_task)
        whole_number("probe.steps", steps)
        whole_number("probe.batch_size", batch_size)
        seed_number("probe.seed", seed, images=prompts_per_task)
        if guidance is not None:
            number("probe.guidance", guidance)
        old = data.view("validation")
        self.worlds = {"old": old, word: old.with_word(word)}
        self.word, self.prompts_per_task, self.seed = word, prompts_per_task, seed
        self.steps, self.guidance, self.batch_size = steps, guidance, batch_size
        self.autocast = autocast

    @torch.no_grad()
    def __call__(self, pipe: Pipeline) -> dict[str, float]:
        """The accuracy of each task, and three means.

        `accuracy_old` is that of all tasks without the word, `accuracy_taught` that of the phrase
        that names a colour and a shape, `accuracy_word` that of the other tasks whose prompts say
        the word: five for a shape, two for a texture.
        """
        old, new = (self._accuracy(pipe, world) for world in self.worlds.values())
        new = {task: accuracy for task, accuracy in new.items() if self._says(task)}
        word = [accuracy for task, accuracy in new.items() if task != TAUGHT]
        return {
            "accuracy_old": sum(old.values()) / len(old),
            "accuracy_taught": new[TAUGHT],
            "accuracy_word": sum(word) / len(word),
            **{f"accuracy_old_{task}": accuracy for task, accuracy in old.items()},
            **{f"accuracy_word_{task}": accuracy for task, accuracy in new.items()},
        }

    def _says(self, task: str) -> bool:
        """Whether the prompts of a task say the word; those without colours say no texture."""
        scene = self.worlds[self.word].scene_for_task(task, 0)
        return self.word in short_caption(scene)

    def _accuracy(self, pipe: Pipeline, data: Shapes) -> Mapping[str, float]:
        """Accuracy of each task."""
        n = self.prompts_per_task
        scenes = [data.scene_for_task(task, i) for task in TASKS for i in range(n)]
        prompts = [short_caption(scene) for scene in scenes]
        seeds = [self.seed + i for _ in TASKS for i in range(n)]
        images = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            request = Request(
                prompts[batch], seeds=seeds[batch], steps=self.steps, guidance=self.guidance
            )
            with self.autocast():
                images.append(pipe.sample(request).images.cpu())
        right = judge(data, scenes, torch.cat(images))
        return {task: sum(right[i * n : (i + 1) * n]) / n for i, task in enumerate(TASKS)}
