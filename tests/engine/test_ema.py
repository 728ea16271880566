"""Averages: how long they remember, and in what precision."""

import math

import pytest
import torch
from torch import nn

from mmdit.engine.ema import EMA, ConstantDecay, HalfLife, PowerFunction, Profile, gamma_of
from mmdit.errors import UserError

each_profile = pytest.mark.each("profile")


def share_of_start(profile: Profile, steps: int) -> float:
    """What is left after `steps` steps of an average's start."""
    module = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        module.weight.zero_()
    ema = EMA(module, profile=profile)
    with torch.no_grad():
        ema.module.weight.fill_(1.0)
    for step in range(1, steps + 1):
        ema.update(step)
    return ema.module.weight.item()


@each_profile
def test_average_of_bfloat16_weights_is_float32_and_moves(profile: Profile) -> None:
    module = nn.Linear(4, 4).to(torch.bfloat16)
    ema = EMA(module, profile=profile)
    assert all(average.dtype == torch.float32 for average in ema.module.parameters())
    before = ema.module.weight.clone()
    with torch.no_grad():
        module.weight += 1
    for step in range(1, 4):
        ema.update(step * profile.every)
    assert (ema.module.weight > before).all()
    assert all(average.dtype == torch.float32 for average in ema.module.parameters())


@each_profile
def test_a_profile_forgets_the_start_and_never_the_weights(profile: Profile) -> None:
    """Every update keeps a share of [0, 1), and of the start less and less is left."""
    assert type(profile.every) is int and profile.every >= 1
    steps = range(profile.every, 300_000, profile.every * 7)
    decays = [profile.decay(step) for step in steps]
    assert all(0 <= decay < 1 for decay in decays)
    assert decays[::-1] == [profile.decay(step) for step in reversed(steps)]  # of the step alone
    left = share_of_start(profile, 30 * profile.every)
    later = math.prod(decays)
    assert later <= left < 1 and later < 0.5


def test_average_converges_to_constant_weights_at_its_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, profile=ConstantDecay(decay=0.5, every=2))
    with torch.no_grad():
        ema.module.weight.zero_()
        module.weight.fill_(1.0)
    expected = 0.0
    for step in range(1, 41):
        ema.update(step)
        if step % 2 == 0:
            decay = min(0.5, (1 + step // 2) / (10 + step // 2))
            expected = decay * expected + (1 - decay)
        assert ema.module.weight.item() == pytest.approx(expected)
    assert expected == pytest.approx(1.0, abs=1e-5)


def test_average_shares_frozen_weights_and_does_not_follow_buffers() -> None:
    module = nn.BatchNorm1d(2)
    module.weight.requires_grad_(False)
    ema = EMA(module, profile=ConstantDecay(decay=0.5, every=1))
    with torch.no_grad():
        for value in (module.bias, module.running_mean):
            value += 1
    ema.update(1)
    assert ema.module.weight is module.weight and ema.shared == {"weight"}
    assert torch.equal(ema.module.running_mean, torch.zeros(2))
    assert (ema.module.bias > 0).all()


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
def test_half_is_left_after_the_half_life_whatever_the_batch_size(batch_size: int) -> None:
    profile = HalfLife(half_life=640, batch_size=batch_size)
    assert share_of_start(profile, 640 // batch_size) == pytest.approx(0.5, rel=1e-5)
    assert share_of_start(profile, 1920 // batch_size) == pytest.approx(0.125, rel=1e-5)


def test_half_life_ramps_up_with_the_samples_seen_and_then_stays() -> None:
    ramped = HalfLife(half_life=1000, batch_size=10, ramp_up=0.1)
    constant = HalfLife(half_life=1000, batch_size=10)
    assert ramped.decay(1) == pytest.approx(0.5**10)
    assert ramped.decay(500) == pytest.approx(0.5 ** (10 / 500))
    assert ramped.decay(999) < constant.decay(999)
    assert ramped.decay(1000) == ramped.decay(5000) == constant.decay(1)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.05, 0.1, 0.2, 0.28, 12**-0.5])
def test_weights_of_a_power_function_spread_by_sigma_rel(sigma_rel: float) -> None:
    steps = 20_000
    profile = PowerFunction(sigma_rel=sigma_rel)
    share, weights = 1.0, torch.zeros(steps, dtype=torch.float64)
    for step in range(steps, 0, -1):
        weights[step - 1] = share * (1 - profile.decay(step))
        share *= profile.decay(step)
    assert weights.sum().item() == pytest.approx(1.0)
    assert share == 0.0
    place = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    mean = (weights * place).sum()
    spread = (weights * (place - mean).square()).sum().sqrt()
    assert spread.item() == pytest.approx(sigma_rel, rel=2e-3)


def test_widest_power_function_is_the_mean_of_all_steps() -> None:
    assert gamma_of(12**-0.5) == pytest.approx(0.0, abs=1e-6)
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, profile=PowerFunction(sigma_rel=12**-0.5))
    for step in range(1, 11):
        with torch.no_grad():
            module.weight.fill_(float(step))
        ema.update(step)
    assert ema.module.weight.item() == pytest.approx(5.5)


def test_power_function_keeps_its_shape_as_the_run_grows() -> None:
    profile = PowerFunction(sigma_rel=0.1)
    # What is left of an average from step s at step t depends on s / t alone.
    ratios = []
    for scale in (1, 10, 100):
        left = 1.0
        for step in range(10 * scale + 1, 20 * scale + 1):
            left *= profile.decay(step)
        ratios.append(left)
    assert ratios == pytest.approx([0.5 ** (profile.gamma + 1)] * 3)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ConstantDecay(decay=1.0, every=1), r"^decay=1.0"),
        (lambda: ConstantDecay(decay=-0.1, every=1), r"^decay=-0.1"),
        (lambda: ConstantDecay(decay=0.9, every=0), r"^every=0"),
        (lambda: HalfLife(half_life=0), r"^half_life=0"),
        (lambda: HalfLife(half_life=9, batch_size=0), r"^batch_size=0"),
        (lambda: HalfLife(half_life=9, ramp_up=0.0), r"^ramp_up=0.0"),
        (lambda: PowerFunction(sigma_rel=0.0), "sigma_rel 0.0"),
        (lambda: PowerFunction(sigma_rel=0.3), "sigma_rel 0.3"),
        (lambda: ConstantDecay(decay="x", every=1), "decay='x' must be a finite number"),
        (lambda: ConstantDecay(decay=0.9, every=1.5), "every=1.5 must be a whole number"),
        (lambda: HalfLife(half_life=None), "half_life=None must be a finite number"),
        (lambda: HalfLife(half_life=9, ramp_up=[1]), r"ramp_up=\[1\] must be a finite number"),
        (lambda: PowerFunction(sigma_rel=True), "sigma_rel=True must be a finite number"),
    ],
)
def test_bad_numbers_are_refused(make, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make()


class Parts(nn.Module):
    """Something trained beside something frozen; both have buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.BatchNorm1d(2), nn.BatchNorm1d(2).requires_grad_(False)


def test_frozen_parts_are_shared_and_trained_ones_are_not() -> None:
    module = Parts()
    ema = EMA(module, profile=ConstantDecay(decay=0.9999, every=1))
    average = ema.module
    assert average is not module
    for name, tensor in module.state_dict(keep_vars=True).items():
        same = average.state_dict(keep_vars=True)[name] is tensor
        assert same == name.startswith("frozen.") == (name in ema.shared), name
    module.frozen.load_state_dict({k: v + 2 for k, v in module.frozen.state_dict().items()})
    assert (average.frozen.weight == 3).all() and (average.frozen.running_mean == 2).all()
