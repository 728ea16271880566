"""Files of weights, opened but not read: a list of their tensors, each read on request.

A tensor is a view of the memory-mapped file. Nothing is copied until it is converted.
"""

import copy
import hashlib
import json
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdit.atomic import NEW, scratch
from mmdit.bounds import (
    LONGEST_JSON,
    LONGEST_KEY,
    MOST_OPCODES,
    MOST_SHARDS,
    MOST_TENSORS,
    parse_json,
    read_bounded,
)
from mmdit.checkpoints.hashes import HASH, NO_HASH, NO_SEAL, SEAL, sealed, verify_hash
from mmdit.checkpoints.headers import DTYPE_NAMES, TOO_MANY, Header, Info, read_header
from mmdit.errors import UserError, first_line
from mmdit.nn.block_codes import EIGHT_BITS, Codes
from mmdit.printable import logger

log = logger("mmdit.checkpoints")

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
GGUF = ".gguf"
MOST_PARTS = 50  # dicts on the top level of a pickle
DEEPEST_PART = 4  # levels of nested dicts, as in {"ema": {"state_dict": {"key": tensor}}}


class Archive:
    """Tensors by key, in one file or in several.

    Attributes:
        infos: shape and dtype of every tensor.
        metadata: text entries of the headers.
        headers: the header of each file; empty for a pickle.
        name: the file, or the folder of the shards, for messages.
        paths: the files.
        parts: names of the nested dicts of a pickle, with which its keys begin; otherwise empty.
    """

    parts: tuple[str, ...] = ()
    root = ""  # beginning of every key in the file that is left out in `infos`
    scales: Mapping[str, str] = {}  # of 8-bit floats, by their keys in the file: keys of a factor

    def __init__(self, paths: Sequence[Path], name: Path | None = None) -> None:
        self.name = paths[0] if name is None else name
        self.paths = list(paths)
        self.infos: dict[str, Info] = {}
        self.metadata: dict[str, str] = {}
        self.headers: dict[Path, Header] = {}
        self._opened: dict[str, Any] = {}  # the open file that holds each key
        for path in paths:
            header = read_header(path)
            if len(self.infos) + len(header.infos) > MOST_TENSORS:
                raise UserError(f"{self.name} lists {TOO_MANY}")
            if repeated := self.infos.keys() & header.infos.keys():
                raise UserError(
                    f"{path} repeats {sorted(repeated)[0]}, which another shard holds, too: "
                    "download the shards again"
                )
            self.headers[path] = header
            self.infos |= header.infos
            self.metadata |= header.metadata
            self._opened |= dict.fromkeys(header.infos, mapped(path))

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._opened[self.root + key].get_tensor(self.root + key)
        scale = self.scales.get(self.root + key)
        if scale is not None:
            return tensor.float() * self._opened[scale].get_tensor(scale).float().reshape(())
        return tensor

    def codes(self, key: str) -> Codes | None:
        """A matrix in the codes that it is stored in; None if it is stored in plain numbers."""
        kind, name = self.infos[key].dtype, self.root + key
        if kind not in EIGHT_BITS or len(self.infos[key].shape) != 2 or name not in self._opened:
            return None
        scale = self.scales.get(name)
        factor = None if scale is None else self._opened[scale].get_tensor(scale).float()
        rows = self._opened[name].get_tensor(name).view(torch.uint8)
        return Codes(kind, rows, None if factor is None else factor.reshape(()))

    def decodes(self, key: str) -> bool:
        """Whether a tensor is decoded to a new one when it is read, and not a view of the file."""
        return self.root + key in self.scales

    def verify(self) -> None:
        """Compare the files with their known hashes, if they have any.

        Raises:
            UserError: a file is damaged.
        """
        for path in self.paths:
            header = self.headers.get(path)
            verify_hash(path, None if header is None else header.text)

    def reopened(self) -> Self:
        """The same tensors, mapped once more: their memory is let go with this view of them."""
        view = copy.copy(self)
        if self.headers:
            view._opened = {}
            for path, header in self.headers.items():
                view._opened |= dict.fromkeys(header.infos, mapped(path))
        return view

    def scaled(self, infos: Mapping[str, Info], scales: Mapping[str, str]) -> Self:
        """A view with other tensors, some of them times a factor (see `scales`)."""
        view = copy.copy(self)
        view.infos, view.scales = dict(infos), scales
        return view

    def without(self, *prefixes: str) -> Self:
        """A view without the tensors whose keys begin with one of these prefixes."""
        view = copy.copy(self)
        view.infos = {k: info for k, info in self.infos.items() if not k.startswith(prefixes)}
        return view

    def part(self, name: str) -> Self:
        """A view of the tensors under a prefix or in a nested dict: `ema`, `module.model`, ...

        The prefix is removed from the keys.

        Raises:
            UserError: there are none.
        """
        prefix = f"{name}."
        part = copy.copy(self)
        part.infos = {
            key.removeprefix(prefix): info
            for key, info in self.infos.items()
            if key.startswith(prefix)
        }
        if not part.infos:
            first = list(dict.fromkeys(key.partition(".")[0] for key in self.infos))
            raise UserError(
                f"{self.name} has no tensors under {name!r}: its keys begin with "
                f"{', '.join(first[:10])}{', ...' if len(first) > 10 else ''}"
            )
        part.root, part.parts = self.root + prefix, ()
        part.name = Path(f"{self.name}:{name}")
        return part


