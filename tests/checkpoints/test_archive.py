"""Files that are damaged, or are something else, are refused in one sentence."""

import json
import os
import pickle
import stat
import struct
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdit.checkpoints.archive import (
    open_file,
    open_shards,
    write_archive,
    write_shards,
)
from mmdit.checkpoints.hashes import HASH, SEAL, content_hash
from mmdit.errors import UserError

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FOREIGN = {
    "empty": (b"", "it is empty"),
    "short": (b"abc", "its first bytes are not a header"),
    "web page": (b"\n<!DOCTYPE html><html>log in", "it is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    "zip": (b"PK\x03\x04" + bytes(100), "it is a pickle"),
    "pickle": (pickle.dumps({"a": 1}), "it is a pickle"),
    "gguf": (b"GGUF\x03" + bytes(100), "GGUF"),
    "zeros": (bytes(1000), "its first bytes are not a header"),
    "a header too long": (struct.pack("<Q", 2**40) + b"{" + bytes(99), "are not a header"),
    "cut in the header": (packed({"a": A})[:30], "is cut off, with 30 bytes"),
    "cut in the data": (packed({"a": A}, bytes(7)), "is cut off"),
    "no JSON": (packed(b"{,}    "), "damaged header"),
    "deep JSON": (packed(b'{"a":' + b"[" * 99999), "damaged header"),
    "a list": (packed(b"{}  ")[:8] + b"[]  ", "its first bytes are not a header"),
    "metadata that is false": (packed({"__metadata__": False, "a": A}, bytes(8)), "damaged"),
    "no shape": (packed({"a": {"dtype": "F32"}}), "damaged header"),
    "no offsets": (packed({"a": {**A, "data_offsets": []}}), "damaged header"),
    "metadata that is a number": (packed({"__metadata__": 3, "a": A}, bytes(8)), "damaged"),
    "another size": (packed({"a": {**A, "shape": [3]}}, bytes(8)), "is damaged ("),
    "more than it says": (packed({"a": A}, bytes(9)), "is damaged ("),
    "an unknown type": (packed({"a": {**A, "dtype": "X9"}}, bytes(8)), "is damaged ("),
    "a negative offset": (packed({"a": {**A, "data_offsets": [-8, 0]}}, bytes(8)), "is damaged ("),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_safetensors_file_is_told_for_what_it_is(tmp_path, name):
    content, expected = FOREIGN[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        open_file(path)
    assert str(path) in str(refusal.value)
    assert expected in str(refusal.value)


@pytest.mark.parametrize("empty", [None, {}])
def test_empty_metadata_may_be_null(tmp_path, empty):
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"__metadata__": empty, "a": A}, bytes(8)))
    opened = open_file(path)
    assert opened.metadata == {} and torch.equal(opened["a"], torch.zeros(2))


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="there is no such file"):
            open_file(path)


# Pickles


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_pickles_are_refused_unless_asked_for(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for suffix in (".ckpt", ".pt", ".pth", ".bin"):
        torch.save({"state_dict": {**TENSORS, "step": 3}}, path := tmp_path / f"x{suffix}")
        with pytest.raises(UserError, match=r"can run code .*\.safetensors.* allow_pickle=true"):
            open_file(path)
        opened = open_file(path, allow_pickle=True)
        assert {key: info.dtype for key, info in opened.infos.items()} == {"a": "F32", "b": "BF16"}
        assert torch.equal(opened["a"], TENSORS["a"])
        assert "ignoring values that are not tensors: step" in caplog.text
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert torch.equal(open_file(path, allow_pickle=True)["b"], TENSORS["b"])
    for content in ({"state_dict": Evil()}, {"model": 3}, [1]):
        torch.save(content, path)
        with pytest.raises(UserError, match="state dict of tensors") as refusal:
            open_file(path, allow_pickle=True)
        assert "weights_only" not in str(refusal.value)  # torch advises to run what is in it
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="cannot be read as a pickled state dict"):
        open_file(path, allow_pickle=True)
    assert not (tmp_path / "evil").exists()


# Shards


@pytest.fixture
def index(tmp_path):
    """An index of two shards, one with each tensor."""
    write_shards(tmp_path, "model", TENSORS, max_bytes=50)
    return tmp_path / "model.safetensors.index.json"


def test_shards_hold_what_one_file_would(index):
    opened = open_shards(index)
    assert opened.infos.keys() == TENSORS.keys()
    assert all(torch.equal(opened[key], value) for key, value in TENSORS.items())
    content = json.loads(index.read_text())
    assert content["metadata"] == {"total_size": 58}
    assert content["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"a": "../secret.safetensors"}, "points to '../secret.safetensors'"),
        ({"a": "/etc/x.safetensors"}, "points to '/etc/x.safetensors'"),
        ({"a": "sub/x.safetensors"}, "not a .safetensors file beside it"),
        ({"a": "model.bin"}, "not a .safetensors file beside it"),
        ({"a": 3}, "points to '3'"),
        ({"a": "gone.safetensors"}, "lacks 1 of 1 shards: gone.safetensors"),
        ({"a": "model-00002-of-00002.safetensors"}, "lists 1 tensors that its shards lack: a"),
        ([], 'no JSON "weight_map"'),
        ({"a": []}, "points to"),
    ],
)
def test_an_index_that_is_wrong(index, weight_map, expected):
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as refusal:
        open_shards(index)
    assert expected in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": null}', "[" * 99999])
def test_an_index_that_is_none(index, text):
    index.write_text(text)
    with pytest.raises(UserError, match="not an index of shards"):
        open_shards(index)


def test_shards_that_are_wrong(index):
    first, second = sorted(index.parent.glob("*-of-*"))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=f"{second.name} repeats a, which another shard holds"):
        open_shards(index)
    second.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{second.name} is damaged: the file is cut off"):
        open_shards(index)
    second.unlink()
    with pytest.raises(UserError, match=f"lacks 1 of 2 shards: {second.name}"):
        open_shards(index)


