"""Write a network as a GGUF file, as ComfyUI-GGUF reads it.

Matrices are rounded to a block type. Vectors and small tensors are float32, and what works badly in
few bits (embeddings, positions, the output layer) keeps 16 bits, or 32 where the model has them.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit.atomic import NEW, scratch
from mmdit.checkpoints.diagnosis import explain_infinite
from mmdit.checkpoints.gguf_archive import CONTENT, gguf_package
from mmdit.checkpoints.gguf_header import read_gguf_header
from mmdit.checkpoints.headers import DTYPES
from mmdit.checkpoints.public import descriptions, exported
from mmdit.checkpoints.readers import REMARK, remark
from mmdit.checkpoints.values import is_finite
from mmdit.errors import UserError, first_line
from mmdit.nn.block_codes import BLOCK_TYPES, Codes
from mmdit.nn.network import Network
from mmdit.registry import describe

WRITTEN = ("Q8_0", "Q5_1", "Q4_0", "BF16")
# By kind: what the file states, and the layout of its keys.
ARCHITECTURES = {"mmdit": ("sd3", "original"), "t5": ("t5encoder", "gguf")}
SMALL = 1024  # values; up to here tensors stay in float32
NEVER = re.compile(
    r"(x_embedder|t_embedder|y_embedder|context_embedder|final_layer)\..*|pos_embed|.*attn_rel_b.*"
)
NO_CONTENT = 64 * "0"


def write_gguf(path: Path, module: Network, kind: str, quantized: str) -> str | None:
    """Write a GGUF file atomically, with the hash of its content.

    Args:
        path: the file.
        module: the network.
        kind: 'mmdit' or 't5'.
        quantized: one of `WRITTEN`.

    Returns:
        What other programs would misread, if anything.

    Raises:
        UserError: the package `gguf` is not installed; a value is not finite, or too large for the
            type; the file cannot be written.
    """
    package = gguf_package("writing GGUF files")
    architecture, layout = ARCHITECTURES[kind]
    tensors = dict(exported(module, layout, kind=kind))
    types = {key: type_of(key, tensor, quantized) for key, tensor in tensors.items()}
    message = remark({kind: module})
    try:
        with scratch(path) as beside:
            new = beside / NEW
            writer = package.GGUFWriter(new, architecture)
            _add_metadata(writer, package, module, kind, quantized)
            if message:
                writer.add_string(REMARK, message)
            for key, tensor in tensors.items():
                shape, size = tuple(tensor.shape), _encoded_bytes(tensor, types[key])
                number = package.GGMLQuantizationType[types[key]]
                writer.add_tensor_info(key, shape, np.dtype(np.float32), size, raw_dtype=number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for content in _encoded(tensors, types, package, path):
                writer.write_tensor_data(content)
            writer.close()
            _fill_in_hash(new)
            new.rename(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({first_line(error)})") from None
    return message


def type_of(key: str, tensor: Tensor, quantized: str) -> str:
    """The type that a tensor is stored in."""
    if tensor.ndim < 2 or tensor.numel() <= SMALL:
        return "F32"
    rows_fit = quantized == "BF16" or tensor.shape[-1] % BLOCK_TYPES[quantized].values == 0
    if rows_fit and not NEVER.fullmatch(key):
        return quantized
    return "F16" if tensor.element_size() == 2 and is_finite(tensor.half()) else "F32"


def _add_metadata(writer: Any, package: Any, module: Network, kind: str, quantized: str) -> None:
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_file_type(package.LlamaFileType[f"MOSTLY_{quantized}"])
    for key, text in descriptions({kind: module}).items():
        writer.add_string(key, text)
    writer.add_string(CONTENT, NO_CONTENT)
    if kind == "t5":
        a = describe(module)
        writer.add_embedding_length(a["width"])
        writer.add_feed_forward_length(a["hidden"])
        writer.add_block_count(a["depth"])
        writer.add_head_count(a["num_heads"])
        writer.add_key_length(a["head_width"])
        writer.add_value_length(a["head_width"])
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_relative_attn_buckets_count(32)


def _encoded_bytes(tensor: Tensor, kind: str) -> int:
    if kind in DTYPES:
        return tensor.numel() * DTYPES[kind].itemsize
    block = BLOCK_TYPES[kind]
    return tensor.numel() // block.values * block.size


def _encoded(
    tensors: Mapping[str, Tensor], types: Mapping[str, str], package: Any, path: Path
) -> Iterator[np.ndarray]:
    """The bytes of the tensors, one after another."""
    for key, tensor in tensors.items():
        kind = types[key]
        wide = tensor.detach().cpu().float().contiguous()
        if not is_finite(wide):
            raise UserError(explain_infinite(path, [key], None))
        if kind in DTYPES:
            stored = wide.to(DTYPES[kind])
            if not is_finite(stored):
                raise UserError(f"{path}: {key} has values that are too large for {kind}")
            yield stored.view(torch.uint8).numpy()
            continue
        with np.errstate(all="ignore"):  # blocks of numbers below 1e-7 become zeros
            rows = package.quants.quantize(wide.numpy(), package.GGMLQuantizationType[kind])
        if not Codes(kind, torch.from_numpy(rows)).is_finite():
            raise UserError(f"{path}: {key} has values that are too large for {kind}")
        yield rows


def _fill_in_hash(path: Path) -> None:
    """Replace the placeholder in the header by the hash of what follows the header."""
    data = read_gguf_header(path).data
    with path.open("r+b") as file:
        header = file.read(data)
        content = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(header.index(NO_CONTENT.encode(), header.index(CONTENT.encode())))
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
