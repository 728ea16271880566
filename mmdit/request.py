"""What to sample, checked in one place before any of it is computed."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mmdit.checks import MOST_STEPS, seed_number, whole_number
from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.grids import Grid
from mmdit.flow.guidance import ClassifierFreeGuidance, Guidance
from mmdit.flow.solvers import Solver, euler

MOST_IMAGES = 10_000  # of one request, which are all held at once


class Request:
    """Images to sample: numbers that no model could use are refused when it is made.

    What is None is the model's own. `Pipeline.sample` fills it in, and checks what depends on the
    model, such as the sizes that it takes.

    Example:
        request = Request(["a cat", "a dog"], num_images=2, steps=20)
        images, seeds, function_evaluations = pipe.sample(request)

    Args:
        prompt: one or several, or what `Pipeline.encode` made of them; an empty prompt means
            unconditional.
        negative_prompt: what guidance moves away from, one or one for each prompt, or encoded;
            None is unconditional. It is encoded only if the guidance reads it.
        image: to start from instead of noise: uint8 (h, w, 3), or one for each prompt.
        strength: how much of `image` is replaced, from 0 (it is encoded and decoded) to 1 (nothing
            is kept); `Grid.remaining` says which steps are left to do.
        num_images: per prompt; image i of a prompt starts from seed + i. All prompts together, at
            most 10,000 images.
        height, width: in pixels; that of `image` or `control`, or the training size, by default.
        steps: of the solver, at most 10,000.
        guidance: scale of classifier-free guidance (1 turns it off), or an object of
            `mmdit.flow.guidance`.
        seed: of the first image of each prompt, 0 to 2^64 - 1; 0 by default. Torch's CPU generator
            reads the low 32 bits: seeds 2^32 apart give the same image.
        seeds: one for each image, prompts outermost, instead of `seed`.
        solver: a function of `mmdit.flow.solvers`.
        grid: where the solver stops, of `mmdit.flow.grids`; the formulation's own by default.
        control: image that a `ControlledMMDiT` follows, as `image` is given.
        extra: what else conditions the network besides text, by the names of `Backbone.reads`: one
            row for all images or one for each, prompts outermost. Both sides of guidance get it.

    Raises:
        UserError: an impossible value, or values that do not fit each other.
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
                f"{negatives} negative prompts for {prompts} prompts: give one, or one for each"
            )
        num_images = whole_number("num_images", num_images, most=MOST_IMAGES)
        self.count = prompts * num_images
        if self.count > MOST_IMAGES:
            raise UserError(
                f"{prompts} prompts x num_images={num_images} are {self.count:,} images, which are "
                f"sampled at once: at most {MOST_IMAGES:,} are, so make several calls"
            )
        self.seeds = seeds_of(seed, seeds, prompts, num_images)
        if (image is None) != (strength is None):
            raise UserError("image and strength belong together: give both or neither")
        self.strength = 1.0 if strength is None else real("strength", strength, 0.0, 1.0)
        self.height = None if height is None else whole_number("height", height)
        self.width = None if width is None else whole_number("width", width)
        self.image = self._sized("image", image, prompts)
        self.control = self._sized("control", control, prompts)
        self.extra = rows_for(extra, self.count)
        self.steps = None if steps is None else whole_number("steps", steps, most=MOST_STEPS)
        if not (guidance is None or isinstance(guidance, Guidance)):
            guidance = ClassifierFreeGuidance(scale=real("guidance", guidance))
        self.guidance = guidance
        if not callable(solver):
            raise UserError(f"solver={solver!r} must be a function of mmdit.flow.solvers")
        if not (grid is None or isinstance(grid, Grid)):
            raise UserError(f"grid={grid!r} must be an object of mmdit.flow.grids")
        self.solver, self.grid = solver, grid

    def _sized(self, name: str, image: Tensor | None, prompts: int) -> Tensor | None:
        """An image as a batch, whose size is that of all images."""
        if image is None:
            return None
        batch = one_per_prompt(name, image, prompts, self.height, self.width)
        self.height, self.width = batch.shape[1:3]
        return batch


def texts(name: str, given: str | Sequence[str] | Condition) -> list[str] | Condition:
    """One text or several as a list; encoded ones as they are.

    Raises:
        UserError: something else, or none.
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
    """The seed of each image, prompts outermost: as given, or counted from `seed` for each prompt.

    Raises:
        UserError: both are given, a seed is not one, or there is another number of them.
    """
    if seed is not None and seeds is not None:
        raise UserError("seed and seeds exclude each other: give one of them")
    if seeds is None:
        first = seed_number("seed", 0 if seed is None else seed, images=num_images)
        return [first + i for i in range(num_images)] * prompts
    if not isinstance(seeds, Sequence) or len(seeds) != prompts * num_images:
        many = len(seeds) if isinstance(seeds, Sequence) else repr(seeds)
        raise UserError(
            f"{many} seeds for {prompts * num_images} images: give a list, one for each"
        )
    return [seed_number(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]


def one_per_prompt(
    name: str, image: Tensor, prompts: int, height: int | None, width: int | None
) -> Tensor:
    """An image for all prompts or one for each, as a batch (1 or prompts, h, w, 3).

    Args:
        name: of the argument.
        image: uint8 (h, w, 3), or one for each prompt (prompts, h, w, 3).
        height, width: what the sides must be; None is any.

    Raises:
        UserError: another type, shape or number.
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise UserError(f"{name} is {kind}, but must be a torch tensor of type uint8")
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[-1] != 3 or len(batch) not in (1, prompts):
        raise UserError(
            f"{name} of shape {tuple(image.shape)} must be (height, width, 3), or one for each "
            f"prompt: ({prompts}, height, width, 3)"
        )
    wanted = (("height", height, batch.shape[1]), ("width", width, batch.shape[2]))
    for side, asked, has in wanted:
        if asked not in (None, has):
            raise UserError(
                f"{side}={asked} was asked for, but {name} has {has}: leave {side} out, or scale "
                f"the {name} first"
            )
    return batch


def rows_for(extra: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """What else conditions `count` images, checked.

    Raises:
        UserError: something is not a tensor of one row for all images, or one for each.
    """
    if not isinstance(extra, Mapping):
        raise UserError(f"extra={extra!r} must give a tensor to each name")
    for name, part in extra.items():
        if not isinstance(part, Tensor) or part.ndim == 0 or len(part) not in (1, count):
            has = f"{len(part)} rows" if isinstance(part, Tensor) and part.ndim else repr(part)
            raise UserError(
                f"extra[{name!r}] has {has} for {count} images: give one for all, or one for each, "
                "prompts outermost (repeat_interleave(num_images, dim=0))"
            )
    return dict(extra)


def real(name: str, given: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number, of Python or numpy, as a float.

    Raises:
        UserError: something else, or outside of [least, most].
    """
    number = isinstance(given, Real) and not isinstance(given, bool) and math.isfinite(given)
    if not (number and least <= given <= most):
        within = "" if math.isinf(most) else f" in [{least:g}, {most:g}]"
        raise UserError(f"{name}={given!r} must be a finite number{within}")
    return float(given)
