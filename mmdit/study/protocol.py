"""The paper's protocol for comparing variants: six sampler settings (Sec. 5.1, App. B.3)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.data.captions import TASKS, Scene, short_caption
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.flow.solvers import Progress
from mmdit.metrics.compositional import judge
from mmdit.metrics.distances import clip_score, frechet_distance, kernel_distance
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast
from mmdit.request import Request

PROTOCOL = "scores-1"
SOLVER = "euler"


class Setting(NamedTuple):
    """Sampler settings, all with Euler's method."""

    steps: int
    guidance: float


# 50 steps at three scales, and one scale at fewer steps (App. B.3).
SETTINGS = (
    *(Setting(50, 1.0), Setting(50, 2.5), Setting(50, 5.0)),
    *(Setting(5, 5.0), Setting(10, 5.0), Setting(25, 5.0)),
)


class Features(Protocol):
    """CLIP embeddings of images and prompts."""

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """Images uint8 (n, h, w, 3) -> embeddings (n, d), not normalized."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """Images uint8 (n, h, w, 3) -> embeddings (n, d) of norm 1."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> embeddings (n, d) of norm 1."""


class StudyProtocol:
    """Samples the same prompts under every setting and computes the study's metrics.

    These are the CLIP score, the Frechet and kernel distances of CLIP's image features to those of
    real images of the same kinds of scenes, and compositional accuracy.

    Args:
        samples: number of images per setting, one per scene, cycling through the six tasks.
        references: number of real images to compare with.
        seed: image i starts from the noise of seed + i.
        batch_size: number of images per batch.

    Raises:
        UserError: fewer samples than tasks, or fewer than two references.
    """

    def __init__(
        self, *, samples: int = 252, references: int = 1536, seed: int = 0, batch_size: int = 126
    ) -> None:
        if samples < len(TASKS) or references < 2 or batch_size < 1:
            raise UserError(
                f"samples {samples} must be at least {len(TASKS)} (one scene per task), "
                f"references {references} at least 2, batch_size {batch_size} at least 1"
            )
        self.samples, self.references = samples, references
        self.seed, self.batch_size = seed, batch_size

    @property
    def evaluations(self) -> int:
        """Solver steps of all settings together, for a progress bar."""
        batches = -(-self.samples // self.batch_size)
        return batches * sum(setting.steps for setting in SETTINGS)

    @torch.no_grad()
    def __call__(
        self,
        pipe: Pipeline,
        features: Features,
        data: Shapes,
        progress: Progress | None = None,
        autocast: Autocast = nullcontext,
    ) -> list[dict[str, Any]]:
        """Metrics for each of `SETTINGS`.

        Args:
            pipe: the model.
            features: CLIP, the same for all models that are compared.
            data: the split from which scenes and real images are taken.
            progress: called after every solver step, as in `Pipeline.denoise`.
            autocast: context that sets the model's precision; `features` has its own.
        """
        scenes = scenes_of(data, self.samples)
        prompts = [short_caption(scene) for scene in scenes]
        text_features = features.text_features(prompts)
        # Scenes of the same kinds, but not those sampled.
        others = scenes_of(data, self.references, start=self.samples)
        real = features.image_embeddings(
            torch.stack([torch.from_numpy(data.render(scene)) for scene in others])
        )
        rows = []
        for setting in SETTINGS:
            with autocast():
                images, evaluations = self._sample(pipe, prompts, setting, progress)
            seen = features.image_embeddings(images)
            right = judge(data, scenes, images)
            rows.append(
                {
                    **setting._asdict(),
                    "solver": SOLVER,
                    "clip": clip_score(F.normalize(seen, dim=-1), text_features),
                    "fd": frechet_distance(seen, real),
                    "kid": kernel_distance(seen, real),
                    "accuracy": sum(right) / len(right),
                    "function_evaluations": evaluations,
                }
            )
        return rows

    def _sample(
        self, pipe: Pipeline, prompts: Sequence[str], setting: Setting, progress: Progress | None
    ) -> tuple[Tensor, float]:
        """Images (n, h, w, 3) uint8, and network evaluations per image."""
        images = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            request = Request(
                batch,
                seeds=[self.seed + start + i for i in range(len(batch))],
                steps=setting.steps,
                guidance=setting.guidance,
            )
            samples = pipe.sample(request, progress)
            images.append(samples.images.cpu())
        return torch.cat(images), samples.function_evaluations


def scenes_of(data: Shapes, count: int, *, start: int = 0) -> list[Scene]:
    """`count` scenes, cycling through the tasks, beginning with number `start`."""
    numbers = range(start, start + count)
    return [data.scene_for_task(TASKS[i % len(TASKS)], i // len(TASKS)) for i in numbers]
