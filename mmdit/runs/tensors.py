"""Tensors in a folder of safetensors files, each of which holds some tensors or parts of them.

Written by all processes of a run at once, by `torch.distributed.checkpoint`; read by any number of
processes, each of which takes the parts it needs. Nothing in such a folder is a pickle.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from mmdit.bounds import parse_json
from mmdit.checkpoints.headers import DTYPES, Header, read_header, read_tensors
from mmdit.errors import UserError
from mmdit.runs.native import differences, hash_in_order

FILE_SIZE = 256 * 1024**2  # bytes; while a file is put together, Python does nothing else


class Fact(NamedTuple):
    """What a folder holds under a key."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype


class _Writer(HuggingFaceStorageWriter):
    """Keeps an error until all processes have come to the end, so that none waits for another."""

    problem: Exception | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            self.problem = error
            nothing: Future[list[WriteResult]] = Future()
            nothing.set_result([])
            return nothing


def write(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write tensors, flushed to the disk; together with the other processes of `group`.

    Args:
        tensors: contiguous, on the CPU. Of a DTensor each process writes its own part, of a plain
            tensor, which all have, one of them does.
        group: of gloo; None for a single process.

    Raises:
        Exception: what went wrong in this process; the others must be told.
    """
    _hush()
    writer = _Writer(str(folder), fqn_to_index_mapping=files_for(tensors), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # that is for tensors on GPUs, and would wait for their work
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # which is no Exception
        raise RuntimeError(f"{folder} could not be written: {error}") from error
    if writer.problem is not None:
        raise writer.problem


def files_for(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file for each key, from 1: as few files as hold `FILE_SIZE` each."""
    number, filled, chosen = 1, 0, {}
    for key, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if filled and filled + local.nbytes > FILE_SIZE:
            number, filled = number + 1, 0
        filled += local.nbytes
        chosen[key] = number
    return chosen


def facts(folder: Path) -> dict[str, Fact]:
    """Shape and dtype of all that a folder holds.

    Raises:
        UserError: a file cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of tensors")
    found: dict[str, Fact] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        for key, start in _starts(path, header).items():
            end = tuple(o + n for o, n in zip(start, header.infos[key].shape, strict=True))
            known = found.get(key, Fact(end, DTYPES[header.infos[key].dtype]))
            found[key] = Fact(tuple(map(max, known.shape, end)), known.dtype)
    return found


def _starts(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    """Where in its tensor each part of a file begins.

    Raises:
        UserError: the header says it of other tensors.
    """
    try:
        stated = parse_json(header.metadata.get("DCP_SHARDING_INFO", "{}").encode())
        starts = {
            key: tuple(stated[key]["saved_offsets"]) if stated else (0,) * len(info.shape)
            for key, info in header.infos.items()
        }
        assert all(len(starts[key]) == len(i.shape) for key, i in header.infos.items())
        assert all(isinstance(n, int) and n >= 0 for start in starts.values() for n in start)
        assert all(info.dtype in DTYPES for info in header.infos.values())
        return starts
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise _unreadable(path, error) from error


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place with what `folder` holds; of a DTensor, the part of this process.

    Raises:
        UserError: keys, shapes or dtypes differ, and nothing is filled then; or a file cannot be
            read.
    """
    found = facts(folder)
    told = differences(tensors, found)
    if not told and (cast := [k for k, fact in found.items() if fact.dtype != tensors[k].dtype]):
        key = cast[0]
        told = f"{len(cast)} of another dtype: {key} {tensors[key].dtype}, not {found[key].dtype}"
    if told:
        raise UserError(f"{folder} does not fit: {told}")
    _hush()
    try:
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise _unreadable(folder, error) from error


class Part(NamedTuple):
    """A tensor, or what one file holds of it."""

    key: str
    start: tuple[int, ...]  # in the whole tensor
    tensor: Tensor


def read_parts(path: Path) -> tuple[list[Part], str]:
    """What a file holds, and its SHA-256; every byte is read once.

    Raises:
        UserError: it is not such a file.
        OSError: it cannot be read.
    """
    header = read_header(path)
    starts = _starts(path, header)
    digest = hashlib.sha256(header.raw)
    tensors = read_tensors(path, header, digest)
    return [Part(key, starts[key], tensors[key]) for key in tensors], digest.hexdigest()


def joined(parts: Iterable[Part], source: Path) -> dict[str, Tensor]:
    """Whole tensors from what the files of a folder hold of them.

    Args:
        source: for messages.

    Raises:
        UserError: of a tensor, something is missing or there twice.
    """
    by_key: dict[str, list[Part]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(part)
    tensors: dict[str, Tensor] = {}
    for key, own in by_key.items():
        ends = [[o + n for o, n in zip(p.start, p.tensor.shape, strict=True)] for p in own]
        shape = [max(sizes) for sizes in zip(*ends, strict=True)]
        if math.prod(shape) != sum(part.tensor.numel() for part in own):
            raise _unreadable(source, ValueError(f"{key} is not whole"))
        if len(own) == 1:
            tensors[key] = own[0].tensor
            continue
        tensors[key] = own[0].tensor.new_empty(shape)
        for part, end in zip(own, ends, strict=True):
            place = tuple(slice(o, e) for o, e in zip(part.start, end, strict=True))
            tensors[key][place] = part.tensor
    return tensors


def hash_of(folders: Sequence[Path]) -> str:
    """`tensors_hash` of all that some folders hold, with one tensor in memory at a time.

    Raises:
        UserError: a file cannot be read.
    """
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    starts = {path: _starts(path, read_header(path)) for path in files}
    places: dict[str, list[Path]] = {}
    for path in files:
        for key in starts[path]:
            places.setdefault(key, []).append(path)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in files}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for key in sorted(places):
                parts = [Part(key, starts[p][key], opened[p].get_tensor(key)) for p in places[key]]
                yield from joined(parts, folders[-1]).items()

        return hash_in_order(tensors())


def _unreadable(folder: Path, error: BaseException) -> UserError:
    return UserError(f"{folder} cannot be read, a file is damaged or missing: {error}")


def _hush() -> None:
    """Keep DCP from warning that a single process is a single process."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unini")
