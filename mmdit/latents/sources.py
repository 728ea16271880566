"""Where the latents and texts of a step come from: pixels encoded at each step, or once."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.checkpoints.values import is_finite
from mmdit.checks import expect, expect_whole
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
from mmdit.runs.folder import config_hash
from mmdit.text.conditioning import Encoding, Encodings, TextConditioner, TokenIds

log = logger(__name__)


class Read(NamedTuple):
    """Samples as a source reads them, on the CPU."""

    x: Tensor  # pixels, or latents
    text: TokenIds | Encodings  # or what frozen encoders said of it
    extra: dict[str, Tensor] = {}  # noqa: RUF012  # as in `Batch`; never written to


class Source(Protocol):
    """Latents and texts for `FlowTask`."""

    def prepare(self, processes: Processes) -> None:
        """Make what is read from: by all processes of a run, once, before the first step."""

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

    def prepare(self, processes: Processes) -> None:
        """Nothing: pictures are read when they are needed."""

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
    """What sources share that keep the latents of pictures that never change."""

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
        data.cacheable(0)  # refuses images that change with the step, before anything is trained

    def order(self, *, batch_size: int, seed: int) -> Order:
        return self.data.order(batch_size=batch_size, seed=seed)

    def latent_shape(self, x: Tensor) -> tuple[int, int, int]:  # (b, c, h, w)
        _, c, h, w = x.shape
        return c, h, w

    def latents(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True).float()


class FromMemory(_Kept):
    """Pictures are encoded once, their latents kept in memory, by each process for itself.

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
        captions = [self.data.pick(self.captions[index], index, step) for index in indices]
        latents = torch.stack([self.encoded[index] for index in indices])
        return Read(latents, self.text.tokenize(captions))


class FromCache(_Kept):
    """Pictures are encoded once, their latents kept on disk (App. E.1), and so are the words of
    text encoders that are not trained.

    What is read is what is encoded at each step, but for the last bit of values whose sums in
    float32 depend on the batch. All captions of a picture are kept, and each encoder's words for
    itself: which caption a step sees, and which encoders are dropped, is drawn as ever.

    Args:
        data, autoencoder, text, autocast: as in `FromPixels`.
        folder: of the cache; made if it is not there. None is one in `root` that is named by all
            that the cache follows from.
        root: where that is.
        shard_size: samples of a file.
        threads: that read pictures while the cache is made.
        verify: compare the whole cache with its hashes first. What is read is compared anyway.
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
        named = isinstance(folder, str | Path | None)
        expect(named, "latents.folder", folder, "must be the name of a folder, or null")
        expect(isinstance(root, str | Path), "latents.root", root, "must be the name of a folder")
        expect_whole("latents.shard_size", shard_size, 1)
        expect_whole("latents.threads", threads, 1)
        expect(isinstance(verify, bool), "latents.verify", verify, "must be true or false")
        self.folder, self.root, self.shard_size = folder, root, shard_size
        self.threads, self.verify = threads, verify

    def prepare(self, processes: Processes) -> None:
        """Make the cache, or what it lacks.

        Raises:
            Unfinished: a signal asked to stop.
            UserError: the folder holds a cache that was made otherwise, or is damaged.
        """
        precompute = Precomputation(
            data=self.data,
            autoencoder=self.autoencoder,
            text=self.text,
            autocast=self.autocast,
            threads=self.threads,
        )
        # Hashing large encoders takes a while: one process does.
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
        latents = torch.stack([self.cache.latent(index) for index in indices])
        self._expect_finite(latents, indices)
        captions = [
            self.cache.caption(index, self.data.pick(self.cache.captions(index), index, step))
            for index in indices
        ]
        if not captions[0].said:
            return Read(latents, self.text.tokenize([caption.text for caption in captions]))
        said = {name: torch.stack([c.said[name] for c in captions]) for name in captions[0].said}
        for words in said.values():
            self._expect_finite(words, indices)
        return Read(latents, self._encodings(said, len(indices)))

    def _expect_finite(self, kept: Tensor, indices: Sequence[int]) -> None:
        """Refuse NaN and infinite values in a cache, as earlier versions may have written them."""
        if not is_finite(kept):
            bad = [i for i, values in zip(indices, kept, strict=True) if not is_finite(values)]
            raise NotFinite(
                f"cache {self.cache.folder}: what it keeps of samples {bad[:10]} is NaN or "
                "infinite. It was made in too low a precision or with damaged weights: delete that "
                "folder, and it is made again from the images"
            )

    def _encodings(self, said: dict[str, Tensor], batch: int) -> Encodings:
        """What was kept, and zeros where an encoder is absent or pools nothing."""
        nothing = torch.zeros((), dtype=HALF)
        return Encodings(
            *(
                Encoding(
                    said.get(f"{name}.hidden", nothing.expand(batch, e.length, e.width)),
                    said.get(f"{name}.pooled", nothing.expand(batch, e.pooled_width)),
                )
                for name, e in zip(Encodings._fields, self.text.encoders, strict=True)
            )
        )