def mapped(path: Path) -> Any:
    """A safetensors file, mapped into memory.

    Raises:
        UserError: it is damaged, or too large to be mapped.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): download or copy it again") from None
    except RuntimeError as error:  # the address space is too small for it
        raise UserError(f"{path} cannot be opened ({first_line(error)})") from None


class PickleArchive(Archive):
    """Tensors of a pickled state dict, read with `weights_only`, which runs none of its code."""

    def __init__(self, path: Path) -> None:
        content = _read_pickle(path)
        inner = content.get("state_dict")
        beside = flattened({k: v for k, v in content.items() if k != "state_dict"})
        if isinstance(inner, Mapping) and not any(isinstance(v, Tensor) for _, v in beside):
            content = inner
        values = dict(flattened(content))
        tensors = {
            key: value
            for key, value in values.items()
            if isinstance(value, Tensor) and value.layout == torch.strided
        }
        if not tensors:
            raise UserError(f"{path} does not hold a state dict of tensors")
        if others := [key for key in values if key not in tensors]:
            log.warning(
                "%s: ignoring values that are not tensors: %s", path, ", ".join(others[:10])
            )
        if len(tensors) > MOST_TENSORS:
            raise UserError(f"{path} holds {TOO_MANY}")
        if (longest := max(map(len, tensors))) > LONGEST_KEY:
            raise UserError(f"{path}: a tensor's name has {longest:,} characters")
        nested = {str(name): v for name, v in content.items() if isinstance(v, Mapping)}
        if len(nested) > MOST_PARTS:
            raise UserError(
                f"{path} holds {len(nested):,} nested dicts; {MOST_PARTS} is several times what "
                "any training program writes"
            )
        self.parts = tuple(
            name for name in nested if any(key.startswith(f"{name}.") for key in tensors)
        )
        for key, value in tensors.items():
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"{path}: {key} is larger than its stored data")
        self.name, self.paths, self.metadata, self._tensors = path, [path], {}, tensors
        self.headers = {}
        self.infos = {
            k: Info(tuple(v.shape), DTYPE_NAMES.get(v.dtype, str(v.dtype)))
            for k, v in tensors.items()
        }

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[self.root + key]

    def codes(self, key: str) -> None:
        return None


def _read_pickle(path: Path) -> Mapping[Any, object]:
    """The content of a pickled dict; of other pickles, nothing.

    Raises:
        UserError: the file cannot be read without running code in it.
    """
    try:
        _expect_short_pickle(path)
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except UserError:
        raise
    except pickle.UnpicklingError:  # whose message advises running the code in it
        raise UserError(
            f"{path} cannot be read as a pickled state dict of tensors: it is damaged, is not "
            "a pickle, or holds objects other than tensors"
        ) from None
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a pickled state dict of tensors ({first_line(error)})"
        ) from None
    return content if isinstance(content, Mapping) else {}


def flattened(
    content: Mapping[Any, object], depth: int = DEEPEST_PART
) -> Iterator[tuple[str, object]]:
    """The values of nested dicts, under their keys joined by dots, down to `depth` levels."""
    for key, value in content.items():
        if isinstance(value, Mapping) and depth > 1:
            yield from ((f"{key}.{name}", v) for name, v in flattened(value, depth - 1))
        else:
            yield str(key), value


def split_part(path: Path) -> tuple[Path, str]:
    """Split `file.pt:ema` into the file and the requested part; the part is '' for a whole file."""
    name, colon, part = str(path).rpartition(":")
    if colon and not path.exists() and Path(name).is_file():
        return Path(name), part
    return path, ""


def _expect_short_pickle(path: Path) -> None:
    """Refuse a pickle that would take minutes or gigabytes to read, without running any of it.

    Raises:
        UserError: it has too many tensors or opcodes.
        Exception: it is damaged; the exception is that of the library which found it so.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) > 2 * MOST_TENSORS:
                raise UserError(f"{path} holds {TOO_MANY}")
            for name in names:
                if name.endswith("data.pkl"):
                    with archive.open(name) as file:
                        _count_opcodes(path, file)
        return
    with path.open("rb") as file:
        for _ in range(4):  # magic number, version, facts about the machine, content
            _count_opcodes(path, file)


