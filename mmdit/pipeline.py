"""Prompt to picture: text, noise, guided flow, decoder."""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.checks import MOST_STEPS, expect_finite, seed_number, whole_number
from mmdit.dtypes import at_least_float32
from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.grids import Grid
from mmdit.flow.guidance import ClassifierFreeGuidance, Guidance
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.solvers import Progress, VelocityFunction, euler
from mmdit.flow.watch import Watch
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.backbone import Backbone
from mmdit.models.controlnet import ControlledMMDiT
from mmdit.registry import register
from mmdit.text.conditioning import TextConditioner

Solver = Callable[[VelocityFunction, Tensor, Tensor, Progress | None], Tensor]
Autocast = Callable[[], AbstractContextManager[object]]
MOST_IMAGES = 10_000  # of one call, which holds all of them at once


def to_pixels(x: Tensor) -> Tensor:
    """Float images (b, 3, h, w) in [-1, 1], as decoded -> uint8 (b, h, w, 3).

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    expect_finite("the autoencoder's decoder", x)
    return rearrange(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), "b c h w -> b h w c")


def from_pixels(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images (b, h, w, 3) -> (b, 3, h, w) in [-1, 1], contiguous.

    Strides of (b, h, w, c) would spread through the autoencoder, whose GroupNorm is many times
    slower in that layout on CPU.
    """
    return rearrange(pixels, "b h w c -> b c h w").contiguous().to(dtype) / 127.5 - 1.0


