"""What is done between updates: images of some prompts are sampled and rewarded."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.alignment.prompts import Prompt, Prompts
from mmdit.alignment.rewards import Reward, columns
from mmdit.alignment.rollouts import Rollouts, Trajectory, joined, rows_of
from mmdit.alignment.samplers import Sampler
from mmdit.checks import seed_number, whole_number
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.latents.encoding import condition, encode_text
from mmdit.metrics.diversity import pixel_deviation
from mmdit.nn.attention import as_in_training
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast
from mmdit.printable import logger
from mmdit.processes import Processes
from mmdit.text.conditioning import Encoding, Encodings, TextConditioner, TokenIds

log = logger(__name__)


class Images(NamedTuple):
    """A batch of a round, on the CPU."""

    x_0: Tensor  # latents (b, c, h, w), float32
    images: Tensor  # uint8 (b, height, width, 3)
    trajectory: Trajectory | None  # of stochastic sampling


class Collector:
    """Samples `members` images of each of `groups` prompts in a round, and rewards them.

    Noise is keyed by (seed, round, prompt, member); so the images depend neither on `batch_size`
    nor on the number of processes, which share the prompts. Each process then holds all of them.

    Args:
        prompts: what is asked for.
        reward: what is thought of the images.
        sampler: how the images are sampled.
        groups: prompts of a round.
        members: images of a prompt, at least 2: an image is compared with its group.
        updates: steps of a round.
        seed: of the initial noise.
        batch_size: images computed at a time.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        *,
        prompts: Prompts,
        reward: Reward,
        sampler: Sampler,
        groups: int = 12,
        members: int = 16,
        updates: int = 2,
        seed: int = 0,
        batch_size: int = 192,
        autocast: Autocast,
        processes: Processes,
    ) -> None:
        self.prompts, self.reward, self.sampler = prompts, reward, sampler
        self.groups = whole_number("collector.groups", groups)
        self.members = whole_number("collector.members", members, 2)
        self.updates = whole_number("collector.updates", updates)
        self.batch_size = whole_number("collector.batch_size", batch_size)
        seed_number("collector.seed", seed)
        self.seed, self.autocast, self.processes = seed, autocast, processes
        if groups % processes.world_size:
            raise UserError(
                f"collector.groups={groups} must be a multiple of the number of processes, "
                f"{processes.world_size}, which share them"
            )
        self._rollouts: Rollouts | None = None

    @property
    def guidance(self) -> float:
        """Scale of the guidance that the images are sampled with."""
        return self.sampler.guidance

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return self.sampler.steps

    @property
    def evaluations(self) -> int:
        """Network evaluations of a round."""
        return self.groups * self.members * self.sampler.evaluations

    @property
    def rollouts(self) -> Rollouts:
        """Those of the newest round."""
        assert self._rollouts is not None, "a round begins with collecting"
        return self._rollouts

    def __call__(self, number: int, averaged: Pipeline) -> dict[str, float]:
        """Sample and reward the images of round `number`, from 0, with the averaged weights.

        Returns:
            The mean reward and its deviation, also by task and, of a sum, each part; the share of
            groups whose rewards are all alike; and how different the images of a group are, as a
            deviation of pixels.

        Raises:
            UserError: the reward fails, or all images of the first round have the same.
            NotFinite: values become NaN or infinite while images are sampled.
        """
        asked = self.prompts.draw(number, self.groups)
        with self.autocast(), torch.no_grad():
            text = text_of(averaged.text, asked)
            share = self.groups // self.processes.world_size
            mine = range(self.processes.rank * share, (self.processes.rank + 1) * share)
            rows = [g * self.members + m for g in mine for m in range(self.members)]
            parts = [
                self._sample(averaged, text, number, rows[start : start + self.batch_size])
                for start in self._shown(range(0, len(rows), self.batch_size), number)
            ]
        images = torch.cat([part.images for part in parts])
        own = [asked[row // self.members] for row in rows]
        rewarded = columns(self.reward, images, own)
        deviation = pixel_deviation(images, self.members)
        everyone = self.processes.gather((parts, rewarded, deviation))
        parts = [part for each, _, _ in everyone for part in each]
        every = {name: torch.cat([each[name] for _, each, _ in everyone]) for name in rewarded}
        trajectories = [part.trajectory for part in parts if part.trajectory is not None]
        self._rollouts = Rollouts(
            asked,
            text,
            torch.cat([part.x_0 for part in parts]),
            every.pop("reward"),
            joined(trajectories) if trajectories else None,
        )
        self._expect_signal(number)
        return {
            **figures(self._rollouts),
            **{f"reward_of_{name}": values.mean().item() for name, values in every.items()},
            "deviation_within_group": sum(d for _, _, d in everyone) / len(everyone),
        }

    def _sample(
        self, pipe: Pipeline, text: TokenIds | Encodings, number: int, rows: Sequence[int]
    ) -> Images:
        """The images of some rows of the round."""
        size = pipe.latent_size(pipe.image_size, pipe.image_size)
        shape = (pipe.mmdit.latent_channels, *size)
        keys = [(self.seed, "rollout", number, *divmod(row, self.members)) for row in rows]
        noise = torch.stack([torch.randn(shape, generator=generator_for(*key)) for key in keys])
        own = rows_of(text, torch.tensor(rows) // self.members)
        kept = torch.ones(len(rows), 3, dtype=torch.bool)
        with as_in_training():  # where encoders are trained, as their losses see them
            positive = condition(pipe.text, own, kept)
        x_0, trajectory = self.sampler(pipe, noise.to(pipe.device), positive)
        return Images(x_0.float().cpu(), pipe.decode(x_0).cpu(), trajectory)

    def _shown(self, batches: Sequence[int], number: int) -> Iterator[int]:
        """The batches with a progress bar, where they take longer than a few seconds."""
        return iter(
            tqdm(
                batches,
                desc=f"round {number}: sampling",
                unit="batch",
                leave=False,
                delay=5,
                disable=None if self.processes.main else True,
            )
        )

    def _expect_signal(self, number: int) -> None:
        """Raise UserError if nothing can be learned from the first round."""
        rewards = self.rollouts.rewards
        if number == 0 and bool((rewards == rewards[0]).all()):
            raise UserError(
                f"reward: all {len(rewards)} images of the first round are given "
                f"{rewards[0].item():g}, so none is better than another, and nothing can be "
                "learned. Choose another reward or prompts that the model sometimes gets right "
                "(reward.partial=true gives credit for parts), or more collector.members"
            )


def figures(rollouts: Rollouts) -> dict[str, float]:
    """What is logged of the rewards of a round."""
    rewards = rollouts.rewards
    by_task: dict[str, list[Tensor]] = {}
    for prompt, group in zip(rollouts.prompts, rollouts.groups, strict=True):
        if prompt.task is not None:
            by_task.setdefault(prompt.task, []).append(group.mean())
    return {
        "reward": rewards.mean().item(),
        "reward_deviation": rewards.std().item(),
        "groups_without_signal": 1 - rollouts.informative.double().mean().item(),
        **{f"reward_{task}": torch.stack(by_task[task]).mean().item() for task in sorted(by_task)},
    }


def text_of(text: TextConditioner, prompts: Sequence[Prompt]) -> TokenIds | Encodings:
    """What the encoders read of the prompts, or what frozen ones say: on the CPU, one row each."""
    ids = text.tokenize([prompt.text for prompt in prompts])
    if not text.frozen:
        return ids
    return Encodings(*(Encoding(*(part.cpu() for part in each)) for each in encode_text(text, ids)))
