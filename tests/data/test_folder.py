import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import mmdit.data.folder
from mmdit.data.caption_sources import ClassNames, Sidecars, Table
from mmdit.data.captioned import CaptionedImages
from mmdit.data.folder import image_folder
from mmdit.data.images import read_bytes
from mmdit.errors import UserError

from .conftest import bomb, encoded, noise

PLAIN = {"captions": Sidecars(), "mix": {"text": 1.0}, "image_size": 32, "validation_fraction": 0.0}


def opened(folder, split="train", **arguments) -> CaptionedImages:
    return image_folder(**{"root": str(folder), **PLAIN, **arguments}).view(split)


def test_images_are_identified_by_content_not_by_location(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.bmp").write_bytes(encoded(noise(4, 4 + i), "BMP"))
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    one, other = (opened(tmp_path / name) for name in ("one", "other"))
    assert one.fingerprint() == other.fingerprint()
    changed = tmp_path / "other" / "2.bmp"
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert opened(tmp_path / "other").fingerprint() != one.fingerprint()


def test_of_a_small_set_one_image_is_held_back(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encoded(noise(4, 4)))
        (tmp_path / f"{i}.txt").write_text("one")
    held_back = opened(tmp_path, split="validation", validation_fraction=1e-9)
    kept = opened(tmp_path, validation_fraction=1e-9)
    assert len(held_back) == 1 and sorted([*kept.names, *held_back.names]) == [
        f"{i}.png" for i in range(5)
    ]


def test_so_many_samples_are_a_part_of_more(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(encoded(noise(4, 4)))
        (tmp_path / f"{i:02d}.txt").write_text(f"image {i}")
    every = opened(tmp_path, mix=None, validation_fraction=0.3)
    parts = [opened(tmp_path, samples=n, validation_fraction=0.3).names for n in (5, 12, 100)]
    assert [len(names) for names in parts] == [5, 12, len(every)]
    assert set(parts[0]) < set(parts[1]) < set(parts[2]) == set(every.names)
    assert parts[1] == sorted(parts[1]) != every.names[:12]
    held_back = opened(tmp_path, split="validation", samples=2, validation_fraction=0.3)
    assert len(held_back) == 40 - len(every)
    with pytest.raises(ValueError, match="samples=0 must be a whole number of at least 1"):
        opened(tmp_path, samples=0)


@pytest.mark.parametrize(
    "field",
    ["samples", "threads", "max_pixels", "seed", "validation_fraction", "max_bad_fraction", "mix"],
)
@pytest.mark.parametrize("value", ["x", -1, 1.5, [1], True])
def test_arguments_that_make_no_sense_are_refused_by_name(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"^{field}[ =].* must "):
        opened(tmp_path, **{field: value})


@pytest.fixture
def thousand(tmp_path, photo):
    """A folder of 1,000 images of which ten are bad, each in its own way; name -> reason."""
    root = tmp_path / "thousand"
    good = encoded(noise(4, 4))
    for i in range(990):
        path = root / f"{i % 7}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(good)
        path.with_suffix(".txt").write_text(f"image {i}")
    contents = {
        "truncated.png": encoded(noise(40, 40))[:1500],
        "empty.jpg": b"",
        "text.png": b"I am not an image",
        "bomb.png": bomb(),
        "float.tiff": encoded(np.zeros((4, 4), np.float32), "TIFF"),
        "silent.png": good,
        "latin.png": good,
    }
    for name, data in contents.items():
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text("bad")
    (root / "silent.txt").unlink()
    (root / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (root / "folder.png").mkdir()
    (root / "link.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")
    shutil.copy(root / "0" / "0000.png", root / "0" / "0000.jpg")  # a wrong suffix is no fault
    (root / "._0000.png").write_bytes(b"what a file system leaves behind")
    return root, {
        "truncated.png": "truncated or damaged",
        "empty.jpg": "is empty",
        "text.png": "not an image",
        "bomb.png": "too many pixels",
        "float.tiff": "colour mode F",
        "silent.png": "has no caption",
        "latin.png": "its caption latin.txt is not UTF-8",
        "folder.png": "is a folder",
        "link.png": "a broken link",
        "pipe.png": "not a regular file",
    }


def test_exactly_the_bad_ones_of_a_thousand_are_listed(thousand, tmp_path):
    root, bad = thousand
    report = tmp_path / "report.json"
    once, again = (opened(root, report=str(report), threads=n) for n in (8, 1))
    listed = json.loads(report.read_text())
    assert {entry["file"] for entry in listed["images"]} == bad.keys()
    for entry in listed["images"]:
        assert bad[entry["file"]] in entry["reason"]
    assert (listed["files"], listed["kept"], listed["set_aside"]) == (1001, 991, 10)
    assert len(once) == 991 and list(once.names) == sorted(once.names)
    assert once.names == again.names and np.array_equal(once.sizes, again.sizes)
    assert "0/0000.jpg" in once.names
    orders = [data.order(batch_size=8, seed=0)(0, 100) for data in (once, again)]
    assert orders[0] == orders[1]


def test_too_many_bad_ones_stop_the_run_and_are_listed(thousand, tmp_path):
    root, bad = thousand
    report = tmp_path / "report.json"
    with pytest.raises(UserError, match=r"10 of 1001 images .* max_bad_fraction 0.005"):
        opened(root, max_bad_fraction=0.005, report=str(report))
    assert len(json.loads(report.read_text())["images"]) == len(bad)


def test_a_file_that_may_not_be_read_is_listed(tmp_path, photo, monkeypatch):
    for i in range(3):
        photo(tmp_path / f"{i}.png", "a caption")

    def guarded(path):  # to the superuser no mode of a file is a hindrance
        if path.name == "1.png":
            raise PermissionError(13, "Permission denied")
        return path_read(path)

    path_read = type(tmp_path).read_bytes
    monkeypatch.setattr(type(tmp_path), "read_bytes", guarded)
    report = tmp_path / "report.json"
    assert len(opened(tmp_path, max_bad_fraction=0.5, report=str(report))) == 2
    [entry] = json.loads(report.read_text())["images"]
    assert entry == {"file": "1.png", "reason": "cannot be read (permission denied)"}


def test_other_failures_of_the_disk_set_nothing_aside(tmp_path, photo, monkeypatch):
    photo(tmp_path / "0.png", "a caption")

    def failing(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(tmp_path), "read_bytes", failing)
    with pytest.raises(OSError, match="Input/output"):
        read_bytes(tmp_path / "0.png")


def test_the_index_saves_decoding_and_changes_nothing(tmp_path, photo, monkeypatch):
    root, index = tmp_path / "photos", tmp_path / "index.jsonl"
    for i in range(6):
        photo(root / f"{i}.png", "a caption", width=8 + i)
    first = opened(root, index=str(index), threads=1)
    decoded = []
    decode = mmdit.data.folder.decode
    monkeypatch.setattr(
        mmdit.data.folder, "decode", lambda data, **o: (decoded.append(data), decode(data, **o))[1]
    )
    lines = index.read_text().splitlines()
    old = json.loads(lines[0]) | {"seen": [8, 1, 2]}  # as written before there were checksums
    odd = [{"file": "1.png", "seen": 5}, {"file": "2.png", "seen": ["x"]}, [1]]
    index.write_text("\n".join([*map(json.dumps, [old, *odd]), *lines[2:], '{"file": "half a li']))
    photo(root / "3.png", "a caption", width=20)
    photo(root / "7.png", "a caption")
    second = opened(root, index=str(index), threads=1)
    assert decoded == [(root / f"{i}.png").read_bytes() for i in (0, 1, 3, 7)]
    assert list(second.names) == [*first.names, "7.png"]
    assert np.array_equal(second.sizes, opened(root).sizes)


@pytest.mark.parametrize("index", ["a.png/index.jsonl", "folder"])
def test_an_index_that_cannot_be_written_is_logged_once(
    tmp_path, photo, caplog, monkeypatch, index
):
    monkeypatch.setattr(mmdit.data.folder, "CHUNK", 1)
    for name in ("a.png", "b.png"):
        photo(tmp_path / name, "a caption")
    (tmp_path / "folder").mkdir()
    assert len(opened(tmp_path, index=str(tmp_path / index))) == 2
    [record] = caplog.records
    assert f"{index} cannot be used" in record.getMessage()


def test_a_report_that_cannot_be_written_is_named(tmp_path, photo):
    photo(tmp_path / "a.png", "a caption")
    with pytest.raises(UserError, match=r"report .*a\.png/report\.json cannot be written: "):
        opened(tmp_path, report=str(tmp_path / "a.png" / "report.json"))


def test_links_to_folders_are_followed_and_circles_end(tmp_path, photo):
    photo(tmp_path / "elsewhere" / "b.png", "a caption")
    photo(tmp_path / "photos" / "a.png", "a caption")
    (tmp_path / "photos" / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "back").symlink_to(tmp_path / "photos")
    assert list(opened(tmp_path / "photos").names) == ["a.png", "there/b.png"]


def test_a_folder_that_many_ways_lead_to_counts_once_by_its_own_path(tmp_path, photo):
    for i in range(12):
        photo(tmp_path / "photos" / f"{i:02d}" / "a.png", "a caption")
        for j in range(12):
            (tmp_path / "photos" / f"{i:02d}" / f"link{j}").symlink_to(f"../{j:02d}")
    photo(tmp_path / "elsewhere" / "b.png", "a caption")
    for name in ("z", "0", "05/z"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "elsewhere")
    expected = sorted(["0/b.png", *(f"{i:02d}/a.png" for i in range(12))])
    assert list(opened(tmp_path / "photos").names) == expected


def test_odd_names_set_aside_one_image_each(tmp_path, photo):
    long = f"{'b' * 251}.png"  # whose sidecar of another kind would have too long a name
    for name in ("a.png", long):
        photo(tmp_path / name, "a caption")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.synthetic.txt").write_text("made")
    report = tmp_path / "report.json"
    arguments = {"max_bad_fraction": 0.9, "report": str(report)}
    data = opened(tmp_path, mix={"text": 1, "synthetic": 1}, **arguments)
    assert list(data.names) == ["a.png", long]
    names = ["a.png", "a.png/b.png", f"{'c' * 300}.png"]
    rows = [json.dumps({"file_name": name, "text": "a caption"}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert list(opened(tmp_path, captions=Table(), **arguments).names) == ["a.png"]
    reasons = {e["file"]: e["reason"] for e in json.loads(report.read_text())["images"]}
    assert reasons == {
        "a.png/b.png": "its path leads to no file (Not a directory)",
        f"{'c' * 300}.png": "its path leads to no file (File name too long)",
        "loop.png": "its path leads to no file (Too many levels of symbolic links)",
        long: "has no caption of the kind text",
    }


# Captions


def test_sidecars_give_lines_and_kinds(tmp_path, photo):
    photo(tmp_path / "a.b.png", "one\n\n  two  words \r\n")
    (tmp_path / "a.b.synthetic.txt").write_text("three")
    data = opened(tmp_path, mix={"text": 0.5, "synthetic": 0.5})
    assert data.read(0)[1] == {"text": ("one", "two words"), "synthetic": ("three",)}
    (tmp_path / "a.b.txt").rename(tmp_path / "a.b.TXT")
    (tmp_path / "a.b.synthetic.txt").rename(tmp_path / "a.b.synthetic.TXT")
    again = opened(tmp_path, mix={"text": 0.5, "synthetic": 0.5})
    assert again.read(0)[1] == data.read(0)[1]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables_give_columns_and_lines_add_up(tmp_path, photo, kind):
    for name in ("a.png", "sub/b.png", "c.png"):
        photo(tmp_path / name, None)
    if kind == "jsonl":
        rows = [
            {"file_name": "a.png", "text": ["one", "two"], "synthetic": "made"},
            {"file_name": "sub/b.png", "text": "three", "synthetic": None},
            {"file_name": "gone.png", "text": "four"},
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        (tmp_path / "metadata.csv").write_text(
            'file_name,text,synthetic\na.png,one,made\na.png,two,\n"sub/b.png",three,\n'
            "gone.png,four,\n"
        )
    report = tmp_path / "report.json"
    data = opened(
        tmp_path,
        captions=Table(),
        mix={"text": 0.5, "synthetic": 0.5},
        max_bad_fraction=0.5,
        report=str(report),
    )
    assert list(data.names) == ["a.png", "sub/b.png"]
    assert [list(data.read(i)[1]["text"]) for i in (0, 1)] == [["one", "two"], ["three"]]
    assert list(data.read(0)[1]["synthetic"]) == ["made"]
    reasons = {e["file"]: e["reason"] for e in json.loads(report.read_text())["images"]}
    assert reasons.keys() == {"c.png", "gone.png"}
    assert "no such file" in reasons["gone.png"] and "no caption" in reasons["c.png"]


def test_names_that_no_file_can_have_are_listed(tmp_path, photo):
    photo(tmp_path / "a.png", None)
    names = ["a.png", "zero\0.png", "half\ud800.png", "../out.png", ""]
    rows = [json.dumps({"file_name": name, "text": "a caption"}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    report = tmp_path / "report.json"
    data = opened(
        tmp_path,
        captions=Table(),
        max_bad_fraction=0.9,
        report=str(report),
        index=str(tmp_path / "index.jsonl"),
    )
    assert list(data.names) == ["a.png"]
    reasons = {e["file"]: e["reason"] for e in json.loads(report.read_text())["images"]}
    assert reasons == {
        "zero\0.png": "has an invalid file name",
        "half\ud800.png": "has an invalid file name",
        "../out.png": "lies outside of the folder",
        ".": "is a folder",
    }


def test_class_names_are_the_folders(tmp_path, photo):
    photo(tmp_path / "golden_retriever" / "1.png", None)
    photo(tmp_path / "n0144" / "2.png", None)
    assert opened(tmp_path, captions=ClassNames()).batch([0])[1] == [
        "a photo of a golden retriever"
    ]
    names = tmp_path / "names.json"
    names.write_text("\ufeff" + json.dumps({"golden_retriever": "dog", "n0144": "fish"}))
    named = opened(tmp_path, captions=ClassNames(template="{}!", names=str(names)))
    assert named.batch([1])[1] == ["fish!"]
    photo(tmp_path / os.fsdecode(b"K\xe4se") / "3.png", None)
    assert len(opened(tmp_path, captions=ClassNames(), max_bad_fraction=0.5)) == 2


def test_kinds_come_as_often_as_the_mix_says_and_every_caption_occurs(tmp_path, photo):
    photo(tmp_path / "a.png", "one\ntwo\nthree")
    (tmp_path / "a.synthetic.txt").write_text("made")
    photo(tmp_path / "b.png", "alone")  # has no synthetic caption: always its own
    data = opened(tmp_path, mix={"text": 0.5, "synthetic": 0.5})
    found = [data.batch([0, 1], step).captions for step in range(400)]
    assert np.mean([first == "made" for first, _ in found]) == pytest.approx(0.5, abs=0.08)
    assert {first for first, _ in found} == {"one", "two", "three", "made"}
    assert {second for _, second in found} == {"alone"}


def test_what_a_step_sees_is_keyed_by_seed_step_and_sample(tmp_path, photo):
    for i in range(4):
        photo(tmp_path / f"{i}.png", "one\ntwo\nthree", height=40, width=70, seed=i)
    data, same, other = (opened(tmp_path, seed=seed) for seed in (0, 0, 1))
    images, texts, _ = data.batch([0, 1, 2, 3], step=5)
    assert images.shape == (4, *data.size_of(0), 3)
    for i in (3, 1):  # alone, in another order, by another process
        alone, caption, _ = same.batch([i], step=5)
        assert np.array_equal(alone[0], images[i]) and caption == [texts[i]]
    differing = [data.batch([0, 1, 2, 3], 6)[0], other.batch([0, 1, 2, 3], 5)[0]]
    assert all(not np.array_equal(images, else_) for else_ in differing)


def test_centre_crops_do_not_depend_on_the_step(tmp_path, photo):
    photo(tmp_path / "a.png", "one", height=40, width=70)
    data = opened(tmp_path, crop="centre", max_ratio=1)
    middle = Image.fromarray(data.image(0)).resize((32, 32), 3, box=(15, 0, 55, 40))
    assert np.array_equal(data.batch([0], 1)[0][0], np.array(middle))
    assert np.array_equal(data.batch([0], 1)[0], data.batch([0], 2)[0])


# What can be kept


def test_what_is_kept_gives_what_every_step_sees(tmp_path, photo):
    photo(tmp_path / "a.png", "one\ntwo", height=40, width=70)
    (tmp_path / "a.synthetic.txt").write_text("made")
    data = opened(tmp_path, crop="centre", mix={"text": 0.5, "synthetic": 0.5})
    image, captions = data.cacheable(0)
    assert captions == {"text": ("one", "two"), "synthetic": ("made",)}
    numbered = {"text": range(2), "synthetic": range(2, 3)}
    for step in range(50):
        images, texts, _ = data.batch([0], step)
        assert np.array_equal(images[0], image)
        assert data.pick(captions, 0, step) == texts[0]
        assert ["one", "two", "made"][data.pick(numbered, 0, step)] == texts[0]


def test_the_identity_depends_on_images_captions_and_sizes(tmp_path, photo):
    photo(tmp_path / "a.png", "one", seed=1)
    photo(tmp_path / "b.png", "two", seed=2)

    def identity(**arguments):
        return opened(tmp_path, crop="centre", **arguments).identity()

    seen = [identity()]
    assert identity(seed=5, index=str(tmp_path / "index")) == seen[0]  # what is kept is the same
    seen += [identity(image_size=64), identity(max_ratio=1)]
    (tmp_path / "b.txt").write_text("zwei")
    seen.append(identity())
    photo(tmp_path / "b.png", "zwei", height=9)
    seen.append(identity())
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.append(identity())
    assert len({json.dumps(each) for each in seen}) == len(seen)
    (tmp_path / "c.png").unlink()
    assert identity()["images"] == 1


def bmp(seed: int) -> bytes:
    return encoded(noise(8, 8, seed), "BMP")


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(8, 8), "JPEG", exif=exif)


@pytest.mark.parametrize("contents", [(bmp(1), bmp(2)), (turned(1), turned(3))])
def test_the_identity_tells_files_of_one_length_and_size_apart(tmp_path, contents):
    before, after = contents
    assert len(before) == len(after)
    (tmp_path / "a.txt").write_text("a caption")
    options = {"crop": "centre", "index": str(tmp_path / "index")}
    (tmp_path / "a.jpg").write_bytes(before)
    data = opened(tmp_path, **options)
    first = data.identity()
    assert opened(tmp_path, **options).identity() == first
    (tmp_path / "a.jpg").write_bytes(after)
    assert opened(tmp_path, **options).identity() != first
    with pytest.raises(UserError, match=r"a\.jpg has changed .*: its content differs"):
        data.batch([0])


def test_the_identity_of_a_file_that_is_gone_is_refused(tmp_path, photo):
    path = photo(tmp_path / "a.png", "a caption")
    data = opened(tmp_path, crop="centre")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.png has changed .*: no such file"):
        data.identity()


def test_random_crops_cannot_be_kept(tmp_path, photo):
    photo(tmp_path / "a.png", "one")
    for ask in (CaptionedImages.identity, lambda data: data.cacheable(0)):
        with pytest.raises(UserError, match=r"crop=random .* data\.crop=centre"):
            ask(opened(tmp_path))


# Splits, batches, mistakes


def test_splits_share_no_image_and_lose_none(tmp_path, photo):
    for i in range(60):
        photo(tmp_path / f"{i}.png", "a caption")
    parts = [opened(tmp_path, split=s, validation_fraction=0.3) for s in ("train", "validation")]
    names = [set(part.names) for part in parts]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 60
    photo(tmp_path / "new.png", "a caption")
    later = set(opened(tmp_path, split="validation", validation_fraction=0.3).names)
    assert names[1] <= later  # an image that is added moves no other


def test_a_batch_of_several_sizes_is_refused(tmp_path, photo):
    photo(tmp_path / "a.png", "a caption", width=32)
    photo(tmp_path / "b.png", "a caption", height=32)
    data = opened(tmp_path)
    with pytest.raises(ValueError, match="must be of one size"):
        data.batch([0, 1])
    order = data.order(batch_size=3, seed=0)
    for step in range(6):
        assert data.batch(order(step * 3, 3), step)[0].shape[0] == 3


def test_an_image_that_changes_later_is_named(tmp_path, photo):
    path = photo(tmp_path / "a.png", "a caption")
    data = opened(tmp_path)
    photo(path, "a caption", width=50)
    with pytest.raises(UserError, match=r"a\.png has changed"):
        data.batch([0])
    path.unlink()
    with pytest.raises(UserError, match=r"a\.png has changed.*no such file"):
        data.batch([0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": "/nowhere/at/all"}, "root '/nowhere/at/all' must be a folder"),
        ({"split": "trian"}, "Did you mean train"),
        ({"crop": "center"}, "Did you mean centre"),
        ({"mix": {"text": 0}}, "mix=.* must not all be zero"),
        ({"mix": {"text": 1, "../x": 1}}, "must be an identifier"),
        ({"mix": {"text": 1, "synthetic": 1}}, "no image of .* has a caption of .* 'synthetic'"),
        ({"captions": Table()}, "has no metadata.jsonl and metadata.csv"),
        ({"captions": ClassNames(), "mix": {"label": 1}}, "mix label must be text"),
        (
            {"max_bad_fraction": 1.0},
            r"max_bad_fraction=1.0 must be a finite number",
        ),
        ({"max_pixels": 10}, "1 of 1 images .* 8 x 8 pixels are more than the limit of 10"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_mistakes_are_named(tmp_path, photo, arguments, message):
    photo(tmp_path / "a.png", "a caption")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "metadata.jsonl, line 2: not JSON"),
        ('["a.png"]', "line 2: must be an object"),
        ('{"text": "x"}', "line 2: must have a 'file_name'; its keys are text"),
        ('{"file_name": null}', "line 2: file_name None must be the name"),
        ('{"file_name": "a.png", "text": 3}', "line 2: text 3 must be a caption"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "line 2: text '.*' must be a caption"),
        ('{"file_name": "a.png", "id": ' + "9" * 5000 + "}", "line 2: not JSON: Exceeds the limit"),
        ("[" * 100_000, "line 2: not JSON: maximum recursion depth"),
        ('{"file_name": "a.png", "text": "K\udce4se"}', r"metadata\.jsonl, line 2: must be UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_by_line(tmp_path, photo, line, message):
    photo(tmp_path / "a.png", None)
    (tmp_path / "metadata.jsonl").write_text(f"\n{line}\n", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        opened(tmp_path, captions=Table())


GOOD_ROWS = b"file_name,text\na.png,one\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"metadata\.csv must have one column 'file_name'; its columns are none"),
        (b"file_name;text\na.png;one\n", "column 'file_name'; its columns are file_name;text"),
        (b"file_name,caption\n", "one column 'text'; its columns are file_name, caption"),
        (b'file_name,"text\na.png,one\n', "line 1: not CSV"),
        (b"file_name,text,text\n", "one column 'text'; its columns are file_name, text, text"),
        (GOOD_ROWS + b"b.png,a cat, a dog\n", "line 3: has 3 fields, not 2 .* in quotes"),
        (GOOD_ROWS + b"\nb.png\n", "line 4: has 1 fields, not 2"),
        (GOOD_ROWS + b'b.png,"two\nc.png,three\n', "line 3: not CSV, a quote may be unclosed"),
        (GOOD_ROWS + b'b.png,"two\nc.png,"three"\n', "line 3: not CSV, a quote may be unclosed"),
        (GOOD_ROWS + "b.png,Käse\n".encode("latin-1"), r"metadata\.csv, line 3: must be UTF-8"),
        (GOOD_ROWS.decode().encode("utf-16"), "line 1: must be UTF-8"),
    ],
)
def test_a_csv_table_that_cannot_be_read_is_named_by_line(tmp_path, photo, content, message):
    photo(tmp_path / "a.png", None)
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        opened(tmp_path, captions=Table())


def test_csv_tables_of_other_programs_are_read(tmp_path, photo):
    photo(tmp_path / "a.png", None)
    long = "word " * 40_000
    rows = f'\ufefffile_name, text\r\n\r\na.png,"two, ""three"""\r\na.png,{long}\r\n'
    (tmp_path / "TABLE.CSV").write_bytes(rows.encode())
    data = opened(tmp_path, captions=Table(file="TABLE.CSV"))
    assert data.read(0)[1] == {"text": ['two, "three"', long.strip()]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "names '.*' cannot be read: No such file"),
        ("{", "must be a JSON file: Expecting property name"),
        ("[]", r"must be a JSON object \{folder: class\}"),
        ('{"dog": 5}', r"must be a JSON object \{folder: class\}"),
    ],
)
def test_class_names_that_cannot_be_read_are_refused(tmp_path, photo, content, message):
    photo(tmp_path / "photos" / "dog" / "a.png", None)
    names = tmp_path / "names.json"
    if content is not None:
        names.write_text(content)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "photos", captions=ClassNames(names=str(names)))


@pytest.mark.parametrize("template", ["a dog", "{} and {}", "{0}", "{x}", "{} {x}", "{!r}", "{"])
def test_a_template_has_one_place_for_the_class(template):
    with pytest.raises(ValueError, match=r"must hold \{\} once"):
        ClassNames(template=template)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no images"):
        opened(tmp_path)
