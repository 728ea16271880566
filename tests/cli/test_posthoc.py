"""`eval/posthoc.py` writes averages that open like any weights, and says how near they are."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn

import mmdit
from mmdit.cli.eval import posthoc
from mmdit.cli.launch import launch
from mmdit.engine.ema import EMA, PowerFunction
from mmdit.engine.posthoc import PostHoc
from tests.checkpoints_for_tests import write_checkpoint
from tests.cli.test_eval_scripts import tiny_pipeline

STEPS = 40


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A run with eight snapshots, and the average of another profile that was kept during it."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("averaged")
    pipeline = tiny_pipeline()
    pipeline.autoencoder.requires_grad_(False)
    posthoc = PostHoc(pipeline, sigma_rels=[0.05, 0.1], snapshot_every=5)
    kept = EMA(pipeline, profile=PowerFunction(sigma_rel=0.08))
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for weight in posthoc.weights.values():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        posthoc.update(step, run, last=step == STEPS)
        kept.update(step)
    write_checkpoint(run, STEPS, {"ema": kept.module, "raw": pipeline})
    return run, kept.module


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`call(*words, code=0)`: what it prints; on stderr, where code is 2."""

    def start(*words: str, code: int = 0) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["posthoc.py", *words])
        GlobalHydra.instance().clear()
        if code == 0:
            launch(
                posthoc.job,
                config_name="posthoc_average",
                verbatim=posthoc.VERBATIM,
            )
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            launch(
                posthoc.job,
                config_name="posthoc_average",
                verbatim=posthoc.VERBATIM,
            )
        assert stop.value.code == code
        return capsys.readouterr().err

    return start


def test_the_file_opens_as_a_pipeline_with_the_average_kept_during_training(
    averaged: tuple[Path, nn.Module], call: Callable[..., str], tmp_path: Path
) -> None:
    run, kept = averaged
    told = call(f"run={run}", "sigma_rel=0.08", "out=made/average.safetensors")
    pipe = mmdit.load_pipeline(tmp_path / "made/average.safetensors")
    theirs = kept.state_dict()
    for name, weight in pipe.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=5e-3)
    assert pipe("a red circle").shape == (1, 32, 32, 3)
    row = json.loads((tmp_path / "made/average.json").read_text())["rows"][0]
    assert (row["step"], row["snapshots"]) == (STEPS, 8)
    assert 0 < row["profile_error"] < 0.05
    assert "| 0.08 | 40 | 8 |" in told


def test_several_averages_are_compared_in_a_table(
    averaged: tuple[Path, nn.Module], call: Callable[..., str], tmp_path: Path
) -> None:
    call(f"run={averaged[0]}", "sigma_rel=[0.03,0.1,0.2]", "step=20", "out=averages")
    rows = json.loads((tmp_path / "averages/posthoc.json").read_text())["rows"]
    errors = [row["profile_error"] for row in rows]
    assert errors[1] < 1e-5  # kept itself
    assert min(errors[0], errors[2]) > 1e-4
    assert all(row["step"] == 20 and row["snapshots"] == 4 for row in rows)
    assert len({row["sha256"] for row in rows}) == 3
    assert all((tmp_path / row["file"]).is_file() for row in rows)


@pytest.mark.parametrize("content", ["", '{"step": 5, "sig', "[]", '{"step": "5"}', '{"step": 5}'])
def test_a_damaged_note_of_a_snapshot_is_named(
    call: Callable[..., str], tmp_path: Path, content: str
) -> None:
    note = tmp_path / "run" / "snapshots" / "step_00000005.json"
    note.parent.mkdir(parents=True)
    note.write_text(content)
    message = call("run=run", "out=a.safetensors", code=2)
    assert message.startswith("snapshot run/snapshots/step_00000005.json is damaged (")
    assert message.endswith("): move it elsewhere to do without it\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["out=a.safetensors"], "give run=<run folder>"),
        (["run=absent", "out=a.safetensors"], "run=absent: there is no such folder"),
        (["run=.", "out=a.safetensors"], "has no snapshots: train with posthoc=power_functions"),
        (["run={run}"], "give out=<file.safetensors>"),
        (["run={run}", "out=a.png"], "out=a.png must end in .safetensors"),
        (["run={run}", "out=a.safetensors", "sigma_rel=0.3"], "numbers in (0, 0.2887]"),
        (["run={run}", "out=a.safetensors", "sigma_rel=wide"], "numbers in (0, 0.2887]"),
        (["run={run}", "out=a", "sigma_rel=[0.1,0.1]"], "none of them twice"),
        (["run={run}", "out=a.safetensors", "step=0"], "step=0 must be a whole number"),
        (["run={run}", "out=a.safetensors", "step=4"], "has no snapshots up to step 4"),
        (["run={run}", "out=a.safetensors", "step=41"], "step 41 is beyond the newest snapshot"),
        (["run={run}", "out=/proc/a.safetensors"], "/proc/a.safetensors cannot be written"),
    ],
)
def test_mistakes_end_in_one_message(
    averaged: tuple[Path, nn.Module], call: Callable[..., str], words: list[str], told: str
) -> None:
    message = call(*(word.format(run=averaged[0]) for word in words), code=2)
    assert told in message
    assert message.count("\n") == 1
