"""Schedules: pure functions of the step, continuous, with the ends they name."""

import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mmdit.engine import schedules
from mmdit.engine.schedules import (
    WarmupConstant,
    WarmupCosine,
    WarmupStableDecay,
)
from mmdit.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "schedule"
ALL = [
    WarmupConstant(warmup_steps=10),
    WarmupCosine(warmup_steps=10, steps=200, final=0.1),
    WarmupCosine(warmup_steps=0, steps=200),
    WarmupStableDecay(warmup_steps=10, steps=200, decay_steps=40, final=0.1),
    WarmupStableDecay(warmup_steps=0, steps=200, decay_steps=200),
]
each_schedule = pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)


def test_yamls_and_classes_are_the_same_set() -> None:
    classes = {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): f"mmdit.engine.{name}"
        for name, value in vars(schedules).items()
        if inspect.isclass(value)
        and value.__module__ == schedules.__name__
        and not inspect.isabstract(value)
    }
    targets = {f.stem: yaml.safe_load(f.read_text())["_target_"] for f in CONFIGS.glob("*.yaml")}
    assert targets == classes


def test_warm_up_is_linear_then_constant() -> None:
    schedule = WarmupConstant(warmup_steps=4)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert WarmupConstant(warmup_steps=0)(0) == 1.0


@each_schedule
def test_factor_lies_in_0_1_and_falls_only_after_the_warm_up(schedule) -> None:
    factors = [schedule(step) for step in range(300)]
    assert all(0 <= factor <= 1 for factor in factors)
    warm = schedule.warmup_steps
    assert all(a < b for a, b in pairwise(factors[:warm]))
    assert all(a >= b for a, b in pairwise(factors[max(0, warm - 1) :]))
    assert factors[warm] == factors[max(0, warm - 1)] == 1.0


@each_schedule
def test_factor_of_a_step_depends_on_no_other_call(schedule) -> None:
    forwards = [schedule(step) for step in range(250)]
    backwards = [schedule(step) for step in reversed(range(250))]
    assert backwards[::-1] == forwards


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_decays_end_at_final_and_stay_there(final: float) -> None:
    for schedule in (
        WarmupCosine(warmup_steps=10, steps=100, final=final),
        WarmupStableDecay(warmup_steps=10, steps=100, decay_steps=20, final=final),
    ):
        assert schedule(100) == schedule(101) == schedule(10_000) == pytest.approx(final)
        assert schedule(99) >= schedule(100)


def test_cosine_is_half_way_in_the_middle_and_changes_smoothly() -> None:
    schedule = WarmupCosine(warmup_steps=10, steps=1010)
    assert schedule(510) == pytest.approx(0.5)
    assert max(a - b for a, b in pairwise(map(schedule, range(9, 1020)))) < 2 / 1000


def test_stable_decay_is_stable_until_the_decay_then_falls_as_1_minus_sqrt() -> None:
    schedule = WarmupStableDecay(warmup_steps=5, steps=100, decay_steps=16)
    assert {schedule(step) for step in range(5, 85)} == {1.0}
    assert schedule(88) == pytest.approx(1 - 0.5)
    assert schedule(93) == pytest.approx(1 - 0.75)


def test_stable_decays_of_two_lengths_agree_until_the_first_decays() -> None:
    short, long = (
        WarmupStableDecay(warmup_steps=5, steps=steps, decay_steps=20) for steps in (100, 400)
    )
    assert [short(step) for step in range(81)] == [long(step) for step in range(81)]
    assert short(81) < long(81)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: WarmupConstant(warmup_steps=-1), "warmup_steps -1"),
        (lambda: WarmupCosine(warmup_steps=9, steps=9), "steps 9 .* more than warmup_steps, 9"),
        (lambda: WarmupCosine(steps=5000, final=1.5), "final 1.5"),
        (lambda: WarmupStableDecay(steps=2000, decay_steps=0), "decay_steps 0"),
        (lambda: WarmupStableDecay(warmup_steps=9, steps=20, decay_steps=12), "steps 20"),
        (lambda: WarmupStableDecay(steps=2000, decay_steps=9, final=-0.1), "final -0.1"),
        (lambda: WarmupConstant(warmup_steps="x"), "warmup_steps 'x' must be a whole number"),
        (lambda: WarmupConstant(warmup_steps=float("nan")), "warmup_steps nan must be a whole"),
        (lambda: WarmupCosine(steps=5e3), "steps 5000.0 must be a whole number"),
        (lambda: WarmupCosine(steps=5000, final=None), "final None must be a number"),
        (lambda: WarmupStableDecay(steps=2000, decay_steps=True), "decay_steps True must be a"),
    ],
)
def test_bad_numbers_are_refused(make, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make()


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupCosine(warmup_steps=2, steps=6),
        WarmupStableDecay(warmup_steps=2, steps=6, decay_steps=2),
    ],
)
def test_a_training_that_outlasts_its_learning_rate_is_refused(schedule) -> None:
    with pytest.raises(UserError, match=r"training\.steps=12 .* schedule\.steps=6.* last 6 steps"):
        schedule.check_length(12)
    assert schedule.check_length(6) == []
    assert "training ends 1 steps before" in schedule.check_length(5)[0]


def test_what_a_schedule_leaves_unsaid_is_remarked() -> None:
    assert WarmupConstant(warmup_steps=2).check_length(10**6) == []
    assert "never reaches" in WarmupConstant(warmup_steps=6).check_length(6)[0]
    (remark,) = WarmupCosine(warmup_steps=2, steps=6, final=0.1).check_length(12)
    assert remark == "the last 6 steps are made at 0.1 x lr"
