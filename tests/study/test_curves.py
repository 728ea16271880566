"""Figures of many runs over their steps: what is read, averaged over seeds, and refused."""

import math
from pathlib import Path

import pytest

from mmdit.errors import UserError
from mmdit.study.curves import Comparison, Study, mean_of, read_study
from tests.curves_for_tests import write_run

PROBE = {"_target_": "mmdit.study.Probe", "steps": 10}
COMPARISON = Comparison(
    experiment="some",
    probe="Probe",
    figures={"right": "accuracy", "varied": "diversity"},
    order=("right",),
    required=("right",),
)


def row(right: float, varied: float | None = 1.0) -> dict[str, float | None]:
    both = {"ema/accuracy": right, "ema/diversity": varied}
    return {name: value for name, value in both.items() if value is not None}


def read(folder: Path) -> Study:
    return read_study(folder, COMPARISON)


def test_runs_that_differ_in_their_seed_are_one_recipe(tmp_path) -> None:
    for seed, right in enumerate((0.3, 0.5)):
        rows = {50: row(0.1), 100: row(right)}
        write_run(tmp_path, f"adapter=lora,seed={seed}", rows, seed=seed, probe=PROBE)
    write_run(tmp_path, "plain", {100: row(0.6)}, variant="named", probe=PROBE)
    best, second = read(tmp_path).recipes()
    assert (best.name, best.seeds, best.steps) == ("named", [0], [100])
    assert (second.name, second.seeds, second.steps) == ("adapter=lora", [0, 1], [50, 100])
    assert second.last("right").mean == pytest.approx(0.4)


def test_what_is_left_out_is_said(tmp_path) -> None:
    rows = {100: row(0.9)}
    write_run(tmp_path, "good", rows, probe=PROBE)
    write_run(tmp_path, "bare", rows, probe=None)
    write_run(tmp_path, "other", rows, probe={"_target_": "mmdit.study.WordAccuracy"})
    write_run(tmp_path, "random", rows, probe=PROBE, initial=None)
    write_run(tmp_path, "student", rows, probe=PROBE, student={"_target_": "mmdit.fewsteps.LADD"})
    write_run(tmp_path, "stopped", {50: row(0.9)}, probe=PROBE)
    (write_run(tmp_path, "begun", {}, probe=PROBE) / "metrics.jsonl").unlink()
    torn = write_run(tmp_path, "training", {50: row(0.1)}, probe=PROBE) / "metrics.jsonl"
    torn.write_text(torn.read_text() + '\n{"step": 60, "ema/accu')
    study = read(tmp_path)
    assert [curve.recipe for curve in study.curves] == ["good"]
    assert sorted(study.notes) == [
        "Ignored, a student, which samples in other steps than the initial model: student.",
        "Ignored, not finished: begun.",
        "Ignored, not finished: stopped.",
        "Ignored, not finished: training.",
        "Ignored, without a probe Probe: bare.",
        "Ignored, without a probe Probe: other.",
        "Ignored, without initial weights: random.",
    ]


def test_a_figure_that_is_missing_is_averaged_over_the_seeds_that_have_it(tmp_path) -> None:
    for seed, varied in enumerate((0.6, 0.8, None)):
        rows = {50: row(0.1, None), 100: row(0.9, varied)}
        write_run(tmp_path, f"a,seed={seed}", rows, seed=seed, probe=PROBE)
    (recipe,) = read(tmp_path).recipes()
    assert recipe.steps == [50, 100]
    assert recipe.last("right").seeds == 3
    assert recipe.last("varied") == pytest.approx((0.7, 12.71 * 0.1, 2))
    none = recipe.figures["varied"][50]
    assert math.isnan(none.mean) and none.seeds == 0 and str(none) == "-"


def test_operations_of_a_step_are_those_of_its_samples_whatever_the_speed(tmp_path) -> None:
    rates = [{"images_per_second": fast, "tflops": 2 * fast} for fast in (5.0, 10.0)]
    rows = {50: rates[0], 90: {"tflops": None}, 100: rates[1] | row(0.9)}
    write_run(tmp_path, "a", rows, probe=PROBE)
    write_run(tmp_path, "b", {100: row(0.5)}, probe=PROBE)
    counted, not_counted = read(tmp_path).recipes()
    assert counted.tflop_per_step == pytest.approx(2 * 4)
    assert math.isnan(not_counted.tflop_per_step)


def test_intervals_are_students() -> None:
    # Three values: 4.303 times the standard error.
    found = mean_of([0.4, 0.5, 0.6])
    assert found.mean == pytest.approx(0.5)
    assert found.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert math.isnan(mean_of([0.4]).half_width)
    assert mean_of([0.0, 1.0] * 20).half_width == pytest.approx(0.16, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_sha256": "cd"}, "initial_sha256 differs"),
        ({"probe": PROBE | {"steps": 5}}, "probe differs"),
        ({"variant": "b", "seed": 0}, "seed 0 of b is there twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, message) -> None:
    write_run(tmp_path, "b", {100: row(1.0)}, probe=PROBE)
    write_run(tmp_path, "c", {100: row(1.0)}, **({"probe": PROBE} | changes))
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_runs_of_one_recipe_need_an_evaluation_in_common(tmp_path) -> None:
    for seed, steps in enumerate((100, 150)):
        write_run(
            *(tmp_path, f"a,seed={seed}", {steps: row(1.0)}),
            seed=seed,
            probe=PROBE,
            training={"steps": steps, "batch_size": 4},
        )
    with pytest.raises(UserError, match="the runs of a have no evaluation at the same step"):
        read(tmp_path).recipes()


def test_folders_without_such_runs_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="no finished run in it has a probe Probe"):
        read(tmp_path)
    write_run(tmp_path, "a", {100: row(1.0)}, probe=PROBE)
    (tmp_path / "a" / "metrics.jsonl").unlink()
    (tmp_path / "a" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is not readable"):
        read(tmp_path)
