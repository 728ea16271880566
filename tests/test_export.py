"""Exporting the weights of a run to one file."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import mmdit
from mmdit.checkpoints.archive import open_file
from mmdit.errors import UserError
from mmdit.export import export, main
from mmdit.models.autoencoder import Autoencoder
from mmdit.processes import Processes
from mmdit.registry import describe
from mmdit.runs.checkpoint import read_weights
from mmdit.runs.retention import Retention
from mmdit.runs.saving import Saver


def saved_run(folder: Path, weights: Callable[[nn.Module, int], nn.Module]) -> Path:
    """A run folder with an autoencoder, raw and averaged, saved at two steps."""
    model = Autoencoder(latent_channels=4, width=32, multipliers=[1, 2], blocks=1)
    with Saver(folder, Processes(), keep=Retention(last=2), config={}) as saver:
        for step in (1, 2):
            states = {}
            for i, kind in enumerate(("raw", "ema")):
                state = weights(model, 10 * step + i).state_dict()
                states[kind] = {key: value.clone() for key, value in state.items()}
            saver.save(
                step=step,
                finished=step == 2,
                tensors=states,
                descriptions=dict.fromkeys(states, describe(model)),
                metrics={},
            )
    return folder


@pytest.fixture
def run(tmp_path: Path, randomize: Callable[[nn.Module, int], nn.Module]) -> Path:
    return saved_run(tmp_path / "run", randomize)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_exported_file_loads_like_the_run(run: Path, tmp_path: Path, weights: str) -> None:
    out = tmp_path / "new" / "model.safetensors"
    main([str(run), str(out), "--weights", weights])
    assert read_weights(out).sha256 == read_weights(run, weights).sha256
    one, other = (mmdit.load_autoencoder(source, weights=weights) for source in (run, out))
    assert describe(one) == describe(other)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_older_checkpoint_is_exported_by_its_folder(run: Path, tmp_path: Path) -> None:
    older = run / "checkpoints" / "step_00000001"
    main([str(older), str(tmp_path / "older.safetensors")])
    assert read_weights(tmp_path / "older.safetensors").sha256 == read_weights(older / "ema").sha256
    assert read_weights(older / "ema").sha256 != read_weights(run).sha256


@pytest.mark.parametrize(
    ("form", "name"), [("single_file", "vae.safetensors"), ("diffusers", "vae")]
)
def test_public_layouts_are_loaded_again(run: Path, tmp_path: Path, form: str, name: str) -> None:
    main([str(run), str(tmp_path / name), "--format", form])
    if form == "single_file":
        assert "decoder.conv_in.weight" in open_file(tmp_path / name).infos
    again = mmdit.load_autoencoder(tmp_path / name)
    whole = mmdit.load_autoencoder(run)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(again.encode(x), whole.encode(x), rtol=1e-5, atol=1e-5)


def test_the_command_warns_which_programs_can_read_the_file(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main([str(run), str(tmp_path / "vae.safetensors"), "--format", "single_file"])
    message = "autoencoder has latent_channels 4 for 16, width 32 for 128"
    assert message in caplog.text
    assert message in open_file(tmp_path / "vae.safetensors").metadata["mmdit.readers"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere", "x.safetensors"], "nowhere: there is no such file or folder"),
        (["run", "x.bin"], "x.bin must end in .safetensors"),
        (["run", "run/config/x.safetensors"], "cannot be written"),
        (["damaged", "x.safetensors"], "is damaged: ema/shard"),
    ],
)
def test_mistakes_give_one_line(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (run / "config").write_text("a file, no folder")
    if words[0] == "damaged":
        run.rename("damaged")
        for file in Path("damaged").glob("checkpoints/*/ema/*"):
            os.truncate(file, 50)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert expected in message
    # A warning names the older checkpoint.
    assert message.count("\n") == 1 or words[0] == "damaged"
    assert not Path("x.safetensors").exists()


@pytest.mark.slow
def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    command = [sys.executable, "-m", "mmdit.export", str(run), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == f"{out}\n"
    assert ended.stderr == ""


@pytest.mark.parametrize("form", ["native", "single_file", "diffusers"])
def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path, form: str) -> None:
    def ruined(model: nn.Module, seed: int) -> nn.Module:
        nn.init.constant_(next(model.parameters()), math.nan)
        return model

    run = saved_run(tmp_path / "run", ruined)
    with pytest.raises(UserError, match=r"1 tensors have values that are NaN or infinite"):
        export(run, tmp_path / "out.safetensors", form=form)
    assert not (tmp_path / "out.safetensors").exists()
