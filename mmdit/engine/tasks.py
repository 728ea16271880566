"""What is learned: the loss of a batch, and how well the result does. The loop knows no more."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmdit.checks import expect_finite, number
from mmdit.data.dataset import Data
from mmdit.data.order import Order
from mmdit.dtypes import wide
from mmdit.engine.preservation import OwnPrediction
from mmdit.engine.validation import TextToImage, Validation
from mmdit.flow.condition import Condition
from mmdit.flow.objective import Draw
from mmdit.keys import generator_for
from mmdit.latents.encoding import condition, memory_for
from mmdit.latents.sources import LatentSource
from mmdit.metrics.reconstruction import psnr
from mmdit.models.autoencoder import Autoencoder
from mmdit.pipeline import Pipeline, from_pixels, to_latents, to_pixels
from mmdit.precision import Autocast
from mmdit.text.conditioning import Encodings, TokenIds


class Work(NamedTuple):
    """What one sample costs a step, forward and backward; zeros where nobody counts."""

    tokens: int = 0
    flops: float = 0.0


class Task(Protocol):
    """A module to train, with its loss and its evaluation.

    `example` runs on the CPU, in a loader's worker if there are any; all that chance decides about
    a step happens there. `loss` follows from it and the weights alone.
    """

    @property
    def module(self) -> nn.Module:
        """What is trained."""

    @property
    def protocol(self) -> dict[str, str | int]:
        """Under which name, on how many samples and with which seed `evaluate` measures."""

    @property
    def higher_is_better(self) -> frozenset[str]:
        """The figures of `evaluate` that are the better the higher they are; others, the lower."""

    def order(self, *, batch_size: int, seed: int) -> Order:
        """Sample indices by position."""

    def example(self, step: int, indices: Sequence[int]) -> Any:
        """What the step needs to know of these samples, drawn with keys (seed, step, index)."""

    def loss(self, example: Any) -> Tensor:
        """Loss of each sample, (b,)."""

    def times(self, example: Any) -> Tensor | None:
        """The noise level t of each sample, (b,) on the CPU, by which losses are told apart."""

    def figures(self) -> dict[str, float]:
        """What else is logged of the losses of the last step in this process; asked once a step."""

    def work(self, example: Any) -> Work:
        """Cost of each sample."""

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Validation figures of `module`, raw or averaged."""

    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        """Images (n, h, w, 3) uint8 that show what `module` can do, and their captions."""


class Probe(Protocol):
    """Further metrics at every evaluation; they take longer, so of the averaged weights alone."""

    @property
    def higher_is_better(self) -> frozenset[str]:
        """The metrics that are better the higher they are."""

    def __call__(self, module: Any) -> dict[str, float]:
        """The metrics of a module by name."""


class Pictures(NamedTuple):
    """An example of `AutoencoderTask`."""

    images: Tensor  # uint8 (b, height, width, 3)
    noise: Tensor  # of the posterior (b, c, h, w)


