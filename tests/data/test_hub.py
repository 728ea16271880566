import socket
import sys
from types import SimpleNamespace

import pytest

from mmdit.data import hub, pack
from mmdit.data.captioned import CaptionedImages
from mmdit.data.hub import Rows
from mmdit.data.shards import tar_shards

from .conftest import encoded, noise


def opened(root, mix) -> CaptionedImages:
    return tar_shards(
        root=str(root),
        image_size=32,
        mix=mix,
        max_bad_fraction=0.6,
        validation_fraction=0.0,
    )


class Table(list):
    """As much of a map-style data set as packing uses."""

    _fingerprint = "f00"


def test_rows_become_shards(tmp_path):
    path = tmp_path / "on_disk.png"
    path.write_bytes(encoded(noise(8, 8)))
    rows = Table(
        [
            {"image": {"bytes": encoded(noise(8, 9)), "path": None}, "c": "one", "alt": None},
            {"image": {"bytes": None, "path": str(path)}, "c": ["two", "more"], "alt": "else"},
            {"image": None, "c": "three", "alt": None},
            {"image": encoded(noise(8, 9)), "c": None, "alt": ""},
            {"image": {"bytes": None, "path": "gone.png"}, "c": "five", "alt": None},
        ]
    )
    source = Rows(data=rows, image="image", texts={"text": "c", "alt": "alt"})
    pack.pack(source, tmp_path / "out", kinds=("text", "alt"), max_bad_fraction=0.6)
    data = opened(tmp_path / "out", {"text": 1, "alt": 1})
    assert list(data.names) == ["row 000000000", "row 000000001"]
    assert data.read(0)[1] == {"text": ("one",)}
    assert data.read(1)[1] == {"text": ("two", "more"), "alt": ("else",)}


# Parquet files, by the library itself


def write_rows(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Two files of five rows, and no network to look for anything else."""
    pytest.importorskip("datasets")

    def refused(*arguments, **options):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in range(2):
        numbers = range(5 * file, 5 * file + 5)
        rows = {
            "image": [{"bytes": encoded(noise(8, 8, i)), "path": f"{i}.png"} for i in numbers],
            "jpg": [encoded(noise(8, 8, i), "JPEG") for i in numbers],
            "caption": [f"caption {i}" for i in numbers],
            "more": [[f"made {i}", "twice"] for i in numbers],
        }
        write_rows(folder / f"rows-{file}.parquet", rows)
    return folder


@pytest.mark.parametrize("source", ["rows", "rows/rows-{0..1}.parquet", "rows/*.parquet"])
def test_parquet_files_become_shards_without_network(
    parquet, tmp_path, monkeypatch, capsys, source
):
    monkeypatch.chdir(tmp_path)
    command = [source, "out", "--text", "caption", "more", "--per-shard", "4"]
    assert hub.main(command) == 0
    assert "data=shards data.root=out" in capsys.readouterr().out
    data = opened("out", {"text": 1, "more": 1})
    assert len(data) == 10
    for i in range(10):
        image, captions = data.read(i)
        assert image == encoded(noise(8, 8, i))
        assert captions == {"text": (f"caption {i}",), "more": (f"made {i}", "twice")}
    assert hub.main(command) == 0  # all is done: goes on to nothing
    assert hub.main([*command, "--image", "jpg"]) == 2
    assert "image 'image' then, 'jpg' now" in capsys.readouterr().err


def test_one_parquet_file_with_images_as_plain_bytes(parquet, tmp_path):
    file, out = parquet / "rows-1.parquet", tmp_path / "out"
    assert hub.main([str(file), str(out), "--image", "jpg", "--text", "caption"]) == 0
    data = opened(out, {"text": 1})
    assert len(data) == 5 and data.read(0)[1] == {"text": ("caption 5",)}
    assert data.read(0)[0][:2] == b"\xff\xd8"


def test_a_file_whose_name_is_also_a_pattern_is_read(parquet, tmp_path):
    file = (parquet / "rows-1.parquet").rename(parquet / "rows [3].parquet")
    assert hub.main([str(file), str(tmp_path / "out"), "--text", "caption"]) == 0
    assert len(opened(tmp_path / "out", {"text": 1})) == 5


def test_columns_of_the_librarys_own_type_keep_their_bytes(parquet, tmp_path):
    import datasets

    data = datasets.load_dataset("parquet", data_files=[str(parquet / "rows-0.parquet")])["train"]
    data = data.cast_column("image", datasets.Image())
    data.to_parquet(parquet / "typed.parquet")  # which notes the type
    out = tmp_path / "out"
    assert hub.main([str(parquet / "typed.parquet"), str(out), "--text", "caption"]) == 0
    assert opened(out, {"text": 1}).read(3)[0] == encoded(noise(8, 8, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows"], "column='text' must be one of image, jpg, caption, more"),
        (["rows", "--text", "caption", "--image", "img"], "column='img' must be one of"),
        (["rows/none.parquet"], r"rows has no none.parquet"),
        (["empty"], "empty has no files that match *.parquet"),
        (["junk.parquet"], "junk.parquet cannot be opened"),
        (
            ["none.parquet", "--text", "caption", "text"],
            "text caption, text must be different kinds",
        ),
        (["none.parquet", "--text", "a", "b", "b"], "text a, b, b must be different kinds"),
        (["none.parquet", "--text", "a", "a-b"], "mix='a-b' must be an identifier"),
        (["differing"], "because column names don't match"),
    ],
)
def test_mistakes_end_in_a_line_and_exit_code_2(
    parquet, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.parquet").write_bytes(b"no table")
    (tmp_path / "differing").mkdir()
    for column in ("caption", "text"):
        write_rows(tmp_path / "differing" / f"{column}.parquet", {column: ["one"]})
    source, *options = arguments
    assert hub.main([source, "out", *options]) == 2
    found = capsys.readouterr().err
    assert message in found and "Traceback" not in found
    assert not (tmp_path / "out").exists()


# The hub


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert hub.main(["owner/name", str(tmp_path / "out")]) == 2
    assert "sd3-mmdit[datasets]" in capsys.readouterr().err


def test_a_data_set_of_the_hub_is_asked_for_by_name_config_and_split(tmp_path, monkeypatch, capsys):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        raise FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub\nand so on")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    command = ["owner/name", str(tmp_path / "out"), "--config", "small", "--split", "test"]
    assert hub.main(command) == 2
    assert asked == [(("owner/name", "small"), {"split": "test"})]
    found = capsys.readouterr().err
    assert "error: owner/name cannot be opened: Dataset 'owner/name' doesn't exist" in found
    assert "and so on" not in found
