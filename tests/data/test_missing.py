"""What a folder lacks is reported with its likely cause, and each cause is counted."""

import json
import logging
import time
import unicodedata
from pathlib import Path

import pytest

from mmdit.data.bad_images import report_bad
from mmdit.data.caption_sources import Sidecars, Table
from mmdit.data.captioned import CaptionedImages
from mmdit.data.folder import image_folder
from mmdit.data.missing import Likely
from mmdit.errors import UserError

COMPOSED = "caf\u00e9.jpg"
THERE = ["a.jpg", "train/b.JPG", "train/deep/c d.png", COMPOSED, "x/0.png", "y/0.png"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("photos/a.jpg", "the folder 'photos' is superfluous"),
        ("/data/photos/a.jpg", "the folder '/data/photos' is superfluous"),
        ("../photos/a.jpg", "the folder '../photos' is superfluous"),
        ("photos/train/b.JPG", "the folder 'photos' is superfluous"),
        ("b.JPG", "the folder 'train' is missing"),
        ("deep/c d.png", "the folder 'train' is missing"),
        ("train/b.jpg", "upper and lower case differ"),
        ("TRAIN/b.JPG", "upper and lower case differ"),
        ("a.png", "the suffix there is '.jpg'"),
        ("a", "the suffix there is '.jpg'"),
        ("train\\b.JPG", "it has backslashes instead of slashes"),
        ("C:\\photos\\a.jpg", "it has backslashes instead of slashes; the folder 'C:/photos' is"),
        ("train/deep/c%20d.png", "it is URL-encoded"),
        ("a.jpg ", "it has spaces around it"),
        (
            unicodedata.normalize("NFD", COMPOSED),
            "its accents are encoded differently (Unicode NFC",
        ),
        ("other/c d.png", "it is in 'train/deep'"),
        ("y/0.jpg", "the suffix there is '.png'"),
        ("new/y/0.png", "the folder 'new' is superfluous"),
        ("z.jpg", None),
        ("", None),
        ("..", None),
    ],
)
def test_the_cause_is_found(name: str, cause: str | None) -> None:
    found = Likely(THERE).cause(name)
    assert found is None if cause is None else found is not None and found.startswith(cause)


def test_many_names_take_no_longer_each() -> None:
    likely = Likely(f"{i}/0.jpg" for i in range(50_000))
    began = time.process_time()
    for i in range(1000):
        likely.cause(f"photos/{i}/0.png")
    likely.cause("/".join("a" * 50_000) + "%20" * 10_000)
    assert time.process_time() - began < 2


def test_causes_are_counted_and_three_of_them_listed(tmp_path: Path, caplog) -> None:
    bad = {f"{i}.jpg": "no such file" for i in range(5)} | {"x.jpg": "is empty", "y.jpg": "is odd"}
    with pytest.raises(
        UserError,
        match=r": 0\.jpg: no such file \(5 files\); x\.jpg: is empty; y\.jpg: is odd$",
    ):
        report_bad(bad, files=7, place=tmp_path, report=None, limit=0)
    bad |= {"z.jpg": "is green"}
    report_bad(bad, files=100, place=tmp_path, report=None, limit=0.5)
    assert caplog.messages[0].endswith("y.jpg: is odd; other causes: 1")


