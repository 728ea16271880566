"""Sampling requests, checked in one place before anything is computed."""

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from mmdit.checks import MOST_STEPS, number, seed_number, whole_number
from mmdit.errors import UserError
from mmdit.flow.caches import Cache, expect_cacheable
from mmdit.flow.condition import Condition
from mmdit.flow.grids import Grid
from mmdit.flow.guidance import ClassifierFreeGuidance, Guidance
from mmdit.flow.solvers import Solver, euler

MOST_IMAGES = 10_000  # of one request; all are in memory at once


class Request:
    """The images to sample: prompts, size, seeds, solver, guidance.

    Values that no model could use are rejected when it is constructed. Values left at None are
    the model's defaults: `Pipeline.sample` fills them in, and checks what depends on the model,
    such as the sizes it supports.

    Example:
        request = Request(["a cat", "a dog"], num_images=2, steps=20)
        images, seeds, function_evaluations = pipe.sample(request)

    Args:
        prompt: one text or several, or the result of `Pipeline.encode`; an empty prompt is
            unconditional.
        negative_prompt: text that guidance moves away from: one, one per prompt, or encoded; None
            is unconditional. It is encoded only if the guidance reads it.
        image: image to start from instead of noise: uint8 (h, w, 3), or one per prompt (n, h, w,
            3).
        strength: how much of `image` is replaced, from 0 (it is only encoded and decoded) to 1
            (nothing is kept); `Grid.remaining` selects the steps that remain.
        num_images: number of images per prompt; image i of a prompt starts from seed + i. At most
            10,000 images over all prompts.
        height, width: size in pixels; by default that of `image` or `control`, or the training
            size.
        steps: number of solver steps, at most 10,000.
        guidance: scale of classifier-free guidance (1 turns it off), or an object from
            `mmdit.flow.guidance`.
        seed: seed of the first image of each prompt, 0 to 2^64 - 1; 0 by default. Torch's CPU
            generator reads only the low 32 bits: seeds 2^32 apart give the same image.
        seeds: one per image, prompts outermost, instead of `seed`.
        solver: ODE solver, a function from `mmdit.flow.solvers`.
        grid: time grid of the solver, from `mmdit.flow.grids`; by default the formulation's.
        cache: saves evaluations of the network, from `mmdit.flow.caches`, at the cost of images
            that differ from those of full sampling; None is full sampling.
        control: image that a `ControlledMMDiT` follows, in the format of `image`.
        extra: further conditions of the network, by the names in `Backbone.reads`: one row for all
            images or one per image, prompts outermost. Guidance passes them to the conditional
            and the unconditional evaluation alike.

    Raises:
        UserError: a value is impossible, or values contradict each other.
    """

    def __init__(
        self,
        prompt: str | Sequence[str] | Condition,
        *,
        negative_prompt: str | Sequence[str] | Condition | None = None,
        image: Tensor | None = None,
        strength: float | None = None,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | Guidance | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        solver: Solver = euler,
        grid: Grid | None = None,
        cache: Cache | None = None,
        control: Tensor | None = None,
        extra: Mapping[str, Tensor] = {},
    ) -> None:
        self.prompts = texts("prompt", prompt)
        self.negatives = texts(
            "negative_prompt", "" if negative_prompt is None else negative_prompt
        )
        prompts, negatives = count(self.prompts), count(self.negatives)
        if negatives not in (1, prompts):
            raise UserError(
                f"{negatives} negative prompts for {prompts} prompts: give one, or one per prompt"
            )
        num_images = whole_number("num_images", num_images, most=MOST_IMAGES)
        self.count = prompts * num_images
        if self.count > MOST_IMAGES:
            raise UserError(
                f"{prompts} prompts x num_images={num_images} are {self.count:,} images, but at "
                f"most {MOST_IMAGES:,} can be sampled at once: split them into several calls"
            )
        self.seeds = seeds_of(seed, seeds, prompts, num_images)
        if (image is None) != (strength is None):
            raise UserError("image and strength belong together: give both or neither")
        self.strength = 1.0 if strength is None else number("strength", strength, 0.0, 1.0)
        self.height = None if height is None else whole_number("height", height)
        self.width = None if width is None else whole_number("width", width)
        self.image = self._sized("image", image, prompts)
        self.control = self._sized("control", control, prompts)
        self.extra = rows_for(extra, self.count)
        self.steps = None if steps is None else whole_number("steps", steps, most=MOST_STEPS)
        if not (guidance is None or isinstance(guidance, Guidance)):
            guidance = ClassifierFreeGuidance(scale=number("guidance", guidance))
        self.guidance = guidance
        if not callable(solver):
            raise UserError(f"solver={solver!r} must be a function of mmdit.flow.solvers")
        if not (grid is None or isinstance(grid, Grid)):
            raise UserError(f"grid={grid!r} must be an object of mmdit.flow.grids")
        if not (cache is None or isinstance(cache, Cache)):
            raise UserError(f"cache={cache!r} must be an object of mmdit.flow.caches")
        if cache is not None:
            expect_cacheable(solver)
        self.solver, self.grid, self.cache = solver, grid, cache

    def encoded(self, prompts: Condition, negatives: Condition | None) -> Self:
        """The same request with encoded prompts.

        Args:
            prompts: encoded.
            negatives: the negative prompts, encoded; None leaves them as they are.
        """
        request = copy.copy(self)
        request.prompts = prompts
        if negatives is not None:
            request.negatives = negatives
        return request

    def _sized(self, name: str, image: Tensor | None, prompts: int) -> Tensor | None:
        """An image as a batch, whose size becomes that of all samples."""
        if image is None:
            return None
        batch = one_per_prompt(name, image, prompts, self.height, self.width)
        self.height, self.width = batch.shape[1:3]
        return batch