# Hashes


def test_a_file_may_be_mapped_once_more(tmp_path):
    path = tmp_path / "a.safetensors"
    write_archive(path, {"part.x": torch.arange(4.0)}, {})
    archive = open_file(path).part("part")
    again = archive.reopened()
    assert torch.equal(archive["x"], again["x"])
    assert archive["x"].data_ptr() != again["x"].data_ptr()
    assert archive["x"].data_ptr() == archive["x"].data_ptr()


def test_what_is_written_says_its_hash_and_is_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        write_archive(tmp_path / name, TENSORS, {"told": 'quotes " and \u00fcmlauts', "x": "y"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one", "two"]
    opened = open_file(tmp_path / "one")
    assert opened.metadata["told"] == 'quotes " and \u00fcmlauts'
    assert all(
        torch.equal(value, TENSORS[key]) for key, value in load_file(tmp_path / "one").items()
    )
    opened.verify()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_found_by_the_hash_in_the_header(tmp_path):
    path = tmp_path / "x.safetensors"
    write_archive(path, TENSORS)
    flip(path)
    with pytest.raises(UserError, match=r"x.safetensors is damaged: .* SHA-256"):
        open_file(path).verify()


def test_a_flipped_bit_is_found_by_the_name_in_the_cache_of_the_hub(tmp_path):
    save_file(TENSORS, blob := tmp_path / "blob")
    name = content_hash(blob, 0, 0, 0)
    (tmp_path / "blobs").mkdir()
    blob = blob.rename(tmp_path / "blobs" / name)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    open_file(link).verify()
    flip(blob)
    with pytest.raises(UserError, match=r"model.safetensors is damaged.* Download it again"):
        open_file(link).verify()


def edited(path, change):
    """Write a file again, as another program that keeps its metadata does."""
    with safe_open(path, "pt") as file:
        tensors, metadata = load_file(path), file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors["a"].mul_(2),  # merged: same names, shapes and metadata
        lambda tensors, _: tensors.update(a=tensors["a"].half()),
        lambda tensors, _: tensors.pop("b"),
        lambda tensors, metadata: metadata.pop(SEAL) and tensors["a"].zero_(),  # older ones of ours
    ],
)
def test_a_hash_that_another_program_has_kept_is_only_reported(tmp_path, caplog, change):
    path = tmp_path / "x.safetensors"
    write_archive(path, TENSORS, {"x": "y"})
    for _ in range(9):  # the library puts the metadata in another order each time
        edited(path, change)
        open_file(path).verify()
        assert f"{path}: the hash in its header is not that of its content" in caplog.text
        caplog.clear()
        write_archive(path, TENSORS, {"x": "y"})


def test_a_header_that_another_program_has_added_to_is_not_damaged(tmp_path, caplog):
    path = tmp_path / "x.safetensors"
    write_archive(path, TENSORS, {"x": "y"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["modelspec.title"] = "mine"
    path.write_bytes(packed(header, content[8 + length :]))
    open_file(path).verify()  # its content still is what the hash says
    assert not caplog.records
    flip(path)
    open_file(path).verify()
    assert "was merged, cast or edited" in caplog.text


@pytest.mark.parametrize(("old", "new"), [(b'"x":"y"', b'"x":"z"'), (b'"b":', b'"c":')])
def test_a_header_that_was_changed_in_place_is_refused(tmp_path, old, new):
    path = tmp_path / "x.safetensors"
    write_archive(path, TENSORS, {"x": "y"})
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match="its header is not as it was written") as refusal:
        open_file(path).verify()
    assert "elete" not in str(refusal.value)


def test_without_a_hash_that_is_said(tmp_path, caplog):
    for metadata in (None, {HASH: "0x12"}, {HASH: "none"}):
        save_file(TENSORS, tmp_path / "x.safetensors", metadata)
        with caplog.at_level("DEBUG", logger="mmdit.checkpoints"):
            open_file(tmp_path / "x.safetensors").verify()
        assert "has no known hash" in caplog.text
        caplog.clear()


def test_five_models_of_one_file_are_hashed_once(tmp_path, monkeypatch):
    write_archive(path := tmp_path / "x.safetensors", TENSORS)
    before = content_hash.cache_info().misses
    for _ in range(5):
        open_file(path).verify()
    assert content_hash.cache_info().misses == before + 1


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_archive(tmp_path / "file" / "x.safetensors", TENSORS)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_archive(tmp_path / "folder.safetensors", TENSORS)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_written_may_be_read_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_archive(path := tmp_path / "x.safetensors", TENSORS)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_nobody_elses_file_beside_is_touched(tmp_path):
    (tmp_path / "x.safetensors.tmp").write_text("mine")
    write_archive(tmp_path / "x.safetensors", TENSORS)
    assert {f.name for f in tmp_path.iterdir()} == {"x.safetensors", "x.safetensors.tmp"}
    assert (tmp_path / "x.safetensors.tmp").read_text() == "mine"
