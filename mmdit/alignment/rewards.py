"""Rewards: how good each image is for its prompt.

A reward is called with images, uint8 (n, h, w, 3) on the CPU, and one `Prompt` for each; it returns
n finite numbers, of which a greater one is better.
"""

import importlib
import re
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmdit.alignment.prompts import Prompt, expect_shapes
from mmdit.checks import expect, flag, mapping, number, whole_number
from mmdit.data.captions import Scene, short_caption
from mmdit.data.shapes import Shapes
from mmdit.devices import available
from mmdit.errors import UserError, first_line
from mmdit.metrics.compositional import Detection, detections, holds, kinds, matches
from mmdit.metrics.diversity import attributes
from mmdit.metrics.features import load_clip_features
from mmdit.out_of_memory import is_out_of_memory
from mmdit.text.clip_pair import CLIPPair

SAFE = "The weights of the last checkpoint are kept: change the reward, and continue the run"


class Reward(Protocol):
    """Scores images."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Images uint8 (n, h, w, 3) on the CPU, with a prompt each -> rewards, float64 (n,)."""


class CompositionalReward:
    """1 for an image that is exactly what its scene's short caption asks for, otherwise 0.

    Args:
        data: the shapes, of whose scenes the prompts are.
        partial: give credit for the parts that are right, by `credit`; 1 is still all of it.
        novelty: in [0, 1], what a right image loses if all other right images of its prompt agree
            with it in what the caption leaves free (`crowding`): an answer is worth less the more
            often it is given, so that one answer for all is no longer the best.

    Raises:
        UserError: the data has no scenes, or a value is out of range.
    """

    def __init__(self, *, data: Shapes, partial: bool = False, novelty: float = 0.0) -> None:
        self.data = expect_shapes("reward.data", data)
        self.novelty = number("reward.novelty", novelty, 0, 1)
        flag("reward.partial", partial)
        self.score: Callable[[Scene, list[Detection]], float] = credit if partial else matches

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The reward of each image.

        Raises:
            UserError: a prompt has no scene.
        """
        scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
        if len(scenes) < len(prompts):
            text = next(prompt.text for prompt in prompts if prompt.scene is None)
            raise UserError(
                f"CompositionalReward compares an image with the scene of its prompt, but {text!r} "
                "has none: use prompt_source=scenes, or another reward"
            )
        found = detections(self.data, scenes, images)
        scores = [self.score(scene, things) for scene, things in zip(scenes, found, strict=True)]
        rewards = torch.tensor(scores, dtype=torch.float64)
        if self.novelty:
            rewards *= 1 - self.novelty * crowding(scenes, found, self.data.grid)
        return rewards


def crowding(scenes: Sequence[Scene], found: Sequence[Sequence[Detection]], grid: int) -> Tensor:
    """How many other right images of the same caption agree with an image in what it leaves free.

    A share in [0, 1], the mean over place and, where the caption names none, colour; 0 for wrong
    images, and where no other is right. Float64 (n,).

    Args:
        scenes: of the prompt of each image.
        found: the objects in each image.
        grid: cells of the layout along a side.
    """
    groups: dict[str, list[int]] = {}
    for row, (scene, things) in enumerate(zip(scenes, found, strict=True)):
        if matches(scene, things):
            groups.setdefault(short_caption(scene), []).append(row)
    shares = torch.zeros(len(scenes), dtype=torch.float64)
    for rows in groups.values():
        free = attributes(scenes[rows[0]], grid).values()
        for attribute in free if len(rows) > 1 else ():
            values = [attribute(found[row]) for row in rows]
            alike = Counter(values)
            agree = [(alike[value] - 1) / (len(rows) - 1) for value in values]
            shares[rows] += torch.tensor(agree, dtype=torch.float64) / len(free)
    return shares


def credit(scene: Scene, found: Sequence[Detection]) -> float:
    """The part of a short caption that is right, in [0, 1]: 1 exactly where `matches` is true.

    It is the mean of what the caption asks for, for n objects of which f are found:

    - number: 1 - |n - f| / n, at least 0;
    - shapes: the number of shapes that agree, each found object for one asked for, / max(n, f);
    - colours, in the tasks that name them: the same for pairs of a shape and its colour;
    - relation, in the position task: 1 if an object of the first kind lies so to one of the second.
    """
    asked, seen = (Counter(kinds(scene, things)) for things in (scene.objects, found))
    n, f = len(scene.objects), len(found)
    shapes = Counter(thing.shape for thing in scene.objects)
    parts = [max(0.0, 1 - abs(n - f) / n)]
    parts.append((shapes & Counter(thing.shape for thing in found)).total() / max(n, f))
    if any(colour for _, colour in asked):
        parts.append((asked & seen).total() / max(n, f))
    if scene.relation is not None:
        first, second = (
            [thing for thing in found if (thing.shape, thing.colour) == (own.shape, own.colour)]
            for own in scene.objects
        )
        parts.append(any(holds(scene.relation, a, b) for a in first for b in second))
    return sum(parts) / len(parts)


class CLIPReward:
    """The cosine between CLIP's embeddings of an image and of its prompt, in [-1, 1].

    Args:
        clip: a CLIP pair; or the file or folder of one, or a run that trained one.
        batch_size: number of images embedded at a time.
        device: where it is computed, of a CLIP that is opened here.

    Raises:
        UserError: it is not a CLIP, or cannot be read.
    """

    def __init__(
        self, *, clip: CLIPPair | str | Path, batch_size: int = 64, device: str = "cpu"
    ) -> None:
        self.batch_size = whole_number("reward.batch_size", batch_size)
        if not isinstance(clip, CLIPPair):
            expect(isinstance(clip, str | Path), "reward.clip", clip, "must be a file or folder")
            clip = load_clip_features(clip, device=available(device))
        self.clip = clip

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        rows = {text: row for row, text in enumerate(dict.fromkeys(p.text for p in prompts))}
        texts, size = list(rows), self.batch_size
        of_texts = torch.cat(
            [self.clip.text_features(texts[i : i + size]) for i in range(0, len(texts), size)]
        )
        parts = []
        for start in range(0, len(images), size):
            batch = slice(start, start + size)
            own = of_texts[[rows[prompt.text] for prompt in prompts[batch]]]
            seen = self.clip.image_features(images[batch].to(self.clip.device))
            parts.append((seen * own).sum(dim=-1).double().cpu())
        return torch.cat(parts)


class FunctionReward:
    """A function of your own.

    Example:
        # my_rewards.py
        def redness(images, texts):  # uint8 (n, h, w, 3), n texts
            return images[..., 0].float().mean(dim=(1, 2)) - images[..., 2].float().mean(dim=(1, 2))

        python train.py imports=[my_rewards] reward=function reward.function=my_rewards:redness ...

    Args:
        function: the function, or its name as "module:name". It is called with a copy of the images
            and a list of the prompts' texts, and returns one number for each image, as a tensor,
            array or list.

    Raises:
        UserError: the function cannot be found.
    """

    def __init__(self, *, function: Callable[[Tensor, list[str]], Any] | str) -> None:
        self.name = function if isinstance(function, str) else getattr(function, "__name__", "")
        self.function = _function(function) if isinstance(function, str) else function
        expect(callable(self.function), "reward.function", function, "must be a function")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        values = self.function(images.clone(), [prompt.text for prompt in prompts])
        return _numbers(f"FunctionReward {self.name}", values, prompts)


class WeightedSum:
    """A weighted sum of rewards, each of which is logged under its name.

    Args:
        rewards: name -> reward.
        weights: name -> its weight, for the same names; not all zero.

    Raises:
        UserError: names or weights do not fit.
    """

    def __init__(self, *, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        mapping("reward.rewards", rewards)
        mapping("reward.weights", weights)
        expect(bool(rewards), "reward.rewards", dict(rewards), "must name at least one")
        expect("reward" not in rewards, "reward.rewards", "reward", "is the name of the sum")
        for name in {*rewards, *weights}:
            if name not in rewards or name not in weights:
                lacking = "weights" if name in rewards else "rewards"
                raise UserError(
                    f"reward.{lacking} has no {name!r}: rewards and weights need the same names"
                )
        for name, reward in rewards.items():
            expect(callable(reward), f"reward.rewards.{name}", reward, "must be a reward")
        self.rewards = dict(rewards)
        self.weights = {
            name: number(f"reward.weights.{name}", weights[name]) for name in self.rewards
        }
        some = any(self.weights.values())
        expect(some, "reward.weights", self.weights, "must not all be zero")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.total(self.parts(images, prompts))

    def parts(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Each reward, before it is weighted, by its name."""
        return {
            name: checked(reward, images, prompts, name) for name, reward in self.rewards.items()
        }

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of `parts`."""
        return torch.stack([w * parts[name] for name, w in self.weights.items()]).sum(dim=0)


def columns(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The reward of each image as "reward", checked, and each part of a weighted sum by its name.

    Raises:
        UserError: as `checked` does.
    """
    if not isinstance(reward, WeightedSum):
        return {"reward": checked(reward, images, prompts)}
    parts = reward.parts(images, prompts)
    return {"reward": reward.total(parts), **parts}


