"""Our own files: one safetensors file per module, with its description in the header.

The header's metadata holds the module's description (plain JSON, see `mmdit.registry`), so a file
says by itself what it is. Files appear whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmdit.bounds import parse_json
from mmdit.checkpoints.archive import write_sealed
from mmdit.checkpoints.building import build_on_meta, filled
from mmdit.checkpoints.hashes import HASH, SEAL, expect, known_hash
from mmdit.checkpoints.headers import read_header, read_tensors
from mmdit.errors import UserError
from mmdit.registry import describe

Change = Callable[[dict[str, Any]], dict[str, Any]]  # of a description


def save_module(path: Path, module: nn.Module) -> None:
    """Write a registered module: its tensors and its description."""
    save_tensors(path, module.state_dict(), {"description": describe(module)})


def load_module(path: Path, change: Change | None = None) -> nn.Module:
    """The module a file describes, with its tensors; in eval mode, on the CPU.

    Args:
        change: what else the description is to say.

    Raises:
        UserError: the file is not there, is damaged, or does not fit its own description.
    """
    tensors, metadata = load_tensors(path)
    if "description" not in metadata:
        raise UserError(
            f"{path} was not written by this project: its header has no description of a model"
        )
    description = metadata["description"]
    if change is not None:
        description = change(description)
    check_description(description, tensors, path)
    return filled(description, tensors, path)


def check_description(
    description: dict[str, Any], found: Mapping[str, "Shaped"], source: Path
) -> None:
    """Compare what a description asks for with what there is, before anything is allocated.

    Raises:
        UserError: they do not fit.
    """
    try:
        module = build_on_meta(description)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if told := differences(module.state_dict(), found):
        raise UserError(f"{source} does not fit {type(module).__name__}: {told}")


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors into a module; every key must be there, fit, and be expected.

    Raises:
        UserError: with the first ten keys that are missing, unexpected or misshapen; nothing is
            loaded then.
    """
    if told := differences(module.state_dict(), tensors):
        raise UserError(f"{source} does not fit {type(module).__name__}: {told}")
    module.load_state_dict(dict(tensors))


class Shaped(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def differences(wanted: Mapping[str, Shaped], found: Mapping[str, Shaped]) -> str:
    """The first ten keys that are missing, unexpected or misshapen in `found`; '' if none is."""
    faults = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "misshapen": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted
            if key in found and tuple(found[key].shape) != tuple(wanted[key].shape)
        ],
    }
    return "; ".join(
        f"{len(keys)} {fault}: {', '.join(keys[:10])}" for fault, keys in faults.items() if keys
    )


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors with a JSON header and their hash, atomically.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    write_sealed(path, tensors, {key: json.dumps(value) for key, value in metadata.items()})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file of ours, compared with the hash that is known of it.

    They are copied, since a mapped tensor changes with its file, and lies as it lies there.

    Raises:
        UserError: the file is not there, cannot be read as safetensors, is damaged, or is not one
            of ours.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: there is no such file")
    header = read_header(path)
    known = known_hash(path, header.text)
    digest = hashlib.sha256(header.raw if known is not None and known.start == 0 else b"")
    tensors = read_tensors(path, header, digest)
    if known is not None:
        expect(path, known, digest.hexdigest())
    return tensors, _read_metadata(header.metadata, path)


def _read_metadata(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    own = {key: value for key, value in header.items() if key not in ("format", HASH, SEAL)}
    try:
        return {key: parse_json(value.encode()) for key, value in own.items()}
    except ValueError as error:  # others write what they like
        raise UserError(
            f"{path} was not written by this project: its header is no JSON ({error})"
        ) from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights and buffers, in hexadecimal; the same wherever they lie."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names, in hexadecimal; the same wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        # Of a tensor spread over processes all is gathered: every process must ask.
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        value = gathered.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
