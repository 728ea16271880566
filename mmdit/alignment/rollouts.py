"""The images of a round of post-training, with their rewards: what the updates of a round see."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from mmdit.alignment.prompts import Prompt
from mmdit.text.conditioning import Encoding, Encodings, TokenIds


class Trajectory(NamedTuple):
    """How stochastic sampling came to its images: K Gaussian steps of which the densities count."""

    z: Tensor  # (n, K + 1, c, h, w), before the first of these steps and after each
    t: Tensor  # (K + 1,), the noise levels, decreasing: float64
    log_prob: Tensor  # (n, K), of each step by the policy that made it


class Rollouts(NamedTuple):
    """All images of a round, on the CPU, in every process.

    Prompt g has the rows g * members, ..., g * members + members - 1.
    """

    prompts: Sequence[Prompt]
    text: TokenIds | Encodings  # of the prompts, one row each
    x_0: Tensor  # latents (n, c, h, w), float32
    rewards: Tensor  # (n,) float64
    trajectory: Trajectory | None = None

    @property
    def members(self) -> int:
        """Number of images for each prompt."""
        return len(self.x_0) // len(self.prompts)

    @property
    def groups(self) -> Tensor:
        """The rewards by prompt: (prompts, members)."""
        return rearrange(self.rewards, "(g m) -> g m", g=len(self.prompts))

    @property
    def informative(self) -> Tensor:
        """Which rows belong to a group whose rewards differ: bool (n,)."""
        differs = self.groups.amax(1) > self.groups.amin(1)
        return repeat(differs, "g -> (g m)", m=self.members)

    def advantages(self, most: float = 5.0) -> Tensor:
        """How much better each image is than the others of its prompt: float32 (n,).

        The reward less the mean of its group, over the standard deviation of all rewards of the
        round, in [-most, most] (Flow-GRPO, Liu et al. 2025, with one scale for all groups).
        """
        centred = self.groups - self.groups.mean(1, keepdim=True)
        scaled = centred / (self.rewards.std() + 1e-4)
        return rearrange(scaled, "g m -> (g m)").clamp(-most, most).float()

    def text_of(self, rows: Tensor) -> TokenIds | Encodings:
        """The text of some images, one row each."""
        return rows_of(self.text, rows // self.members)


def rows_of(text: TokenIds | Encodings, rows: Tensor) -> TokenIds | Encodings:
    """Some rows of texts, as often as they are named."""
    if isinstance(text, Encodings):
        return Encodings(*(Encoding(*(part[rows] for part in each)) for each in text))
    return TokenIds(*(ids[rows] for ids in text))


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """The trajectories of several batches as those of one."""
    z, log_prob = (torch.cat([getattr(p, name) for p in parts]) for name in ("z", "log_prob"))
    return Trajectory(z, parts[0].t, log_prob)


def best_and_worst(rollouts: Rollouts) -> Tensor:
    """Pairs of rows of one prompt, a best image and a worst one: (pairs, 2), of differing groups.

    All images with the greatest reward of their group are paired with those with the least, in
    turn, so that each is in a pair.
    """
    pairs = []
    for number, rewards in enumerate(rollouts.groups):
        best, worst = (
            torch.nonzero(rewards == end).flatten() for end in (rewards.max(), rewards.min())
        )
        if rewards.max() > rewards.min():
            count = max(len(best), len(worst))
            turns = torch.arange(count)
            both = torch.stack([best[turns % len(best)], worst[turns % len(worst)]], 1)
            pairs.append(both + number * rollouts.members)
    return torch.cat(pairs) if pairs else torch.empty(0, 2, dtype=torch.int64)
