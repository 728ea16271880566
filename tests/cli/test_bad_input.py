"""A user's mistake ends in one message that says what, where and what to do, with exit code 2."""

import struct
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import save

from mmdit.cli.formulations import store_formulations
from mmdit.cli.launch import launch

ROOT = Path(__file__).resolve().parents[2]
Told = Callable[..., str]


def script(name: str) -> object:
    return import_module("mmdit.cli." + name.removesuffix(".py").replace("/", "."))


@pytest.fixture(autouse=True)
def formulations() -> None:
    """As the script itself makes them known."""
    store_formulations()


@pytest.fixture
def told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Told:
    """`told(script, *words)`: what stderr says when the script refuses its command line."""

    def refuse(name: str, *words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *words])
        GlobalHydra.instance().clear()
        module = script(name)
        verbatim = getattr(module, "VERBATIM", ())
        with pytest.raises(SystemExit) as stop:
            launch(module.job, config_name=Path(name).stem, verbatim=verbatim)  # type: ignore[attr-defined]
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return refuse


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("training.step=3",), ("training.step", "training.steps")),
        (("model=tpy",), ("tpy", "toy")),
        (("objective/timesteps=lognormal",), ("logit_normal",)),
        (("~latents",), ("~latents", "cannot do without latents")),
        (("experiment=smoke", "~data"), ("~data", "cannot do without data")),
        (("~seed",), ("~seed", "cannot do without seed")),
        (("training.steps=abc",), ("training.steps='abc'", "whole")),
        (("training.steps=0",), ("training.steps=0", "at least 1")),
        (("training.batch_size=1.5",), ("training.batch_size=1.5", "whole")),
        (("model.width=190",), ("width 190", "num_heads 3")),
        (("image_size=36",), ("image_size", "36", "32")),
        (("objective.timesteps.s=-1",), ("s=-1", "above 0")),
        (("objective.shift.alpha=0",), ("alpha=0", "above 0")),
        (("precision=fp17",), ("precision", "fp17", "bf16")),
        (("device=gpu",), ("device=gpu", "cpu")),
        (("resume=runs/nowhere",), ("runs/nowhere", "no run")),
        (("text.dropout=1.5",), ("dropout=1.5", "at most 1")),
        (("text.clip_l.model.vocabulary_size=8",), ("vocabulary_size 8", "at least")),
        (("data.samples=0",), ("samples", "0")),
        (("model.colour=red",), ("model.colour",)),
        (("+model.heads=2",), ("heads", "num_heads")),
        (("formulation=rf", "objective.path.sigma_max=3"), ("sigma_max",)),
        (("objective=rf_mode", "objective.timesteps.s=1.76"), ("s 1.76", "2/(pi-2)")),
        (("objective=edm", "objective.path.P_s=0"), ("P_s=0", "above 0")),
        (("objective=rf", "objective/prediction=epsilon"), ("Epsilon",)),
        (("model=toy_uvit", "model.width=191"), ("191",)),
        (("formulation=rf", "objective=edm"), ("study's rf",)),
        (("match=size",), ("match='size'", "params, flops")),
        (
            ("schedule=warmup_cosine", "training.steps=12", "schedule.steps=6"),
            ("training.steps=12", "schedule.steps=6", "last 6 steps would train nothing"),
        ),
        (
            ("schedule=warmup_stable_decay", "schedule.decay_steps=2", "schedule.steps=5"),
            ("training.steps=6", "schedule.steps=5"),
        ),
        (("name=/abs",), ("name='/abs' must be a name",)),
        (("name=../../x",), ("name='../../x' must be",)),
        (("name=null",), ("name='' must be a name",)),
        (("metrics=study", "metrics.samples=0"), ("metrics", "samples")),
        (("+guidance_scale=9",), ("'guidance_scale'. Did you mean", "No code reads it")),
        (("autoencoder.training.workers=2",), ("write +autoencoder.training.workers=",)),
        (("+autoencoder.training.step=2",), ("autoencoder.training.step",)),
        (("training._target_=torch.load",), ("training._target_",)),
        (("logger._target_=torch.load",), ("logger._target_: 'torch.load' is not part",)),
    ],
)
def test_train_refuses(told: Told, words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    message = told("train.py", "experiment=smoke", *words)
    assert all(part in message for part in expected), message


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ("prompt=",)),
        (("prompt=a", "prompt_file=b"), ("either",)),
        (("prompt_file=missing.txt",), ("missing.txt",)),
        (("prompt=a",), ("no finished run", "train.py")),
        (("prompt=a", "checkpoint=runs/none"), ("runs/none", "no such")),
        (("prompt=a", f"checkpoint={300 * 'x'}"), ("xxx", "name too long")),
        (("prompt=a", f"out={300 * 'x'}"), ("xxx", "name too long")),
        (("prompt=a", "num_images=0"), ("num_images=0", "whole number from 1")),
        (("prompt=a", "steps=many"), ("steps='many'", "whole")),
        (("prompt=a", "seed=-1"), ("seed=-1 must be a whole number from 0 to 2^64 - 1",)),
        (("prompt=a", f"seed={2**64}"), ("must be a whole number from 0 to 2^64 - 1",)),
        (("prompt=a", f"seed={2**64 - 2}"), ("from 0 to 2^64 - 4: seeds of 4 images",)),
        (("prompt=a", "steps=1000000000"), ("steps=1000000000", "from 1 to 10,000")),
        (("prompt=a", "device=nonsense", "checkpoint=."), ("device=nonsense is not available",)),
        (("prompt=a", "guidance=strong"), ("guidance='strong'", "number")),
        (("prompt=a", "weights=best", "checkpoint=."), ("weights='best'", "ema")),
        (("prompt=a", "solver=eulr"), ("eulr", "euler")),
        (("prompt=a", "out=image.png"), ("image.png", "folder")),
        (("prompt=a", "cache=fist_block"), ("fist_block", "first_block")),
        (("prompt=a", "cache=taylor", "cache.order=7"), ("TaylorCache: order=7", "from 0 to 4")),
        (("prompt=a", "cache=first_block", "cache.threshold=2"), ("threshold=2", "at most 1")),
        (("prompt=a", "cache=first_block", "cache.order=1"), ("unknown key 'cache.order'",)),
        (("--prompt", "a"), ("prompt=",)),
        (("promt=a",), ("promt", "prompt")),
        (("prompt=a", "+guidance_scale=9"), ("'guidance_scale'. Did you mean gui", "No code")),
        (("prompt=a", "+schedule=warmup_cosine"), ("'schedule'", "No code reads it")),
        (("prompt=a", "solver._target_=numpy.load"), ("solver._target_: 'numpy.load' is not",)),
    ],
)
def test_sample_refuses(told: Told, words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    message = told("sample.py", *words)
    assert all(part in message for part in expected), message


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("logger=wandb",), "log in by `wandb login`"),
        (("logger=wandb", "logger.project=a/b"), "Invalid project name"),
        (("text=published", "text.source=missing"), "missing"),
        (("metrics=study", "+metrics.colour=red"), "metrics.colour"),
    ],
)
def test_what_a_run_needs_from_elsewhere_is_looked_at_before_the_first_stage(
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    expected: str,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert expected in told("train.py", "experiment=smoke", *words)
    assert not list(tmp_path.glob("runs/autoencoder-*"))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["rank", "attention", "geneval", "memory", "speed"])
def test_scripts_refuse_what_they_do_not_read_or_may_not_build(told: Told, name: str) -> None:
    assert "No code reads it" in told(f"eval/{name}.py", "+guidance_scale=9")
    assert "is not part of mmdit" in told(f"eval/{name}.py", "+hydra.callbacks.a={_target_: a.b}")


def test_checkpoint_that_is_no_safetensors(told: Told, tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    message = told("sample.py", "prompt=a", "checkpoint=page.safetensors")
    assert "page.safetensors" in message
    assert "not a safetensors file" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (struct.pack("<Q", 99) + b"{", "is cut off"),
        (save({"lora_unet_x.lora_up.weight": torch.ones(1)}), "a LoRA"),
        (save({"conditioner.embedders.0.x": torch.ones(1)}), "Stable Diffusion XL"),
        (save({"module.joint_blocks.0.x_block.x": torch.ones(1)}), "an MMDiT's width"),
    ],
)
def test_weights_that_are_none(told: Told, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    message = told("sample.py", "prompt=a", "checkpoint=x.safetensors")
    assert "x.safetensors" in message
    assert expected in message
    (tmp_path / "x.ckpt").write_bytes(content)
    assert "can run code" in told("sample.py", "prompt=a", "checkpoint=x.ckpt")
