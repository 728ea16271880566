"""The loop on a model of a few weights: a run is a pure function of its config and seed."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmdit.data.order import Order, ShuffledOrder
from mmdit.engine import loop, meter, skips
from mmdit.engine.ema import EMA, ConstantDecay
from mmdit.engine.loggers import NoLogger, read_metrics
from mmdit.engine.loop import train
from mmdit.engine.optimizers import adamw
from mmdit.engine.schedules import WarmupConstant
from mmdit.engine.settings import Settings
from mmdit.engine.state import TrainState
from mmdit.engine.tasks import Work
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.registry import register
from mmdit.runs.checkpoint import checkpoints_in
from mmdit.runs.folder import RunFolder


@register
class Line(nn.Module):
    """y = w x + b."""

    def __init__(self, *, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)


class Regression:
    """Learns the sum of its inputs, which are keyed by (step, sample)."""

    protocol: ClassVar[dict[str, str | int]] = {"protocol": "regression"}
    higher_is_better: ClassVar[frozenset[str]] = frozenset({"likeness"})

    def __init__(self, poison: tuple[int, int] | None = None) -> None:
        torch.manual_seed(0)
        self.module = Line()
        self.poison = poison  # (step, place in the batch) where the loss is not finite

    def order(self, *, batch_size: int, seed: int) -> Order:
        return ShuffledOrder(size=10, seed=seed)

    def example(self, step: int, indices: Sequence[int]) -> Tensor:
        x = torch.stack([torch.randn(3, generator=generator_for("x", step, i)) for i in indices])
        if self.poison is not None and self.poison[0] == step:
            x[self.poison[1]] = float("nan")
        return x

    def loss(self, x: Tensor) -> Tensor:
        return (self.module.linear(x)[:, 0] - x.sum(1)).square()

    def times(self, x: Tensor) -> Tensor:
        return torch.linspace(0, 1, len(x))

    def figures(self) -> dict[str, float]:
        return {}

    def work(self, x: Tensor) -> Work:
        return Work()

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Line)
        return {"loss": (module.linear.weight - 1).square().sum().item()}

    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        return torch.zeros(1, 32, 32, 3, dtype=torch.uint8), ["nothing"]


def go(
    folder: Path,
    steps: int,
    poison: tuple[int, int] | None = None,
    log_every: int = 1,
    **settings: Any,
) -> Regression:
    task = Regression(poison)
    run = RunFolder(folder)
    try:
        train(
            task,
            TrainState(
                task.module,
                ema=EMA(task.module, profile=ConstantDecay(decay=0.9, every=2)),
                optimizer=adamw(task.module, lr=0.05, weight_decay=0.1),
                schedule=WarmupConstant(warmup_steps=3),
            ),
            run=run,
            settings=Settings(
                steps=steps,
                batch_size=4,
                clip=1.0,
                log_every=log_every,
                evaluate_every=5,
                save_every=2,
                keep=3,
                **settings,
            ),
            seed=0,
            logger=NoLogger(),
        )
    finally:
        run.close()
    return task


def losses(folder: Path) -> dict[float, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_run_in_two_parts_equals_an_unbroken_one(tmp_path: Path, stop: int) -> None:
    whole = go(tmp_path / "whole", 12)
    go(tmp_path / "parts", stop)
    parts = go(tmp_path / "parts", 12)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(parts.module.linear.weight, whole.module.linear.weight)


def test_logged_losses_do_not_depend_on_where_a_run_stopped(tmp_path: Path) -> None:
    go(tmp_path / "whole", 12, log_every=3)
    go(tmp_path / "parts", 5, log_every=3)
    go(tmp_path / "parts", 12, log_every=3)
    assert sorted(losses(tmp_path / "whole")) == [3, 6, 9, 12]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_it_learns(tmp_path: Path) -> None:
    task = go(tmp_path, 120)
    assert (task.module.linear.weight - 1).abs().max() < 0.1


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 7: the loss is nan.*samples \[\d\]"):
        go(tmp_path / "bad", 12, poison=(7, 2))
    assert [c.step for c in checkpoints_in(tmp_path / "bad")] == [2, 4, 6]
    go(tmp_path / "bad", 12)
    go(tmp_path / "good", 12)
    assert losses(tmp_path / "bad") == losses(tmp_path / "good")


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    go(tmp_path, 9)
    found = checkpoints_in(tmp_path)
    assert [c.step for c in found] == [6, 8, 9]
    assert [c.finished for c in found] == [False, False, True]


def test_a_run_of_no_steps_left_trains_nothing(tmp_path: Path) -> None:
    before = go(tmp_path, 6).module.linear.weight
    again = go(tmp_path, 6).module.linear.weight
    assert torch.equal(before, again)
    assert max(losses(tmp_path)) == 6


@pytest.mark.parametrize("group", ["raw", "ema", "optimizer", "manifest.json"])
def test_after_damage_a_run_goes_on_from_the_checkpoint_before(
    tmp_path: Path, group: str, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path / "whole", 8)
    go(tmp_path / "parts", 5)
    newest = checkpoints_in(tmp_path / "parts")[-1].folder
    path = newest / group
    path = path if path.is_file() else next(path.iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    go(tmp_path / "parts", 8)
    assert f"{newest} is damaged" in caplog.text and "going on from step 4" in caplog.text
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    go(tmp_path, 4)
    newest = checkpoints_in(tmp_path)[-1].folder
    newest.rename(newest.with_name(newest.name + ".tmp"))
    (newest.with_name(newest.name + ".tmp") / "manifest.json").unlink()
    go(tmp_path, 6)
    go(tmp_path / "whole", 6)
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_run_that_never_gets_finite_again_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skips, "MOST_IN_A_ROW", 3)
    monkeypatch.setattr(Regression, "loss", lambda self, x: self.module.linear(x)[:, 0] / 0)
    with pytest.raises(UserError, match=r"step 2: 3 steps in a row were left out.*optimizer\.lr"):
        go(tmp_path / "flow", 6, nonfinite="skip")
    with pytest.raises(UserError, match=r"step 2: 3 steps .* Lower autoencoder\.lr: the autoenc"):
        go(tmp_path / "stage", 6, nonfinite="skip", section="autoencoder.training")


def test_the_best_checkpoint_is_that_of_the_weights_that_were_measured(tmp_path: Path) -> None:
    go(tmp_path, 7, keep_best="ema/loss")  # evaluates at 5 and 7, saves at even steps, keeps 3
    assert [checkpoint.step for checkpoint in checkpoints_in(tmp_path)] == [5, 6, 7]


@pytest.mark.parametrize("figure", ["ema/loss", "raw/likeness"])
def test_the_best_checkpoint_is_that_of_the_better_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str
) -> None:
    losses = iter([3.0, 3.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])  # averaged and raw each time

    def evaluate(*_: object) -> dict[str, float]:
        loss = next(losses)
        return {"loss": loss, "likeness": -loss}

    monkeypatch.setattr(Regression, "evaluate", evaluate)
    go(tmp_path, 20, keep_best=figure)  # evaluates at 5, 10, 15 and 20
    assert [checkpoint.step for checkpoint in checkpoints_in(tmp_path)] == [10, 16, 18, 20]


def test_a_figure_that_is_none_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(tmp_path, 5, keep_best="ema/los")
    assert "keep_best=ema/los is not a validation metric" in caplog.text


def test_a_stopped_run_of_no_steps_left_is_measured_and_finished(tmp_path: Path) -> None:
    go(tmp_path, 6)
    shutil.rmtree(checkpoints_in(tmp_path)[-1].folder)
    go(tmp_path, 4)
    (checkpoint,) = [c for c in checkpoints_in(tmp_path) if c.step == 4]
    assert checkpoint.finished and "ema/loss" in checkpoint.metrics


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"clip": float("nan")}, r"training\.clip=nan must be a finite number above 0"),
        ({"timeout": float("inf")}, r"training\.timeout=inf must be a finite number above 0"),
        ({"keep_best": 5}, r"training\.keep_best=5 must be a text"),
    ],
)
def test_settings_that_are_none_are_refused(change: dict[str, Any], told: str) -> None:
    plain: dict[str, Any] = dict.fromkeys(Settings._fields[:7], 1)
    with pytest.raises(UserError, match=told):
        Settings.of({**plain, **change}, "training")


def test_settings_know_their_section() -> None:
    plain: dict[str, Any] = dict.fromkeys(Settings._fields[:7], 1)
    assert Settings.of(plain, "clip.training").section == "clip.training"


def test_settings_that_are_missing_are_named() -> None:
    with pytest.raises(UserError, match=r"training has no batch_size, keep, and needs them"):
        Settings.of(
            {"steps": 1, "clip": 1.0, "log_every": 1, "evaluate_every": 1, "save_every": 1},
            "training",
        )


def test_snapshots_of_an_attempt_that_left_no_checkpoint_are_removed(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    for step in (2, 9):
        (tmp_path / "snapshots" / f"step_{step:08d}.json").touch()
    go(tmp_path, 4)
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    with pytest.raises(UserError, match="in use by process"):
        RunFolder(tmp_path)
    first.close()
    RunFolder(tmp_path).close()


def test_a_step_that_is_not_finite_can_be_left_out(tmp_path: Path) -> None:
    task = go(tmp_path, 6, poison=(3, 1), nonfinite="skip")
    checkpoint = checkpoints_in(tmp_path)[-1]
    assert checkpoint.metrics["skipped_steps"] == 1
    assert all(weight.isfinite().all() for weight in task.module.parameters())
    go(tmp_path / "parts", 4, poison=(3, 1), nonfinite="skip")
    go(tmp_path / "parts", 6, poison=(3, 1), nonfinite="skip")
    assert checkpoints_in(tmp_path / "parts")[-1].metrics["skipped_steps"] == 1
    assert losses(tmp_path / "parts")[6] == losses(tmp_path)[6]


def test_steps_that_are_left_out_are_counted_in_the_log(tmp_path: Path) -> None:
    go(tmp_path / "skips", 6, poison=(3, 1), nonfinite="skip")
    rows = [row for row in read_metrics(tmp_path / "skips" / "metrics.jsonl") if "lr" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1]
    go(tmp_path / "stops", 1)
    assert "skipped_steps" not in read_metrics(tmp_path / "stops" / "metrics.jsonl")[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_neither_workers_nor_accumulation_change_the_losses(
    tmp_path: Path, workers: int, accumulation: int
) -> None:
    go(tmp_path / "plain", 6)
    go(tmp_path / "other", 6, workers=workers, accumulation=accumulation)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_what_is_logged_at_each_interval(tmp_path: Path) -> None:
    go(tmp_path, 2)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert {"loss", "gradient_norm", "lr", "images_per_second", "data_wait", "memory_gb"} <= set(
        row
    )
    by_level = [row[f"loss_t{low:.2f}-{low + 0.25:.2f}"] for low in (0.0, 0.25, 0.5, 0.75)]
    assert sum(by_level) / 4 == pytest.approx(row["loss"], rel=1e-6)  # one sample in each


def test_speed_is_that_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def lasting(seconds: float, original: Any) -> Any:
        def longer(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return original(*arguments, **options)

        return longer

    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Regression, "loss", lasting(1.0, Regression.loss))
    monkeypatch.setattr(Regression, "evaluate", lasting(30.0, Regression.evaluate))
    monkeypatch.setattr(loop.Saver, "save", lasting(100.0, loop.Saver.save))
    go(tmp_path, 9, log_every=3)  # evaluates at 5 and 9, saves at even steps and at 9
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "lr" in row]
    assert [row["images_per_second"] for row in rows] == pytest.approx([4.0] * 3)


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make the losses of some steps not finite."""
    example = Regression.example

    def spoiled(self: Regression, step: int, indices: Sequence[int]) -> Tensor:
        return example(self, step, indices) * (float("nan") if bad(step) else 1.0)

    monkeypatch.setattr(Regression, "example", spoiled)


