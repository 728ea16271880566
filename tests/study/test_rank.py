import json
import math
import re
import subprocess
import sys
import zlib
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from mmdit.cli.eval import rank
from mmdit.cli.eval.rank import PAPER_TABLE1
from mmdit.errors import UserError
from mmdit.study import protocol as study_scores
from mmdit.study import records as rank_input
from mmdit.study.ranking import Point
from mmdit.study.records import SAMPLERS, SETTINGS
from tests import ready_process

SCRIPT = Path(__file__).parents[2] / "eval" / "rank.py"
VARIANTS = ("rf", "rf/lognorm(0.00,1.00)", "eps/linear", "made/up")


def scores(variant: str, seed: int = 0, *, budget: float = 1e12) -> dict[str, Any]:
    """A made-up `scores.json` of the format that a study writes."""
    rng = np.random.default_rng(zlib.crc32(f"{variant} {seed}".encode()))
    quality = np.random.default_rng(zlib.crc32(variant.encode())).uniform()
    loss = float(0.3 - 0.1 * quality + rng.normal(0, 0.004))
    rows = []
    for weights in ("ema", "raw"):
        for steps, guidance in SAMPLERS:
            worse = 1 + 3 / steps + (0.3 if weights == "raw" else 0)
            noise = rng.normal(0, 0.03, 3)
            rows.append(
                {
                    "weights": weights,
                    "steps": steps,
                    "guidance": guidance,
                    "solver": "euler",
                    "clip": float(
                        0.2 + 0.02 * guidance / 5 + 0.05 * quality / worse + noise[0] / 10
                    ),
                    "fd": float((20 - 12 * quality) * worse * (1 + noise[1])),
                    "kid": float(0.02 * worse),
                    "accuracy": float(np.clip(quality / worse + noise[2], 0, 1)),
                    "function_evaluations": steps * 2,
                }
            )
    validation = {"loss": loss, "levels": {str(i / 8): loss for i in range(1, 9)}}
    return {
        "protocol": "scores-1",
        "variant": variant,
        "seed": seed,
        "dataset": "shapes",
        "samples": 256,
        "weights_sha256": {"ema": "ab" * 32, "raw": "cd" * 32},
        "training": {"steps": 400, "batch_size": 64, "parameters": 1000, "flops": budget},
        "validation": {"ema": validation, "raw": validation},
        "scores": rows,
    }


def write_study(folder: Path, records: list[dict[str, Any]]) -> Path:
    for i, record in enumerate(records):
        run = folder / f"run-{i:03d}"
        (run / "samples").mkdir(parents=True)
        (run / "scores.json").write_text(json.dumps(record))
    return folder


def study(folder: Path, seeds: int = 2) -> Path:
    """Four variants; the grids of one run."""
    records = [scores(v, s, budget=10.0 ** (12 + i)) for i, v in enumerate(VARIANTS)
               for s in range(seeds)]  # fmt: skip
    write_study(folder, records)
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (1600, 40), colour).save(folder / f"run-000/samples/step_{i:08d}.png")
    return folder


