"""A study end to end, at its smallest: sweep, stop, go on, score, rank."""

import json
import subprocess
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from mmdit.cli.scores import is_finished
from mmdit.cli.train import sweep_folder
from mmdit.runs.checkpoint import checkpoints_in
from tests.training_for_tests import ALONE, command, run

pytestmark = pytest.mark.slow  # each test trains several models and scores them

SMOKE = (
    *("experiment=smoke", "precision=fp32", "metrics=study", "name=study"),
    *("metrics.samples=6", "metrics.references=8", "metrics.batch_size=6"),
    *("clip.training.steps=2", "clip.training.batch_size=8", "clip.training.evaluate_every=2"),
    *("clip.training.save_every=2", "clip.samples=64"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two formulations were trained and scored."""
    folder = tmp_path_factory.mktemp("study")
    result = run(folder, "train.py", "-m", *SMOKE, "formulation=rf,edm_rf")
    assert "training the clip" in result.stdout and "reusing the clip" in result.stdout
    return folder


def run_of(folder: Path, label: str) -> Path:
    return folder / "runs" / "study" / f"{label},seed=0"


def test_each_variant_has_a_folder_named_by_its_values_and_its_scores(folder):
    for option, name in (("rf", "rf"), ("edm_rf", "edm/rf")):
        path = run_of(folder, f"formulation={option}")
        scores = json.loads((path / "scores.json").read_text())
        assert scores["variant"] == name and scores["samples"] == 6
        settings = {(row["weights"], row["steps"], row["guidance"]) for row in scores["scores"]}
        assert len(settings) == len(scores["scores"]) == 12
        assert all(row["function_evaluations"] > 0 for row in scores["scores"])
        newest = checkpoints_in(path)[-1]
        for kind, digest in scores["weights_sha256"].items():
            assert newest.read(kind).sha256 == digest
        (evaluation,) = path.glob("evaluations/*.json")
        measured = json.loads(evaluation.read_text())
        assert measured["protocol"] == "validation-1" and measured["samples"] == 4
        assert measured["ema"]["loss"] == scores["validation"]["ema"]["loss"]
        assert measured["ema"]["weights_sha256"] != measured["raw"]["weights_sha256"]
        assert (path / "objective.png").is_file()


def test_a_finished_variant_is_not_run_again_and_a_failed_one_stops_no_other(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/study/*/scores.json")}
    result = run(folder, "train.py", "-m", *SMOKE, "formulation=rf,edm_rf")
    assert result.stdout.count("is finished") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    values = ("objective/timesteps=mode", "objective.timesteps.s=9,0.5")
    failed = run(folder, "train.py", "-m", *SMOKE, *values, code=2)
    assert "job 0" in failed.stderr and "s 9 must lie in" in failed.stderr
    done = run_of(folder, "objective.timesteps.s=0.5")
    scores = json.loads((done / "scores.json").read_text())
    assert scores["variant"] == "objective.timesteps.s=0.5"  # what was varied, and no more


def test_a_finished_variant_is_not_taken_for_one_of_another_config(folder):
    changed = ("formulation=rf,edm_rf", "optimizer.lr=0.5")
    result = run(folder, "train.py", "-m", *SMOKE, *changed, code=2)
    assert "optimizer.lr was 0.0015, now 0.5" in result.stderr
    assert result.stderr.count("2 jobs of this multirun failed") == 1


@pytest.mark.parametrize(
    ("content", "remark"), [(None, False), ("[]", True), ('{"protocol"', True), ("\xff", True)]
)
def test_scores_that_cannot_be_read_are_measured_again_with_a_remark(
    tmp_path, caplog, content, remark
):
    config = OmegaConf.create(
        {"training": {"steps": 4}, "metrics": {"samples": 6, "references": 8, "seed": 0}}
    )
    if content is not None:
        (tmp_path / "scores.json").write_bytes(content.encode("latin-1"))
    run = SimpleNamespace(path=tmp_path, latest=lambda: SimpleNamespace(step=4))
    assert not is_finished(config, run)
    assert ("so the run is scored again" in caplog.text) == remark


def test_an_unfinished_variant_goes_on(folder):
    path = run_of(folder, "formulation=rf")
    (path / "scores.json").unlink()
    result = run(folder, "train.py", "-m", *SMOKE, "formulation=rf,edm_rf")
    assert result.stdout.count("is finished") == 1
    assert (path / "scores.json").is_file()  # measured again, of the weights that were there
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 7  # and not trained again


@pytest.mark.slow
def test_the_same_sweep_started_twice_at_once_is_done_by_both(tmp_path):
    words = command("train.py", "-m", "experiment=smoke", "precision=fp32", "seed=0,1")
    sweeps = [
        subprocess.Popen(words, cwd=tmp_path, env=ALONE, stdout=PIPE, stderr=PIPE, text=True)
        for _ in range(2)
    ]
    told = [sweep.communicate(timeout=300) for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], told
    assert "".join(out for out, _ in told).count(" is finished: it has made") == 2


def test_the_ranking_reads_what_the_sweep_wrote(folder):
    result = run(folder, "eval/rank.py", "runs=runs/study", "report=false", "out=ranking")
    assert "rf" in result.stdout and "edm/rf" in result.stdout
    assert json.loads((folder / "ranking" / "rank.json").read_text())["protocol"] == "rank-1"


def test_backbones_are_matched_by_one_key(folder):
    words = ("experiment=smoke", "precision=fp32", "match=flops", "model=toy_cross_dit")
    result = run(folder, "train.py", *words)
    assert "match=flops: width" in result.stdout
    refused = run(folder, "train.py", *words, "match=weight", code=2)
    assert "match='weight' must be one of params, flops" in refused.stderr


def test_folders_of_long_sweeps_have_short_names_of_their_own():
    config = OmegaConf.create({"runs": "runs", "name": "study", "seed": 0})
    names = {sweep_folder(config, f"{'key=value,' * 40}last={i}").name for i in range(3)}
    assert len(names) == 3
    assert all(len(name.encode()) <= 150 for name in names)
