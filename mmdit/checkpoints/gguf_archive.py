"""GGUF files as archives: memory-mapped, each tensor decoded when it is asked for.

The types that `mmdit.nn.block_codes` decodes need no other package. The rest (IQ, ternary) are
decoded by `gguf`, which is optional.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmdit.checkpoints.archive import Archive
from mmdit.checkpoints.gguf_header import Stored, read_gguf_header
from mmdit.checkpoints.hashes import content_of
from mmdit.checkpoints.headers import DTYPES
from mmdit.errors import UserError
from mmdit.nn.block_codes import BLOCK_TYPES, Codes

# What the files of SD3's networks and of T5 state, and other programs' names for any network.
ARCHITECTURES = ("sd3", "t5", "t5encoder")
UNSTATED = ("pig", "cow")
CONTENT = (
    "mmdit.content_sha256"  # metadata key, in files of ours: hash of all bytes after the header
)


class GGUFArchive(Archive):
    """The tensors of a GGUF file.

    Raises:
        UserError: the file is damaged, or states another architecture.
    """

    def __init__(self, path: Path) -> None:
        header = read_gguf_header(path)
        stated = header.metadata.get("general.architecture")
        if stated is not None and stated not in (*ARCHITECTURES, *UNSTATED):
            raise UserError(
                f"{path} holds a model of the architecture {str(stated)[:100]!r}; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.name, self.paths, self.headers = path, [path], {}
        self.metadata = {k: v for k, v in header.metadata.items() if isinstance(v, str)}
        self._tensors: dict[str, Stored] = header.tensors
        self.infos = {name: tensor.info for name, tensor in header.tensors.items()}
        self._data = header.data
        self._map()

    def _map(self) -> None:
        path = self.paths[0]
        try:
            size = path.stat().st_size
            self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be opened ({error})") from None

    def __getitem__(self, key: str) -> Tensor:
        codes = self.codes(key)
        info, _, start, end = self._tensors[self.root + key]
        if codes is None:
            return self._bytes[start:end].view(DTYPES[info.dtype]).reshape(info.shape)
        if codes.decodable:
            return codes.decoded(torch.float32).reshape(info.shape)
        return decoded_by_gguf(codes, self.name).reshape(info.shape)

    def codes(self, key: str) -> Codes | None:
        info, rows, start, end = self._tensors[self.root + key]
        if info.dtype not in BLOCK_TYPES:
            return None
        return Codes(info.dtype, self._bytes[start:end].view(rows, -1))

    def decodes(self, key: str) -> bool:
        return self.infos[key].dtype in BLOCK_TYPES

    def verify(self) -> None:
        super().verify()
        known = self.metadata.get(CONTENT)
        if known is not None and content_of(self.paths[0], self._data) != known:
            raise UserError(
                f"{self.paths[0]} is damaged: its content is not what was written (its SHA-256 is "
                f"not {known[:16]}...). Copy or download it again"
            )

    def reopened(self) -> Self:
        view = super().reopened()
        view._map()
        return view


def gguf_package(what: str) -> Any:
    """The package `gguf`.

    Args:
        what: what needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError(
            f'{what} needs the package gguf, which is not installed: pip install -e ".[gguf]"'
        ) from error
    return gguf


def decoded_by_gguf(codes: Codes, source: object) -> Tensor:
    """The values of a type that only the package `gguf` decodes, float32.

    Raises:
        UserError: it is not installed, or is too old for this type.
    """
    package = gguf_package(f"{source}: {codes.kind}")
    try:
        kind = package.GGMLQuantizationType[codes.kind]
        with np.errstate(all="ignore"):  # values that are not finite are found afterwards
            values = package.quants.dequantize(codes.rows.numpy(), kind)
    except (KeyError, NotImplementedError):
        raise UserError(
            f"{source}: the installed version of gguf does not decode {codes.kind}: "
            "pip install --upgrade gguf"
        ) from None
    return torch.from_numpy(values)
