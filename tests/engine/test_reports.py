"""What a run tells is written whole, or it is said why not."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdit.engine.loggers import MetricsFile, NoLogger
from mmdit.engine.posthoc import PostHoc
from mmdit.engine.reports import Reports
from mmdit.errors import NotFinite, UserError
from mmdit.processes import Processes

MODULES = (nn.Identity(), nn.Identity(), {"ema": nn.Identity(), "raw": nn.Identity()})


class Measured:
    """A task whose figures are given."""

    def __init__(self, figures: dict[str, float]) -> None:
        self.figures, self.protocol = figures, {"protocol": "test-1"}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        return self.figures

    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        return torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["nothing"]


def reports(run: Path, **figures: float) -> Reports:
    task = Measured(figures or {"loss": 0.5})
    return Reports(run, task=task, logger=NoLogger(), processes=Processes(), start=0, steps=9)


def test_an_evaluation_that_is_not_finite_is_null(tmp_path: Path) -> None:
    told = reports(tmp_path, loss=math.nan, psnr=20.0)
    figures = told.evaluate(3, *MODULES)
    told.close()
    assert math.isnan(figures["ema/loss"])
    text = (tmp_path / "evaluations" / "step_00000003.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert (record["ema"]["loss"], record["raw"]["psnr"]) == (None, 20.0)


def test_samples_that_are_not_finite_are_left_out_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = reports(tmp_path, loss=0.5)

    def picture(module: nn.Module) -> tuple[Tensor, list[str]]:
        raise NotFinite("sampling, step 2 of 5: the latents are NaN")

    monkeypatch.setattr(told.task, "picture", picture)
    assert told.evaluate(3, *MODULES)["ema/loss"] == 0.5
    told.close()
    assert not (tmp_path / "samples").exists()
    assert (tmp_path / "loss.png").is_file()
    assert "step 3: no sample images: sampling, step 2 of 5" in caplog.text


def full(handle: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def told_of(path: Path, run: Path) -> str:
    return rf"^{path} could not be written \(.*\): go on with resume={run} once there is space"


@pytest.mark.parametrize(
    "name", ["evaluations/step_00000003.json", "samples/step_00000003.png", "loss.png"]
)
def test_what_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    told = reports(tmp_path)
    (tmp_path / name).mkdir(parents=True)  # where a file should be
    with pytest.raises(UserError, match=told_of(tmp_path / name, tmp_path)):
        told.evaluate(3, *MODULES)
    told.close()


def test_a_stage_goes_on_with_the_command_that_began_it(tmp_path: Path) -> None:
    told = reports(tmp_path)
    (tmp_path / "recipe.json").touch()
    (tmp_path / "loss.png").mkdir()  # where a file should be
    with pytest.raises(
        UserError, match=r"loss\.png could not .*: give the same command again once"
    ):
        told.evaluate(3, *MODULES)
    told.close()


def test_a_full_disk_is_told_and_leaves_nothing_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = reports(tmp_path)
    posthoc = PostHoc(nn.Linear(2, 2), sigma_rels=[0.1], snapshot_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"step_00000003\.json could not be written .*No space"):
            told.evaluate(3, *MODULES)
        with pytest.raises(
            UserError, match=r"step_00000001\.safetensors could not be written .*No"
        ):
            posthoc.update(1, tmp_path, last=False)
        with pytest.raises(UserError, match=told_of(tmp_path / "metrics.jsonl", tmp_path)):
            reports(tmp_path)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", start_step=0)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(UserError, match=told_of(tmp_path / "metrics.jsonl", tmp_path)):
        metrics.log(4, {"loss": 0.5})
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".tmp"]
