"""The native format: one safetensors file per module, with its description in the header.

The header's metadata contains the module's description (plain JSON, see `mmdit.registry`), so that
a file can be loaded without any other information. Files are written atomically.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
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
    """Save a registered module: its tensors and its description."""
    save_tensors(path, module.state_dict(), {"description": describe(module)})


@dataclass(frozen=True, eq=False)
class Weights:
    """A module's tensors, read and verified, with the description to build the module from.

    Attributes:
        path: the exported file, or a group's folder in a checkpoint.
        tensors: the tensors by key, on the CPU.
        metadata: what the file states besides them; `description` is that of the module.
        stated_sha256: their hash, if a manifest states it.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any]
    stated_sha256: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of the tensors and their names, in hexadecimal; see `tensors_hash`.

        It does not depend on the number of processes that wrote them, and is the same for an
        exported file.
        """
        return self.stated_sha256 or tensors_hash(self.tensors)

    @property
    def description(self) -> dict[str, Any]:
        """The description to build the module from; see `mmdit.registry.build`.

        Raises:
            UserError: the metadata contain none.
        """
        if "description" not in self.metadata:
            raise UserError(
                f"{self.path} was not written by this project: it has no description of a model"
            )
        described: dict[str, Any] = self.metadata["description"]
        return described

    def module(self, change: Change | None = None) -> nn.Module:
        """Build the module around these tensors, without copying; in eval mode, on the CPU.

        Args:
            change: amends the description before the module is built.

        Raises:
            UserError: the tensors do not fit the description, or contain NaN or infinite values.
        """
        description = self.description if change is None else change(self.description)
        check_description(description, self.tensors, self.path)
        return filled(description, self.tensors, self.path)


def check_description(
    description: dict[str, Any], found: Mapping[str, "Shaped"], source: Path
) -> None:
    """Check that tensors fit a description, before anything is allocated.

    Raises:
        UserError: they do not fit.
    """
    try:
        module = build_on_meta(description)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if wrong := mismatches(module.state_dict(), found):
        raise UserError(f"{source} does not fit {type(module).__name__}: {wrong}")


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors into a module; the keys and shapes must be exactly those of the module.

    Raises:
        UserError: keys are missing, unexpected or misshapen; the message names the first ten of
            each. Nothing is loaded then.
    """
    if wrong := mismatches(module.state_dict(), tensors):
        raise UserError(f"{source} does not fit {type(module).__name__}: {wrong}")
    module.load_state_dict(dict(tensors))


class Shaped(Protocol):
    """A tensor, or anything else with a shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def mismatches(wanted: Mapping[str, Shaped], found: Mapping[str, Shaped]) -> str:
    """Keys of `found` that are missing, unexpected or misshapen, ten of each; '' if none are."""
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
    """Read the tensors and the metadata of a native file, and verify its hash if known.

    The tensors are copied to memory, because a memory-mapped tensor would change with its file and
    might not be aligned.

    Raises:
        UserError: the file does not exist, is not valid safetensors, is damaged, or was not
            written by this project.
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
    except ValueError as error:  # of another program
        raise UserError(
            f"{path} was not written by this project: its header is not JSON ({error})"
        ) from error


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights and buffers, in hexadecimal; independent of their device."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names, in hexadecimal; independent of their device."""
    return hash_in_order(sorted(tensors.items()))


def hash_in_order(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`tensors_hash` of tensors that arrive one by one, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        # A sharded tensor is gathered, which is a collective: every process must call this.
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        value = gathered.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
