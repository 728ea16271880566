import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest

import mmdit.data.shard_index
from mmdit.data import index
from mmdit.data.caption_sources import Sidecars
from mmdit.data.captioned import CaptionedImages
from mmdit.data.folder import image_folder
from mmdit.data.shards import tar_shards
from mmdit.errors import UserError

from .conftest import add, bomb, encoded, noise, tar_of

PLAIN = {"mix": {"text": 1.0}, "image_size": 32, "validation_fraction": 0.0}
GOOD = encoded(noise(8, 8))


def opened(root, split="train", **arguments) -> CaptionedImages:
    return tar_shards(**{"root": str(root), **PLAIN, **arguments}).view(split)


def reasons(path) -> dict[str, str]:
    return {entry["file"]: entry["reason"] for entry in json.loads(path.read_text())["images"]}


def plain(number: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of `number` good samples."""
    return [
        member
        for i in range(start, start + number)
        for member in (
            (f"{i:04d}.png", encoded(noise(8, 8 + i % 5, i))),
            (f"{i:04d}.txt", f"image {i}".encode()),
        )
    ]


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Grows by one with each image that indexing decodes."""
    calls: list[int] = []
    decode = mmdit.data.shard_index.decode
    monkeypatch.setattr(
        mmdit.data.shard_index, "decode", lambda data, **o: (calls.append(1), decode(data, **o))[1]
    )
    return calls


# A thousand


@pytest.fixture
def thousand(tmp_path):
    """Ten shards of 1,000 samples of which ten are bad, each in its own way; name -> reason."""
    contents = {
        "truncated": [(".png", encoded(noise(40, 40))[:1500]), (".txt", b"bad")],
        "empty": [(".jpg", b""), (".txt", b"bad")],
        "text": [(".png", b"I am not an image"), (".txt", b"bad")],
        "bomb": [(".png", bomb()), (".txt", b"bad")],
        "float": [(".tiff", encoded(np.zeros((4, 4), np.float32), "TIFF")), (".txt", b"bad")],
        "silent": [(".png", GOOD)],
        "latin": [(".png", GOOD), (".txt", "Käse".encode("latin-1"))],
        "broken": [(".png", GOOD), (".json", b'{"text": ')],
        "two": [(".png", GOOD), (".jpg", GOOD), (".txt", b"bad")],
        "none": [(".txt", b"bad")],
    }
    shards = [plain(99, 99 * i) for i in range(10)]
    for shard, (key, members) in zip(shards, contents.items(), strict=True):
        shard[50:50] = [(key + suffix, data) for suffix, data in members]
    for i, members in enumerate(shards):
        tar_of(tmp_path / "thousand" / f"s-{i:06d}.tar", members)
    bad = {
        "truncated": "truncated or damaged",
        "empty": "is empty",
        "text": "not an image",
        "bomb": "too many pixels",
        "float": "colour mode F",
        "silent": "has no caption",
        "latin": "its caption .txt is not UTF-8",
        "broken": "its .json is not JSON",
        "two": "has 2 images under one key, not one: .png, .jpg, .txt",
        "none": "has 0 images under one key",
    }
    return tmp_path / "thousand", {
        f"s-{i:06d}.tar/{key}": reason for i, (key, reason) in enumerate(bad.items())
    }


def test_exactly_the_bad_ones_of_a_thousand_are_listed(thousand, tmp_path):
    root, bad = thousand
    report = tmp_path / "report.json"
    indices = (tmp_path / "a", tmp_path / "b", tmp_path / "a")  # made, made alike, found
    runs = [
        opened(root, report=str(report), index=str(folder), threads=threads)
        for folder, threads in zip(indices, (8, 1, 8), strict=True)
    ]
    found = reasons(report)
    assert found.keys() == bad.keys()
    for name, reason in bad.items():
        assert reason in found[name]
    listed = json.loads(report.read_text())
    assert (listed["files"], listed["kept"], listed["set_aside"]) == (1000, 990, 10)
    once, *others = runs
    assert len(once) == 990 and once.names == sorted(once.names)
    for again in others:
        assert once.names == again.names and np.array_equal(once.sizes, again.sizes)
        orders = [data.order(batch_size=8, seed=0)(0, 100) for data in (once, again)]
        assert orders[0] == orders[1]
    assert not list(root.glob("*.jsonl"))


def test_too_many_bad_ones_stop_the_run_and_are_listed(thousand, tmp_path):
    root, bad = thousand
    report = tmp_path / "report.json"
    with pytest.raises(UserError, match=r"10 of 1000 images .* max_bad_fraction 0.005"):
        opened(root, max_bad_fraction=0.005, report=str(report))
    assert reasons(report).keys() == bad.keys()


# What a tar file may hold


def test_captions_come_from_text_and_json_by_kind(tmp_path):
    rows = {
        "text": "of the table",
        "synthetic": ["made  one", " ", "made two"],
        "caption": "third",
        "score": 0.5,
        "half": "\ud800",
        "holes": ["\ufeffnot", None, "null"],
    }
    tar_of(
        tmp_path / "0.tar",
        [
            ("a.png", GOOD),
            ("a.txt", "one\n\n two  words \r\né".encode()),
            ("a.json", json.dumps(rows).encode()),
            ("b.png", GOOD),
            ("b.json", b"[1, 2]"),
            ("b.txt", b""),
            ("b.synthetic.txt", b"own"),
            ("c.PNG", GOOD),
            ("c.json", b'\xef\xbb\xbf{"text": "of a table"}'),
            ("d.PNG", GOOD),
            ("d.TXT", b"\xef\xbb\xbfin capitals"),
            ("d.synthetic.TXT", b"too"),
        ],
    )
    data = opened(tmp_path, mix={"text": 1, "synthetic": 1, "caption": 1, "holes": 1})
    found = [{kind: texts for kind, texts in data.read(i)[1].items() if texts} for i in range(4)]
    assert found == [
        {"text": ("one", "two words", "é"), "synthetic": ("made one", "made two"),
         "caption": ("third",), "holes": ("not", "null")},
        {"synthetic": ("own",)},
        {"text": ("of a table",)},
        {"text": ("in capitals",), "synthetic": ("too",)},
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no image of .* has a caption of the kind 'half'"):
        opened(tmp_path, mix={"text": 1, "half": 1}, max_bad_fraction=0.5)


def test_members_of_a_sample_need_not_follow_each_other(tmp_path):
    members = plain(4)
    tar_of(tmp_path / "0.tar", members[::2] + members[1::2])
    data = opened(tmp_path)
    assert data.batch([0])[1] == ["image 0"]
    assert data.read(3) == (members[6][1], {"text": ("image 3",)})


def test_keys_that_come_twice_are_set_aside(tmp_path):
    report = tmp_path / "report.json"
    tar_of(tmp_path / "0.tar", plain(2) + plain(1, start=1))
    tar_of(tmp_path / "1.tar", plain(2))  # in another shard the same key is another sample
    data = opened(tmp_path, report=str(report), max_bad_fraction=0.5)
    assert data.names == ["0.tar/0000", "1.tar/0000", "1.tar/0001"]
    assert reasons(report) == {"0.tar/0001": "has two .png under one key"}


def test_odd_members_do_no_harm(tmp_path):
    report = tmp_path / "report.json"
    long = "very/" * 60 + "long"
    names = ["./dotted", "Käse", "/absolute", "../above", "x.y/inside", "  blank ", long, "\udcff"]
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "folder.png", type=tarfile.DIRTYPE)
        add(tar, "README", b"no suffix")
        add(tar, "._0000.png", b"what a file system leaves behind")
        add(tar, "__note__.png", b"what WebDataset leaves behind")
        for name in names:
            add(tar, f"{name}.png", GOOD)
            add(tar, f"{name}.txt", b"a caption")
        for kind, key in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard")):
            add(tar, f"{key}.png", type=kind, linkname="Käse.png")
            add(tar, f"{key}.txt", b"a caption")
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
    data = opened(tmp_path, report=str(report), max_bad_fraction=0.5)
    assert data.names == [f"0.tar/{name.removeprefix('./')}" for name in names]
    assert len(data.batch(range(len(data)))[1]) == len(names)
    assert reasons(report) == {
        "0.tar/soft": "soft.png is a link",
        "0.tar/hard": "hard.png is a link",
        "0.tar/pipe": "pipe.png is not a regular file",
    }


def test_shards_without_samples_are_passed_over_but_not_alone(tmp_path):
    tar_of(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match="has no images"):
        opened(tmp_path)
    tar_of(tmp_path / "1.tar", plain(3))
    assert len(opened(tmp_path)) == 3


def test_names_within_json_that_nothing_can_have_are_not_taken(tmp_path):
    for i, origin in enumerate(('"\\ud800.png"', "5", '""')):
        members = [*plain(1), ("0000.json", b'{"packed_from": %s}' % origin.encode())]
        tar_of(tmp_path / f"{i}.tar", members)
    data = opened(tmp_path)
    assert data.names == ["0.tar/0000", "1.tar/0000", "2.tar/0000"]


# Which files


def test_the_identity_tells_content_not_where_it_lies(tmp_path):
    def identity(name: str, members: list[tuple[str, bytes]]) -> dict[str, object]:
        folder = tmp_path / name
        folder.mkdir()
        tar_of(folder / "a.tar", members)
        return opened(folder, crop="centre").identity()

    first = plain(3)
    turned = [*first[4:], *first[:4]]
    said = [*first[:-1], ("0002.txt", b"image X")]
    drawn = [*first[:4], ("0002.png", encoded(noise(8, 10, 99))), first[5]]
    one = identity("one", first)
    assert identity("same", first) == one
    assert one != identity("turned", turned)  # another order
    assert len({one["content"], identity("said", said)["content"]}) == 2
    assert len({one["content"], identity("drawn", drawn)["content"]}) == 2


def test_a_pattern_chooses_shards_and_the_order_is_that_of_names(tmp_path):
    for i in (11, 9, 10):
        tar_of(tmp_path / f"s-{i:06d}.tar", plain(2, i))
    every = opened(tmp_path)
    assert [name[:8] for name in every.names[::2]] == ["s-000009", "s-000010", "s-000011"]
    some = opened(tmp_path, shards="s-{000010..000011}.tar")
    assert some.names == every.names[2:]
    with pytest.raises(UserError, match=r"has no s-000012\.tar"):
        opened(tmp_path, shards="s-{000010..000012}.tar")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": "nowhere"}, "root 'nowhere' must be a folder"),
        ({"split": "trian"}, "Did you mean train"),
        ({"mix": {"text": 1, "synthetic": 1}}, "no image of .* has a caption of .* 'synthetic'"),
        ({"split": "validation"}, "split 'validation' has none of the 3 images"),
        ({"max_pixels": 10}, "3 of 3 images .* pixels are more than the limit of 10"),
        ({"threads": 0}, "threads=0"),
        ({"shards": "*.tgz"}, r"has no files that match \*\.tgz"),
        ({"shards": "0.tar.gz"}, r"0\.tar\.gz must be a complete, uncompressed tar file"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message):
    tar_of(tmp_path / "0.tar", plain(3))
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=message):
        opened(**{"root": tmp_path, **arguments})


