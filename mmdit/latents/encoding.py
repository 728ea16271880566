"""Encoding of images and captions for training, rounded to half precision.

All sources (pixels, memory, cache) encode through this module, so that they give equal values.
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
from mmdit.text.conditioning import (
    AbsentEncoder,
    Encoding,
    Encodings,
    TextConditioner,
    TextEncoder,
    TokenIds,
)

# The dtype of latents and of frozen encoders' embeddings, whatever the source (App. E.1).
HALF = torch.bfloat16
AT_ONCE = 2**20  # largest number of pixels per batch of the autoencoder
IMAGES = 256  # largest number of images per batch


class Encoded(NamedTuple):
    """An encoded sample of a data set."""

    number: int  # its index in the data set
    latent: Tensor  # normalized, in half precision, on the CPU (c, h, w)
    captions: Captions  # all captions of the image


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor, autocast: Autocast) -> Tensor:
    """Encode images, uint8 (b, h, w, 3), to normalized latents (b, c, h, w) in half precision."""
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
    """Encode samples of a data set in batches of one size; so they are not yielded in order.

    Args:
        data: the data set.
        indices: the samples to encode.
        autoencoder: encodes the images.
        autocast: precision of the encoder.
        threads: number of threads that read images while others are encoded.

    Raises:
        UserError: an image has changed on disk, or crops are random.
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
            expect_finite("the autoencoder's encoder", latents)  # before they are stored
            for index, latent, (_, captions) in zip(batch, latents, samples, strict=True):
                yield Encoded(index, latent, captions)


def memory_for(doing: str, images: Tensor) -> AbstractContextManager[None]:
    """Raise a UserError if the autoencoder runs out of memory for images (n, h, w, 3)."""
    count, height, width = images.shape[:3]
    return enough_memory(
        f"{doing} {count} images of {width} x {height}",
        "precision=bf16, a smaller data.image_size or autoencoder.model, or device=cpu",
    )


def batches_of(data: CacheableData, indices: Sequence[int]) -> list[list[int]]:
    """Batch indices by image size, with at most `AT_ONCE` pixels and `IMAGES` images per batch."""
    groups: dict[Size, list[int]] = {}
    for index in indices:
        groups.setdefault(data.size_of(index), []).append(index)
    batches: list[list[int]] = []
    for (height, width), group in groups.items():
        count = max(1, min(IMAGES, AT_ONCE // (height * width)))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return batches


@torch.no_grad()
def halved(encoder: TextEncoder | AbsentEncoder, ids: Tensor) -> Encoding:
    """The embeddings of captions by a frozen encoder, in half precision."""
    return Encoding(*(part.to(HALF) for part in encoder(ids)))


def encode_text(text: TextConditioner, ids: TokenIds) -> Encodings:
    """The embeddings of captions by frozen encoders, in half precision."""
    pairs = zip(text.encoders, ids, strict=True)
    return Encodings(*(halved(encoder, own_ids) for encoder, own_ids in pairs))


def condition(text: TextConditioner, read: TokenIds | Encodings, kept: Tensor) -> Condition:
    """The network's condition for captions read from a source.

    Args:
        text: the encoders.
        read: token ids, or precomputed embeddings of frozen encoders.
        kept: bool (b, 3), False where an encoder is dropped.
    """
    if isinstance(read, Encodings):
        return text.join(read, kept)
    # Trained encoders run as one module, which may be sharded over processes.
    return text.join(encode_text(text, read), kept) if text.frozen else text(read, kept)
