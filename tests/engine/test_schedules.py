"""Schedules: pure functions of the step, continuous, with the ends they name."""

from itertools import pairwise

import pytest

from mmdit.engine.schedules import (
    WarmupConstant,
    WarmupCosine,
    WarmupStableDecay,
)
from mmdit.errors import UserError

KNOWN = [
    WarmupConstant(warmup_steps=10),
    WarmupCosine(warmup_steps=10, steps=200, final=0.1),
    WarmupCosine(warmup_steps=0, steps=200),
    WarmupStableDecay(warmup_steps=10, steps=200, decay_steps=40, final=0.1),
    WarmupStableDecay(warmup_steps=0, steps=200, decay_steps=200),
]
each_schedule = pytest.mark.each("schedule")
STEPS = range(1200)  # the toy training has 1000


def test_warm_up_is_linear_then_constant() -> None:
    schedule = WarmupConstant(warmup_steps=4)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert WarmupConstant(warmup_steps=0)(0) == 1.0


@each_schedule
def test_factor_lies_in_0_1_and_rises_in_a_line_to_1_at_the_end_of_the_warm_up(schedule) -> None:
    factors = [schedule(step) for step in STEPS]
    assert all(0 <= factor <= 1 for factor in factors)
    warm = schedule.warmup_steps
    assert factors[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert factors[warm] == factors[max(0, warm - 1)] == 1.0


@each_schedule
def test_a_schedule_that_names_its_end_stays_at_its_final_factor(schedule) -> None:
    if schedule.end is not None:
        assert schedule.end > schedule.warmup_steps
        for step in (schedule.end, schedule.end + 1, 10 * schedule.end):
            assert schedule(step) == pytest.approx(schedule.final)


@pytest.mark.parametrize("known", KNOWN, ids=lambda s: type(s).__name__)
def test_factor_falls_only_after_the_warm_up(known) -> None:
    after = [known(step) for step in range(max(0, known.warmup_steps - 1), 300)]
    assert all(a >= b for a, b in pairwise(after))


@each_schedule
def test_factor_of_a_step_depends_on_no_other_call(schedule) -> None:
    forwards = [schedule(step) for step in STEPS]
    backwards = [schedule(step) for step in reversed(STEPS)]
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
        (lambda: WarmupConstant(warmup_steps=-1), "warmup_steps=-1"),
        (lambda: WarmupCosine(warmup_steps=9, steps=9), "steps 9 .* more than warmup_steps, 9"),
        (lambda: WarmupCosine(steps=5000, final=1.5), "final=1.5"),
        (lambda: WarmupStableDecay(steps=2000, decay_steps=0), "decay_steps=0"),
        (lambda: WarmupStableDecay(warmup_steps=9, steps=20, decay_steps=12), "steps 20"),
        (lambda: WarmupStableDecay(steps=2000, decay_steps=9, final=-0.1), "final=-0.1"),
        (lambda: WarmupConstant(warmup_steps="x"), "warmup_steps='x' must be a whole number"),
        (lambda: WarmupConstant(warmup_steps=float("nan")), "warmup_steps=nan must be a whole"),
        (lambda: WarmupCosine(steps=5e3), "steps=5000.0 must be a whole number"),
        (lambda: WarmupCosine(steps=5000, final=None), "final=None must be a finite number"),
        (lambda: WarmupStableDecay(steps=2000, decay_steps=True), "decay_steps=True must be a"),
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