# The index


def test_an_index_saves_decoding_and_changes_nothing(tmp_path, decoded):
    for i in range(3):
        tar_of(tmp_path / f"{i}.tar", plain(4, 4 * i))
    first = opened(tmp_path)
    assert len(decoded) == 12
    (tmp_path / "1.index.jsonl").unlink()
    second = opened(tmp_path)
    assert len(decoded) == 16
    assert first.names == second.names and np.array_equal(first.sizes, second.sizes)
    assert [first.read(i) for i in range(12)] == [second.read(i) for i in range(12)]


def test_shards_that_grow_are_indexed_anew(tmp_path, decoded):
    for i in range(2):
        tar_of(tmp_path / f"{i}.tar", plain(3, 3 * i))
    before = opened(tmp_path)
    length = (tmp_path / "1.tar").stat().st_size
    with tarfile.open(tmp_path / "1.tar", "a") as tar:
        for name, data in plain(1, 100):
            add(tar, name, data)
    assert (tmp_path / "1.tar").stat().st_size == length  # tar files are padded
    after = opened(tmp_path)
    assert after.names == [*before.names, "1.tar/0100"] and len(decoded) == 6 + 4
    assert before.read(5) == after.read(5)  # a run that began before goes on


def test_shards_that_were_copied_keep_their_index(tmp_path, decoded):
    tar = tar_of(tmp_path / "0.tar", plain(4))
    opened(tmp_path)
    os.utime(tar, ns=(1, 1))
    opened(tmp_path)
    assert len(decoded) == 4