def job(text: Mapping[str, object], **values: object) -> None:
    """What the script does, without the seconds that a process needs to start."""
    config = OmegaConf.create({"resamples": 2000, "seed": 0, "report": True, **values})
    rank.job(config, {key: str(value) for key, value in text.items()})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return ready_process.run([str(SCRIPT), *arguments])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of a ranking of four variants with two seeds, and what was printed."""
    pytest.importorskip("matplotlib")
    folder = study(tmp_path_factory.mktemp("study"))
    (folder / "half-done").mkdir()
    (folder / "half-done" / "config.json").write_text("{}")
    done = run(f"runs={folder}")
    assert done.returncode == 0, done.stderr
    return folder / "ranking", done.stdout


def test_settings_are_those_of_the_paper():
    assert len(SETTINGS) == len(set(SETTINGS)) == 12
    assert {s.guidance for s in SETTINGS if s.steps == 50} == {1.0, 2.5, 5.0}
    assert {s.steps for s in SETTINGS if s.guidance == 5.0} == {5, 10, 25, 50}


def test_every_setting_that_is_scored_is_ranked_under_both_weights():
    rows = [
        {"weights": weights, **setting._asdict(), "solver": study_scores.SOLVER}
        for weights in ("ema", "raw")
        for setting in study_scores.SETTINGS
    ]
    assert [rank_input.setting_of(row) for row in rows] == SETTINGS


def test_the_papers_printed_ranks_are_averages_of_24_and_of_4_settings():
    for overall, *few in PAPER_TABLE1.values():
        assert round(overall * 24) / 24 == pytest.approx(overall, abs=0.0051)
        assert all(4 * rank == round(4 * rank) for rank in few)


def test_a_table_whose_ranking_is_known(tmp_path, capsys):
    known = {  # setting: (clip, fd) of a, b, c; fronts 1 1 2, then 2 1 2, then 1 1 1
        ("few", 5): [(0.3, 9.0), (0.2, 8.0), (0.1, 9.0)],
        ("many", 50): [(0.2, 9.0), (0.3, 8.0), (0.1, 8.5)],
        ("odd", 20): [(0.2, 9.0), (0.2, 9.0), (0.2, 9.0)],
    }
    rows = [
        {"variant": v, "setting": name, "steps": steps, "guidance": 5.0, "clip": clip, "fd": fd}
        for (name, steps), points in known.items()
        for v, (clip, fd) in zip("abc", points, strict=True)
    ]
    (tmp_path / "table.json").write_text(json.dumps(rows))
    job({"table": tmp_path / "table.json", "out": tmp_path / "out"})
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)]
    none = "\N{EN DASH} | " * 2 + "\N{EN DASH} |"
    assert lines == [
        f"| 1 | b | 1.00 | 1.00 | 1.00 | {none}",
        f"| 2 | a | 1.33 | 1.00 | 2.00 | {none}",
        f"| 3 | c | 1.67 | 2.00 | 2.00 | {none}",
    ]
    result = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert [row["fronts"] for row in result["variants"]] == [
        [[1], [1], [1]],
        [[1], [2], [1]],
        [[2], [2], [1]],
    ]
    assert "odd" in (tmp_path / "out" / "report.html").read_text()


def test_rows_without_steps_have_no_ranks_at_5_and_50_steps(tmp_path, capsys):
    rows = [{"variant": v, "setting": "x", "clip": c, "fd": 1} for v, c in (("rf", 1), ("b", 2))]
    (tmp_path / "table.json").write_text(json.dumps(rows))
    job({"table": tmp_path / "table.json", "out": tmp_path}, report=False)
    dash = "\N{EN DASH}"
    assert f"| 2 | rf | 2.00 | {dash} | {dash} | 5.67 | 6.50 | 5.75 |" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()


def test_a_study_is_ranked_with_the_papers_ranks_beside(report):
    folder, printed = report
    result = json.loads((folder / "rank.json").read_text())
    assert (folder / "rank.md").read_text() in printed
    assert result["protocol"] == "rank-1" and result["scores_protocol"] == "scores-1"
    assert result["samples"] == 256 and result["seeds"] == [0, 1] and len(result["controls"]) == 12
    assert result["runs"][0]["weights_sha256"] == {"ema": "ab" * 32, "raw": "cd" * 32}
    for row in result["variants"]:
        numbers = np.array(row["fronts"])
        assert numbers.shape == (12, 2)
        assert row["ranks"]["all"]["mean"] == pytest.approx(numbers.mean())
        for steps in (5, 50):
            at = [(c["steps"], c["guidance"]) == (steps, 5.0) for c in result["controls"]]
            assert sum(at) == 2
            assert row["ranks"][f"{steps} steps"]["mean"] == pytest.approx(numbers[at].mean())
        assert (row["paper"] is None) is (row["variant"] == "made/up")
    assert re.search(r"\| rf \| \d\.\d\d ± \d\.\d\d .*\| 5\.67 \| 6\.50 \| 5\.75 \|", printed)
    means = [row["ranks"]["all"]["mean"] for row in result["variants"]]
    assert means == sorted(means)


def test_what_is_left_out_is_said(report):
    assert "Ignored, without scores.json: half-done." in report[1]


def test_trends_are_those_of_the_scores(report):
    result = json.loads((report[0] / "rank.json").read_text())
    (trend,) = result["trends"]
    rows = [f for f in result["figures"] if f["dataset"] == "shapes"]
    assert len(rows) == 8
    loss, accuracy = [f["loss"] for f in rows], [f["accuracy"] for f in rows]
    pearson = np.corrcoef(loss, accuracy)[0, 1]
    assert trend["loss_and_accuracy"]["all"]["pearson"] == pytest.approx(pearson)
    assert trend["loss_and_accuracy"]["rf"]["points"] == 4
    slope = np.polyfit(np.log([f["flops"] for f in rows]), np.log(loss), 1)[0]
    assert trend["loss_by_flops"]["exponent"] == pytest.approx(slope)


def test_runs_in_subfolders_are_ranked_and_what_they_left_out_is_noted(tmp_path):
    records = [scores(v) for v in VARIANTS[:2]]
    records[0]["training"]["skipped_steps"] = 3
    write_study(tmp_path / "sweep" / "[a]", records)
    job({"runs": tmp_path})
    result = json.loads((tmp_path / "ranking" / "rank.json").read_text())
    assert len(result["runs"]) == 2
    assert all(run["run"].startswith("sweep/[a]/") for run in result["runs"])
    assert any(re.match("3 of .* steps skipped, not finite: ", note) for note in result["notes"])


@pytest.mark.slow
def test_figures_that_a_study_lacks_leave_a_dash(tmp_path):
    pytest.importorskip("matplotlib")
    records = [scores(v) for v in VARIANTS[:2]]
    records[0]["validation"]["ema"] = {"loss": math.nan, "levels": {}}
    for row in [row for record in records for row in record["scores"]]:
        row["accuracy"] = None
    job({"runs": write_study(tmp_path, records)})
    text = (tmp_path / "ranking" / "rank.json").read_text()
    assert "NaN" not in text
    assert f"DIVERGED, the validation loss is not finite: {VARIANTS[0]}" in text
    assert {f["variant"]: f["loss"] is None for f in json.loads(text)["figures"]} == {
        VARIANTS[0]: True,
        VARIANTS[1]: False,
    }
    assert "loss_by_flops-shapes.png" in {p.name for p in (tmp_path / "ranking").iterdir()}
    assert not list((tmp_path / "ranking").glob("loss_and_accuracy*"))


class Links(HTMLParser):
    """Everything that a page would load or lead to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]
        self.open += [tag] if tag not in ("br", "img", "meta") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_needs_nothing_beside_it(report):
    page = (report[0] / "report.html").read_text()
    links = Links(page)
    assert links.open == []
    # By steps with both weights, trade-off, two of the losses, and the newest grid of one run.
    assert len(links.found) == 6
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)
    assert "step_00000001.png" in page and "step_00000000.png" not in page
    assert len(list(report[0].glob("*.png"))) == 5
    for file in report[0].glob("*.png"):
        with Image.open(file) as image:
            assert min(image.size) > 300


