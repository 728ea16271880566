"""Encode a data set once, into a cache: by all processes of a run, and on after an interruption."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.data.dataset import CacheableData
from mmdit.errors import UserError
from mmdit.latents.cache import Cache, Samples, texts_of
from mmdit.latents.encoding import HALF, Encoded, encode_each, say
from mmdit.models.autoencoder import Autoencoder
from mmdit.out_of_memory import enough_memory
from mmdit.precision import Autocast
from mmdit.printable import logger
from mmdit.processes import Processes
from mmdit.registry import describe
from mmdit.runs.folder import RunFolder, config_hash
from mmdit.runs.native import weights_hash
from mmdit.runs.signals import Signals
from mmdit.text.conditioning import (
    AbsentEncoder,
    Encodings,
    TextConditioner,
    TextEncoder,
    expect_finite_encodings,
)

log = logger(__name__)
CAPTIONS = 64  # that the encoders read at once


class Unfinished(Exception):
    """A signal asked to stop; the shards that are finished stay."""

    def __init__(self, cache: Cache, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}; finished shards stay in {cache.folder}")
        self.number = number


class Precomputation:
    """How a data set is encoded.

    Args:
        data: pictures that are the same at every step.
        autoencoder: frozen.
        text: what its encoders say is kept if they are frozen.
        autocast: precision of the encoders.
        threads: that read pictures.
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
        """All that latents and encoded captions follow from.

        Raises:
            UserError: pictures are not the same at every step.
        """
        device = self.autoencoder.device.type
        with self.autocast():
            computed = (
                torch.get_autocast_dtype(device)
                if torch.is_autocast_enabled(device)
                else torch.float32
            )
        said: dict[str, Any] = dict.fromkeys(Encodings._fields)
        if self.text.frozen:
            encoders = zip(Encodings._fields, self.text.encoders, strict=True)
            said = {name: identity_of(encoder) for name, encoder in encoders}
        return {
            "data set": self.data.identity(),
            "autoencoder": {
                "weights": weights_hash(self.autoencoder),  # scale and shift are among them
                "architecture": config_hash(describe(self.autoencoder)),
            },
            "precision": {"computed": str(computed), "kept": str(HALF)},
            **said,
        }

    def __call__(self, cache: Cache, processes: Processes) -> None:
        """Make the shards that are missing.

        Raises:
            Unfinished: SIGINT, SIGTERM, SIGUSR1 or SIGHUP.
            UserError: a picture has changed, a shard is damaged, or the disk is full or cannot be
                written.
        """
        with contextlib.ExitStack() as held:
            holds = processes.main and not cache.completed
            if holds:
                with _writing(cache):
                    # What RunFolder would tell of a folder that cannot be made is for runs.
                    cache.folder.mkdir(parents=True, exist_ok=True)
                    (cache.folder / ".lock").touch()
                    # Another run that makes it, too, is waited for.
                    held.callback(RunFolder(cache.folder, wait=True).close)
                    cache.begin()
            found = (cache.facts, cache.missing() if holds else [])
            cache.facts, missing = processes.broadcast(found)
            if missing:
                log.info("making %d shards of %d in %s", len(missing), len(cache), cache.folder)
            self._make(cache, missing[processes.rank :: processes.world_size], processes.main)
            processes.barrier()
            if holds:
                with _writing(cache):
                    cache.complete()
        processes.barrier()

    def _make(self, cache: Cache, numbers: Sequence[int], shown: bool) -> None:
        """Make these shards."""
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
        said: dict[str, Tensor] = {}
        if self.text.frozen:
            texts = texts_of(captions, cache.kinds)
            parts = []
            for start in range(0, len(texts), CAPTIONS):
                parts.append(self._said(texts[start : start + CAPTIONS]))
                if signals.received is not None:
                    raise Unfinished(cache, signals.received)
            said = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Samples([sample.latent for sample in ordered], captions, said)

    def _said(self, texts: list[str]) -> dict[str, Tensor]:
        """What present encoders say, by `<encoder>.hidden` and `<encoder>.pooled`."""
        what, advice = f"reading {len(texts)} captions", "precision=bf16, text_device=cpu"
        with enough_memory(what, f"{advice} or text.use_t5=false"), self.autocast():
            encodings = say(self.text, self.text.tokenize(texts))
        expect_finite_encodings(encodings)  # they will be kept
        return {
            f"{name}.{part}": tensor.cpu()
            for name, encoder in zip(Encodings._fields, self.text.encoders, strict=True)
            for part, tensor in getattr(encodings, name)._asdict().items()
            if isinstance(encoder, TextEncoder) and tensor.numel()
        }


@contextlib.contextmanager
def _writing(cache: Cache) -> Iterator[None]:
    """Tell what to do where a cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache {cache.folder} could not be written ({error}); shards that are finished stay. "
            "The same command goes on when there is space and the folder can be written to; "
            "latents.folder=<folder> makes the cache elsewhere"
        ) from error


def identity_of(encoder: TextEncoder | AbsentEncoder) -> dict[str, Any]:
    """All that an encoder's words follow from."""
    if isinstance(encoder, AbsentEncoder):
        return {**describe(encoder)}
    return {
        "weights": weights_hash(encoder.model),
        "architecture": config_hash(describe(encoder.model)),
        "tokenizer": encoder.tokenizer.identity(),
        "tokens": encoder.length,
    }
