"""Where the latents and texts of a step come from: pixels encoded at each step, or once."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.order import Order
from mmdit.engine.precision import Autocast
from mmdit.models.autoencoder import Autoencoder
from mmdit.pipeline import from_pixels
from mmdit.text.conditioning import TextConditioner, TokenIds

# Of latents that training sees, wherever they come from (Sec. E.1).
HALF = torch.bfloat16


class Data(Protocol):
    """A data set as training sees it: samples of one size in a batch, keyed by the step."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], step: int = 0) -> tuple[Tensor, list[str]]:
        """Pictures, uint8 (b, h, w, 3), and captions, as a step sees them."""

    def square(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """The same at S x S, cropped at the centre: what judges, whatever the step."""

    def order(self, *, batch_size: int, seed: int) -> Order:
        """Sample indices by position, in batches of one size each."""


class Read(NamedTuple):
    """Samples as a source reads them, on the CPU."""

    x: Tensor  # pixels, or latents
    text: TokenIds


class Source(Protocol):
    """Latents and texts for `FlowTask`."""

    def order(self, *, batch_size: int, seed: int) -> Order:
        """Sample indices by position."""

    def read(self, step: int, indices: Sequence[int]) -> Read:
        """What step `step` sees of these samples; may run in a loader's worker."""

    def latent_shape(self, x: Tensor) -> tuple[int, int, int]:
        """(c, h, w) of each latent that `latents` makes of x."""

    def latents(self, x: Tensor) -> Tensor:
        """Normalized latents (b, c, h, w), float32, where the model is."""


class FromPixels:
    """Pictures are read and encoded at every step: crops and captions may change with it.

    Args:
        data: captioned pictures.
        autoencoder: frozen; on the device of the model.
        text: reads captions.
        autocast: precision of the encoder.
    """

    def __init__(
        self, *, data: Data, autoencoder: Autoencoder, text: TextConditioner, autocast: Autocast
    ) -> None:
        self.data, self.autoencoder, self.text, self.autocast = data, autoencoder, text, autocast

    def order(self, *, batch_size: int, seed: int) -> Order:
        return self.data.order(batch_size=batch_size, seed=seed)

    def read(self, step: int, indices: Sequence[int]) -> Read:
        images, captions = self.data.batch(indices, step)
        return Read(images, self.text.tokenize(captions))

    def latent_shape(self, x: Tensor) -> tuple[int, int, int]:  # (b, height, width, 3)
        factor = self.autoencoder.factor
        return self.autoencoder.latent_channels, x.shape[1] // factor, x.shape[2] // factor

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:  # (b, height, width, 3) uint8
        return encode(self.autoencoder, x, self.autocast).float()


class FromMemory:
    """Pictures of one size that never change: encoded once, their latents kept in memory.

    Args:
        data, autoencoder, text, autocast: as in `FromPixels`.
    """

    def __init__(
        self, *, data: Data, autoencoder: Autoencoder, text: TextConditioner, autocast: Autocast
    ) -> None:
        self.data, self.text = data, text
        self.device = next(autoencoder.parameters()).device
        latents: list[Tensor] = []
        self.captions: list[str] = []
        starts = range(0, len(data), 256)
        for start in tqdm(starts, desc="encoding images", unit="batch", disable=None):
            images, told = data.batch(range(start, min(start + 256, len(data))))
            latents.append(encode(autoencoder, images, autocast).cpu())
            self.captions += told
        self.encoded = torch.cat(latents)

    def order(self, *, batch_size: int, seed: int) -> Order:
        return self.data.order(batch_size=batch_size, seed=seed)

    def read(self, step: int, indices: Sequence[int]) -> Read:
        captions = [self.captions[index] for index in indices]
        return Read(self.encoded[list(indices)], self.text.tokenize(captions))

    def latent_shape(self, x: Tensor) -> tuple[int, int, int]:  # (b, c, h, w)
        _, c, h, w = x.shape
        return c, h, w

    def latents(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True).float()


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor, autocast: Autocast) -> Tensor:
    """Pictures, uint8 (b, h, w, 3) -> normalized latents (b, c, h, w) in half precision."""
    device = next(autoencoder.parameters()).device
    with autocast():
        pixels = from_pixels(images.to(device, non_blocking=True))
        return autoencoder.encode(pixels).to(HALF)