def test_a_greater_limit_of_pixels_looks_again_and_a_smaller_one_does_not(tmp_path, decoded):
    sizes = {"a": (8, 8), "b": (30, 30), "c": (50, 50)}
    tar_of(
        tmp_path / "0.tar",
        [
            member
            for key, size in sizes.items()
            for member in ((f"{key}.png", encoded(noise(*size))), (f"{key}.txt", b"a caption"))
        ],
    )
    report = tmp_path / "report.json"
    for limit, kept, looked in ((1000, "ab", 3), (100, "a", 3), (2500, "abc", 6), (100, "a", 6)):
        data = opened(tmp_path, max_pixels=limit, max_bad_fraction=0.9, report=str(report))
        assert data.names == [f"0.tar/{key}" for key in kept]
        assert len(decoded) == looked
        assert reasons(report).keys() == {f"0.tar/{key}" for key in sizes if key not in kept}


@pytest.mark.parametrize(
    "damage", ["cut", "a line is missing", "a digit", "empty", "[]", '{"state": 5}']
)
def test_a_damaged_index_is_made_again(tmp_path, decoded, damage, caplog):
    tar_of(tmp_path / "0.tar", plain(4))
    names = opened(tmp_path).names
    path = tmp_path / "0.index.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = {"cut": whole[:-20], "a line is missing": b"".join(lines[:-1]), "empty": b""}
    cut["a digit"] = b"".join([lines[0], lines[1].replace(b" 8", b" 9", 1), *lines[2:]])
    assert whole not in cut.values()
    path.write_bytes(cut.get(damage, damage.encode()))
    assert opened(tmp_path).names == names and len(decoded) == 8
    assert path.read_bytes() == whole
    assert "cannot be used and is created again" in caplog.text
    assert "{" not in damage or "'protocol' is missing" in caplog.text


