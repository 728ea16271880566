"""Reads the reference values of `tests/golden`, described in its README."""

import functools
import json
import lzma
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
MORE = os.environ.get("MMDIT_GOLDEN")  # a folder with more cases


class GoldenCase(NamedTuple):
    """A tiny model, inputs, and what the reference computes from them."""

    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    weights: dict[str, Tensor]  # the original key, its prefix stripped; float32
    control_weights: dict[str, Tensor]

    def check(self, name: str, actual: Tensor) -> None:
        tolerance = self.config["tolerance"]["float32"]
        torch.testing.assert_close(actual, self.outputs[name], rtol=0, atol=tolerance)


def case(name: str) -> GoldenCase:
    """Open a case."""
    kept = GOLDEN / f"{name}.safetensors.xz"
    if kept.is_file() or MORE is None:
        content = lzma.decompress(kept.read_bytes())
    else:
        content = (Path(MORE) / f"{name}.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    config = json.loads(header["__metadata__"]["config"])
    tensors = load(content)
    return GoldenCase(
        config,
        _below("inputs.", tensors),
        _below("outputs.", tensors),
        _floats(f"weights.{config.get('weights_prefix', '')}", tensors),
        _floats("control_weights.", tensors),
    )


def cases(*names: str) -> list[str]:
    """Those of the cases that are at hand: in the repository, or in MMDIT_GOLDEN."""
    more = [] if MORE is None else [path.stem for path in Path(MORE).glob("*.safetensors")]
    return [n for n in names if n in more or (GOLDEN / f"{n}.safetensors.xz").is_file()]


@functools.cache
def table(name: str) -> Any:
    """A JSON file: 'manifests', 'correspondences' or 'token_ids'."""
    return json.loads(lzma.decompress((GOLDEN / f"{name}.json.xz").read_bytes()))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _floats(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() for key, value in _below(prefix, tensors).items()}
