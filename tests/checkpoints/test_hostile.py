"""Files that were made to hang or to eat memory are refused within two seconds and 200 MB."""

import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit.bounds import MOST_TENSORS
from mmdit.checkpoints import archive
from mmdit.checkpoints.archive import open_file, open_shards
from mmdit.checkpoints.public import load
from mmdit.errors import UserError
from tests.hostile_process import measured

NET = "model.diffusion_model."


def packed(header: bytes | dict[str, Any], data: int = 0) -> bytes:
    """A safetensors file of a header and that many zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def dims(key: str) -> list[int]:
    return {"context": [1, 1], "x_embed": [1, 1, 1, 1]}.get(key.removeprefix(NET)[:7], [1])


def scalars(keys: Iterable[str]) -> bytes:
    """A file of one number under each key."""
    entries = {
        key: {"dtype": "F32", "shape": dims(key), "data_offsets": [4 * i, 4 * i + 4]}
        for i, key in enumerate(keys)
    }
    return packed(entries, 4 * len(entries))


def blocks(count: int) -> list[str]:
    widths = [f"{NET}context_embedder.weight", f"{NET}x_embedder.proj.weight"]
    return widths + [f"{NET}joint_blocks.{i}.x" for i in range(count)]


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "many keys": (lambda: scalars(f"k{i}" for i in range(MOST_TENSORS + 1)), "more than 10,000"),
    "a million keys": (lambda: scalars(f"k{i}" for i in range(10**6)), "header of 7"),
    "as many as are read": (
        lambda: scalars(f"k{i}" for i in range(MOST_TENSORS)),
        "nor any other",
    ),
    "blocks without end": (lambda: scalars(blocks(10**5)), "header of 1"),
    "thousands of blocks": (lambda: scalars(blocks(9000)), "number 9,000 blocks"),
    "a block of 400 digits": (lambda: scalars([f"{NET}joint_blocks.{'9' * 400}.x"]), "MMDiT"),
    "a long name": (lambda: scalars(["k" * 5000]), "name has 5,000 characters"),
    "objects": (lambda: packed(b'{"a":[' + b"{}," * 2_700_000 + b"{}]}"), "100,000 parts"),
    "texts": (lambda: packed(b'{"a":[' + b'"ab",' * 1_600_000 + b'""]}'), "damaged header"),
    "numbers": (lambda: packed(b'{"a":[' + b"1.5," * 2_000_000 + b"0]}"), "damaged header"),
    "entries": (lambda: packed({"__metadata__": dict.fromkeys(map(str, range(9**6)), "")}), "531,"),
    "a long entry": (lambda: packed({"__metadata__": {"a": "x" * 90_000_000}}), "header of 90,"),
    "levels": (lambda: packed(b'{"a":' + b"[" * 90_000), "nested too deeply"),
}
SLOW = {
    "a million keys",
    "a long entry",
    "as many as are read",
    "blocks without end",
    "objects",
    "texts",
    "numbers",
    "entries",
}


@pytest.mark.parametrize("name", sorted(FILES.keys() - SLOW))
def test_headers_have_bounds(tmp_path: Path, name: str) -> None:
    content, told = FILES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content())
    with pytest.raises(UserError) as refusal:
        load(open_file(path), "mmdit")
    assert told in str(refusal.value)


def test_indices_have_bounds(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    names = {f"key.{i}": f"model-{i}.safetensors" for i in range(2000)}
    content = json.dumps({"weight_map": names})
    for text, told in ((content, "lists 2,000 shards"), (" " * 8_400_000, "larger than")):
        index.write_text(text)
        with pytest.raises(UserError, match=told):
            open_shards(index)
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(UserError, match="is not a regular file"):
        open_shards(index)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.setattr(archive, "MOST_OPCODES", 1000)
    content = {f"{NET}joint_blocks.{i}.x": i for i in range(1000)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds more than a state dict"):
        open_file(tmp_path / "x.pt", allow_pickle=True)


def test_a_tensor_of_a_pickle_is_not_larger_than_what_is_stored(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1, 1).expand(10**6, 10**6)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="a is larger than its stored data"):
        open_file(tmp_path / "x.pt", allow_pickle=True)


@pytest.mark.slow
def test_what_headers_ask_for_is_refused_within_seconds_and_200_mb(tmp_path: Path) -> None:
    paths = []
    for name, (content, _) in FILES.items():
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].write_bytes(content())
    million = {f"{NET}joint_blocks.{i}.x": i for i in range(10**6)}
    for zipped in (True, False):
        paths.append(tmp_path / f"million {zipped}.pt")
        torch.save(million, paths[-1], _use_new_zipfile_serialization=zipped)
    (tmp_path / "index").mkdir()
    paths.append(tmp_path / "index" / "model.safetensors.index.json")
    paths[-1].write_text(json.dumps({"weight_map": dict.fromkeys(million, "x.safetensors")}))
    found = measured(paths)
    assert len(found) == len(paths)
    for case in found:
        assert case["raised"].startswith("UserError: "), case
        assert case["seconds"] < 4, case  # 2.1 on a slow processor
        assert case["megabytes"] < 200, case
