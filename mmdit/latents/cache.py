"""An on-disk cache of a data set's latents and encoded captions, with random access (App. E.1).

<folder>/
    cache.json              what the cache was made from, and the sizes and hashes of its shards
    shard-00000.safetensors the first `shard_size` samples, in data set order
    shard-00000.json        size and hash of a shard that cache.json does not list yet

Shards are written atomically, so an interrupted precomputation continues at the first missing one.
Only the requested samples of a shard are read, and every read is verified by checksum. The header
of a shard identifies the shard and its cache.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmdit.atomic import clear, file_hash, whole_file, write_atomically
from mmdit.checks import whole_number
from mmdit.data.caption_sources import Captions
from mmdit.errors import UserError, first_line
from mmdit.printable import logger
from mmdit.recipes import differences

log = logger(__name__)

PROTOCOL = "mmdit-cache-2"
# Most recently used shards that a process keeps open. Each takes one of the 65530 memory mappings
# that Linux allows, no file descriptor, and about 0.1 MB for 512 samples.
MAX_OPEN_SHARDS = 2048
TABLES = ("shapes", "counts", "latent_sums", "text_ends", "caption_sums")
EMBEDDING = "said."  # prefix of the names of text embeddings in a shard, fixed by the protocol
Identity: TypeAlias = Mapping[str, Any]


class Caption(NamedTuple):
    """A cached caption."""

    text: str
    embeddings: dict[str, Tensor]  # outputs of frozen text encoders, by name; may be empty


class Samples(NamedTuple):
    """The content of a shard to be written."""

    latents: Sequence[Tensor]  # (c, h, w) each, of any sizes
    captions: Sequence[Captions]  # of each sample
    embeddings: Mapping[str, Tensor]  # name -> (m, ...), of all captions as ordered by `texts_of`


class Cache:
    """A folder of shards.

    Args:
        folder: the cache; `begin` creates it if it does not exist.
        identity: plain data that determines the content, by topic ("data set", "autoencoder", ...).
        samples: number of samples when the cache is complete.
        kinds: the kinds of captions.
        shard_size: number of samples per shard; an existing cache keeps its own.

    Raises:
        UserError: the folder has a cache with a different identity, or other files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: Identity,
        samples: int,
        kinds: Sequence[str],
        shard_size: int,
    ) -> None:
        whole_number("shard_size", shard_size, 1)
        self.folder, self.samples, self.kinds = folder, samples, tuple(kinds)
        self.facts: dict[str, Any] = {  # the content of cache.json
            "protocol": PROTOCOL,
            "identity": json.loads(json.dumps(identity)),  # normalized, as if read from the file
            "shard_size": shard_size,
            "shards": {},
        }
        # Listed before cache.json is read: another process that creates the cache writes it first.
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        others = [n for n in names if not n.startswith(".") and not n.endswith(".tmp")]
        if not self._reopened() and others:
            raise UserError(f"{folder} is not a cache and not empty: choose another folder")
        self._open: dict[int, Shard] = {}  # the most recently used at the end

    @property
    def shard_size(self) -> int:
        """Number of samples per shard; the last may have fewer."""
        return int(self.facts["shard_size"])

    def begin(self) -> None:
        """Read cache.json again, or write it if it does not exist.

        Only the process that holds the folder's lock may call this, as all writers except `write`.
        """
        clear(self.folder)
        if not self._reopened():
            self._write_facts()

    def _reopened(self) -> bool:
        """Read cache.json if it exists; return whether it does."""
        exists = (self.folder / "cache.json").is_file()
        if exists:
            self.facts = self._read_facts()
        return exists

    def _read_facts(self) -> dict[str, Any]:
        path = self.folder / "cache.json"
        try:
            facts: dict[str, Any] = json.loads(path.read_bytes())
            protocol, made = facts["protocol"], facts["identity"]
            whole_number("shard_size", facts["shard_size"])
            facts["shards"] = {name: _record(entry) for name, entry in facts["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}): move the cache elsewhere"
            ) from error
        if protocol != PROTOCOL:
            raise UserError(
                f"{path} has the protocol {protocol}, not {PROTOCOL}: move the cache elsewhere"
            )
        if changes := identity_differences(made, self.facts["identity"]):
            raise UserError(
                f"{self.folder} was made with {'; '.join(changes)}: choose another folder"
            )
        return facts

    def _write_facts(self) -> None:
        write_atomically(self.folder / "cache.json", json.dumps(self.facts, indent=1).encode())

    def __len__(self) -> int:
        """The number of shards when the cache is complete."""
        return -(-self.samples // self.shard_size)

    def path(self, number: int) -> Path:
        """The path of a shard."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def indices(self, number: int) -> range:
        """The indices of the samples in a shard."""
        return range(self.samples)[number * self.shard_size : (number + 1) * self.shard_size]

    def missing(self) -> list[int]:
        """The numbers of the shards that do not exist yet.

        Raises:
            UserError: an existing shard has changed in size.
        """
        return [number for number, record in self._records() if record is None]

    def verify(self) -> None:
        """Compare all shards with the SHA-256 recorded when they were written.

        Raises:
            UserError: shards are damaged; the message names them.
        """
        made = [(self.path(n), record["sha256"]) for n, record in self._records() if record]
        with ThreadPoolExecutor(4) as threads:  # hashing releases the GIL
            hashes = list(threads.map(lambda pair: file_hash(pair[0]), made))
        pairs = zip(made, hashes, strict=True)
        if damaged := [path.name for (path, expected), found in pairs if found != expected]:
            raise UserError(
                f"{len(damaged)} of {len(made)} shards of {self.folder} are damaged, their SHA-256 "
                f"differs: {', '.join(damaged[:10])}; delete them to have them made again"
            )

    def write(self, number: int, samples: Samples) -> None:
        """Write a shard atomically, then its record."""
        path = self.path(number)
        tensors, tables = self._tensors(samples)
        content = {name: list(t.shape) for name, t in tensors.items() if name not in TABLES}
        facts = {"tables": tables, "content": content, **self._place(number)}
        # Under a single key: the order of several is random, which would change a shard's bytes.
        data = save(tensors, {"facts": json.dumps(facts)})
        with whole_file(path) as file:
            file.write(data)
        record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_atomically(path.with_suffix(".json"), json.dumps(record).encode())

    @property
    def completed(self) -> bool:
        """Whether all shards exist and are listed in cache.json."""
        # From cache.json as read: records beside shards may move to cache.json at any moment.
        listed = all(self.path(number).name in self.facts["shards"] for number in range(len(self)))
        return listed and not self._record_files() and not self.missing()

    def complete(self) -> None:
        """List all shards in cache.json, once all exist; by the process that holds the lock.

        If killed at any moment, the cache remains incomplete and the next run completes it.
        """
        clear(self.folder)
        for path in filter(Path.is_file, self.folder.glob("*.tmp")):  # left by earlier versions
            path.unlink(missing_ok=True)
        if records := self._record_files():
            self.facts["shards"] = {self.path(n).name: record for n, record in self._records()}
            self._write_facts()
        for path in records:
            path.unlink(missing_ok=True)

    def _record_files(self) -> list[Path]:
        return list(self.folder.glob("shard-*.json"))

    def latent(self, index: int) -> Tensor:
        """The latent of a sample, (c, h, w).

        Raises:
            UserError: its shard is damaged.
        """
        return self._shard(index).latent(index % self.shard_size)

    def captions(self, index: int) -> dict[str, range]:
        """The caption numbers of a sample by kind, for `caption`."""
        return self._shard(index).captions(index % self.shard_size)

    def caption(self, index: int, number: int) -> Caption:
        """One caption of a sample, by a number from `captions`.

        Raises:
            UserError: its shard is damaged.
        """
        return self._shard(index).caption(number)

    def _shard(self, index: int) -> "Shard":
        number = index // self.shard_size
        shard = self._open.pop(number, None)
        if shard is None:
            shard = Shard(self.path(number), self.kinds, self._place(number))
        self._open[number] = shard  # at the end: a dict keeps insertion order
        if len(self._open) > MAX_OPEN_SHARDS:
            del self._open[next(iter(self._open))]
        return shard

    def _place(self, number: int) -> dict[str, str]:
        """Header fields that identify a shard and its cache."""
        made = [self.facts["identity"], self.samples, self.kinds, self.shard_size]
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        return {"cache": digest, "shard": f"{number} of {len(self)}"}

    def _records(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """The record (size and hash) of each shard; None where it does not exist yet."""
        for number in range(len(self)):
            path = self.path(number)
            note = path.with_suffix(".json")
            record = _read_record(note) if note.is_file() else self.facts["shards"].get(path.name)
            if record is None or not path.is_file():
                yield number, None
                continue
            if (size := path.stat().st_size) != record["bytes"]:
                raise _damaged(path, f"it has {size} bytes instead of {record['bytes']}")
            yield number, record

    def _tensors(self, samples: Samples) -> tuple[dict[str, Tensor], int]:
        """The tensors of a shard, and the checksum of its tables."""
        texts = [text.encode("utf-8") for text in texts_of(samples.captions, self.kinds)]
        names = sorted(samples.embeddings)
        rows = [[_bytes(samples.embeddings[name][m]) for name in names] for m in range(len(texts))]
        counts = [[len(each.get(kind, ())) for kind in self.kinds] for each in samples.captions]
        tables = {
            "shapes": torch.tensor([list(latent.shape) for latent in samples.latents]),
            "counts": torch.tensor(counts),
            "latent_sums": torch.tensor([_sum(_bytes(latent)) for latent in samples.latents]),
            "text_ends": torch.tensor([len(text) for text in texts]).cumsum(0),
            "caption_sums": torch.tensor(
                [_sum(text, *row) for text, row in zip(texts, rows, strict=True)]
            ),
        }
        content = {
            "latents": torch.cat([latent.flatten() for latent in samples.latents]),
            "texts": torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8),
            **{EMBEDDING + name: samples.embeddings[name].contiguous() for name in names},
        }
        return {**tables, **content}, _sum(*(_bytes(tables[name]) for name in TABLES))


class Shard:
    """An open shard. Its content is memory-mapped, so only accessed samples are read.

    Args:
        path: the file.
        kinds: the kinds of captions.
        place: the header fields that identify the shard and its cache.

    Raises:
        UserError: it is missing or damaged, or belongs to another place or cache.
    """

    def __init__(self, path: Path, kinds: Sequence[str], place: Mapping[str, str]) -> None:
        self.path, self.kinds = path, kinds
        try:
            self._file = safe_open(path, framework="pt")
            tables = {name: self._file.get_tensor(name) for name in TABLES}
            facts = json.loads(self._file.metadata()["facts"])
            expected, cache, shard = (facts[key] for key in ("tables", "cache", "shard"))
            found = {
                name: self._file.get_slice(name).get_shape()
                for name in self._file.keys()  # noqa: SIM118
                if name not in TABLES
            }
            if found != facts["content"]:
                raise ValueError(f"it has {found} instead of {facts['content']}")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, first_line(error)) from error
        if _sum(*(_bytes(tables[name]) for name in TABLES)) != expected:
            raise _damaged(path, "the checksum of its tables differs")
        if (cache, shard) != (place["cache"], place["shard"]):
            other = "this cache" if cache == place["cache"] else "another cache"
            raise UserError(
                f"{path} should be shard {place['shard']}, but is shard {shard} of {other}: delete "
                "the file to have it made again"
            )
        self._shapes, self._counts, self._latent_sums, ends, self._caption_sums = tables.values()
        self._ends = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).tolist()
        self._starts = [0, *self._shapes.prod(dim=1).cumsum(0).tolist()]
        self._firsts = [0, *self._counts.flatten().cumsum(0).tolist()]
        self._embeddings = sorted(name for name in found if name.startswith(EMBEDDING))

    def latent(self, i: int) -> Tensor:
        """The latent of the shard's i-th sample."""
        flat = self._file.get_slice("latents")[self._starts[i] : self._starts[i + 1]]
        if _sum(_bytes(flat)) != self._latent_sums[i]:
            raise _damaged(self.path, f"the checksum of the latent of sample {i} differs")
        return flat.view(*self._shapes[i].tolist())

    def captions(self, i: int) -> dict[str, range]:
        """The caption numbers of the shard's i-th sample, by kind."""
        firsts = self._firsts[i * len(self.kinds) : (i + 1) * len(self.kinds) + 1]
        return {kind: range(firsts[k], firsts[k + 1]) for k, kind in enumerate(self.kinds)}

    def caption(self, number: int) -> Caption:
        """A caption of the shard by its number."""
        text = _bytes(self._file.get_slice("texts")[self._ends[number] : self._ends[number + 1]])
        embeddings = {
            name.removeprefix(EMBEDDING): self._file.get_slice(name)[number : number + 1][0]
            for name in self._embeddings
        }
        if _sum(text, *map(_bytes, embeddings.values())) != self._caption_sums[number]:
            raise _damaged(self.path, f"the checksum of caption {number} differs")
        return Caption(text.decode("utf-8"), embeddings)


def texts_of(captions: Sequence[Captions], kinds: Sequence[str]) -> list[str]:
    """All captions of samples, in the order in which a shard stores them."""
    return [text for each in captions for kind in kinds for text in each.get(kind, ())]


def identity_differences(made: Identity, wanted: Identity) -> list[str]:
    """Differences between two identities: ['another autoencoder (weights: 12ab, not 34cd)']."""
    found: dict[str, list[str]] = {}
    for key, before, now in differences(made, wanted):
        what, _, particular = key.partition(".")
        values = f"{_short(before)}, not {_short(now)}"
        found.setdefault(what, []).append(f"{particular}: {values}" if particular else values)
    return [f"another {what} ({'; '.join(values)})" for what, values in found.items()]


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file; None if it is truncated or damaged, or was removed meanwhile."""
    try:
        return _record(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return None


def _record(entry: Any) -> dict[str, Any]:
    """The size and hash of a shard, as recorded when it was written."""
    return {"bytes": entry["bytes"], "sha256": entry["sha256"]}


def _short(value: object) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 16 else f"{text[:12]}..."


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): delete it to have it made again")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _sum(*parts: bytes) -> int:
    """The CRC-32 of all parts."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value
