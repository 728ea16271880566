import pytest

from mmdit.data.patterns import expand, find, find_shards
from mmdit.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("plain.tar", ["plain.tar"]),
        ("s-{000008..000011}.tar", [f"s-{i:06d}.tar" for i in range(8, 12)]),
        ("s-{8..11}", ["s-8", "s-9", "s-10", "s-11"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a,}x", ["ax", "x"]),
        ("{{1..2},b}x", ["1x", "bx", "2x", "bx"]),
    ],
)
def test_braces_stand_for_names(pattern, names):
    assert list(expand(pattern)) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s-{0..1", "an unmatched brace"),
        ("s-0..1}", "an unmatched brace"),
        ("s-{9..1}", "must be ascending"),
        ("s-{0..99999999}", "at most 1000000 names"),
        ("s-{}", "must be like"),
        ("s-{a..c}", "must be like"),
        ("s-{0..1}-{x}", "must be like"),
    ],
)
def test_braces_of_another_kind_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        list(expand(pattern))


def test_the_library_webdataset_expands_alike():
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    for pattern in ("s-{000000..000009}.tar", "{a,b}-{08..12}", "s-{9..11}", "{a,{1..2}}"):
        assert sorted(set(expand(pattern))) == sorted(set(braceexpand(pattern)))


def test_files_are_found_sorted_and_once(tmp_path):
    for name in ("b.tar", "a.tar", ".hidden.tar", "c.txt", "sub/d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for pattern, names in (
        ("*.tar", ["a.tar", "b.tar"]),
        ("{b,a,a}.tar", ["a.tar", "b.tar"]),
        ("{*,a}.tar", ["a.tar", "b.tar"]),
        ("**/*.tar", ["a.tar", "b.tar", "sub/d.tar"]),
        ("sub/d.tar", ["sub/d.tar"]),
    ):
        assert find(tmp_path, pattern) == [tmp_path / name for name in names]


@pytest.mark.parametrize("name", ["a [3].tar", "a{1}.tar", "a{.tar"])
def test_a_file_of_just_this_name_is_found(tmp_path, name):
    for other in (name, "a 3.tar", "a1.tar"):
        (tmp_path / other).touch()
    assert find(tmp_path, name) == [tmp_path / name]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..5}.tar", r"has no 1\.tar, 2\.tar, 3\.tar and more: 5 files"),
        ("*.tgz", r"has no files that match \*\.tgz"),
        ("folder.tar", "must be a regular file"),
        ("../*.tar", "must be relative to root"),
        ("/x/*.tar", "must be relative to root"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, pattern, message):
    (tmp_path / "0.tar").touch()
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(UserError, match=message):
        find(tmp_path, pattern)


def test_what_looks_like_a_shard_and_is_not_read_is_reported(tmp_path, caplog):
    others = ["B.TAR", "c.tar.gz", "d.tgz", "sub/e.tar"]
    for name in (*others, "sub/x.txt", ".f.TAR", "a.index.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"has no files that match \*\.tar; .*: B\.TAR, c\.tar\.gz, d\.tgz and more"
    ):
        find_shards(tmp_path)
    (tmp_path / "a.tar").touch()
    assert find_shards(tmp_path) == [tmp_path / "a.tar"]
    [record] = caplog.records
    assert "B.TAR, c.tar.gz, d.tgz and more" in record.getMessage()
    for name in others[:3]:
        (tmp_path / name).unlink()
    find_shards(tmp_path)
    assert "look like shards: sub/e.tar (" in caplog.records[-1].getMessage()
    (tmp_path / "sub/e.tar").unlink()
    find_shards(tmp_path)
    assert len(caplog.records) == 2
