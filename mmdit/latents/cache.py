"""Latents and encoded captions of a data set on disk, made once, read at any position (App. E.1).

<folder>/
    cache.json              what the cache was made from, and the sizes and hashes of its shards
    shard-00000.safetensors the first so many samples, in the order of the data set
    shard-00000.json        size and hash of a shard that cache.json does not list yet

A shard appears whole or not at all, so that an interrupted cache goes on at the first that is not
there. Of a shard only what is asked for is read. All that is read is compared with its checksum;
the header of a shard tells which one it is, and of which cache.
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

from mmdit.atomic import clear, whole_file, write_atomically
from mmdit.checks import expect, expect_whole
from mmdit.data.caption_sources import Captions
from mmdit.errors import UserError, first_line
from mmdit.printable import logger

log = logger(__name__)

PROTOCOL = "mmdit-cache-2"
# Shards that a process holds open, the last ones used. Each is one of the 65530 mappings that Linux
# grants, no open file, and about 0.1 MB for 512 samples.
OPEN = 2048
TABLES = ("shapes", "counts", "latent_sums", "text_ends", "caption_sums")
Identity: TypeAlias = Mapping[str, Any]


class Caption(NamedTuple):
    """A caption as it was kept."""

    text: str
    said: dict[str, Tensor]  # what encoders say of it, by name; empty if that was not kept


class Samples(NamedTuple):
    """What a shard is to hold."""

    latents: Sequence[Tensor]  # (c, h, w) each, of any sizes
    captions: Sequence[Captions]  # of each sample
    said: Mapping[str, Tensor]  # name -> (m, ...), of all captions, in the order of `texts_of`


class Cache:
    """A folder of shards.

    Args:
        folder: the cache; `begin` makes it if there is none.
        identity: all that its content follows from, as plain data: what -> its particulars.
        samples: how many it holds when it is complete.
        kinds: of captions.
        shard_size: samples of a shard; a cache that was begun keeps its own.

    Raises:
        UserError: the folder holds a cache of another identity, or something else.
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
        expect_whole("shard_size", shard_size, 1)
        self.folder, self.samples, self.kinds = folder, samples, tuple(kinds)
        self.facts: dict[str, Any] = {  # the content of cache.json
            "protocol": PROTOCOL,
            "identity": json.loads(json.dumps(identity)),  # as it will be read again
            "shard_size": shard_size,
            "shards": {},
        }
        # Looked at before cache.json: where another process begins the cache, that comes first.
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        others = [n for n in names if not n.startswith(".") and not n.endswith(".tmp")]
        if not self._reopened() and others:
            raise UserError(f"{folder} holds something else than a cache: name another folder")
        self._open: dict[int, Shard] = {}  # the one used last at the end

    @property
    def shard_size(self) -> int:
        """Samples of a shard; the last may have fewer."""
        return int(self.facts["shard_size"])

    def begin(self) -> None:
        """Look at what other processes have made by now, and write cache.json if there is none.

        By the process that holds the folder, as all that writes but `write`.
        """
        clear(self.folder)
        if not self._reopened():
            self._write_facts()

    def _reopened(self) -> bool:
        """Read cache.json, if it is there."""
        there = (self.folder / "cache.json").is_file()
        if there:
            self.facts = self._read_facts()
        return there

    def _read_facts(self) -> dict[str, Any]:
        path = self.folder / "cache.json"
        try:
            facts: dict[str, Any] = json.loads(path.read_bytes())
            protocol, made = facts["protocol"], facts["identity"]
            expect(facts["shard_size"] >= 1, "shard_size", facts["shard_size"], "must be 1 or more")
            facts["shards"] = {name: _record(told) for name, told in facts["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}): move the cache elsewhere"
            ) from error
        if protocol != PROTOCOL:
            raise UserError(
                f"{path} is of the protocol {protocol}, not {PROTOCOL}: move the cache elsewhere"
            )
        if told := differences(made, self.facts["identity"]):
            raise UserError(f"{self.folder} was made with {'; '.join(told)}: name another folder")
        return facts

    def _write_facts(self) -> None:
        write_atomically(self.folder / "cache.json", json.dumps(self.facts, indent=1).encode())

    def __len__(self) -> int:
        """How many shards it has when it is complete."""
        return -(-self.samples // self.shard_size)

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def indices(self, number: int) -> range:
        """The samples of a shard."""
        return range(self.samples)[number * self.shard_size : (number + 1) * self.shard_size]

    def missing(self) -> list[int]:
        """Shards that are still to be made.

        Raises:
            UserError: one was made and has another size now.
        """
        return [number for number, record in self._records() if record is None]

    def verify(self) -> None:
        """Compare all bytes with the hashes they had when they were written.

        Raises:
            UserError: with the shards that are damaged.
        """
        made = [(self.path(n), record["sha256"]) for n, record in self._records() if record]
        with ThreadPoolExecutor(4) as threads:  # hashing leaves Python to others
            hashes = list(threads.map(lambda pair: _hash(pair[0]), made))
        pairs = zip(made, hashes, strict=True)
        if damaged := [path.name for (path, expected), found in pairs if found != expected]:
            raise UserError(
                f"{len(damaged)} of {len(made)} shards of {self.folder} are damaged, their SHA-256 "
                f"differs: {', '.join(damaged[:10])}; move them elsewhere, and they are made again"
            )

    def write(self, number: int, samples: Samples) -> None:
        """Make a shard: flushed to the disk, then moved to its place, then noted."""
        path = self.path(number)
        tensors, tables = self._tensors(samples)
        content = {name: list(t.shape) for name, t in tensors.items() if name not in TABLES}
        facts = {"tables": tables, "content": content, **self._place(number)}
        # Under one key: the order of several is left to chance, and a shard's bytes would be.
        data = save(tensors, {"facts": json.dumps(facts)})
        with whole_file(path) as file:
            file.write(data)
        record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_atomically(path.with_suffix(".json"), json.dumps(record).encode())

    @property
    def completed(self) -> bool:
        """Whether all shards are there, and noted in cache.json."""
        # As it was read: what is only noted may be moved to cache.json at any moment.
        listed = all(self.path(number).name in self.facts["shards"] for number in range(len(self)))
        return listed and not self._notes() and not self.missing()

    def complete(self) -> None:
        """Note all shards in cache.json; by the process that holds the folder, when all are there.

        A kill at any moment leaves a cache that is not completed, and so comes here again.
        """
        clear(self.folder)
        for path in filter(Path.is_file, self.folder.glob("*.tmp")):  # as they once were written
            path.unlink(missing_ok=True)
        if notes := self._notes():
            self.facts["shards"] = {self.path(n).name: record for n, record in self._records()}
            self._write_facts()
        for path in notes:
            path.unlink(missing_ok=True)

    def _notes(self) -> list[Path]:
        return list(self.folder.glob("shard-*.json"))

    def latent(self, index: int) -> Tensor:
        """The latent of a sample, (c, h, w), as it was given.

        Raises:
            UserError: its shard is damaged.
        """
        return self._shard(index).latent(index % self.shard_size)

    def captions(self, index: int) -> dict[str, range]:
        """Of each kind, the numbers of a sample's captions, for `caption`."""
        return self._shard(index).captions(index % self.shard_size)

    def caption(self, index: int, number: int) -> Caption:
        """One caption of a sample, of a number that `captions` gave.

        Raises:
            UserError: its shard is damaged.
        """
        return self._shard(index).caption(number)

    def _shard(self, index: int) -> "Shard":
        number = index // self.shard_size
        shard = self._open.pop(number, None)
        if shard is None:
            shard = Shard(self.path(number), self.kinds, self._place(number))
        self._open[number] = shard  # as the last: a dict keeps the order of insertion
        if len(self._open) > OPEN:
            del self._open[next(iter(self._open))]
        return shard

    def _place(self, number: int) -> dict[str, str]:
        """What the header of a shard says of where it belongs."""
        made = [self.facts["identity"], self.samples, self.kinds, self.shard_size]
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        return {"cache": digest, "shard": f"{number} of {len(self)}"}

    def _records(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """What is noted of each shard: size and hash; None where it is still to be made."""
        for number in range(len(self)):
            path = self.path(number)
            note = path.with_suffix(".json")
            record = _noted(note) if note.is_file() else self.facts["shards"].get(path.name)
            if record is None or not path.is_file():
                yield number, None
                continue
            if (size := path.stat().st_size) != record["bytes"]:
                raise _damaged(path, f"it has {size} bytes instead of {record['bytes']}")
            yield number, record

    def _tensors(self, samples: Samples) -> tuple[dict[str, Tensor], int]:
        """A shard's tensors, and the checksum of its tables."""
        texts = [text.encode("utf-8") for text in texts_of(samples.captions, self.kinds)]
        said = sorted(samples.said)
        rows = [[_bytes(samples.said[name][m]) for name in said] for m in range(len(texts))]
        counts = [[len(told.get(kind, ())) for kind in self.kinds] for told in samples.captions]
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
            **{f"said.{name}": samples.said[name].contiguous() for name in said},
        }
        return {**tables, **content}, _sum(*(_bytes(tables[name]) for name in TABLES))


class Shard:
    """A shard to read from; its content is mapped into memory, and read where it is touched.

    Args:
        path: of the file.
        kinds: of captions.
        place: what its header must say of where it belongs.

    Raises:
        UserError: it is missing or damaged, or belongs elsewhere.
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
                raise ValueError(f"it holds {found} instead of {facts['content']}")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, first_line(error)) from error
        if _sum(*(_bytes(tables[name]) for name in TABLES)) != expected:
            raise _damaged(path, "its tables have another checksum")
        if (cache, shard) != (place["cache"], place["shard"]):
            other = "this cache" if cache == place["cache"] else "a cache that was made otherwise"
            raise UserError(
                f"{path} should be shard {place['shard']}, and is shard {shard} of {other}: move "
                "this file elsewhere, and it is made again"
            )
        self._shapes, self._counts, self._latent_sums, ends, self._caption_sums = tables.values()
        self._ends = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).tolist()
        self._starts = [0, *self._shapes.prod(dim=1).cumsum(0).tolist()]
        self._firsts = [0, *self._counts.flatten().cumsum(0).tolist()]
        self._said = sorted(name for name in found if name.startswith("said."))

    def latent(self, i: int) -> Tensor:
        """The latent of the shard's i-th sample."""
        flat = self._file.get_slice("latents")[self._starts[i] : self._starts[i + 1]]
        if _sum(_bytes(flat)) != self._latent_sums[i]:
            raise _damaged(self.path, f"the latent of its sample {i} has another checksum")
        return flat.view(*self._shapes[i].tolist())

    def captions(self, i: int) -> dict[str, range]:
        """Of each kind, the numbers of the captions of the shard's i-th sample."""
        firsts = self._firsts[i * len(self.kinds) : (i + 1) * len(self.kinds) + 1]
        return {kind: range(firsts[k], firsts[k + 1]) for k, kind in enumerate(self.kinds)}

    def caption(self, number: int) -> Caption:
        """The shard's caption of a number."""
        text = _bytes(self._file.get_slice("texts")[self._ends[number] : self._ends[number + 1]])
        said = {
            name.removeprefix("said."): self._file.get_slice(name)[number : number + 1][0]
            for name in self._said
        }
        if _sum(text, *map(_bytes, said.values())) != self._caption_sums[number]:
            raise _damaged(self.path, f"its caption {number} has another checksum")
        return Caption(text.decode("utf-8"), said)


def texts_of(captions: Sequence[Captions], kinds: Sequence[str]) -> list[str]:
    """All captions of samples, in the order in which a shard keeps them."""
    return [text for told in captions for kind in kinds for text in told.get(kind, ())]


def differences(made: Identity, wanted: Identity) -> list[str]:
    """Where two identities differ: 'another autoencoder (weights: 12ab, not 34cd)'."""
    told = []
    for what in sorted(made.keys() | wanted.keys()):
        before, now = ({"": each.get(what)} for each in (made, wanted))
        if isinstance(before[""], dict) and isinstance(now[""], dict):
            before, now = before[""], now[""]
        changed = [
            f"{key}{': ' if key else ''}{_short(before.get(key))}, not {_short(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            told.append(f"another {what} ({'; '.join(changed)})")
    return told


def _noted(path: Path) -> dict[str, Any] | None:
    """The record that a note holds; None if it is cut or damaged, or went meanwhile."""
    try:
        return _record(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return None


def _record(told: Any) -> dict[str, Any]:
    """What is known of a shard that was made."""
    return {"bytes": told["bytes"], "sha256": told["sha256"]}


def _short(value: object) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 16 else f"{text[:12]}..."


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}): move this file elsewhere, and it is made again"
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _sum(*parts: bytes) -> int:
    """CRC-32 of all parts."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