@pytest.mark.parametrize(
    ("heights", "gap", "expected"),
    [
        ([0.1, 0.5, 0.9], 0.2, [0.1, 0.5, 0.9]),
        ([0.5, 0.5], 0.2, [0.4, 0.6]),
        ([0.2, 0.5, 0.55, 0.6], 0.2, [0.1625, 0.3625, 0.5625, 0.7625]),
        ([0.9, 1.0], 0.2, [0.8, 1.0]),
        ([0.0, 0.0, 0.9], 0.1, [0.0, 0.1, 0.9]),
        ([], 0.1, []),
    ],
)
def test_names_beside_a_plot_keep_apart_and_near_their_curves(heights, gap, expected):
    plots = pytest.importorskip("mmdit.study.plots", exc_type=ImportError)
    assert plots.spread(heights, gap) == pytest.approx(expected)


def test_names_are_escaped_in_the_report(tmp_path):
    rows = [{"variant": v, "setting": "<x>", "clip": 1, "fd": 1} for v in ("<b>", "a&b")]
    (tmp_path / "table.json").write_text(json.dumps(rows))
    job({"table": tmp_path / "table.json", "out": tmp_path})
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in page and "a&amp;b" in page and "&lt;x&gt;" in page and "<b>" not in page


def test_names_forge_neither_cells_nor_lines_nor_escapes(tmp_path, capsys):
    rows = [
        {"variant": v, "setting": "x", "clip": 1, "fd": 1} for v in ("a|b\n<i>", "c\x1b[2J\u202e")
    ]
    (tmp_path / "table.json").write_text(json.dumps(rows))
    job({"table": tmp_path / "table.json", "out": tmp_path})
    shown = capsys.readouterr().out + (tmp_path / "rank.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert r"a\|b\n&lt;i>" in shown and r"c\x1b[2J\u202e" in shown and r"c\x1b[2J\u202e" in page
    assert not {"\x1b", "\u202e"} & {*shown, *page}


def changed(change) -> list[dict[str, Any]]:
    records = [scores(v) for v in VARIANTS[:2]]
    change(records[1])
    return records


MISTAKES = {
    "one variant": (lambda r: r.update(variant="rf", seed=1), "the only one is rf"),
    "protocol": (lambda r: r.update(protocol="scores-2"), "'scores-2' must be 'scores-1'"),
    "samples": (lambda r: r.update(samples=512), "differ in samples"),
    "dataset": (lambda r: r.update(dataset="cc12m"), "no run of rf, seed 0, cc12m"),
    "seed": (lambda r: r.update(seed=3), "no run of rf, seed 3, shapes"),
    "twice": (lambda r: r.update(variant="rf"), "the only one is rf"),
    "setting": (
        lambda r: r["scores"].pop(0),
        "(0.00,1.00), seed 0, shapes: ema, 50 steps, guidanc",
    ),
    "nan": (lambda r: r["scores"][3].update(fd=math.nan), "shapes: ema, 5 steps, guidance 5: clip"),
    "null": (lambda r: r["scores"][3].update(clip=None), "clip nan"),
    "row twice": (lambda r: r["scores"].append(r["scores"][2]), "scores[12] repeats a setting"),
    "field": (lambda r: r.pop("samples"), "samples is None, but must be of type int"),
    "deep field": (lambda r: r["training"].pop("flops"), "training has no flops"),
    "flops": (
        lambda r: r["training"].update(flops=0),
        "training.flops is 0, which is not a positive",
    ),
    "score field": (lambda r: r["scores"][1].pop("clip"), "scores[1] has no clip"),
    "text": (lambda r: r["scores"][1].update(guidance="5"), "scores[1] needs numbers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_runs_that_cannot_be_ranked_are_refused(name, tmp_path):
    change, message = MISTAKES[name]
    write_study(tmp_path, changed(change))
    with pytest.raises(UserError, match=re.escape(message)):
        job({"runs": tmp_path})
    assert not (tmp_path / "ranking").exists()


def test_scores_of_other_settings_are_left_out_and_said(tmp_path):
    records = changed(lambda r: r["scores"].append({**r["scores"][0], "solver": "heun", "fd": 0}))
    read, notes = rank_input.read_runs(write_study(tmp_path, records))
    assert notes == ["Ignored, in other settings than the protocol's: 1 scores."]
    points = rank_input.as_run(read[1]).points
    assert points.keys() == set(SETTINGS)
    first = records[1]["scores"][0]
    assert points[SETTINGS[0]] == Point(first["clip"], first["fd"])


def test_unequal_training_is_said(tmp_path):
    records = changed(lambda r: r["training"].update(steps=800))
    notes = rank_input.read_runs(write_study(tmp_path, records))[1]
    assert notes == ["Training differs between the runs: steps 400, 800."]


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ({}, {}, "give either runs="),
        ({"runs": "a", "table": "b"}, {}, "give either runs="),
        ({"runs": "nowhere"}, {}, "runs=nowhere: there is no such folder"),
        ({"runs": ""}, {}, "no folder in it has a scores.json"),
        ({"table": "none.json"}, {}, "is not a readable JSON file"),
        ({"table": "bad.json"}, {}, "is not a readable JSON file"),
        ({"table": "object.json"}, {}, "must hold a JSON list"),
        ({"table": "row.json"}, {}, "row 0 has no setting, fd"),
        ({"table": "twice.json"}, {}, "row 1 repeats a, x"),
        ({"table": "lists.json"}, {}, "steps and guidance of row 0 must be numbers or absent"),
        ({"table": "one.json"}, {}, "at least 2 variants, but the only one is a"),
        ({"table": "empty.json"}, {}, "at least 2 variants, but there are none"),
        ({}, {"resamples": 3}, "resamples=3 must be a whole number of at least 100"),
        ({}, {"seed": -1}, "seed=-1 must be a whole number from 0 to"),
        ({}, {"report": "perhaps"}, "report='perhaps' must be true or false"),
    ],
)
def test_mistakes_are_refused(text, values, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"variant": "a", "setting": "x", "clip": 1, "fd": 1}
    contents = {
        "bad": "[",
        "object": "{}",
        "row": '[{"variant": "a", "clip": 1}]',
        "twice": json.dumps([row, row]),
        "lists": json.dumps([{**row, "steps": [5]}]),
        "one": json.dumps([row]),
        "empty": "[]",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        job(text, **values)
    assert not (tmp_path / "results").exists()


def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path):
    write_study(tmp_path, [scores("rf")])
    done = run(f"runs={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == "a ranking compares at least 2 variants, but the only one is rf\n"


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = study(tmp_path, seeds=1)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[plots]', or report=false")):
        job({"runs": folder})
    job({"runs": folder}, report=False)
    assert {p.name for p in (folder / "ranking").iterdir()} == {"rank.json", "rank.md"}