@pytest.mark.parametrize(
    ("steps", "bad", "told"),
    [
        (8, lambda step: step > 0, "step 7: 7 of all 8 steps were left out"),
        (1, lambda step: True, "step 0: 1 of all 1 steps were left out"),
        (20, lambda step: step < 3, "step 19: 3 of all 20 steps were left out"),
        (14, lambda step: step % 4 == 3, "step 9: 2 of the last 10 steps were left out"),
    ],
)
def test_a_run_of_too_many_steps_left_out_is_not_finished(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    bad: Callable[[int], bool],
    told: str,
) -> None:
    monkeypatch.setattr(skips, "WINDOW", 10 if steps == 14 else 100)
    poisoned(monkeypatch, bad)
    with pytest.raises(UserError, match=f"{told}.*more than 10%.*Lower autoencoder.lr"):
        go(tmp_path, steps, nonfinite="skip", section="autoencoder.training")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "FAILED" and status["skipped_steps"] >= 1
    assert not any(checkpoint.finished for checkpoint in checkpoints_in(tmp_path))


def test_a_run_that_left_few_steps_out_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, lambda step: step in (4, 9))
    go(tmp_path, 20, nonfinite="skip")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["skipped_steps"]) == ("FINISHED", 2)


@pytest.mark.parametrize("figure", ["loss", "likeness"])
def test_a_run_whose_last_evaluation_is_not_finite_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str
) -> None:
    monkeypatch.setattr(Regression, "evaluate", lambda *_: {"other": 1.0, figure: float("nan")})
    with pytest.raises(UserError, match=f"step 6: ema/{figure} nan, raw/{figure} nan: the weights"):
        go(tmp_path, 6)
    assert [(c.step, c.finished) for c in checkpoints_in(tmp_path)] == [(2, False), (4, False)]
