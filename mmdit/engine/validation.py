"""How a text-to-image model is judged while it is trained, whatever it is trained on."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.errors import UserError
from mmdit.latents.encoding import AT_ONCE, memory_for
from mmdit.metrics.attention import attention_at, last_blocks
from mmdit.metrics.validation import LEVELS, validation_loss
from mmdit.pipeline import Pipeline, to_latents
from mmdit.precision import Autocast


class Validation(NamedTuple):
    """What a flow is judged by, always the same."""

    images: Tensor  # uint8 (n, h, w, 3)
    captions: list[str]
    prompts: list[str]  # of the images that are sampled
    extra: dict[str, Tensor] = {}  # noqa: RUF012  # as in `Batch`, for each image and sample


class TextToImage:
    """The validation of a task that trains a pipeline.

    Args:
        module: the pipeline; its autoencoder stays as it is.
        validation: for the validation loss and the sample images.
        seed: of the noise.
        autocast: precision of the forward pass.
    """

    higher_is_better: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, *, module: Pipeline, validation: Validation, seed: int, autocast: Autocast
    ) -> None:
        self.module, self.validation = module, validation
        self.seed, self.autocast = seed, autocast
        pixels = validation.images.shape[1] * validation.images.shape[2]
        latents = []
        for images in validation.images.split(max(1, AT_ONCE // pixels)):
            with memory_for("encoding", images), torch.no_grad(), autocast():
                latents.append(to_latents(module.autoencoder, images))
        self._validation_latents = torch.cat(latents)
        self._noted: list[dict[str, Tensor]] = []
        self._flops = functools.cache(
            functools.partial(module.mmdit.flops, text_length=module.text.context_length)
        )

    @property
    def protocol(self) -> dict[str, str | int]:
        samples = len(self.validation.captions)
        return {"protocol": "validation-1", "samples": samples, "seed": self.seed}

    def cost_of(self, shape: tuple[int, int, int]) -> tuple[int, float]:
        """Tokens of a latent (c, h, w) with its text, and FLOPs of a forward pass."""
        _, height, width = shape
        p = self.module.mmdit.patch_size
        tokens = (height // p) * (width // p) + self.module.text.context_length
        return tokens, self._flops(height=height, width=width)

    def read(self, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the network reads of the tensors that come with a batch, on its device.

        Raises:
            UserError: it reads others.
        """
        reads, device = self.module.mmdit.reads, self.module.device
        if missing := reads - extra.keys():
            raise UserError(
                f"{type(self.module.mmdit).__name__} reads {', '.join(sorted(missing))} besides "
                "text, but the data has none: return it in Batch.extra from `Data.batch` and "
                "`Data.square`, and train with latents=from_pixels"
            )
        return {name: extra[name].to(device, non_blocking=True) for name in sorted(reads)}

    def note(self, figures: Mapping[str, Tensor]) -> None:
        """Remember what is logged of a batch: each a mean, or one value a sample."""
        self._noted.append({name: v.detach().float().mean() for name, v in figures.items()})

    def figures(self) -> dict[str, float]:
        """The mean of what this process has noted of the last step, which is then forgotten."""
        names = self._noted[0] if self._noted else {}
        means = {n: torch.stack([each[n] for each in self._noted]).mean().item() for n in names}
        self._noted = []
        return means

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """The validation loss at each level, its mean over all but the last, and Figure 5's watch.

        That is the greatest attention logit and the entropy, averaged over the last five blocks.
        """
        assert isinstance(module, Pipeline)
        latents, captions = self._validation_latents, self.validation.captions
        with self.autocast():
            shown: dict[str, Any] = {"seed": self.seed, "extra": self.read(self.validation.extra)}
            levels = validation_loss(module, latents, captions, **shown)
            attention = attention_at(module, latents, captions, levels=LEVELS[:-1], **shown)
        figures = {f"loss_t{t:.3f}": loss for t, loss in zip(LEVELS, levels, strict=True)}
        seen = last_blocks(attention)
        attended = {"attention_max_logit": seen.max_logit, "attention_entropy": seen.entropy}
        return {"loss": sum(levels[:-1]) / len(levels[:-1]), **figures, **attended}

    @torch.no_grad()
    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        assert isinstance(module, Pipeline)
        prompts, extra = self.validation.prompts, self.read(self.validation.extra)
        extra = {name: part[: len(prompts)] for name, part in extra.items()}
        with self.autocast():
            images = module(prompts, seeds=range(len(prompts)), extra=extra)
        return images.cpu(), prompts
