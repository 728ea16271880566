import os

from mmdit.cli.eval.results import write_new
from tests.kills_for_tests import forked


def test_results_of_the_same_name_stand_side_by_side(tmp_path):
    one, other = ({".json": text, ".md": text, ".png": b"same"} for text in (b"one", b"other"))
    assert [p.name for p in write_new(tmp_path, "x", one)] == ["x.json", "x.md", "x.png"]
    assert [p.name for p in write_new(tmp_path, "x", other)] == ["x-2.json", "x-2.md", "x-2.png"]
    assert write_new(tmp_path, "x", one)[0].name == "x.json"  # the same again
    assert (tmp_path / "x.json").read_bytes() == b"one"
    assert len(list(tmp_path.iterdir())) == 6


def test_evaluations_that_end_at_once_lose_nothing(tmp_path):
    def write(who: int) -> None:
        write_new(tmp_path, "x", {".json": bytes([who]), ".md": bytes([who])})

    children = [forked(lambda who=who: write(who)) for who in range(6)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    for path in tmp_path.glob("*.json"):
        assert path.with_suffix(".md").read_bytes() == path.read_bytes()
    assert {path.read_bytes() for path in tmp_path.glob("*.json")} == {bytes([i]) for i in range(6)}


def test_somebody_elses_file_of_that_name_stays(tmp_path):
    (tmp_path / "x.md").write_text("mine")
    assert write_new(tmp_path, "x", {".json": b"", ".md": b""})[0].name == "x-2.json"
    assert (tmp_path / "x.md").read_text() == "mine"