def checked(
    reward: Reward, images: Tensor, prompts: Sequence[Prompt], name: str | None = None
) -> Tensor:
    """The reward of each image, float64 (n,).

    Args:
        reward: the reward.
        images: uint8 (n, h, w, 3) on the CPU.
        prompts: one for each image.
        name: of the reward in a weighted sum, for messages.

    Raises:
        UserError: the reward fails, or does not return a finite number for each image.
    """
    own = type(reward).__name__ if name is None else f"{type(reward).__name__} {name!r}"
    try:
        values = reward(images, prompts)
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise UserError(
            f"the reward {own} raised {type(error).__name__}: {first_line(error)} ({where}). {SAFE}"
        ) from error
    return _numbers(own, values, prompts)


def _numbers(name: str, values: Any, prompts: Sequence[Prompt]) -> Tensor:
    """What a reward returned as float64 (n,), if it is one finite number for each prompt."""
    try:
        if isinstance(values, Tensor | np.ndarray):
            found = torch.as_tensor(values)
        else:
            found = torch.tensor(values, dtype=torch.float64)
        expect(not found.is_complex(), "dtype", found.dtype, "must be real")
        plain = found.detach().cpu().double()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(
            f"the reward {name} returned a {type(values).__name__}, which is not a list of numbers "
            f"({first_line(error)}). {SAFE}"
        ) from error
    if plain.shape != (len(prompts),):
        shape = (
            f"values of shape {tuple(plain.shape)}" if plain.ndim != 1 else f"{len(plain)} values"
        )
        raise UserError(
            f"the reward {name} returned {shape} for {len(prompts)} images: it must return one "
            f"number for each. {SAFE}"
        )
    bad = ~plain.isfinite()
    if bad.any():
        first = int(bad.nonzero()[0])
        raise UserError(
            f"the reward {name} is {plain[first].item()} for {int(bad.sum())} of {len(plain)} "
            f"images, first for one of {prompts[first].text!r}. {SAFE}"
        )
    return plain


def _function(name: str) -> Callable[..., Any]:
    """The function named "module:name"."""
    module, _, attribute = name.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not attribute.isidentifier():
        raise UserError(f"reward.function={name!r} must be module:name, such as my_rewards:score")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"reward.function={name!r} is not found: {first_line(error)}. Python must find a "
            "module of your own, for example by PYTHONPATH=<folder>"
        ) from error
    return found