def to_latents(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """uint8 images (b, h, w, 3), anywhere -> normalized latents (b, c, h, w), where the model is.

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    device, dtype = autoencoder.scale.device, at_least_float32(autoencoder.dtype)
    latents = autoencoder.encode(from_pixels(pixels.to(device, non_blocking=True), dtype))
    expect_finite("the autoencoder's encoder", latents)
    return latents


def one_per_prompt(image: Tensor, prompts: int, height: int | None, width: int | None) -> Tensor:
    """Pictures to start from, as a batch (1 or prompts, h, w, 3).

    Args:
        image: uint8 (h, w, 3), or one for each prompt (prompts, h, w, 3).
        height, width: what the sides must be; None is any.

    Raises:
        UserError: another type, shape or number.
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise UserError(f"image is {kind}, but must be a torch tensor of type uint8")
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[-1] != 3 or len(batch) not in (1, prompts):
        raise UserError(
            f"image of shape {tuple(image.shape)} must be (height, width, 3), or one for each "
            f"prompt: ({prompts}, height, width, 3)"
        )
    wanted = (("height", height, batch.shape[1]), ("width", width, batch.shape[2]))
    for name, asked, has in wanted:
        if asked not in (None, has):
            raise UserError(
                f"{name}={asked} was asked for, but image has {has}: leave {name} out, or scale "
                "the image first"
            )
    return batch


def texts(name: str, given: str | Sequence[str]) -> list[str]:
    """One text or several, as a list.

    Raises:
        UserError: something else, or none.
    """
    several = [given] if isinstance(given, str) else given
    if not isinstance(several, Sequence) or not all(isinstance(text, str) for text in several):
        raise UserError(f"{name} {given!r} must be a text, or a list of texts")
    if not several:
        raise UserError(f"{name} is an empty list: give at least one text")
    for text in several:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{name} {text!r} is no text: it has half of a surrogate pair")
    return list(several)


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


def for_each_picture(condition: Condition, count: int) -> Condition:
    """The condition of each of `count` pictures, of which every prompt has an equal share."""
    times = count // len(condition.c_vec)
    return Condition(*(part.repeat_interleave(times, dim=0) for part in condition))


class NetworkVelocity:
    """dz/dt as a network predicts it: what guidance strengthens and solvers integrate."""

    def __init__(
        self,
        network: Backbone,
        objective: Objective,
        autocast: Autocast,
        evaluated: Callable[[Tensor, Tensor], object] = lambda z_t, velocity: None,
    ) -> None:
        self.network, self.objective, self.autocast = network, objective, autocast
        self.evaluated = evaluated

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Tensor:
        """At one time for a batch; at least float32."""
        with self.autocast():
            velocity = self.objective.velocity(self.network, z_t, t, condition)
        self.evaluated(z_t, velocity)
        return velocity

    def skipping(self, layers: Collection[int]) -> "NetworkVelocity":
        """Without these blocks of the network."""
        fewer = self.network.skipping(layers)
        return NetworkVelocity(fewer, self.objective, self.autocast, self.evaluated)


@register
class Pipeline(nn.Module):
    """All that a text-to-image model consists of.

    Args:
        mmdit: the network.
        text: prompts to conditions.
        autoencoder: images to latents and back.
        objective: the formulation the network was trained with, which sampling inverts.
        image_size: side of the square training images, in pixels; the default size.
        steps, guidance: default number of solver steps and guidance scale.

    Raises:
        UserError: the parts do not fit each other.
    """

    def __init__(
        self,
        *,
        mmdit: Backbone,
        text: TextConditioner,
        autoencoder: Autoencoder,
        objective: Objective,
        image_size: int,
        steps: int = 28,
        guidance: float = 4.5,
    ) -> None:
        super().__init__()
        fits = (
            ("latent_channels", mmdit.latent_channels, autoencoder.latent_channels),
            ("context_width", mmdit.context_width, text.context_width),
            ("pooled_width", mmdit.pooled_width, text.pooled_width),
        )
        for name, has, needs in fits:
            if has != needs:
                raise UserError(f"model.{name} is {has}, but the other parts have {needs}")
        self.mmdit, self.text, self.autoencoder = mmdit, text, autoencoder
        with torch.device("cpu"):  # also where the networks are built on meta
            objective.times(1)  # which refuses what could be trained and never sampled
        self.objective = objective
        self.image_size, self.steps, self.guidance = image_size, steps, guidance
        self.autocast: Autocast = nullcontext
        self.function_evaluations = 0.0  # of the network, for each picture of the newest call

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return next(self.mmdit.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.mmdit.parameters()).device

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent (h, w) of an image of height x width pixels.

        Raises:
            UserError: a side is not a multiple of autoencoder factor x patch size, or too large.
        """
        unit = self.autoencoder.factor * self.mmdit.patch_size
        largest = unit * self.mmdit.positions.shape[0]
        for name, side in (("height", height), ("width", width)):
            if side < unit or side % unit or side > largest:
                raise UserError(
                    f"{name}={side} must be a multiple of {unit} (autoencoder factor "
                    f"{self.autoencoder.factor} x patch {self.mmdit.patch_size}), from {unit} to "
                    f"{largest} pixels; this model was trained at {self.image_size}"
                )
        return height // self.autoencoder.factor, width // self.autoencoder.factor

    def noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """Starting latents, one per seed, each from its own CPU generator: (b, c, h, w).

        Image i has the same noise whatever the batch it is drawn in, whatever the device, and
        whatever the precision: it is drawn in float32.
        """
        size = (self.mmdit.latent_channels, *self.latent_size(height, width))
        draws = [torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(draws).to(self.device, at_least_float32(self.dtype))

    def noised(self, image: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Pictures, uint8 (n, h, w, 3), at noise level t of the straight path, where solvers move.

        Each for an equal share of the noises (b, c, h, w).
        Their latents are the means of the posterior; the reference draws samples of it.
        """
        with self.autocast():
            x_0 = to_latents(self.autoencoder, image)
        x_0 = x_0.repeat_interleave(len(noise) // len(x_0), dim=0)
        return RectifiedFlow().interpolate(x_0, noise, t.to(noise))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
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
        progress: Progress | None = None,
    ) -> Tensor:
        """Paint each prompt `num_images` times.

        Args:
            prompt: one or several; an empty one is legal and means unconditional.
            negative_prompt: what guidance moves away from, one or one for each prompt; None is
                unconditional.
            image: to start from instead of noise: uint8 (h, w, 3), or one for each prompt.
            strength: how much of `image` is repainted, from 0 (it is encoded and decoded) to 1
                (nothing is kept); `Grid.remaining` says which steps are left to do.
            num_images: per prompt; image i of a prompt starts from seed + i.
                All prompts together, at most 10,000 images.
            height, width: in pixels; that of `image`, or the training size, by default.
            steps: of the solver, at most 10,000.
            guidance: scale of classifier-free guidance (1 turns it off), or an object of
                `mmdit.flow.guidance`.
            seed: of the first image, 0 to 2^64 - 1; 0 by default. Torch's CPU generator reads the
                low 32 bits: seeds 2^32 apart give the same image.
            seeds: one for each image, instead of `seed`.
            solver: a function of `mmdit.flow.solvers`.
            grid: where the solver stops, of `mmdit.flow.grids`; the formulation's own by default.
            progress: called after every solver step with its number from 0, the noise level t
                that it reached and the latents there, (b, c, h, w), noise included, in float32 or,
                where the network is, float64. So
                `progress=lambda i, t, z: show(mmdit.latent_preview(z))` shows images of the
                published autoencoder while they are sampled.

        Returns:
            uint8 (len(prompt) * num_images, height, width, 3), prompts outermost. How often the
            network was evaluated for each is kept in `function_evaluations`.

        Raises:
            UserError: an impossible size or number, or an image that does not fit them.
            NotFinite: values become NaN or infinite; the message names the stage and the step.
        """
        prompts = texts("prompt", prompt)
        negatives = texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(negatives) not in (1, len(prompts)):
            raise UserError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one "
                "for each"
            )
        num_images = whole_number("num_images", num_images, most=MOST_IMAGES)
        steps = whole_number("steps", self.steps if steps is None else steps, most=MOST_STEPS)
        if (image is None) != (strength is None):
            raise UserError("image and strength belong together: give both or neither")
        strength = 1.0 if strength is None else real("strength", strength, 0.0, 1.0)
        count = len(prompts) * num_images
        if count > MOST_IMAGES:
            raise UserError(
                f"{len(prompts)} prompts x num_images={num_images} are {count:,} images, which are "
                f"sampled at once: at most {MOST_IMAGES:,} are, so make several calls"
            )
        if seed is not None and seeds is not None:
            raise UserError("seed and seeds exclude each other: give one of them")
        if seeds is None:
            first = seed_number("seed", 0 if seed is None else seed, images=num_images)
            seeds = [first + i % num_images for i in range(count)]
        if not isinstance(seeds, Sequence) or len(seeds) != count:
            many = len(seeds) if isinstance(seeds, Sequence) else repr(seeds)
            raise UserError(f"{many} seeds for {count} pictures: give a list, one for each")
        if image is not None:
            image = one_per_prompt(image, len(prompts), height, width)
            height, width = image.shape[1:3]
        height = self.image_size if height is None else whole_number("height", height)
        width = self.image_size if width is None else whole_number("width", width)
        guidance = self.guidance if guidance is None else guidance
        if not isinstance(guidance, Guidance):
            guidance = ClassifierFreeGuidance(scale=real("guidance", guidance))
        if not callable(solver):
            raise UserError(f"solver={solver!r} must be a function of mmdit.flow.solvers")
        if grid is not None and not isinstance(grid, Grid):
            raise UserError(f"grid={grid!r} must be an object of mmdit.flow.grids")
        if isinstance(self.mmdit, ControlledMMDiT):
            self.mmdit.check_pictures(count)

        seeds = [seed_number(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]
        z = self.noise(seeds, height, width)
        times = self.objective.times(steps, strength=strength, grid=grid)
        # Paths that end before all is noise start there, from the noise alone.
        z = times[0].item() * z if image is None else self.noised(image, z, times[:1])
        with self.autocast():
            positive = for_each_picture(self.text.encode(prompts), count)
            negative = for_each_picture(self.text.encode(negatives), count)
        watch = Watch(len(times) - 1, progress)
        network = NetworkVelocity(self.mmdit, self.objective, self.autocast, watch.evaluated)
        z = solver(guidance(network, positive, negative, times, steps), z, times, watch.step)
        watch.check(z, "at its end")  # solvers need not call `progress`
        self.function_evaluations = watch.evaluations / count
        with self.autocast():
            return to_pixels(self.autoencoder.decode(z))
