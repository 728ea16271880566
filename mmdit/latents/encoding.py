"""Pictures and captions as the network sees them: encoded, and rounded to half precision.

What is encoded at every step, kept in memory or read from a cache passes through here, so that it
is the same.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmdit.checks import expect_finite
from mmdit.data.buckets import Size
from mmdit.data.caption_sources import Captions
from mmdit.data.dataset import CacheableData
from mmdit.flow.condition import Condition
from mmdit.models.autoencoder import Autoencoder
from mmdit.out_of_memory import enough_memory
from mmdit.pipeline import from_pixels
from mmdit.precision import Autocast
from mmdit.text.conditioning import Encoding, Encodings, TextConditioner, TokenIds

# Of latents and of what frozen encoders say, wherever they come from (App. E.1).
HALF = torch.bfloat16
AT_ONCE = 2**20  # pixels that the autoencoder encodes at once
IMAGES = 256  # and pictures


class Encoded(NamedTuple):
    """A sample of a data set, encoded."""

    number: int  # its index in the data set
    latent: Tensor  # normalized, in half precision, on the CPU (c, h, w)
    captions: Captions  # all of them


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor, autocast: Autocast) -> Tensor:
    """Pictures, uint8 (b, h, w, 3) -> normalized latents (b, c, h, w) in half precision."""
    device = autoencoder.device
    with autocast():
        pixels = from_pixels(images.to(device, non_blocking=True))
        return autoencoder.encode(pixels).to(HALF)


def encode_each(
    data: CacheableData,
    indices: Sequence[int],
    *,
    autoencoder: Autoencoder,
    autocast: Autocast,
    threads: int,
) -> Iterator[Encoded]:
    """Samples of a data set, encoded in batches of one size, and so not in order.

    Args:
        threads: that read pictures while others are encoded.

    Raises:
        UserError: a picture has changed, or is another one at each step.
        NotFinite: a latent is NaN or infinite.
    """
    batches = batches_of(data, indices)
    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(data.cacheable, index) for index in batches[0]]
        for batch, following in pairwise([*batches, []]):
            samples = [promise.result() for promise in ahead]
            ahead = [pool.submit(data.cacheable, index) for index in following]
            images = torch.from_numpy(np.stack([image for image, _ in samples]))
            with memory_for("encoding", images):
                latents = encode(autoencoder, images, autocast).cpu()
            expect_finite("the autoencoder's encoder", latents)  # they will be kept
            for index, latent, (_, captions) in zip(batch, latents, samples, strict=True):
                yield Encoded(index, latent, captions)


def memory_for(doing: str, images: Tensor) -> AbstractContextManager[None]:
    """A UserError where the autoencoder has no memory for so many images (n, h, w, 3) at once."""
    count, height, width = images.shape[:3]
    return enough_memory(
        f"{doing} {count} images of {width} x {height}",
        "precision=bf16, a smaller data.image_size or autoencoder.model, or device=cpu",
    )


def batches_of(data: CacheableData, indices: Sequence[int]) -> list[list[int]]:
    """Indices in batches of pictures of one size, and of `AT_ONCE` pixels or less."""
    groups: dict[Size, list[int]] = {}
    for index in indices:
        groups.setdefault(data.size_of(index), []).append(index)
    batches: list[list[int]] = []
    for (height, width), group in groups.items():
        count = max(1, min(IMAGES, AT_ONCE // (height * width)))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return batches


@torch.no_grad()
def say(text: TextConditioner, ids: TokenIds) -> Encodings:
    """What frozen encoders say of captions, in half precision."""
    return Encodings(
        *(Encoding(*(part.to(HALF) for part in encoding)) for encoding in text.encodings(ids))
    )


def condition(text: TextConditioner, read: TokenIds | Encodings, kept: Tensor) -> Condition:
    """The condition of captions that a source has read.

    Args:
        text: the encoders.
        read: the captions' ids, or what frozen encoders said of them.
        kept: which encoders speak, bool (b, 3).
    """
    if isinstance(read, Encodings):
        return text.join(read, kept)
    # Encoders that are trained run as one module, which may be spread over processes.
    return text.join(say(text, read), kept) if text.frozen else text(read, kept)