def opened(root: Path, split: str = "train", **options) -> CaptionedImages:
    given = {"captions": Sidecars(), "image_size": 16, "unit": 4, **options}
    return image_folder(root=str(root), **given).view(split)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_table_whose_names_are_not_there_gets_the_cause(tmp_path, photo, absolute) -> None:
    for i in range(4):
        photo(tmp_path / f"{i}.png", None, seed=i)
    prefix = tmp_path if absolute else "photos"
    rows = [{"file_name": f"{prefix}/{i}.png", "text": "x"} for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    what = "lies outside of the folder" if absolute else "no such file"
    with pytest.raises(UserError) as refusal:
        opened(tmp_path, captions=Table())
    found = f"{prefix}/0.png: {what}: the folder {str(prefix)!r} is superfluous (4 files)"
    assert found in str(refusal.value)
    assert "0.png: has no caption of the kind text (4 files)" in str(refusal.value)


@pytest.mark.parametrize(
    ("suffix", "found"),
    [
        (
            ".caption",
            "but one with .caption: read it with data.captions.suffix=.caption (when packing",
        ),
        (
            ".png.txt",
            "but one with .png.txt: read it with data.captions.suffix=.png.txt (when packing",
        ),
        (".json", "but one with .json: convert these to a metadata.jsonl (3 files)"),
        (
            None,
            "no file with the suffix .txt beside it; data/captions=constant gives all images one "
            "caption (3 files)",
        ),
    ],
)
def test_captions_of_other_programs_are_offered(tmp_path, photo, suffix, found) -> None:
    for i in range(3):
        photo(tmp_path / f"{i}.png", None, seed=i)
        if suffix:
            (tmp_path / f"{i}{suffix}").write_text("a photo")
    with pytest.raises(UserError) as refusal:
        opened(tmp_path)
    assert "has no caption of the kind text: no file with the suffix .txt" in str(refusal.value)
    assert found in str(refusal.value)
    if suffix and suffix != ".json":
        data = opened(tmp_path, captions=Sidecars(suffix=suffix))
        assert data.read(0)[1] == {"text": ("a photo",)}
        both = Sidecars(suffix=[".none", suffix])
        assert opened(tmp_path, captions=both).read(0)[1] == {"text": ("a photo",)}


def test_a_suffix_counts_for_every_kind_and_an_empty_file_is_named(tmp_path, photo) -> None:
    photo(tmp_path / "a.png", None)
    (tmp_path / "a.CAPTION").write_text("one")
    (tmp_path / "a.synthetic.caption").write_text("two")
    mix = {"text": 1.0, "synthetic": 1.0}
    data = opened(tmp_path, captions=Sidecars(suffix=".caption"), mix=mix)
    assert data.read(0)[1] == {"text": ("one",), "synthetic": ("two",)}
    photo(tmp_path / "a.png", " \n")
    with pytest.raises(UserError, match="kind text: the file beside it is empty"):
        opened(tmp_path)


@pytest.mark.parametrize("suffix", ["txt", ".", "../x", ".a/b", ".json", 3, [".txt", ""]])
def test_a_suffix_that_makes_no_sense_is_refused(suffix) -> None:
    with pytest.raises(UserError, match="suffix"):
        Sidecars(suffix=suffix)


def test_one_image_is_in_both_splits_and_a_warning_is_logged(tmp_path, photo, caplog) -> None:
    photo(tmp_path / "a.png", "a photo")
    for fraction in (0.0, 0.01, 0.9):
        for split in ("train", "validation"):
            data = opened(tmp_path, split=split, validation_fraction=fraction)
            assert list(data.names) == ["a.png"]
        assert caplog.messages == [
            f"{tmp_path} has one image: it is used for training and validation"
        ]
        caplog.clear()
    assert data.order(batch_size=4, seed=0)(3, 6) == [0] * 6


def test_several_captions_of_an_image_are_noted(tmp_path, photo, caplog) -> None:
    for i, text in enumerate(("one", "one\ntwo\n", "1\n\n2\n3")):
        photo(tmp_path / f"{i}.png", text, seed=i)
    with caplog.at_level(logging.INFO):
        opened(tmp_path)
    assert any(
        "images with several captions (each line of a .txt is one): 2;" in found
        for found in caplog.messages
    )


def test_names_and_captions_forge_no_line(tmp_path, photo) -> None:
    photo(tmp_path / "a\x1b[2J\nERROR: b.png", None)
    with pytest.raises(UserError) as refusal:
        opened(tmp_path)
    assert r"a\x1b[2J\nERROR: b.png: has no caption" in str(refusal.value)
    assert "\n" not in str(refusal.value)