def _count_opcodes(path: Path, file: IO[bytes]) -> None:
    for count, _ in enumerate(pickletools.genops(file)):
        if count > MOST_OPCODES:
            raise UserError(
                f"{path} holds more than a state dict of {MOST_TENSORS:,} tensors could: it is "
                "damaged, or was not made in good faith"
            )


def open_file(path: Path, *, allow_pickle: bool = False) -> Archive:
    """Open one file, or a part of it (`file.pt:ema`).

    Args:
        path: a safetensors file, a GGUF file, or a pickle.
        allow_pickle: also open pickles (.ckpt, .pt, .pth, .bin), without running their code.

    Raises:
        UserError: there is no such file; it is not a safetensors or GGUF file, is cut off, or is a
            pickle and `allow_pickle` is not set.
    """
    from mmdit.checkpoints.gguf_archive import GGUFArchive  # which is an archive, too
    from mmdit.checkpoints.scaled_fp8 import fold_scales

    path, part = split_part(path)
    if part:
        return open_file(path, allow_pickle=allow_pickle).part(part)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix.lower() in PICKLES:
        if allow_pickle:
            return PickleArchive(path)
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened: use the .safetensors file, "
            "or allow_pickle=true to read only its tensors (weights_only)"
        )
    if path.suffix.lower() == GGUF:
        return GGUFArchive(path)
    return fold_scales(Archive([path]))


def open_shards(index: Path) -> Archive:
    """Open the shards that an index file (`*.safetensors.index.json`) lists, as one archive.

    Raises:
        UserError: the index is invalid, shards are missing or lie outside its folder, or a tensor
            is not where the index says.
    """
    try:
        weight_map: dict[str, str] = parse_json(read_bounded(index, LONGEST_JSON))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{index} is not an index of shards: it has no JSON "weight_map"') from None
    if len(weight_map) > MOST_TENSORS:
        raise UserError(f"{index} lists {TOO_MANY}")
    if len(names) > MOST_SHARDS:
        raise UserError(f"{index} lists {len(names):,} shards, more than {MOST_SHARDS:,}")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} points to {name!r}, not a .safetensors file beside it")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: "
            f"{', '.join(missing[:10])}; download them again"
        )
    from mmdit.checkpoints.scaled_fp8 import fold_scales  # which reads archives

    archive = Archive([index.parent / name for name in names], name=index.parent)
    if absent := sorted(weight_map.keys() - archive.infos.keys()):
        raise UserError(
            f"{index} lists {len(absent)} tensors that its shards lack: {', '.join(absent[:10])}"
        )
    return fold_scales(archive)


def write_archive(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file that a user requested: `write_sealed`, with its errors as a `UserError`.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    try:
        write_sealed(path, tensors, {"format": "pt", **(metadata or {})})
    except OSError as error:
        raise UserError(f"{path} cannot be written ({first_line(error)})") from None


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with the hashes of `mmdit.checkpoints.hashes`.

    Args:
        path: the file.
        tensors: by key, in the order they are written in.
        metadata: text entries of the header.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    with scratch(path) as beside:
        new = beside / NEW
        new.touch()
        mode = new.stat().st_mode
        try:
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                new,
                metadata={**metadata, HASH: NO_HASH, SEAL: NO_SEAL},
            )
        except SafetensorError as error:  # raised for a full disk, too
            raise OSError(first_line(error)) from error
        new.chmod(mode)  # the library creates files that only their owner may read
        with new.open("r+b") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
            content = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(8)
            file.write(sealed(header, length, content))
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)


def write_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    max_bytes: int = 10_000_000_000,
) -> None:
    """Write `stem.safetensors`, or numbered shards and their index.

    Args:
        folder: where to write; earlier files of the same stem are removed.
        stem: file name without its suffix.
        tensors: by key.
        metadata: text entries of each file's header.
        max_bytes: largest size of a shard; only a single larger tensor may exceed it.
    """
    for stale in folder.glob("*.safetensors*"):
        if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", stale.name):
            stale.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    room = max_bytes
    for key, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_archive(folder / f"{stem}.safetensors", shards[0], metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_archive(folder / name, shard, metadata)
        weight_map |= dict.fromkeys(shard, name)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
