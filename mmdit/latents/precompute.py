"""Encode a data set into a cache, with all processes of a run; resumable after an interruption."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.checks import expect_finite
from mmdit.data.dataset import CacheableData
from mmdit.errors import UserError
from mmdit.latents.cache import Cache, Samples, texts_of
from mmdit.latents.encoding import HALF, Encoded, encode_each, halved
from mmdit.models.autoencoder import Autoencoder
from mmdit.out_of_memory import enough_memory
from mmdit.precision import Autocast
from mmdit.printable import logger
from mmdit.processes import Processes
from mmdit.recipes import config_hash
from mmdit.registry import describe
from mmdit.runs.folder import RunFolder
from mmdit.runs.native import weights_hash
from mmdit.runs.signals import Signals
from mmdit.text.conditioning import (
    NAMES,
    AbsentEncoder,
    Encoding,
    Encodings,
    TextConditioner,
    TextEncoder,
)

log = logger(__name__)
CAPTIONS = 64  # captions per batch of the text encoders


class Unfinished(Exception):
    """A signal stopped the precomputation; finished shards remain."""

    def __init__(self, cache: Cache, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}; finished shards stay in {cache.folder}")
        self.number = number


class Precomputation:
    """Encodes a data set into a cache.

    Args:
        data: a data set without random augmentation.
        autoencoder: the frozen autoencoder.
        text: the text encoders; their embeddings are cached if they are frozen.
        autocast: precision of the encoders.
        threads: number of threads that read images.
    """

    def __init__(
        self,
        *,
        data: CacheableData,
        autoencoder: Autoencoder,
        text: TextConditioner,
        autocast: Autocast,
        threads: int,
    ) -> None:
        self.data, self.autoencoder, self.text = data, autoencoder, text
        self.autocast, self.threads = autocast, threads

    def identity(self) -> dict[str, Any]:
        """Plain data that determines latents and text embeddings: the cache's identity.

        Raises:
            UserError: crops are random.
        """
        device = self.autoencoder.device.type
        with self.autocast():
            computed = (
                torch.get_autocast_dtype(device)
                if torch.is_autocast_enabled(device)
                else torch.float32
            )
        encoders: dict[str, Any] = dict.fromkeys(Encodings._fields)
        if self.text.frozen:
            named = zip(Encodings._fields, self.text.encoders, strict=True)
            encoders = {name: identity_of(encoder) for name, encoder in named}
        return {
            "data set": self.data.identity(),
            "autoencoder": {
                "weights": weights_hash(self.autoencoder),  # includes scale and shift
                "architecture": config_hash(describe(self.autoencoder)),
            },
            "precision": {"computed": str(computed), "kept": str(HALF)},
            **encoders,
        }

    def __call__(self, cache: Cache, processes: Processes) -> None:
        """Write the missing shards.

        Raises:
            Unfinished: on SIGINT, SIGTERM, SIGUSR1 or SIGHUP.
            UserError: an image has changed, a shard is damaged, or the disk is full or not
                writable.
        """
        with contextlib.ExitStack() as held:
            holds = processes.main and not cache.completed
            if holds:
                with _writing(cache):
                    # RunFolder would report a failure to create the folder as one of a run.
                    cache.folder.mkdir(parents=True, exist_ok=True)
                    (cache.folder / ".lock").touch()
                    # Wait for another run that is writing the same cache.
                    held.callback(RunFolder(cache.folder, wait=True).close)
                    cache.begin()
            found = (cache.facts, cache.missing() if holds else [])
            cache.facts, missing = processes.broadcast(found)
            if missing:
                log.info("writing %d of %d shards to %s", len(missing), len(cache), cache.folder)
            self._write(cache, missing[processes.rank :: processes.world_size], processes.main)
            processes.barrier()
            if holds:
                with _writing(cache):
                    cache.complete()
        processes.barrier()

    def _write(self, cache: Cache, numbers: Sequence[int], shown: bool) -> None:
        """Encode and write the shards of these numbers, with a progress bar if `shown`."""
        bar = tqdm(
            total=sum(len(cache.indices(number)) for number in numbers),
            desc="precomputing",
            unit="image",
            disable=None if shown and numbers else True,
        )
        with Signals() as signals, bar:
            for number in numbers:
                samples = self._samples(cache, number, signals, bar)
                with _writing(cache):
                    cache.write(number, samples)

    def _samples(self, cache: Cache, number: int, signals: Signals, bar: "tqdm[Any]") -> Samples:
        found: dict[int, Encoded] = {}
        for sample in encode_each(
            self.data,
            cache.indices(number),
            autoencoder=self.autoencoder,
            autocast=self.autocast,
            threads=self.threads,
        ):
            found[sample.number] = sample
            bar.update()
            if signals.received is not None:
                raise Unfinished(cache, signals.received)
        ordered = [found[index] for index in cache.indices(number)]
        captions = [sample.captions for sample in ordered]
        embeddings: dict[str, Tensor] = {}
        if self.text.frozen:
            texts = texts_of(captions, cache.kinds)
            for name, encoder in zip(Encodings._fields, self.text.encoders, strict=True):
                if isinstance(encoder, AbsentEncoder):
                    continue
                with encoder.opened():  # one after another: T5 is large
                    encoding = self._encoded(name, encoder, texts, signals, cache)
                embeddings |= {
                    f"{name}.{part}": values
                    for part, values in encoding._asdict().items()
                    if values.numel()
                }
        return Samples([sample.latent for sample in ordered], captions, embeddings)

    def _encoded(
        self, name: str, encoder: TextEncoder, texts: list[str], signals: Signals, cache: Cache
    ) -> Encoding:
        """Output of an encoder for captions, each of which is encoded once."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        different, parts = list(numbers), []
        for start in range(0, len(different), CAPTIONS):
            parts.append(self._encoding(name, encoder, different[start : start + CAPTIONS]))
            if signals.received is not None:
                raise Unfinished(cache, signals.received)
        rows = [numbers[text] for text in texts]
        return Encoding(*(torch.cat(part)[rows] for part in zip(*parts, strict=True)))

    def _encoding(self, name: str, encoder: TextEncoder, texts: list[str]) -> Encoding:
        """Output of an encoder for captions, in half precision on the CPU."""
        what, advice = f"encoding {len(texts)} captions", "precision=bf16, text_device=cpu"
        with enough_memory(what, f"{advice} or text.use_t5=false"), self.autocast():
            encoding = halved(encoder, encoder.tokenize(texts))
        for part in encoding:
            expect_finite(f"the text encoder {NAMES[name]}", part)  # before it is stored
        return Encoding(*(part.cpu() for part in encoding))


@contextlib.contextmanager
def _writing(cache: Cache) -> Iterator[None]:
    """Turn an OSError while writing a cache into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache {cache.folder} could not be written ({error}); finished shards remain. Free "
            "space or make the folder writable, then run the same command to continue; or choose "
            "another folder with latents.folder=<folder>"
        ) from error


def identity_of(encoder: TextEncoder | AbsentEncoder) -> dict[str, Any]:
    """Plain data that determines the embeddings of an encoder."""
    if isinstance(encoder, AbsentEncoder):
        return {**describe(encoder)}
    with encoder.opened():
        return {
            "weights": weights_hash(encoder.model),
            "architecture": config_hash(describe(encoder.model)),
            "tokenizer": encoder.tokenizer.identity(),
            "tokens": encoder.length,
        }
