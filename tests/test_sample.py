from pathlib import Path

import pytest
from omegaconf import OmegaConf

import eval.subject
import sample
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from tests.checkpoints_for_tests import write_checkpoint

CONFIG = OmegaConf.create({"weights": "ema", "runs": "runs"})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, with a run in it and a folder of nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    model = Autoencoder(latent_channels=4, width=32, multipliers=[1], blocks=0)
    write_checkpoint(tmp_path / "run", 1, {"ema": model, "raw": model})
    return tmp_path


def test_a_run_in_the_users_home_is_found(home):
    found = sample.find_source("~/run", CONFIG)
    assert found == home / "run" / "checkpoints" / "step_00000001" / "ema"
    assert eval.subject.is_run("~/run")


def test_a_folder_without_weights_is_told_what_it_lacks(home):
    with pytest.raises(UserError, match=r"empty: that folder has no complete checkpoint"):
        sample.find_source("~/empty", CONFIG)
    assert eval.subject.is_run("~/empty")


def test_public_weights_keep_their_name(home):
    (home / "empty" / "x.safetensors").touch()
    for name in ("sd3.5-medium", "owner/name", "~/empty", "~/empty/x.txt"):
        assert sample.find_source(name, CONFIG) == name
        assert not eval.subject.is_run(name)


def test_no_run_at_all_is_told(home, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match="there is no finished run in runs/"):
        sample.find_source(None, CONFIG)
