"""Sources of the latents and texts of a training step: encoded at each step, or once."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.checkpoints.values import is_finite
from mmdit.checks import expect, flag, whole_number
from mmdit.data.dataset import CacheableData, Data
from mmdit.data.order import Order
from mmdit.errors import NotFinite
from mmdit.latents.cache import Cache
from mmdit.latents.encoding import HALF, Encoded, encode, encode_each
from mmdit.latents.precompute import Precomputation
from mmdit.models.autoencoder import Autoencoder
from mmdit.precision import Autocast
from mmdit.printable import logger
from mmdit.processes import Processes
from mmdit.recipes import config_hash
from mmdit.text.conditioning import Encoding, Encodings, TextConditioner, TokenIds

log = logger(__name__)


class Read(NamedTuple):
    """Samples read from a source, on the CPU."""

    x: Tensor  # pixels or latents
    text: TokenIds | Encodings  # token ids, or cached embeddings of frozen encoders
    extra: dict[str, Tensor] = {}  # noqa: RUF012  # as in `Batch`; never written to


class LatentSource(Protocol):
    """Latents and texts for `FlowTask`."""

    def prepare(self, processes: Processes) -> None:
        """Encode the data set if needed. All processes call this once, before the first step."""

    def order(self, *, batch_size: int, seed: int) -> Order:
        """Sample indices by position."""

    def read(self, step: int, indices: Sequence[int]) -> Read:
        """Samples as step `step` sees them; may run in a worker of the loader."""

    def latent_shape(self, x: Tensor) -> tuple[int, int, int]:
        """The shape (c, h, w) of each latent in `latents(x)`."""

    def latents(self, x: Tensor) -> Tensor:
        """Normalized latents (b, c, h, w), float32, on the model's device."""


class FromPixels:
    """Reads and encodes images at every step, so crops may be random.

    Args:
        data: captioned images.
        autoencoder: the frozen autoencoder, on the model's device.
        text: tokenizes captions.
        autocast: precision of the autoencoder.
    """

    def __init__(
        self, *, data: Data, autoencoder: Autoencoder, text: TextConditioner, autocast: Autocast
    ) -> None:
        self.data, self.autoencoder, self.text, self.autocast = data, autoencoder, text, autocast

    def prepare(self, processes: Processes) -> None:
        """Does nothing: images are read when needed."""

    def order(self, *, batch_size: int, seed: int) -> Order:
        return self.data.order(batch_size=batch_size, seed=seed)

    def read(self, step: int, indices: Sequence[int]) -> Read:
        images, captions, extra = self.data.batch(indices, step)
        return Read(images, self.text.tokenize(captions), extra)

    def latent_shape(self, x: Tensor) -> tuple[int, int, int]:  # (b, height, width, 3)
        factor = self.autoencoder.factor
        return self.autoencoder.latent_channels, x.shape[1] // factor, x.shape[2] // factor

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:  # (b, height, width, 3) uint8
        return encode(self.autoencoder, x, self.autocast).float()


class _Kept:
    """Base of sources that store latents, which requires images without augmentation."""

    def __init__(
        self,
        *,
        data: CacheableData,
        autoencoder: Autoencoder,
        text: TextConditioner,
        autocast: Autocast,
    ) -> None:
        self.data, self.autoencoder, self.text, self.autocast = data, autoencoder, text, autocast
        self.device = autoencoder.device
        data.cacheable(0)  # raises if crops are random, before training starts

    def order(self, *, batch_size: int, seed: int) -> Order:
        return self.data.order(batch_size=batch_size, seed=seed)

    def latent_shape(self, x: Tensor) -> tuple[int, int, int]:  # (b, c, h, w)
        _, c, h, w = x.shape
        return c, h, w

    def latents(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True).float()


class FromMemory(_Kept):
    """Encodes images once and keeps the latents in memory, separately in each process.

    Args:
        data, autoencoder, text, autocast: as in `FromPixels`.
    """

    def prepare(self, processes: Processes) -> None:
        found: dict[int, Encoded] = {}
        indices = range(len(self.data))
        with tqdm(total=len(indices), desc="encoding images", unit="image", disable=None) as bar:
            for sample in encode_each(
                self.data,
                indices,
                autoencoder=self.autoencoder,
                autocast=self.autocast,
                threads=4,
            ):
                found[sample.number] = sample
                bar.update()
        self.encoded = [found[index].latent for index in indices]
        self.captions = [found[index].captions for index in indices]

    def read(self, step: int, indices: Sequence[int]) -> Read:
        n = len(self.data)  # an index beyond it is the same sample, seen once more
        captions = [self.data.pick(self.captions[index % n], index, step) for index in indices]
        latents = torch.stack([self.encoded[index % n] for index in indices])
        return Read(latents, self.text.tokenize(captions))


