import json
import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mmdit.atomic import write_atomically
from mmdit.cli.stages import find_or_train
from mmdit.cli.subject import open_named
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.runs.folder import RunFolder, open_run
from mmdit.runs.status import clean_up, clean_up_if_killed, read_status, state_of, write_status
from tests.checkpoints_for_tests import write_checkpoint
from tests.kills_for_tests import killed_at


def killed_run(path: Path, *, step: int | None, finished: bool = False) -> Path:
    """A run folder as left by kill -9: RUNNING, an unfinished checkpoint and an unfinished file."""
    (path / "checkpoints").mkdir(parents=True)
    if step is not None:
        model = Autoencoder(latent_channels=4, width=32, multipliers=[1], blocks=0)
        write_checkpoint(path, step, {"ema": model, "raw": model}, finished=finished)
    (path / "checkpoints" / "step_00000099.tmp").mkdir()
    (path / "config.json").write_text("{}")
    (path / ".lock").touch()
    killed_at(2, lambda: write_atomically(path / "recipe.json", b"half"))
    write_status(path, "RUNNING", step=0)
    return path


def leftovers(path: Path) -> list[Path]:
    return list(path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("step", "finished", "status"),
    [
        (8, True, {"state": "FINISHED"}),
        (8, False, {"state": "KILLED", "step": 8}),
        (None, False, {"state": "KILLED", "step": 0}),
    ],
)
def test_the_next_process_to_lock_a_run_cleans_up_after_a_kill(tmp_path, step, finished, status):
    path = killed_run(tmp_path / "a-001", step=step, finished=finished)
    assert leftovers(path)
    RunFolder(path).close()
    found = read_status(path)
    assert {key: found[key] for key in found if key != "process"} == status
    assert leftovers(path) == []


def test_a_run_resumed_beyond_a_finished_checkpoint_was_killed(tmp_path):
    path = killed_run(tmp_path / "a-001", step=8, finished=True)
    write_status(path, "RUNNING", step=8)
    clean_up(path)
    assert read_status(path)["state"] == "KILLED"


def test_a_locked_run_is_not_changed(tmp_path):
    path = killed_run(tmp_path / "a-001", step=8, finished=True)
    held = RunFolder(path)
    write_status(path, "RUNNING", step=8)
    (path / "checkpoints" / "step_00000099.tmp").mkdir()
    assert state_of(path) == "running"
    clean_up_if_killed(path)
    assert read_status(path)["state"] == "RUNNING" and leftovers(path)
    held.close()
    assert state_of(path) == "killed"
    clean_up_if_killed(path)
    assert read_status(path)["state"] == "KILLED" and not leftovers(path)


def test_reading_a_killed_run_cleans_it_up_too(tmp_path):
    path = killed_run(tmp_path / "a-001", step=8, finished=True)
    config = OmegaConf.create({"weights": "ema", "runs": str(tmp_path)})
    open_named(config, {"checkpoint": str(path)}, [])
    assert read_status(path)["state"] == "FINISHED" and not leftovers(path)


def test_a_stage_killed_after_its_last_save_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdit.cli.stages.config_hash", lambda recipe: "x")
    path = killed_run(tmp_path / "autoencoder-x", step=8, finished=True)
    config = type("Config", (), {"runs": str(tmp_path)})
    find_or_train(config, "autoencoder", {}, None, None, seed=0)
    assert read_status(path)["state"] == "FINISHED" and not leftovers(path)


def test_a_list_of_runs_shows_which_was_killed(tmp_path):
    killed_run(tmp_path / "a-001", step=None)
    with pytest.raises(UserError, match=r"a-001 \(killed\)"):
        open_run(tmp_path, name="a", run=None, resume=str(tmp_path / "no"), config={})


def test_an_unreadable_status_is_unknown(tmp_path, caplog):
    (tmp_path / "status.json").write_text("[1")
    assert read_status(tmp_path) == {} and state_of(tmp_path) == ""
    with caplog.at_level(logging.WARNING):
        write_status(tmp_path / "status.json", "RUNNING")
    assert "could not be written" in caplog.text
    assert json.loads((tmp_path / "status.json").read_text() + "]") == [1]
