"""How much of its teacher's accuracy students keep: many runs, averaged over seeds."""

from pathlib import Path

import pytest

from mmdit.cli.eval.few_steps import Teacher, as_json, as_markdown, notes_on
from mmdit.errors import UserError
from mmdit.study.alignment import ALIGNMENT
from mmdit.study.curves import Study, read_study
from mmdit.study.few_steps import FEW_STEPS
from mmdit.study.few_steps_plots import over_compute
from tests.curves_for_tests import write_run

PROBE = {
    "_target_": "mmdit.study.AlignmentProbe",
    "prompts_per_task": 50,
    "diversity_prompts": 24,
    "members": 24,
    "steps": 2,
}
STUDENT = {"probe": PROBE, "student": {"steps": 2}}
TEACHER = Teacher(28, 2.5, {"accuracy": 0.8, "accuracy_held_out": 0.7, "diversity": 1.0})
BASE = {"accuracy": 0.25, "accuracy_in_one": 0.0, "accuracy_held_out": 0.2}


def row(accuracy: float, in_one: float, **more: float) -> dict[str, float | None]:
    found: dict[str, float | None] = {"ema/accuracy": accuracy, "ema/accuracy_held_out": accuracy}
    return {**found, "ema/accuracy_other_sampler": in_one, "ema/pixel_deviation": 30.0, **more}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two seeds of one student, one of another, and a run that is no student."""
    rate = {"images_per_second": 10.0, "tflops": 5.0}
    for seed in (0, 1):
        rows = {50: row(0.4, 0.1), 100: row(0.7 + seed / 10, 0.6, **rate)}
        write_run(tmp_path, f"student=mean_flow,seed={seed}", rows, seed=seed, **STUDENT)
    write_run(tmp_path, "student=reflow,seed=0", {100: row(0.6, 0.2)}, **STUDENT)
    write_run(tmp_path, "aligned", {100: row(0.9, 0.9)}, probe=PROBE)
    return read_study(tmp_path, FEW_STEPS)


def test_the_table_has_both_rows_of_the_teacher_and_what_is_kept(study: Study) -> None:
    table = as_markdown(study.recipes(), BASE, TEACHER, study).splitlines()
    teacher, base, mean_flow, reflow = [line for line in table if line.startswith("|")][2:]
    assert teacher.startswith(
        "|  | the teacher, 28 steps at guidance 2.5 | 0.80 | - | 0.70 | 1.00 |"
    )
    assert base.startswith("|  | the teacher, sampled like a student | 0.25 | 0.00 | 0.20 | - |")
    assert mean_flow.startswith("| 1 | student=mean_flow | 0.75 ± 0.64 | 0.60 ± 0.00 |")
    assert mean_flow.endswith("| 30.00 ± 0.00 | 0.94 ± 0.79 | 0.75 ± 0.00 | 200 |")
    assert reflow.startswith("| 2 | student=reflow (seeds 0) | 0.60 | 0.20 |")
    assert reflow.endswith("| 0.75 | 0.25 | - |")


def test_what_is_left_out_is_noted(study: Study) -> None:
    recipes = study.recipes()
    assert notes_on(recipes, study) == [
        "Ignored, not a student of few steps: aligned.",
        "Not in few_steps.png, no operations counted: student=reflow.",
    ]
    assert as_json(recipes[0], TEACHER)["kept"]["mean"] == pytest.approx(0.75 / 0.8)
    for base in (BASE, {}):
        assert over_compute(recipes, base, 0.8, 2).startswith(b"\x89PNG")


def test_students_and_aligned_models_are_compared_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "students", "one", {100: row(0.6, 0.2)}, **STUDENT)
    write_run(tmp_path / "aligned", "one", {100: row(0.6, 0.2)}, probe=PROBE)
    assert len(read_study(tmp_path / "students", FEW_STEPS).curves) == 1
    assert len(read_study(tmp_path / "aligned", ALIGNMENT).curves) == 1
    with pytest.raises(UserError, match="no finished run in it has a probe AlignmentProbe"):
        read_study(tmp_path / "students", ALIGNMENT)
    with pytest.raises(UserError, match="experiment=few_steps probe=student"):
        read_study(tmp_path / "aligned", FEW_STEPS)
