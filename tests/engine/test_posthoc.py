"""Averages made after training equal those kept during it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdit.engine.ema import EMA, PowerFunction, gamma_of
from mmdit.engine.posthoc import (
    Point,
    PostHoc,
    fit,
    inner,
    reconstruct,
    remove_snapshots,
    snapshots_in,
)
from mmdit.errors import UserError
from mmdit.registry import register
from mmdit.runs.checkpoint import checkpoints_in
from mmdit.runs.folder import RunFolder
from tests.checkpoints_for_tests import write_checkpoint

STEPS = 640


@register
class Walk(nn.Module):
    """A weight that walks at random, a frozen one and a buffer."""

    def __init__(self, *, width: int = 20) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.frozen = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0))


def positions() -> Tensor:
    """Where the weight is after each step: a random walk, with noise around it."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(2, STEPS, 20, generator=generator)
    return 1 + steps[0].cumsum(0) / STEPS**0.5 + 0.3 * steps[1]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, Tensor]]:
    """A run with 32 snapshots, and averages of other profiles that were kept during it."""
    module = Walk()
    posthoc = PostHoc(module, sigma_rels=[0.05, 0.1], snapshot_every=STEPS // 32)
    kept = {s: EMA(module, profile=PowerFunction(sigma_rel=s)) for s in (0.04, 0.07, 0.1, 0.15)}
    run = RunFolder(tmp_path_factory.mktemp("walk"))
    for step, position in enumerate(positions(), 1):
        module.weight.data = position
        posthoc.weights["weight"].data = position
        posthoc.update(step, run.path, last=step == STEPS)
        for ema in kept.values():
            ema.update(step)
    write_checkpoint(run.path, STEPS, {"ema": kept[0.1].module})
    run.close()
    return run.path, {s: ema.module.weight.detach() for s, ema in kept.items()}


@pytest.mark.parametrize(("sigma_rel", "tolerance"), [(0.04, 1e-3), (0.07, 1e-4), (0.15, 1e-4)])
def test_reconstruction_equals_the_average_kept_during_training(
    walked: tuple[Path, dict[float, Tensor]], sigma_rel: float, tolerance: float
) -> None:
    run, kept = walked
    module = reconstruct(run, sigma_rel=sigma_rel)
    assert module.weight.dtype == torch.float32
    away = (module.weight - kept[sigma_rel]).norm() / kept[sigma_rel].norm()
    apart = (kept[0.1] - kept[sigma_rel]).norm() / kept[sigma_rel].norm()
    assert away < tolerance < apart / 20


def test_a_profile_that_was_kept_comes_back_as_it_was(walked) -> None:
    run, kept = walked
    assert torch.allclose(reconstruct(run, sigma_rel=0.1).weight, kept[0.1], rtol=0, atol=1e-6)


def test_frozen_weights_and_buffers_are_those_of_the_checkpoint(walked) -> None:
    module = reconstruct(walked[0], sigma_rel=0.12)
    assert torch.equal(module.frozen, torch.full((2,), 3.0))
    assert torch.equal(module.table, torch.arange(4.0))


def test_an_average_can_end_at_an_earlier_step(walked) -> None:
    module = Walk()
    ema = EMA(module, profile=PowerFunction(sigma_rel=0.07))
    for step, position in enumerate(positions()[: STEPS // 2], 1):
        module.weight.data.copy_(position)
        ema.update(step)
    found = reconstruct(walked[0], sigma_rel=0.07, step=STEPS // 2).weight
    assert (found - ema.module.weight).norm() < 1e-3 * ema.module.weight.norm()


def test_more_snapshots_fit_better() -> None:
    def error(count: int) -> float:
        steps = [1000 * (i + 1) / count for i in range(count)]
        points = [Point(gamma_of(s), step) for s in (0.05, 0.1) for step in steps]
        return fit(points, Point(gamma_of(0.15), 1000)).error

    errors = [error(count) for count in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("steps", [(300.0, 1000.0), (1000.0, 300.0), (700.0, 700.0)])
def test_inner_product_is_the_integral_of_both_profiles(steps: tuple[float, float]) -> None:
    points = [Point(gamma_of(s), step) for s, step in zip((0.08, 0.2), steps, strict=True)]
    n = 200_000
    tau = (torch.arange(n, dtype=torch.float64) + 0.5) * min(steps) / n
    product = torch.ones(n, dtype=torch.float64)
    for gamma, step in points:
        product *= (gamma + 1) * tau**gamma / step ** (gamma + 1)
    assert inner(*points) == pytest.approx(product.mean().item() * min(steps), rel=1e-6)


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    module = Walk()
    run = RunFolder(tmp_path)
    PostHoc(module, sigma_rels=[0.1], snapshot_every=1).update(1, tmp_path, last=True)
    write_checkpoint(run.path, 1, {"ema": module})
    path = snapshots_in(tmp_path)[0].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"step_00000001\.safetensors is missing or damaged"):
        reconstruct(tmp_path, sigma_rel=0.1)
    path.unlink()
    with pytest.raises(UserError, match=r"step_00000001\.safetensors is missing or damaged"):
        reconstruct(tmp_path, sigma_rel=0.1)
    run.close()


def test_snapshots_beyond_the_newest_checkpoint_do_not_count(tmp_path: Path) -> None:
    module = Walk()
    run = RunFolder(tmp_path)
    posthoc = PostHoc(module, sigma_rels=[0.1], snapshot_every=2)
    for step in range(1, 9):
        posthoc.update(step, tmp_path, last=False)
    write_checkpoint(run.path, 5, {"ema": module})
    run.close()
    assert [snapshot.step for snapshot in snapshots_in(tmp_path)] == [2, 4]
    assert checkpoints_in(tmp_path)[-1].step == 5
    with pytest.raises(UserError, match="no snapshots up to step 1"):
        reconstruct(tmp_path, sigma_rel=0.1, step=1)


@pytest.mark.parametrize(
    ("sigma_rels", "every", "told"),
    [
        ([], 1, "one number or several"),
        ([0.1, 0.1], 1, "differ"),
        ([0.1], 0, "snapshot_every=0"),
        (0.1, 1, "must be a list"),
    ],
)
def test_bad_settings_are_refused(sigma_rels: list[float], every: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        PostHoc(Walk(), sigma_rels=sigma_rels, snapshot_every=every)


@pytest.mark.parametrize("start", [0, 4])
def test_snapshots_of_an_earlier_attempt_are_removed(tmp_path: Path, start: int) -> None:
    """It got further than the step that the run goes on from."""
    module = Walk()
    earlier = PostHoc(module, sigma_rels=[0.1], snapshot_every=2)
    for step in range(1, 8):
        earlier.update(step, tmp_path, last=step == 7)
    folder = tmp_path / "snapshots"
    for name in ("step_00000006.safetensors.tmp", "step_00000004.json.tmp", "notes.txt"):
        (folder / name).touch()
    remove_snapshots(tmp_path, start)
    again = PostHoc(module, sigma_rels=[0.1], snapshot_every=3)
    for step in range(start + 1, 9):
        again.update(step, tmp_path, last=False)
    write_checkpoint(tmp_path, 8, {"ema": module})
    steps = {0: [3, 6], 4: [2, 4, 6]}[start]
    assert [snapshot.step for snapshot in snapshots_in(tmp_path)] == steps
    left = {path.name for path in folder.iterdir()}
    assert left - {"step_00000004.json.tmp"} == {
        "notes.txt",
        *(f"step_{step:08d}.{kind}" for step in steps for kind in ("json", "safetensors")),
    }
    assert ("step_00000004.json.tmp" in left) == (start == 4)
