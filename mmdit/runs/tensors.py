"""Sharded tensors: a folder of safetensors files, each with some tensors or parts of them.

All processes of a run write them together, with `torch.distributed.checkpoint`; any number of
processes can read them, each only the parts it needs. Such a folder contains no pickle.
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
from mmdit.runs.native import hash_in_order, mismatches

FILE_SIZE = 256 * 1024**2  # bytes; assembling a file blocks all other Python code


class Fact(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype


class _Writer(HuggingFaceStorageWriter):
    """Defers an error until all processes are done, so that none waits for another for ever."""

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
    """Write tensors and flush them to disk, together with the other processes of `group`.

    Args:
        folder: an empty folder.
        tensors: contiguous, on the CPU. Each process writes its own part of a DTensor; a plain
            tensor, which all have, is written by one of them.
        group: gloo process group; None for a single process.

    Raises:
        Exception: the error of this process; the caller must pass it on to the others.
    """
    _silence_dcp()
    writer = _Writer(str(folder), fqn_to_index_mapping=files_for(tensors), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # for tensors on GPUs; would wait for their work
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # not a subclass of Exception
        raise RuntimeError(f"{folder} could not be written: {error}") from error
    if writer.problem is not None:
        raise writer.problem


def files_for(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """File number for each key, from 1, such that files have at most about `FILE_SIZE` bytes."""
    number, filled, chosen = 1, 0, {}
    for key, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if filled and filled + local.nbytes > FILE_SIZE:
            number, filled = number + 1, 0
        filled += local.nbytes
        chosen[key] = number
    return chosen


def facts(folder: Path) -> dict[str, Fact]:
    """Shape and dtype of all tensors in a folder; only headers are read.

    Raises:
        UserError: the folder does not exist, or a file cannot be read.
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
    """Offset of each part in its tensor, by key, as stated in a file's header.

    Raises:
        UserError: the header's offsets do not match its tensors.
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
    """Fill tensors in place from a folder; a DTensor receives this process's part.

    Raises:
        UserError: keys, shapes or dtypes differ (then nothing is filled), or a file cannot be
            read.
    """
    found = facts(folder)
    wrong = mismatches(tensors, found)
    if not wrong and (cast := [k for k, fact in found.items() if fact.dtype != tensors[k].dtype]):
        key = cast[0]
        wrong = f"{len(cast)} of another dtype: {key} {tensors[key].dtype}, not {found[key].dtype}"
    if wrong:
        raise UserError(f"{folder} does not fit: {wrong}")
    _silence_dcp()
    try:
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise _unreadable(folder, error) from error


class Part(NamedTuple):
    """A tensor, or the part of it that one file holds."""

    key: str
    start: tuple[int, ...]  # offset in the whole tensor
    tensor: Tensor


def read_parts(path: Path) -> tuple[list[Part], str]:
    """Read the parts in a file, and its SHA-256; every byte is read once.

    Raises:
        UserError: it is not a valid file of this kind.
        OSError: it cannot be read.
    """
    header = read_header(path)
    starts = _starts(path, header)
    digest = hashlib.sha256(header.raw)
    tensors = read_tensors(path, header, digest)
    return [Part(key, starts[key], tensors[key]) for key in tensors], digest.hexdigest()


def joined(parts: Iterable[Part], source: Path) -> dict[str, Tensor]:
    """Assemble whole tensors from their parts in the files of a folder.

    Args:
        parts: all parts, in any order.
        source: the folder, for messages.

    Raises:
        UserError: a part of a tensor is missing or duplicated.
    """
    by_key: dict[str, list[Part]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(part)
    tensors: dict[str, Tensor] = {}
    for key, own in by_key.items():
        ends = [[o + n for o, n in zip(p.start, p.tensor.shape, strict=True)] for p in own]
        shape = [max(sizes) for sizes in zip(*ends, strict=True)]
        if math.prod(shape) != sum(part.tensor.numel() for part in own):
            raise _unreadable(source, ValueError(f"{key} is incomplete"))
        if len(own) == 1:
            tensors[key] = own[0].tensor
            continue
        tensors[key] = own[0].tensor.new_empty(shape)
        for part, end in zip(own, ends, strict=True):
            place = tuple(slice(o, e) for o, e in zip(part.start, end, strict=True))
            tensors[key][place] = part.tensor
    return tensors


def hash_of(folders: Sequence[Path]) -> str:
    """`tensors_hash` of all tensors in some folders, with one tensor in memory at a time.

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


def _silence_dcp() -> None:
    """Silence the warning of `torch.distributed.checkpoint` about running in a single process."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unini")
