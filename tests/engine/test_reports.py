"""What a run tells is written whole, or it is said why not."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdit.engine.loggers import NoLogger
from mmdit.engine.processes import Processes
from mmdit.engine.reports import Reports


class Measured:
    """A task whose figures are given."""

    protocol = {"protocol": "test-1"}

    def __init__(self, figures: dict[str, float]) -> None:
        self.figures = figures

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        return self.figures

    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        return torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["nothing"]


def reports(run: Path, **figures: float) -> Reports:
    task = Measured(figures or {"loss": 0.5})
    return Reports(run, task=task, logger=NoLogger(), processes=Processes(), start=0, steps=9)


def test_an_evaluation_that_is_not_finite_is_null(tmp_path: Path) -> None:
    told = reports(tmp_path, loss=math.nan, psnr=20.0)
    figures = told.evaluate(3, nn.Identity(), nn.Identity())
    told.close()
    assert math.isnan(figures["ema/loss"])
    text = (tmp_path / "evaluations" / "step_00000003.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert (record["ema"]["loss"], record["raw"]["psnr"]) == (None, 20.0)
