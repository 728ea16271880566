import json
import os
import shutil

import numpy as np
import pytest

import mmdit.data.pack
from mmdit.data import pack
from mmdit.data.caption_sources import Sidecars, Table
from mmdit.data.captioned import CaptionedImages
from mmdit.data.folder import FolderListing, image_folder
from mmdit.data.shards import tar_shards
from mmdit.errors import UserError

from .conftest import encoded, noise

SEEN = {
    "image_size": 32,
    "max_bad_fraction": 0.2,
    "mix": {"text": 0.5, "synthetic": 0.5},
    "validation_fraction": 0.0,
}
KINDS = ("text", "synthetic")


@pytest.fixture
def photos(tmp_path, photo):
    """Twelve images of several shapes and kinds of captions, and two that cannot be used."""
    root = tmp_path / "photos"
    for i in range(12):
        path = photo(root / f"{i % 3}" / f"{i}.png", f"one {i}\ntwo é", width=8 + 3 * i, seed=i)
        if i % 2:
            path.with_suffix(".synthetic.txt").write_text(f"made {i}")
    (root / "0" / "0.png").write_bytes(encoded(noise(9, 9), "JPEG"))
    (root / "1" / "bad.png").write_bytes(b"no image")
    (root / "1" / "bad.txt").write_text("bad")
    (root / "folder.png").mkdir()
    return root


def packed(root, out, **options):
    source = FolderListing(root=root, captions=Sidecars(), kinds=KINDS)
    pack.pack(source, out, kinds=KINDS, **{"per_shard": 5, "max_bad_fraction": 0.2, **options})
    return out


def opened(root, split="train", **arguments) -> CaptionedImages:
    return tar_shards(**{"root": str(root), **SEEN, **arguments}).view(split)


