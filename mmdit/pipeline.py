"""Text-to-image sampling: encode the prompt, integrate the guided flow from noise, decode."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.adapters.adapter import (
    Adapter,
    attach,
    attached,
    detach,
    fuse,
    rescale,
    unused_name,
)
from mmdit.adapters.reading import read_adapter
from mmdit.checks import MOST_STEPS, expect_finite, whole_number
from mmdit.dtypes import at_least_float32
from mmdit.errors import UserError
from mmdit.flow.cached_velocity import Residuals
from mmdit.flow.caches import Cache, expect_cacheable
from mmdit.flow.condition import Condition, LayeredVelocity
from mmdit.flow.guidance import ClassifierFreeGuidance, Guidance
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.solvers import Progress, Solver, euler
from mmdit.flow.watch import Watch
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.backbone import Backbone, crop_positions
from mmdit.models.controlnet import ControlledMMDiT, control_pixels
from mmdit.models.interval import IntervalMMDiT
from mmdit.models.tabulated import Evaluations, tabulate
from mmdit.registry import register
from mmdit.request import Request
from mmdit.text.conditioning import TextConditioner


def to_pixels(x: Tensor) -> Tensor:
    """Convert decoded float images (b, 3, h, w) in [-1, 1] to uint8 (b, h, w, 3).

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    expect_finite("the autoencoder's decoder", x)
    return rearrange(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), "b c h w -> b h w c")


