"""ComfyUI's scaled fp8: weights in 8-bit floats, each with one factor beside it.

An empty tensor `scaled_fp8` under a model's prefix marks the model (with two elements, its products
are not taken in 8 bits, which they never are here). The weight of a layer is then
`<layer>.weight` times `<layer>.scale_weight`. `<layer>.scale_input` is for products in 8 bits.
"""

import math
import re
from collections.abc import Iterator, Mapping, Set

import torch
from torch import Tensor

from mmdit.checkpoints.archive import Archive
from mmdit.checkpoints.headers import Info
from mmdit.errors import UserError
from mmdit.nn.block_codes import EIGHT_BITS

MARK = "scaled_fp8"
SCALE, INPUT = ".scale_weight", ".scale_input"
FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max  # 448


def fold_scales(archive: Archive) -> Archive:
    """A view in which scaled weights have their values, and no other tensor stands beside them.

    What belongs to no weight stays in sight, so that it is reported.

    Raises:
        UserError: a mark or a factor is not what it should be.
    """
    marks = [key for key in archive.infos if re.fullmatch(rf"(.*\.)?{MARK}", key)]
    if not marks:
        return archive
    for mark in marks:
        kind, size = archive.infos[mark].dtype, math.prod(archive.infos[mark].shape)
        if kind not in (*EIGHT_BITS, "F32") or size not in (0, 2):
            raise UserError(
                f"{archive.name}: {mark} marks weights in scaled fp8 and should be an empty tensor "
                f"of 8-bit floats, but has {size:,} values of {kind}"
            )
    prefixes = tuple(mark.removesuffix(MARK) for mark in marks)
    infos = {key: info for key, info in archive.infos.items() if key not in marks}
    scales: dict[str, str] = {}
    for key in [key for key in infos if key.endswith((SCALE, INPUT)) and key.startswith(prefixes)]:
        weight = f"{key.rpartition('.')[0]}.weight"
        if weight not in infos:
            continue
        _expect_factor(archive, key, infos[weight])
        del infos[key]
        if key.endswith(SCALE):
            scales[weight] = key
    return archive.scaled(infos, scales)


def _expect_factor(archive: Archive, key: str, weight: Info) -> None:
    """Raise UserError unless a tensor is a factor of a weight in 8-bit floats."""
    shape, kind = archive.infos[key]
    if weight.dtype not in EIGHT_BITS:
        raise UserError(
            f"{archive.name}: {key} scales a weight of {weight.dtype}, not of 8-bit floats: the "
            "file was merged or edited"
        )
    if math.prod(shape) != 1 or kind not in ("F32", "F16", "BF16"):
        raise UserError(f"{archive.name}: {key} should be one number, but is {list(shape)} {kind}")
    if not 0 <= float(archive[key]) < math.inf:
        raise UserError(f"{archive.name}: {key} is {float(archive[key])}, not a factor of weights")


def in_fp8(
    tensors: Mapping[str, Tensor], matrices: Set[str], prefix: str = "", *, scaled: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, its matrices in 8-bit floats.

    A scaled weight is divided by its largest magnitude over 448, the largest 8-bit float. What is
    not scaled must not be larger.

    Args:
        tensors: by key without prefix.
        matrices: keys of the weights of linear layers.
        prefix: of the model in the file.
        scaled: whether weights are scaled.

    Raises:
        UserError: a value is not finite, or too large to be stored without a scale.
    """
    if scaled:
        yield f"{prefix}{MARK}", torch.empty(0, dtype=FORMAT)
    for key, tensor in tensors.items():
        if key not in matrices:
            yield prefix + key, tensor
            continue
        wide = tensor.float()
        largest = wide.abs().amax()
        if not largest.isfinite():
            raise UserError(f"{prefix}{key} has values that are NaN or infinite: it is not saved")
        if not scaled:
            if largest > LARGEST:
                raise UserError(
                    f"{prefix}{key} has values up to {float(largest):g}, too large for 8-bit "
                    "floats without a scale: use scaled_fp8"
                )
            yield prefix + key, wide.to(FORMAT)
            continue
        scale = torch.where(largest / LARGEST > 0, largest / LARGEST, 1.0)
        yield prefix + key, (wide / scale).clamp(-LARGEST, LARGEST).to(FORMAT)
        yield f"{prefix}{key.removesuffix('.weight')}{SCALE}", scale