def content(folder) -> dict[str, bytes]:
    """All files but the report, which names the folder."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "set_aside.json"
    }


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_folder_and_its_shards_are_the_same_data_set(photos, tmp_path, split):
    arguments = {**SEEN, "validation_fraction": 0.4, "seed": 3}
    folder = image_folder(root=str(photos), captions=Sidecars(), **arguments).view(split)
    shards = opened(packed(photos, tmp_path / "out"), split, **arguments)
    assert shards.names == folder.names and np.array_equal(shards.sizes, folder.sizes)
    assert shards.fingerprint() == folder.fingerprint()
    assert shards.order(batch_size=2, seed=1)(0, 40) == folder.order(batch_size=2, seed=1)(0, 40)
    for i in reversed(range(len(folder))):  # at any position, in any order
        image, captions = shards.read(i)
        expected, words = folder.read(i)
        assert image == expected  # the very bytes
        assert captions == words
        for step in (0, 7):
            seen, expected = shards.batch([i], step), folder.batch([i], step)
            assert seen.captions == expected.captions
            assert np.array_equal(seen.images, expected.images)


def test_both_report_the_same_images_set_aside(photos, tmp_path):
    out = packed(photos, tmp_path / "out")
    report = tmp_path / "folder.json"
    image_folder(root=str(photos), captions=Sidecars(), report=str(report), **SEEN)
    reports = [json.loads(path.read_text()) for path in (report, out / "set_aside.json")]
    for found in reports:
        found.pop("place")
    assert reports[0] == reports[1]
    assert [entry["file"] for entry in reports[0]["images"]] == ["1/bad.png", "folder.png"]


def test_packing_is_a_pure_function_of_the_folder(photos, tmp_path):
    once, again = packed(photos, tmp_path / "a"), packed(photos, tmp_path / "b", threads=1)
    assert content(once) == content(again)


def test_the_indices_are_those_that_the_shards_alone_give(photos, tmp_path):
    out = packed(photos, tmp_path / "out")
    written = content(out)
    for path in out.glob("*.index.jsonl"):
        path.unlink()
    opened(out)
    assert content(out) == written


def test_names_of_any_bytes_are_kept(tmp_path, photo):
    root = tmp_path / "photos"
    for i, name in enumerate((b"a.b.c.png", b"two  blanks.png", b"K\xe4se.png", "é.png".encode())):
        photo(root / os.fsdecode(name), f"caption {i}")
    source = FolderListing(root=root, captions=Sidecars(), kinds=("text",))
    pack.pack(source, tmp_path / "out")
    data = opened(tmp_path / "out", mix={"text": 1.0})
    assert data.names == source.names and len(data) == 4


def test_captions_with_byte_order_marks_are_the_same_in_both(tmp_path, photo):
    photo(tmp_path / "photos" / "a.png", None)
    row = {"file_name": "a.png", "text": ["\ufeffone", " \ufeff\ufeff two", "\ufeff"]}
    (tmp_path / "photos" / "metadata.jsonl").write_text(json.dumps(row))
    source = FolderListing(root=tmp_path / "photos", captions=Table(), kinds=("text",))
    for _ in range(2):
        pack.pack(source, tmp_path / "out")
        shards = opened(tmp_path / "out", mix={"text": 1.0})
        assert list(shards.read(0)[1]["text"]) == source.captions("a.png")["text"] == ["one", "two"]


@pytest.mark.parametrize("killed_at", range(1, 12))
def test_packing_goes_on_where_it_was_stopped(photos, tmp_path, monkeypatch, killed_at):
    whole = content(packed(photos, tmp_path / "whole"))
    calls = []

    def dying(*arguments):  # before each of the writes that complete something
        calls.append(arguments)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return original(*arguments)

    original = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying)
        with pytest.raises(KeyboardInterrupt):
            packed(photos, tmp_path / "out")
    with pytest.raises(UserError, match=r"has no files that match|has not finished"):
        opened(tmp_path / "out")
    assert len(calls) == killed_at
    resumed = content(packed(photos, tmp_path / "out"))
    assert resumed == whole


def test_what_is_done_is_not_done_again(photos, tmp_path, monkeypatch):
    out = packed(photos, tmp_path / "out")
    (out / "shard-000001.tar").unlink()
    with pytest.raises(
        UserError, match=r"shard-000001\.tar is missing or changed: it was packed with \d+ bytes"
    ):
        opened(out)
    looked = []
    decode = mmdit.data.pack.decode
    monkeypatch.setattr(
        mmdit.data.pack, "decode", lambda data, **o: (looked.append(1), decode(data, **o))[1]
    )
    packed(photos, out)
    assert len(looked) == 5 and len(opened(out)) == 12


def test_what_was_left_by_a_killed_process_is_no_hindrance(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-000000.tar.4711.tmp").write_bytes(b"half")
    assert len(opened(packed(photos, out))) == 12


def test_a_shard_of_bad_images_alone_is_empty(tmp_path, photo):
    root = tmp_path / "photos"
    for i in range(6):
        photo(root / f"{i}.png", "a caption", seed=i)
    for i in (2, 3):
        (root / f"{i}.png").write_bytes(b"no image")
    source = FolderListing(root=root, captions=Sidecars(), kinds=("text",))
    pack.pack(source, tmp_path / "out", per_shard=2, max_bad_fraction=0.5)
    data = opened(tmp_path / "out", mix={"text": 1.0})
    assert data.names == ["0.png", "1.png", "4.png", "5.png"]


def test_shards_of_something_else_are_not_gone_on_with(photos, tmp_path, photo):
    out = packed(photos, tmp_path / "out")
    with pytest.raises(UserError, match="per_shard 5 then, 6 now"):
        packed(photos, out, per_shard=6)
    photo(photos / "new.png", "a caption")
    with pytest.raises(UserError, match=r"files '\w+' then, '\w+' now"):
        packed(photos, out)
    with pytest.raises(UserError, match="must be a new or empty folder"):
        packed(photos, photos)
    with pytest.raises(UserError, match="must be a folder"):
        packed(photos, photos / "new.png")


@pytest.mark.parametrize("text", ["{", "[]", '{"complete": true, "shards": {"a.tar": 5}}'])
def test_a_damaged_note_of_what_is_packed_is_refused(photos, tmp_path, text):
    out = packed(photos, tmp_path / "out")
    (out / "pack.json").write_text(text)
    with pytest.raises(UserError, match=r"pack\.json is damaged"):
        packed(photos, out)
    with pytest.raises(UserError, match=r"pack\.json is damaged"):
        opened(out)


def replaced(root):
    old = (root / "1" / "4.png").read_bytes()
    new = encoded(noise(8, 20, 4), "BMP")
    assert len(new) != len(old)
    (root / "1" / "4.png").write_bytes(new)


def turned(root):
    path = root / "0" / "0.png"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # as long as before, and as large
    path.write_bytes(data)


def mended(root):
    (root / "1" / "bad.png").write_bytes(encoded(noise(9, 9)))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (replaced, r"the image 1/4\.png has changed"),
        (turned, r"the image 0/0\.png has changed"),
        (mended, r"1/bad\.png was set aside before and is usable now"),
        (lambda root: (root / "1" / "4.png").write_bytes(b""), r"the image 1/4\.png has changed"),
        (
            lambda root: (root / "2" / "2.txt").write_text("edited"),
            r"captions of 2/2\.png have changed",
        ),
        (
            lambda root: (root / "0" / "3.synthetic.txt").unlink(),
            r"captions of 0/3\.png have changed",
        ),
        (lambda root: (root / "2" / "2.txt").unlink(), r"2/2\.png has no caption"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_what_has_changed_since_is_not_gone_on_with(photos, tmp_path, change, found, complete):
    out = packed(photos, tmp_path / "out")
    if not complete:
        note = json.loads((out / "pack.json").read_text())
        (out / "pack.json").write_text(json.dumps(note | {"complete": False}))
    before = content(out)
    change(photos)
    with pytest.raises(UserError, match=f"has shards packed differently .*{found}"):
        packed(photos, out)
    assert content(out) == before


def test_two_do_not_pack_into_one_folder_at_once(photos, tmp_path):
    out = tmp_path / "out"

    class Slow(FolderListing):
        def read(self, name):  # while this packs, another begins
            with pytest.raises(UserError, match="another process is packing into"):
                packed(photos, out, per_shard=6)
            return super().read(name)

    source = Slow(root=photos, captions=Sidecars(), kinds=KINDS)
    pack.pack(source, out, kinds=KINDS, per_shard=5, max_bad_fraction=0.2)
    assert content(out) == content(packed(photos, tmp_path / "alone"))


def test_too_many_bad_images_stop_the_packing(photos, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"2 of 14 .* max_bad_fraction 0.1"):
        packed(photos, out, max_bad_fraction=0.1)
    with pytest.raises(UserError, match="has not finished"):
        opened(out)
    packed(photos, out)  # the limit is not part of what is packed
    assert len(opened(out)) == 12


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"per_shard": 0}, "per_shard=0 must be a whole number of at least 1"),
        ({"threads": 0}, "threads=0"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"max_bad_fraction": 1}, r"max_bad_fraction=1 must be a finite number of at least 0 and"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(photos, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        packed(photos, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_webdataset_reads_our_shards(photos, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    out = packed(photos, tmp_path / "out")
    data = opened(out)
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(data)
    for i, sample in enumerate(samples):
        image, captions = data.read(i)
        assert image in (sample.get("png"), sample.get("jpg"))
        assert sample["txt"].decode().split("\n") == list(captions["text"])
        assert ("synthetic.txt" in sample) == ("synthetic" in captions)
        assert json.loads(sample["json"]) == {"packed_from": data.names[i]}


def test_shards_moved_elsewhere_without_their_notes_are_the_same(photos, tmp_path):
    out = packed(photos, tmp_path / "out")
    there = tmp_path / "there"
    there.mkdir()
    for path in out.glob("*.tar"):
        shutil.copy(path, there)
    ours, theirs = opened(out), opened(there)
    assert ours.names == theirs.names
    assert [ours.read(i) for i in range(12)] == [theirs.read(i) for i in range(12)]


def test_the_command_packs_and_says_how_to_train(photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(photos), str(out), "--per-shard", "4", "--max-bad-fraction", "0.2"]
    assert pack.main(command) == 0
    assert f"data=shards data.root={out}" in capsys.readouterr().out
    assert len(opened(out, mix={"text": 1.0})) == 12
    assert pack.main([*command, "--kinds", "text", "synthetic"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("captions", ["table", "class_names"])
def test_the_command_takes_other_captions(tmp_path, photo, captions, capsys):
    photo(tmp_path / "photos" / "red_fox" / "1.png", None)
    rows = tmp_path / "photos" / "rows.csv"
    rows.write_text("file_name,text\nred_fox/1.png,a photo of a red fox\n")
    out = tmp_path / "out"
    options = {"table": ["--table", "rows.csv"], "class_names": ["--template", "a photo of a {}"]}
    command = [str(tmp_path / "photos"), str(out), "--captions", captions, *options[captions]]
    assert pack.main(command) == 0
    assert opened(out, mix={"text": 1.0}).batch([0])[1] == ["a photo of a red fox"]
    assert pack.main(command) == 0
    for changed in (["sidecars"], ["class_names", "--template", "my {}"]):
        assert pack.main([*command[:3], *changed]) == 2
        found = capsys.readouterr().err
        assert "packed differently (captions {'class': " in found and changed[-1] in found.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "out"], "error: root 'none' must be a folder"),
        (["photos", "out", "--captions", "table"], "has no metadata.jsonl and metadata.csv"),
        (["photos", "out", "--captions", "class_names", "--template", "x"], "must hold {} once"),
        (["photos", "out", "--kinds", "../x"], "must be an identifier"),
        (["photos", "out", "--per-shard", "0"], "per_shard=0 must be"),
        (["photos", "photos/0/0.png"], "must be a folder"),
        (["photos", "photos/0/0.png/out"], "photos/0/0.png/out: not a directory"),
    ],
)
def test_mistakes_end_in_a_line_and_exit_code_2(
    photos, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert pack.main(arguments) == 2
    found = capsys.readouterr().err
    assert message in found and "Traceback" not in found
