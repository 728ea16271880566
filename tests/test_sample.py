from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import eval.autoencoder
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


READERS = {
    "sample": lambda path: torch.from_numpy(np.array(sample.open_picture(path))),
    "eval/autoencoder": lambda path: eval.autoencoder.open_picture(path, 4),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_sixteen_bits_a_channel_are_scaled_to_eight(read, tmp_path):
    grey = np.full((4, 4), 128 * 257, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(read(tmp_path / "grey.png"), torch.full((4, 4, 3), 128, dtype=torch.uint8))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_no_picture_is_refused_by_name(read, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    with pytest.raises(UserError, match=r"page\.eps cannot be read as a picture: is not an image"):
        read(tmp_path / "page.eps")
    with pytest.raises(UserError, match=r"absent\.png cannot be read as a picture: no such file"):
        read(tmp_path / "absent.png")


def test_a_line_of_a_file_is_a_prompt_as_it_was_typed(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n two\u2028lines\x0c\n\nlast".encode())
    assert sample.read_prompts({"prompt_file": str(path)}) == [
        "a cat",
        " two\u2028lines\x0c",
        "",
        "last",
    ]
    path.write_text("one\n")
    assert sample.read_prompts({"prompt_file": str(path)}) == ["one"]
    path.write_bytes("\ufeff".encode())
    with pytest.raises(UserError, match="is empty: write one prompt a line"):
        sample.read_prompts({"prompt_file": str(path)})
