"""What is learned: the loss of a batch, and how well the result does. The loop knows no more."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdit.data.captions import TASKS, short_caption
from mmdit.data.shapes import Shapes
from mmdit.engine.precision import Autocast
from mmdit.errors import UserError
from mmdit.flow.objective import Draw
from mmdit.keys import generator_for
from mmdit.metrics.attention import attention_at, last_blocks
from mmdit.metrics.reconstruction import psnr
from mmdit.metrics.validation import LEVELS, validation_loss
from mmdit.models.autoencoder import Autoencoder
from mmdit.pipeline import Pipeline, from_pixels, to_pixels


class Task(Protocol):
    """A module to train, with its loss and its evaluation."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""

    @property
    def protocol(self) -> dict[str, str | int]:
        """Under which name, on how many samples and with which seed `evaluate` measures."""

    def loss(self, step: int, indices: Sequence[int]) -> Tensor:
        """Loss of each sample (b,), drawn with keys (seed, step, sample index)."""

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Validation figures of `module`, raw or averaged."""

    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        """Images (n, h, w, 3) uint8 that show what `module` can do, and their captions."""


class AutoencoderTask:
    """Reconstruction and a KL term (Rombach et al. 2022) on images alone.

    A strong KL term keeps the latents smooth: they must stay decodable under the noise of the
    posterior, which is what the flow's own errors look like to the decoder.

    Args:
        module: the autoencoder.
        data: training images.
        validation: images for the PSNR.
        kl_weight: weight of the KL term, mean over latent values, against the squared error, mean
            over pixel values.
        seed: of the posterior's noise.
        autocast: precision of the forward pass.
    """

    def __init__(
        self,
        *,
        module: Autoencoder,
        data: Shapes,
        validation: Shapes,
        kl_weight: float,
        seed: int,
        autocast: Autocast,
    ) -> None:
        if kl_weight < 0:
            raise UserError(f"kl_weight {kl_weight} must not be negative")
        self.module, self.data, self.kl_weight = module, data, kl_weight
        self.seed, self.autocast = seed, autocast
        self.device = next(module.parameters()).device
        self._truth = validation.batch(range(64))[0]

    @property
    def protocol(self) -> dict[str, str | int]:
        return {"protocol": "reconstruction-1", "samples": len(self._truth), "seed": self.seed}

    def loss(self, step: int, indices: Sequence[int]) -> Tensor:
        x = from_pixels(self.data.batch(indices)[0]).to(self.device)
        with self.autocast():
            posterior = self.module.posterior(x)
            shape = posterior.mean.shape[1:]
            noise = torch.stack(
                [
                    torch.randn(shape, generator=generator_for(self.seed, "posterior", step, i))
                    for i in indices
                ]
            ).to(self.device)
            reconstruction = self.module.decoder(posterior.sample(noise)).float()
        error = (reconstruction - x).square().flatten(1).mean(1)
        return error + self.kl_weight * posterior.kl().flatten(1).mean(1)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """PSNR in dB; also sets the scale and shift of the latents, which have changed."""
        assert isinstance(module, Autoencoder)
        self._measure_latents(module)
        with self.autocast():
            reconstruction = module.decode(module.encode(from_pixels(self._truth).to(self.device)))
        return {"psnr": psnr(to_pixels(reconstruction).cpu(), self._truth)}

    @torch.no_grad()
    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        assert isinstance(module, Autoencoder)
        truth = self._truth[:8]
        x = from_pixels(truth).to(self.device)
        with self.autocast():
            reconstruction = to_pixels(module.decode(module.encode(x)))
        return torch.cat([truth, reconstruction.cpu()]), ["image"] * 8 + ["reconstruction"] * 8

    def _measure_latents(self, module: Autoencoder, count: int = 1024) -> None:
        """Set the scale and shift of `module` from the raw latents of `count` training images."""
        with self.autocast():
            raw = torch.cat(
                [
                    module.posterior(
                        from_pixels(self.data.batch(range(i, i + 128))[0]).to(self.device)
                    ).mean
                    for i in range(0, count, 128)
                ]
            )
        module.normalize(raw.mean(), raw.std())


class FlowTask:
    """Text to image: the objective on latents, with each encoder dropped independently.

    Args:
        module: the pipeline; its autoencoder stays as it is.
        latents: of the training images, (n, c, h, w), any float dtype.
        captions: of the training images.
        validation: captioned images, for the validation loss and the pictures.
        validation_size: number of images in the validation loss.
        seed: of timesteps, noise and encoder drop-out.
        autocast: precision of the forward pass.
    """

    def __init__(
        self,
        *,
        module: Pipeline,
        latents: Tensor,
        captions: Sequence[str],
        validation: Shapes,
        validation_size: int,
        seed: int,
        autocast: Autocast,
    ) -> None:
        self.module, self.latents, self.captions = module, latents, captions
        self.seed, self.autocast = seed, autocast
        images, self._validation_captions = validation.batch(range(validation_size))
        with torch.no_grad(), autocast():
            x = from_pixels(images).to(module.device)
            self._validation_latents = module.autoencoder.encode(x)
        self._prompts = [
            short_caption(validation.scene_for_task(task, i)) for task in TASKS for i in range(4)
        ]

    @property
    def protocol(self) -> dict[str, str | int]:
        samples = len(self._validation_captions)
        return {"protocol": "validation-1", "samples": samples, "seed": self.seed}

    def loss(self, step: int, indices: Sequence[int]) -> Tensor:
        module = self.module
        x_0 = self.latents[list(indices)].float()
        generators = [generator_for(self.seed, "flow", step, index) for index in indices]
        draw = Draw(*(d.to(x_0.device) for d in module.objective.draw(x_0.shape[1:], generators)))
        kept = module.text.draw_kept(generators).to(x_0.device)
        ids = module.text.tokenize([self.captions[index] for index in indices])
        with self.autocast():
            c_vec, c_ctxt = module.text(ids, kept)
            return module.objective(module.mmdit, x_0, c_vec, c_ctxt, draw)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """The validation loss at each level, its mean over all but the last, and Figure 5's watch.

        That is the greatest attention logit and the entropy, averaged over the last five blocks.
        """
        assert isinstance(module, Pipeline)
        latents, captions = self._validation_latents, self._validation_captions
        module.autocast = self.autocast
        with self.autocast():
            levels = validation_loss(module, latents, captions, seed=self.seed)
        figures = {f"loss_t{t:.3f}": loss for t, loss in zip(LEVELS, levels, strict=True)}
        seen = last_blocks(
            attention_at(module, latents, captions, levels=LEVELS[:-1], seed=self.seed)
        )
        attended = {"attention_max_logit": seen.max_logit, "attention_entropy": seen.entropy}
        return {"loss": sum(levels[:-1]) / len(levels[:-1]), **figures, **attended}

    @torch.no_grad()
    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        assert isinstance(module, Pipeline)
        module.autocast = self.autocast
        images = module(self._prompts, seeds=range(len(self._prompts)))
        return images.cpu(), self._prompts


@torch.no_grad()
def encode_dataset(
    autoencoder: Autoencoder, data: Shapes, count: int, autocast: Autocast
) -> tuple[Tensor, list[str]]:
    """Latents (n, c, h, w) of the first `count` images, in half precision (Sec. E.1), and captions.

    The images never change, so they are drawn and encoded once instead of at every step.
    """
    device = next(autoencoder.parameters()).device
    latents: list[Tensor] = []
    captions: list[str] = []
    for start in tqdm(range(0, count, 256), desc="encoding images", unit="batch", disable=None):
        images, told = data.batch(range(start, min(start + 256, count)))
        with autocast():
            latents.append(autoencoder.encode(from_pixels(images).to(device)).to(torch.bfloat16))
        captions += told
    return torch.cat(latents), captions