def from_pixels(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 images (b, h, w, 3) to floats (b, 3, h, w) in [-1, 1], contiguous.

    Channels-last strides would propagate through the autoencoder, whose GroupNorm is many times
    slower in that layout on CPU.
    """
    return rearrange(pixels, "b h w c -> b c h w").contiguous().to(dtype) / 127.5 - 1.0


def to_latents(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """Encode uint8 images (b, h, w, 3) to normalized latents (b, c, h, w).

    The images may be on any device; the latents are on the autoencoder's.

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    device, dtype = autoencoder.device, at_least_float32(autoencoder.compute_dtype)
    latents = autoencoder.encode(from_pixels(pixels.to(device, non_blocking=True), dtype))
    expect_finite("the autoencoder's encoder", latents)
    return latents


class Samples(NamedTuple):
    """Result of `Pipeline.sample`."""

    images: Tensor  # uint8 (n, h, w, 3), prompts outermost
    seeds: list[int]  # one per image
    function_evaluations: float  # of the whole network, per image; parts count as their share


class Denoised(NamedTuple):
    """Result of `Pipeline.denoise`."""

    latents: Tensor  # (n, c, h, w), float32 or wider
    function_evaluations: float  # of the whole network, per latent; parts count as their share


def for_each_image(condition: Condition, count: int) -> Condition:
    """Repeat each prompt's condition for its share of `count` images, prompts outermost."""
    return condition.map(lambda part: part.repeat_interleave(count // len(part), dim=0))


def check_extra(network: Backbone, extra: Mapping[str, Tensor]) -> None:
    """Check that the conditions besides text are exactly those that the network reads.

    Raises:
        UserError: a tensor is missing, or not read by the network.
        NotFinite: a value is NaN or infinite.
    """
    if network.reads != set(extra):
        has, needs = (", ".join(sorted(names)) or "nothing" for names in (extra, network.reads))
        raise UserError(
            f"extra has {has}, but {type(network).__name__} reads {needs} besides the prompt"
        )
    for name, part in extra.items():
        expect_finite(f"the source of extra[{name!r}]", part)


def expect_negative(guidance: Guidance, negative: Condition | None) -> None:
    """Raise UserError if a guidance reads a negative prompt, but there is none."""
    if negative is None and guidance.reads_negative:
        raise UserError(
            f"{type(guidance).__name__} moves away from a negative prompt: pass its condition to "
            'denoise() as `negative`, for example encode([""])'
        )


def takes_averages(solver: Solver) -> bool:
    """Whether a solver's steps are exact if the velocity is the average over each of them: Euler's.

    Others combine velocities at points of time, which averages are not.
    """
    return getattr(solver, "func", solver) is euler


class NetworkVelocity:
    """The velocity dz/dt that a network predicts: input of guidance, integrated by solvers.

    Args:
        network: predicts in the parametrization of `objective`; or what takes its place.
        objective: converts the prediction to a velocity.
        evaluated: called after every evaluation with z_t, the velocity and the share of the
            operations of `whole` that it took.
        ends: the time at which the step from each time ends, for a network that predicts average
            velocities over steps (`IntervalMMDiT`); from other times it predicts the velocity.
        whole: the network with all its blocks, if `network` is a view of it.
    """

    def __init__(
        self,
        network: Backbone | Evaluations,
        objective: Objective,
        evaluated: Callable[[Tensor, Tensor, float], object] = lambda z_t, velocity, share: None,
        ends: Mapping[float, float] = {},
        whole: Backbone | Evaluations | None = None,
    ) -> None:
        self.network, self.objective, self.evaluated = network, objective, evaluated
        self.ends, self.whole = ends, network if whole is None else whole

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Tensor:
        """Velocity (b, c, h, w), at least float32, of latents that are all at time t."""
        if t in self.ends:
            end = z_t.new_full((len(z_t),), self.ends[t], dtype=at_least_float32(z_t.dtype))
            condition = condition._replace(extra={**condition.extra, "r": end})
        velocity = self.objective.velocity(self.network, z_t, t, condition)
        self.evaluated(z_t, velocity, self.share(z_t, condition))
        return velocity

    def skipping(self, layers: Collection[int]) -> "NetworkVelocity":
        """The velocity of the same network without these blocks."""
        return self._of(self.network.skipping(layers))

    def reusing(self, residuals: Residuals) -> "NetworkVelocity":
        """The velocity of the same network, which evaluates all blocks only where it must."""
        assert isinstance(self.network, Backbone), "rehearsals evaluate at every time"
        return self._of(self.network.reusing(residuals))

    def share(self, z_t: Tensor, condition: Condition) -> float:
        """The operations of the latest evaluation over those of the whole network."""
        network, whole = self.network, self.whole
        if network is whole or isinstance(network, Evaluations) or isinstance(whole, Evaluations):
            return 1.0
        height, width = z_t.shape[-2:]
        size = {"height": height, "width": width, "text_length": condition.c_ctxt.shape[1]}
        return network.flops(**size) / whole.flops(**size)

    def _of(self, view: Backbone | Evaluations) -> "NetworkVelocity":
        return NetworkVelocity(view, self.objective, self.evaluated, self.ends, self.whole)


def expect_cacheable_network(network: Backbone) -> None:
    """Check that a cache is of use to a network.

    Raises:
        UserError: it is a student that samples in few steps.
    """
    if isinstance(network, IntervalMMDiT):
        raise UserError(
            "cache: this model is an IntervalMMDiT, which predicts average velocities over steps "
            "as long as possible, so no step resembles the one before: sample without a cache, in "
            "fewer steps"
        )


@register
class Pipeline(nn.Module):
    """A complete text-to-image model: network, text encoders, autoencoder and formulation.

    Calling it samples images. `sample` also returns the seeds and the number of function
    evaluations; `encode`, `denoise` and `decode` are the stages it consists of.

    Example:
        pipe = mmdit.load_pipeline("runs/shapes-001", device="auto")
        images = pipe(["a red circle", "a blue square"], num_images=4)  # uint8 (8, h, w, 3)

    Args:
        mmdit: the network.
        text: maps prompts to conditions.
        autoencoder: maps images to latents and back.
        objective: the formulation the network was trained with, which sampling inverts.
        image_size: side of the square training images in pixels; the default size.
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
            objective.times(1)  # rejects formulations that can be trained but not sampled
        self.objective = objective
        self.image_size, self.steps, self.guidance = image_size, steps, guidance

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the network."""
        return self.mmdit.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.mmdit.device

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent (h, w) of an image of height x width pixels.

        Raises:
            UserError: a side is not a multiple of autoencoder factor x patch size, or too large.
        """
        unit = self.autoencoder.factor * self.mmdit.patch_size
        largest = self.autoencoder.factor * self.mmdit.longest_side
        for name, side in (("height", height), ("width", width)):
            if side < unit or side % unit or side > largest:
                raise UserError(
                    f"{name}={side} must be a multiple of {unit} (autoencoder factor "
                    f"{self.autoencoder.factor} x patch {self.mmdit.patch_size}), from {unit} to "
                    f"{largest} pixels; this model was trained at {self.image_size}"
                )
        return height // self.autoencoder.factor, width // self.autoencoder.factor

    def noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """Draw the initial noise, one latent per seed: (b, c, h, w).

        Each is drawn in float32 from its own CPU generator, so that a seed gives the same noise in
        any batch, on any device and in any precision.
        """
        size = (self.mmdit.latent_channels, *self.latent_size(height, width))
        draws = [torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(draws).to(self.device, at_least_float32(self.dtype))

    def noised(self, image: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents of images on the straight path to the noise, at noise level t, (b, c, h, w).

        The latents are the means of the autoencoder's posterior; the reference implementation
        samples from it.

        Args:
            image: uint8 (n, h, w, 3); each is used for an equal share of the noise.
            noise: (b, c, h, w), b a multiple of n.
            t: noise level in [0, 1], (1,) or (b,).
        """
        x_0 = to_latents(self.autoencoder, image)
        x_0 = x_0.repeat_interleave(len(noise) // len(x_0), dim=0)
        return RectifiedFlow().interpolate(x_0, noise, t.to(noise))

    def __call__(
        self,
        prompt: str | Sequence[str] | Condition,
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Tensor:
        """Sample `num_images` images of each prompt; see `sample` for seeds and evaluations.

        Example:
            images = pipe("a cat", num_images=4, steps=20, guidance=5.0, seed=7)

        Args:
            prompt: one text or several, or the result of `encode`.
            progress: as in `denoise`.
            options: arguments of `Request`.

        Returns:
            uint8 (prompts * num_images, height, width, 3), prompts outermost.

        Raises:
            UserError: a value is impossible for this model, or an image does not fit the size.
            NotFinite: values become NaN or infinite; the message names the stage and the step.
        """
        return self.sample(Request(prompt, **options), progress).images

    @torch.no_grad()
    def sample(self, request: Request, progress: Progress | None = None) -> Samples:
        """Sample the images of a request: encode the text, denoise, decode the latents.

        Each network computes in its `compute_dtype`, or in that of a surrounding `torch.autocast`.

        Example:
            request = Request("a cat", num_images=4, seed=7)
            images, seeds, function_evaluations = pipe.sample(request)

        Args:
            request: what to sample; values left at None become the model's defaults.
            progress: as in `denoise`.

        Returns:
            Images, uint8 (n, height, width, 3) with prompts outermost, their seeds, and the
            number of network evaluations per image.

        Raises:
            UserError: the model cannot fulfil the request.
            NotFinite: values become NaN or infinite; the message names the stage and the step.
        """
        if request.cache is not None:
            expect_cacheable_network(self.mmdit)  # before the text is encoded
        count = request.count
        steps, guidance, size = self._settings(request)
        z = self.noise(request.seeds, *size)
        times = self.objective.times(steps, strength=request.strength, grid=request.grid)
        # A path that ends before pure noise is sampled from its end, starting with noise alone.
        image = request.image
        z = times[0].item() * z if image is None else self.noised(image, z, times[:1])
        positive, negative = self.encode(request.prompts), None
        extra = {**positive.extra, **request.extra}
        if request.control is not None:
            extra["control"] = self.encode_control(request.control)
        check_extra(self.mmdit, extra)
        positive = for_each_image(positive._replace(extra=extra), count)
        if guidance.reads_negative:
            negative = for_each_image(self.encode(request.negatives), count)
            negative = negative._replace(extra=positive.extra)
        latents, evaluations = self.denoise(
            z,
            times,
            positive,
            negative,
            guidance=guidance,
            solver=request.solver,
            steps=steps,
            cache=request.cache,
            progress=progress,
        )
        return Samples(self.decode(latents), request.seeds, evaluations)

    def _settings(self, request: Request) -> tuple[int, Guidance, tuple[int, int]]:
        """Steps, guidance and image size of a request, with the model's defaults filled in."""
        steps = self.steps if request.steps is None else request.steps
        steps = whole_number("steps", steps, most=MOST_STEPS)
        guidance = request.guidance or ClassifierFreeGuidance(scale=self.guidance)
        size = (request.height or self.image_size, request.width or self.image_size)
        return steps, guidance, size

    @torch.no_grad()
    def tabulate(
        self,
        request: Request,
        *,
        layers: Mapping[str, nn.Module] | None = None,
        device: torch.device | None = None,
    ) -> Request:
        """Replace the network's modulation layers by tables that serve a request, in place.

        A third of the weights of SD3 is freed. The pipeline then samples what has the prompts,
        steps, solver, grid, guidance and strength of this request, in any number, order and batch,
        and at most its size; it refuses other prompts and times. Images differ by rounding alone.

        Example:
            request = pipe.tabulate(Request("a cat", steps=28))
            images = pipe.sample(request).images

        Args:
            request: what will be sampled.
            layers, device: see `mmdit.models.tabulated.tabulate`.

        Returns:
            The request with its prompts encoded: encoders are not needed any more.

        Raises:
            UserError: the model cannot fulfil the request, or it has no modulation layers.
        """
        steps, guidance, size = self._settings(request)
        latent = self.latent_size(*size)
        times = self.objective.times(steps, strength=request.strength, grid=request.grid)
        positive, negative = self.encode(request.prompts), None
        if guidance.reads_negative:
            negative = self.encode(request.negatives)
        found = self.evaluations(
            times, positive, negative, guidance=guidance, solver=request.solver, steps=steps
        )
        if not found.times:
            raise UserError("tables: this request evaluates the network at no time (strength=0)")
        tabulate(
            self.mmdit,
            found.times,
            found.pooled,
            lengths=found.lengths,
            layers=layers,
            device=device,
        )
        crop_positions(self.mmdit, *latent)
        return request.encoded(positive, negative)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str] | Condition) -> Condition:
        """Encode prompts to conditions; the distinct ones are encoded once, in one batch.

        Args:
            prompts: n texts; or a condition from this method, which is checked and returned.

        Returns:
            Pooled text (n, p) and text tokens (n, l, d).

        Raises:
            UserError: the widths of a given condition are not those the network reads.
            NotFinite: an encoder gives NaN or infinite values; the message names it.
        """
        if isinstance(prompts, Condition):
            has = prompts.c_vec.shape[-1], prompts.c_ctxt.shape[-1]
            reads = self.mmdit.pooled_width, self.mmdit.context_width
            if has != reads:
                raise UserError(
                    f"the encoded prompts are {has[0]} and {has[1]} wide (c_vec, c_ctxt), but this "
                    f"model reads {reads[0]} and {reads[1]}: encode them with the model's encoders"
                )
            return prompts
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        condition = self.text.encode(list(rows))
        if len(rows) == len(prompts):
            return condition
        chosen = [rows[prompt] for prompt in prompts]
        return condition.map(lambda part: part[chosen])

    @torch.no_grad()
    def encode_control(self, images: Tensor) -> Tensor:
        """Encode control images, uint8 (n, height, width, 3), for a `ControlledMMDiT`.

        The pixels are scaled to the range its ControlNet was trained on, given by `control_type`.

        Returns:
            Latents (n, c, h, w), the `extra["control"]` of a condition.

        Raises:
            UserError: the network is not a `ControlledMMDiT`.
            NotFinite: the encoder gives NaN or infinite values.
        """
        if not isinstance(self.mmdit, ControlledMMDiT):
            raise UserError(
                f"control: {type(self.mmdit).__name__} follows no control image; join a "
                "ControlNet to it: pipe.mmdit = ControlledMMDiT(base=pipe.mmdit, control_net=...)"
            )
        precise = at_least_float32(self.autoencoder.compute_dtype)
        pixels = images.to(self.autoencoder.device)
        pixels = control_pixels(pixels, self.mmdit.control_net.control_type, precise)
        latents = self.autoencoder.encode(pixels)
        expect_finite("the autoencoder's encoder", latents)
        return latents

    @torch.no_grad()
    def denoise(
        self,
        z: Tensor,
        times: Tensor,
        positive: Condition,
        negative: Condition | None = None,
        *,
        guidance: Guidance,
        solver: Solver = euler,
        steps: int | None = None,
        cache: Cache | None = None,
        progress: Progress | None = None,
    ) -> Denoised:
        """Integrate the guided flow, from latents at the first of the times to the last.

        Args:
            z: (n, c, h, w), on the straight path at noise level times[0].
            times: decreasing noise levels, as returned by `Objective.times`.
            positive, negative: conditions of n prompts to move towards and away from; the negative
                one may be None if `guidance.reads_negative` is false.
            guidance: guidance rule, from `mmdit.flow.guidance`.
            solver: ODE solver, from `mmdit.flow.solvers`.
            steps: number of steps of the whole grid, if `times` is only the end of one; None
                counts `times`.
            cache: saves evaluations of the network, from `mmdit.flow.caches`.
            progress: called after every solver step with its index from 0, the noise level t it
                reached and the noisy latents there, (n, c, h, w), in float32 (float64 for a
                float64 network). For example,
                `progress=lambda i, t, z: show(mmdit.latent_preview(z))` previews the images while
                they are sampled with a published autoencoder.

        Returns:
            Latents (n, c, h, w), float32 or wider, and the number of network evaluations per
            latent, in which those of only some blocks count as their share of the operations.

        Raises:
            UserError: the guidance reads a negative prompt, but none is given; the cache does not
                work with the solver or the network.
            NotFinite: latents become NaN or infinite; the message names the step.
        """
        expect_negative(guidance, negative)
        watch = Watch(len(times) - 1, progress, cached=cache is not None)
        ends = self._ends(times, solver)
        network = NetworkVelocity(self.mmdit, self.objective, watch.evaluated, ends)
        source: LayeredVelocity = network
        if cache is not None:
            expect_cacheable(solver)
            expect_cacheable_network(self.mmdit)
            source = cache.cached(network, times)
        steps = len(times) - 1 if steps is None else steps
        velocity = guidance(source, positive, negative, times, steps)
        z = solver(velocity, z, times, watch.step)
        watch.check(z, "at its end")  # solvers need not call `progress`
        return Denoised(z, watch.evaluations / len(z))

    def _ends(self, times: Tensor, solver: Solver) -> dict[float, float]:
        """The time at which the step from each time ends, where the network averages over steps."""
        averages = isinstance(self.mmdit, IntervalMMDiT) and takes_averages(solver)
        return dict(pairwise(times.tolist())) if averages else {}

    @torch.no_grad()
    def evaluations(
        self,
        times: Tensor,
        positive: Condition,
        negative: Condition | None = None,
        *,
        guidance: Guidance,
        solver: Solver = euler,
        steps: int | None = None,
    ) -> Evaluations:
        """The times and pooled vectors with which `denoise` would evaluate the network.

        Solver and guidance are rehearsed with a network that computes nothing.

        Args:
            times, positive, negative, guidance, solver, steps: as in `denoise`.

        Raises:
            UserError: the guidance reads a negative prompt, but none is given.
        """
        expect_negative(guidance, negative)
        found = Evaluations()
        n, patch = len(positive.c_vec), self.mmdit.patch_size
        if negative is not None:
            negative = for_each_image(negative, n)
        precise = at_least_float32(self.dtype)
        z = torch.zeros(n, self.mmdit.latent_channels, patch, patch, dtype=precise)
        velocity = NetworkVelocity(found, self.objective, ends=self._ends(times, solver))
        steps = len(times) - 1 if steps is None else steps
        solver(guidance(velocity, positive, negative, times, steps), z, times, lambda *_: None)
        return found

    @property
    def adapters(self) -> dict[str, float]:
        """The adapters that are attached, with their scales."""
        return attached(self)

    def load_lora(
        self, source: str | Path | Adapter, scale: float = 1.0, *, name: str | None = None
    ) -> str:
        """Attach a LoRA, or another adapter; several add up.

        Example:
            pipe.load_lora("style.safetensors", 0.8)
            images = pipe("a cat in this style")
            pipe.lora_scale("style", 0.5)
            pipe.unload_lora()

        Args:
            source: a file of any program or a folder of PEFT, see `read_adapter`; or an `Adapter`.
            scale: factor of its changes.
            name: under which to find it again; None is the name of the file.

        Returns:
            The name.

        Raises:
            UserError: it is not an adapter, is damaged, or is for another model; the model is as
                it was.
        """
        if isinstance(source, Adapter):
            adapter, stem = source, "adapter"
        else:
            adapter, stem = read_adapter(source, self), Path(source).stem
        name = unused_name(self, stem) if name is None else name
        attach(self, adapter, name, scale=scale)
        return name

    def lora_scale(self, name: str, scale: float) -> None:
        """Set the factor of an adapter's changes; 0 turns it off.

        Raises:
            UserError: no adapter has this name, or the adapters are fused.
        """
        rescale(self, name, scale)

    def fuse_lora(self) -> None:
        """Add all adapters to the weights: sampling then costs no more than without them.

        The weights of the model itself are kept beside, for `unload_lora`.
        """
        fuse(self)

    def unload_lora(self, name: str | None = None) -> None:
        """Remove an adapter, or all: every weight is as if it had never been there.

        Raises:
            UserError: no adapter has this name, or it is fused with others.
        """
        detach(self, name)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode normalized latents (n, c, h, w) to images, uint8 (n, height, width, 3).

        Raises:
            NotFinite: the decoder gives NaN or infinite values.
        """
        return to_pixels(self.autoencoder.decode(z))