class AutoencoderTask:
    """Reconstruction and a KL term (Rombach et al. 2022) on images alone.

    A strong KL term keeps the latents smooth: they must stay decodable under the noise of the
    posterior, which is what the flow's own errors look like to the decoder.

    Args:
        module: the autoencoder.
        data: training images.
        truth: images for the PSNR, uint8 (n, h, w, 3).
        kl_weight: weight of the KL term, mean over latent values, against the squared error, mean
            over pixel values.
        seed: of the posterior's noise.
        autocast: precision of the forward pass.
    """

    higher_is_better: ClassVar[frozenset[str]] = frozenset({"psnr"})

    def __init__(
        self,
        *,
        module: Autoencoder,
        data: Data,
        truth: Tensor,
        kl_weight: float,
        seed: int,
        autocast: Autocast,
    ) -> None:
        number("kl_weight", kl_weight, 0)
        self.module, self.data, self.kl_weight = module, data, kl_weight
        self.seed, self.autocast = seed, autocast
        self.device = next(module.parameters()).device
        self._truth = truth

    @property
    def protocol(self) -> dict[str, str | int]:
        return {"protocol": "reconstruction-1", "samples": len(self._truth), "seed": self.seed}

    def order(self, *, batch_size: int, seed: int) -> Order:
        return self.data.order(batch_size=batch_size, seed=seed)

    def example(self, step: int, indices: Sequence[int]) -> Pictures:
        images = self.data.batch(indices, step).images
        factor = self.module.factor
        shape = (self.module.latent_channels, *(side // factor for side in images.shape[1:3]))
        generators = [generator_for(self.seed, "posterior", step, index) for index in indices]
        return Pictures(images, torch.stack([torch.randn(shape, generator=g) for g in generators]))

    def loss(self, example: Pictures) -> Tensor:
        x = from_pixels(example.images.to(self.device))
        with self.autocast():
            posterior = self.module.posterior(x)
            z = posterior.sample(example.noise.to(self.device))
            reconstruction = wide(self.module.decoder(z))
        error = (reconstruction - x).square().flatten(1).mean(1)
        return error + self.kl_weight * posterior.kl().flatten(1).mean(1)

    def times(self, example: Pictures) -> None:
        return None

    def figures(self) -> dict[str, float]:
        return {}

    def work(self, example: Pictures) -> Work:
        return Work()

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """PSNR in dB; also sets the scale and shift of the latents, which have changed."""
        assert isinstance(module, Autoencoder)
        self._measure_latents(module)
        return {"psnr": psnr(self._reconstructed(module, self._truth), self._truth)}

    def _reconstructed(self, module: Autoencoder, images: Tensor) -> Tensor:
        with self.autocast():
            return to_pixels(module.decode(to_latents(module, images))).cpu()

    @torch.no_grad()
    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        assert isinstance(module, Autoencoder)
        truth = self._truth[:8]
        captions = ["image"] * len(truth) + ["reconstruction"] * len(truth)
        return torch.cat([truth, self._reconstructed(module, truth)]), captions

    def _measure_latents(self, module: Autoencoder, count: int = 1024) -> None:
        """Set the scale and shift of `module` from the raw latents of `count` training images."""
        numbers, raw = range(min(count, len(self.data))), []
        for start in numbers[::128]:
            images = self.data.square(numbers[start : start + 128]).images
            with memory_for("measuring the latents of", images), self.autocast():
                raw.append(module.posterior(from_pixels(images.to(self.device))).mean)
        every = torch.cat(raw)
        expect_finite("the autoencoder's encoder", every)
        module.normalize(every.mean(), every.std())


class Captioned(NamedTuple):
    """An example of `FlowTask`."""

    x: Tensor  # pixels or latents, as the source reads them
    text: TokenIds | Encodings
    kept: Tensor  # bool (b, 3): which encoders speak
    draw: Draw
    extra: dict[str, Tensor]  # as in `Batch`
    seed: int  # of what layers draw, as dropout in an adapter
    preserved: Tensor  # bool (b,): which samples keep what the model predicts of a class


class FlowTask(TextToImage):
    """Text to image: the objective on latents, with each encoder dropped independently.

    Args:
        module: the pipeline; its autoencoder stays as it is.
        source: of latents and texts.
        validation: for the validation loss and the pictures.
        seed: of timesteps, noise and encoder drop-out.
        autocast: precision of the forward pass.
        prior: what the model keeps predicting of a class; None is nothing.
    """

    def __init__(
        self,
        *,
        module: Pipeline,
        source: LatentSource,
        validation: Validation,
        seed: int,
        autocast: Autocast,
        prior: OwnPrediction | None = None,
    ) -> None:
        super().__init__(module=module, validation=validation, seed=seed, autocast=autocast)
        self.source, self.prior = source, prior

    def order(self, *, batch_size: int, seed: int) -> Order:
        return self.source.order(batch_size=batch_size, seed=seed)

    def example(self, step: int, indices: Sequence[int]) -> Captioned:
        x, text, extra = self.source.read(step, indices)
        generators = [generator_for(self.seed, "flow", step, index) for index in indices]
        draw = self.draw(self.source.latent_shape(x), generators)
        kept = self.module.text.draw_kept(generators)
        seed = generator_for(self.seed, "layers", step, *indices).initial_seed()
        none = torch.zeros(len(indices), dtype=torch.bool)
        preserved = none if self.prior is None else self.prior.draw(generators)
        return Captioned(x, text, kept, draw, extra, seed, preserved)

    def draw(self, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Draw:
        """What chance decides about a batch of latents of a shape (c, h, w)."""
        return self.module.objective.draw(shape, generators)

    def loss(self, example: Captioned) -> Tensor:
        module = self.module
        x_0 = self.source.latents(example.x)
        moved = (part.to(x_0.device, non_blocking=True) for part in example.draw)
        draw = type(example.draw)(*moved)
        torch.manual_seed(example.seed)
        with self.autocast():
            conditioned = condition(module.text, example.text, example.kept)
            conditioned = conditioned._replace(extra=self.read(example.extra))
            if self.prior is not None:
                return self.prior.loss(
                    module, x_0, conditioned, draw, example.preserved, example.kept
                )
            return self.losses(x_0, conditioned, draw)

    def losses(self, x_0: Tensor, condition: Condition, draw: Draw) -> Tensor:
        """The losses (b,) of a batch of what the source of latents holds."""
        return self.module.objective(self.module.mmdit, x_0, condition, draw)

    def times(self, example: Captioned) -> Tensor:
        return example.draw.t

    def work(self, example: Captioned) -> Work:
        """Of the network alone, whose backward pass costs two forward passes."""
        tokens, flops = self.cost_of(self.source.latent_shape(example.x))
        return Work(tokens, 3.0 * flops)