class FromCache(_Kept):
    """Encodes images once and caches the latents on disk, with the embeddings of frozen encoders.

    Values equal those encoded at every step, except for the last bit where float32 sums depend on
    the batch. All captions of an image are cached, with separate embeddings of each encoder, so the
    caption that a step sees and the dropped encoders are drawn as without a cache (App. E.1).

    Args:
        data, autoencoder, text, autocast: as in `FromPixels`.
        folder: folder of the cache, created if needed. None uses a folder in `root` named by the
            hash of the cache's identity.
        root: parent of the default folder.
        shard_size: number of samples per file.
        threads: number of threads that read images while the cache is written.
        verify: check the SHA-256 of all shards first. Samples are verified anyway when read.
    """

    def __init__(
        self,
        *,
        data: CacheableData,
        autoencoder: Autoencoder,
        text: TextConditioner,
        autocast: Autocast,
        folder: str | Path | None = None,
        root: str | Path = "runs",
        shard_size: int = 512,
        threads: int = 8,
        verify: bool = False,
    ) -> None:
        super().__init__(data=data, autoencoder=autoencoder, text=text, autocast=autocast)
        is_name = isinstance(folder, str | Path | None)
        expect(is_name, "latents.folder", folder, "must be the name of a folder, or null")
        expect(isinstance(root, str | Path), "latents.root", root, "must be the name of a folder")
        whole_number("latents.shard_size", shard_size, 1)
        whole_number("latents.threads", threads, 1)
        flag("latents.verify", verify)
        self.folder, self.root, self.shard_size = folder, root, shard_size
        self.threads, self.verify = threads, verify

    def prepare(self, processes: Processes) -> None:
        """Write the cache, or its missing shards.

        Raises:
            Unfinished: a signal stopped the precomputation.
            UserError: the folder has a different cache, or one that is damaged.
        """
        precompute = Precomputation(
            data=self.data,
            autoencoder=self.autoencoder,
            text=self.text,
            autocast=self.autocast,
            threads=self.threads,
        )
        # Hashing large encoders takes a while, so only one process does it.
        identity = processes.broadcast(precompute.identity() if processes.main else {})
        folder = Path(self.folder or Path(self.root) / f"cache-{config_hash(identity)}")
        with processes.main_first():
            self.cache = Cache(
                folder,
                identity=identity,
                samples=len(self.data),
                kinds=self.data.kinds,
                shard_size=self.shard_size,
            )
        precompute(self.cache, processes)
        if self.verify and processes.main:
            self.cache.verify()
        log.info("%d samples in the cache %s", len(self.data), folder)

    def read(self, step: int, indices: Sequence[int]) -> Read:
        stored = [index % len(self.data) for index in indices]  # as in `FromMemory`
        latents = torch.stack([self.cache.latent(index) for index in stored])
        self._expect_finite(latents, stored)
        captions = [
            self.cache.caption(at, self.data.pick(self.cache.captions(at), index, step))
            for at, index in zip(stored, indices, strict=True)
        ]
        if not captions[0].embeddings:
            return Read(latents, self.text.tokenize([caption.text for caption in captions]))
        embeddings = {
            name: torch.stack([caption.embeddings[name] for caption in captions])
            for name in captions[0].embeddings
        }
        for values in embeddings.values():
            self._expect_finite(values, stored)
        return Read(latents, self._encodings(embeddings, len(indices)))

    def _expect_finite(self, stored: Tensor, indices: Sequence[int]) -> None:
        """Reject NaN and infinite values, which earlier versions may have cached."""
        if not is_finite(stored):
            bad = [i for i, values in zip(indices, stored, strict=True) if not is_finite(values)]
            raise NotFinite(
                f"cache {self.cache.folder}: values of samples {bad[:10]} are NaN or infinite. The "
                "cache was made in too low a precision or with damaged weights: delete that "
                "folder, and it is made again from the images"
            )

    def _encodings(self, embeddings: dict[str, Tensor], batch: int) -> Encodings:
        """The cached embeddings, and zeros where an encoder is absent or has no pooled output."""
        zero = torch.zeros((), dtype=HALF)
        return Encodings(
            *(
                Encoding(
                    embeddings.get(f"{name}.hidden", zero.expand(batch, e.length, e.width)),
                    embeddings.get(f"{name}.pooled", zero.expand(batch, e.pooled_width)),
                )
                for name, e in zip(Encodings._fields, self.text.encoders, strict=True)
            )
        )
