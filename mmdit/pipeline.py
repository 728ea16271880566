"""Prompt to picture: text, noise, guided flow, decoder."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.errors import UserError
from mmdit.flow.guidance import ClassifierFreeGuidance, Condition
from mmdit.flow.objective import Objective
from mmdit.flow.solvers import Progress, VelocityFunction, euler
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.mmdit import MMDiT
from mmdit.registry import register
from mmdit.text.conditioning import TextConditioner

Solver = Callable[[VelocityFunction, Tensor, Tensor, Progress | None], Tensor]


def to_pixels(x: Tensor) -> Tensor:
    """Float images (b, 3, h, w) in [-1, 1] -> uint8 (b, h, w, 3)."""
    return rearrange(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), "b c h w -> b h w c")


def from_pixels(pixels: Tensor) -> Tensor:
    """uint8 images (b, h, w, 3) -> float (b, 3, h, w) in [-1, 1], contiguous.

    Strides of (b, h, w, c) would spread through the autoencoder, whose GroupNorm is many times
    slower in that layout on CPU.
    """
    return rearrange(pixels, "b h w c -> b c h w").contiguous().float() / 127.5 - 1.0


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
        mmdit: MMDiT,
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
        self.objective = objective
        self.image_size, self.steps, self.guidance = image_size, steps, guidance
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def device(self) -> torch.device:
        return next(self.mmdit.parameters()).device

    def velocity(self, z_t: Tensor, t: float, condition: Condition) -> Tensor:
        """dz/dt of the network at one time for a batch; float32."""
        times = torch.full((len(z_t),), t, device=z_t.device)
        with self.autocast():
            output = self.mmdit(z_t, times, condition.c_vec, condition.c_ctxt)
        objective = self.objective
        return objective.prediction.velocity(objective.path, output.float(), z_t, times)

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

        Image i has the same noise whatever the batch it is drawn in, and whatever the device.
        """
        size = (self.mmdit.latent_channels, *self.latent_size(height, width))
        draws = [torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(draws).to(self.device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        solver: Solver = euler,
        progress: Progress | None = None,
    ) -> Tensor:
        """Paint each prompt `num_images` times.

        Args:
            prompt: one or several; an empty one is legal and means unconditional.
            negative_prompt: what guidance moves away from; None is unconditional.
            num_images: pictures per prompt; picture i of a prompt starts from seed + i.
            height, width: in pixels; the training size by default.
            steps, guidance: of the solver and of classifier-free guidance (1 turns it off).
            seed: of the first picture; `seeds` gives one for each picture instead.
            solver: a function of `mmdit.flow.solvers`.
            progress: called after every solver step.

        Returns:
            uint8 (len(prompt) * num_images, height, width, 3), prompts outermost.

        Raises:
            UserError: an impossible size or number.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_images < 1:
            raise UserError(f"num_images={num_images} must be at least 1")
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise UserError(f"steps={steps} must be at least 1")
        prompts = [text for text in prompts for _ in range(num_images)]
        if seeds is None:
            seeds = [seed + i % num_images for i in range(len(prompts))]
        height, width = height or self.image_size, width or self.image_size

        z = self.noise(seeds, height, width)
        with self.autocast():
            positive = self.text.encode(prompts)
            negative = self.text.encode([negative_prompt or ""] * len(prompts))
        guide = ClassifierFreeGuidance(scale=self.guidance if guidance is None else guidance)
        velocity = guide(self.velocity, positive, negative)
        z = solver(velocity, z, self.objective.shift.grid(steps), progress)
        with self.autocast():
            return to_pixels(self.autoencoder.decode(z))