def texts(name: str, given: str | Sequence[str] | Condition) -> list[str] | Condition:
    """One text or several as a list; encoded prompts are returned unchanged.

    Raises:
        UserError: something else, or an empty list.
    """
    if isinstance(given, Condition):
        return given
    several = [given] if isinstance(given, str) else given
    if not isinstance(several, Sequence) or not all(isinstance(text, str) for text in several):
        raise UserError(f"{name} {given!r} must be a text, or a list of texts")
    if not several:
        raise UserError(f"{name} is an empty list: give at least one text")
    for text in several:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{name} {text!r} is not a text: it has half of a surrogate pair")
    return list(several)


def count(prompts: list[str] | Condition) -> int:
    """Number of prompts."""
    return len(prompts.c_vec if isinstance(prompts, Condition) else prompts)


def seeds_of(
    seed: int | None, seeds: Sequence[int] | None, prompts: int, num_images: int
) -> list[int]:
    """The seed of each image, prompts outermost: as given, or counted up from `seed` per prompt.

    Raises:
        UserError: both are given, a seed is invalid, or their number does not match.
    """
    if seed is not None and seeds is not None:
        raise UserError("seed and seeds exclude each other: give one of them")
    if seeds is None:
        first = seed_number("seed", 0 if seed is None else seed, images=num_images)
        return [first + i for i in range(num_images)] * prompts
    if not isinstance(seeds, Sequence) or len(seeds) != prompts * num_images:
        many = len(seeds) if isinstance(seeds, Sequence) else repr(seeds)
        raise UserError(
            f"{many} seeds for {prompts * num_images} images: give a list, one per image"
        )
    return [seed_number(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]


def one_per_prompt(
    name: str, image: Tensor, prompts: int, height: int | None, width: int | None
) -> Tensor:
    """One image for all prompts, or one per prompt, as a batch (1 or prompts, h, w, 3).

    Args:
        name: name of the argument, for messages.
        image: uint8 (h, w, 3), or one per prompt (prompts, h, w, 3).
        height, width: required size in pixels; None accepts any.

    Raises:
        UserError: the type, the shape or the number of images is wrong.
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise UserError(f"{name} is {kind}, but must be a torch tensor of type uint8")
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[-1] != 3 or len(batch) not in (1, prompts):
        raise UserError(
            f"{name} of shape {tuple(image.shape)} must be (height, width, 3), or one per "
            f"prompt: ({prompts}, height, width, 3)"
        )
    required = (("height", height, batch.shape[1]), ("width", width, batch.shape[2]))
    for side, asked, has in required:
        if asked not in (None, has):
            raise UserError(
                f"{side}={asked} was asked for, but {name} has {has}: leave {side} out, or scale "
                f"the {name} first"
            )
    return batch


def rows_for(extra: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The further conditions of `count` images, checked.

    Raises:
        UserError: a value is not a tensor of one row for all images, or one row per image.
    """
    if not isinstance(extra, Mapping):
        raise UserError(f"extra={extra!r} must be a mapping from names to tensors")
    for name, part in extra.items():
        if not isinstance(part, Tensor) or part.ndim == 0 or len(part) not in (1, count):
            has = f"{len(part)} rows" if isinstance(part, Tensor) and part.ndim else repr(part)
            raise UserError(
                f"extra[{name!r}] has {has} for {count} images: give one for all, or one per "
                "image, prompts outermost (repeat_interleave(num_images, dim=0))"
            )
    return dict(extra)
