"""What post-training gains and what it costs: many runs, averaged over seeds."""

import math
from pathlib import Path

import pytest

from mmdit.cli.eval.alignment import as_markdown, notes_on
from mmdit.study.alignment import ALIGNMENT, at_compute, best_diverse, shared_compute
from mmdit.study.alignment_plots import accuracy_against_diversity, over_compute
from mmdit.study.curve_plots import compute_of
from mmdit.study.curves import Study, read_study
from tests.curves_for_tests import write_run

PROBE = {
    "_target_": "mmdit.study.AlignmentProbe",
    "prompts_per_task": 50,
    "diversity_prompts": 24,
    "members": 24,
    "steps": 10,
}
BASE = {"accuracy": 0.5, "diversity": 0.9, "pixel_deviation": 31.0}


def row(accuracy: float, diversity: float | None = None, **more: float) -> dict[str, float | None]:
    """An evaluation: all accuracies alike, and all diversities."""
    kinds = ("accuracy", "accuracy_held_out", "accuracy_other_sampler", "accuracy_position")
    found: dict[str, float | None] = {f"ema/{kind}": accuracy for kind in kinds}
    if diversity is not None:
        for kind in ("diversity", "diversity_place", "diversity_colour"):
            found[f"ema/{kind}"] = diversity
    return {**found, "ema/pixel_deviation": 30.0, **more}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two seeds that collapse late, one of which loses its diversity altogether; and two others."""
    rate = {"images_per_second": 10.0, "tflops": 5.0}
    for seed in (0, 1):
        ends = row(0.97, None if seed else 0.3, **rate)
        rows = {40: row(0.7, 0.9), 70: row(0.8 + seed / 10, 0.81), 100: ends}
        write_run(tmp_path, f"algorithm=awm,seed={seed}", rows, seed=seed, probe=PROBE)
    write_run(tmp_path, "wrong", {100: row(0.1)}, probe=PROBE)
    write_run(tmp_path, "varied", {50: row(0.6, 0.79), 100: row(0.8, 1.1)}, probe=PROBE)
    return read_study(tmp_path, ALIGNMENT)


def test_the_best_is_that_of_the_evaluations_with_enough_diversity(study: Study) -> None:
    awm, varied, wrong = study.recipes()
    best = best_diverse(awm)
    assert best is not None and best.step == 70
    assert best.accuracy.mean == pytest.approx(0.85)
    assert awm.last("accuracy").mean == pytest.approx(0.97)
    assert best_diverse(varied) == (100, varied.last("accuracy"))
    assert best_diverse(wrong) is None


def test_the_table_says_what_is_missing(study: Study) -> None:
    table = as_markdown(study.recipes(), BASE, study).splitlines()
    before, awm, varied, wrong = [line for line in table if line.startswith("|")][2:]
    assert before == "|  | before | 0.50 | - | - | 0.90 | - | - | 31.00 | - |  |  |  |"
    end = "0.97 ± 0.00 | 0.97 ± 0.00 | 0.97 ± 0.00"
    assert awm.startswith(f"| 1 | algorithm=awm | {end} | 0.30 (1 of 2 seeds) |")
    assert "| 0.97 ± 0.00 | 0.85 ± 0.64 (step 70) |" in awm
    assert varied.startswith("| 2 | varied (seeds 0) | 0.80 | 0.80 | 0.80 | 1.10 |")
    assert wrong.endswith("| 0.10 | 0.10 | 0.10 | - | - | - | 30.00 | 0.10 | - | - | - |")


def test_what_the_plots_lack_is_noted(study: Study) -> None:
    recipes = study.recipes()
    assert compute_of(recipes[0]) == pytest.approx([0.5 * 4 * step for step in (40, 70, 100)])
    assert notes_on(recipes, study) == [
        "Not in alignment-compute.png, no operations counted: varied.",
        "Not in alignment-compute.png, no operations counted: wrong.",
        "No point in alignment.png, without diversity at the end: wrong.",
    ]
    for draw in (over_compute, accuracy_against_diversity):
        for base in (BASE, {"accuracy": 0.0}):
            assert draw(recipes, base).startswith(b"\x89PNG")
        assert draw(recipes[2:], BASE).startswith(b"\x89PNG")


def test_recipes_are_compared_at_the_compute_that_all_have_had(study: Study) -> None:
    awm, varied, _ = study.recipes()
    whole = awm.tflop_per_step * 100
    assert shared_compute(study.recipes()) == pytest.approx(whole)  # no other counted it
    # Half-way: between 0.7 at step 40 and 0.85 at step 70.
    half = at_compute(awm, "accuracy", 0.5, whole / 2)
    assert half == pytest.approx(0.7 + 0.15 / 3)
    assert at_compute(awm, "accuracy", 0.5, whole / 5) == pytest.approx(0.6)
    assert math.isnan(at_compute(varied, "accuracy", 0.5, whole))
    table = as_markdown(study.recipes(), BASE, study).splitlines()
    assert table[2].endswith(f"| accuracy at {whole:.3g} TFLOP | diversity at {whole:.3g} TFLOP |")
    assert table[5].endswith("| 0.97 | - |") and table[6].endswith("| - | - |")