def test_a_folder_that_is_only_read_needs_no_index(tmp_path, monkeypatch, caplog):
    tar_of(tmp_path / "0.tar", plain(4))

    def refused(path, data):  # to the superuser no mode of a folder is a hindrance
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(mmdit.data.shard_index, "write_atomically", refused)
    assert len(opened(tmp_path)) == 4
    assert "cannot be written" in caplog.text and "another folder for indices" in caplog.text


OPEN = """
import sys
from mmdit.data.shards import tar_shards
data = tar_shards(root=sys.argv[1], mix={"text": 1.0}, image_size=32, threads=2,
                  validation_fraction=0.0, report=sys.argv[1] + "/report.json")
print(len(data), data.names[-1])
"""


@pytest.mark.slow
def test_processes_may_index_at_once(tmp_path):
    for i in range(4):
        tar_of(tmp_path / f"{i}.tar", plain(40, 40 * i))
    runs = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    found = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert found == [b"160 3.tar/0159\n"] * 2
    assert not list(tmp_path.glob("*.tmp")) and len(list(tmp_path.glob("*.index.jsonl"))) == 4


# Damage


def test_files_that_look_like_shards_and_are_not_read_are_reported(tmp_path, caplog, capsys):
    tar_of(tmp_path / "0.TAR", plain(2))
    with pytest.raises(UserError, match=r"has no files that match \*\.tar; ignoring .*: 0\.TAR"):
        opened(tmp_path)
    assert index.main([str(tmp_path)]) == 2
    assert "0.TAR" in capsys.readouterr().err
    tar_of(tmp_path / "1.tar", plain(2))
    assert len(opened(tmp_path)) == 2 and "0.TAR" in caplog.text


def test_bytes_that_changed_after_indexing_are_refused(tmp_path):
    tar = tar_of(tmp_path / "0.tar", plain(40))
    data, elsewhere = opened(tmp_path), opened(tmp_path, index=str(tmp_path / "index"))
    whole = tar.read_bytes()
    for place in (data.files._images[0][0], data.files._captions["text"][0][0]):
        changed = bytearray(whole)
        changed[place] ^= 1
        tar.write_bytes(changed)
        found = r"0\.tar/0000 has changed .* since it was indexed: if .*/0\.tar was replaced, "
        for opening, name in ((data, "0"), (elsewhere, "index/0")):
            with pytest.raises(UserError, match=rf"{found}delete its index .*/{name}\.index"):
                opening.batch([0])
    tar.unlink()
    with pytest.raises(UserError, match=r"0\.tar no longer exists"):
        data.batch([0])


def test_samples_survive_the_way_to_another_process(tmp_path):
    tar_of(tmp_path / "0.tar", plain(4))
    data = opened(tmp_path)
    assert pickle.loads(pickle.dumps(data)).read(2) == data.read(2)


def test_all_damaged_shards_are_named_at_once_and_the_others_are_indexed(tmp_path):
    for i in range(4):
        tar = tar_of(tmp_path / f"{i}.tar", plain(20))
        if i % 2:
            tar.write_bytes(tar.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"2 of 4 shards cannot be read: .*1\.tar .*3\.tar"):
        opened(tmp_path)
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"0.index.jsonl", "2.index.jsonl"}


# Other writers, other commands


def test_shards_of_webdataset_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pixels = [noise(16, 12, i) for i in range(7)]
    with webdataset.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=3, verbose=0) as writer:
        for i, image in enumerate(pixels):
            writer.write(
                {
                    "__key__": f"part/{i:04d}",
                    "png": image,
                    "txt": f"caption {i}",
                    "json": {"caption": f"long {i}", "id": i},
                }
            )
    data = opened(tmp_path, mix={"text": 0.5, "caption": 0.5}, shards="w-{000000..000002}.tar")
    assert data.names[3] == "w-000001.tar/part/0003" and len(data) == 7
    for i, image in enumerate(pixels):
        assert np.array_equal(data.image(i), image)
        assert data.read(i)[1] == {"text": (f"caption {i}",), "caption": (f"long {i}",)}


def test_the_command_indexes_before_a_run(thousand, tmp_path, capsys, decoded):
    root, bad = thousand
    report = tmp_path / "report.json"
    assert index.main([str(root), "--report", str(report)]) == 0
    assert "991 images: train with data=shards" in capsys.readouterr().out
    done = len(decoded)
    data = opened(root)
    assert len(decoded) == done and len(data) == 990
    assert reasons(report).keys() == bad.keys() - {"s-000005.tar/silent"}  # knows of no mix
    assert index.main([str(root), "--max-bad-fraction", "0"]) == 2
    assert index.main([str(tmp_path / "none")]) == 2
    assert "error: root" in capsys.readouterr().err


def test_a_folder_of_the_same_images_is_cropped_and_told_alike(tmp_path):
    """Shards that say where they come from are the folder: what a step sees is the same."""
    folder = tmp_path / "folder"
    members = []
    for i in range(5):
        image, found = encoded(noise(40, 50 + i, i)), f"one {i}\ntwo"
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "sub" / f"{i}.png").write_bytes(image)
        (folder / "sub" / f"{i}.txt").write_text(found)
        origin = json.dumps({"packed_from": f"sub/{i}.png"}).encode()
        members += [(f"{i}.png", image), (f"{i}.txt", found.encode()), (f"{i}.json", origin)]
    tar_of(tmp_path / "shards" / "0.tar", members)
    ours = opened(tmp_path / "shards", seed=3)
    theirs = image_folder(root=str(folder), captions=Sidecars(), seed=3, **PLAIN)
    assert ours.names == theirs.names
    for step in (0, 7):
        (image, found, _), (expected, words, _) = ours.batch([2], step), theirs.batch([2], step)
        assert found == words and np.array_equal(image, expected)
