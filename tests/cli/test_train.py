"""The recipe end to end, at its smallest: trained, stopped, killed, resumed, painted, measured."""

import copy
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import mmdit
from mmdit.cli import CONFIGS
from mmdit.cli.train import job
from mmdit.errors import UserError
from mmdit.runs import tensors as tensor_files
from mmdit.runs.checkpoint import checkpoints_in
from tests.training_for_tests import (
    SMOKE,
    Process,
    assert_same_run,
    losses,
    run,
    start,
    train,
    wait_for_step,
)

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, `runs/smoke-001`, of STEPS steps."""
    folder = tmp_path_factory.mktemp("work")
    result = train(folder, f"training.steps={STEPS}")
    assert "psnr" in result.stdout
    assert "finished runs/smoke-001" in result.stdout
    return folder


@pytest.mark.parametrize(
    "key",
    [
        *("seed", "image_size", "sampling.steps", "sampling.guidance"),
        *("autoencoder.seed", "autoencoder.trained", "autoencoder.kl_weight", "autoencoder.lr"),
        *("autoencoder.warmup_steps", "autoencoder.ema.decay", "autoencoder.ema.every"),
        *("clip.samples", "clip.lr", "clip.ema.decay", "metrics.seed", "compile"),
    ],
)
@pytest.mark.parametrize("value", ["x", None, math.nan, [1], True], ids=str)
def test_settings_that_make_no_sense_are_refused_by_their_key(
    composed: DictConfig, key: str, value: object
) -> None:
    if value is True and key in ("autoencoder.trained", "compile"):
        value = 1  # no bool, either
    config = copy.deepcopy(composed)
    OmegaConf.update(config, key, value)
    with pytest.raises(UserError, match=rf"^{re.escape(key)}.* must be "):
        job(config, {})


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """The config of the smallest study run."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", ["experiment=smoke", "metrics=study"])


def test_run_leaves_what_it_promises(folder: Path) -> None:
    done = folder / "runs" / "smoke-001"
    with (
        Image.open(done / "loss.png") as plot,
        Image.open(next(done.glob("samples/*.png"))) as grid,
    ):
        assert plot.size == (800, 480)
        assert grid.width > 500
    last = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()][-1]
    levels = [f"ema/loss_t{(i + 1) / 8:.3f}" for i in range(8)]
    assert last["ema/loss"] == pytest.approx(sum(last[name] for name in levels[:-1]) / 7)
    assert {"raw/loss", "step"} <= last.keys()


def test_what_nobody_trains_is_written_once(folder: Path) -> None:
    first, *_, newest = checkpoints_in(folder / "runs" / "smoke-001")
    frozen = newest.group("frozen")
    assert first.group("frozen") == frozen and frozen.parent == newest.folder.parent
    groups = {name: set(tensor_files.facts(newest.group(name))) for name in ("raw", "ema")}
    groups["frozen"] = set(tensor_files.facts(frozen))
    assert all(key.startswith("autoencoder.") for key in groups["frozen"])
    assert not any(key.startswith("autoencoder.") for key in groups["raw"] | groups["ema"])
    whole = mmdit.load_pipeline(folder / "runs" / "smoke-001").state_dict().keys()
    assert groups["ema"] | groups["frozen"] == groups["raw"] | groups["frozen"] == set(whole)
    shutil.copytree(newest.folder.parent, folder / "copies")
    damaged = next((folder / "copies" / frozen.name).iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"damaged: .*{frozen.name}/"):
        mmdit.load_pipeline(folder / "copies" / newest.folder.name)


@pytest.mark.slow
def test_autoencoder_is_reused(folder: Path) -> None:
    result = train(folder, f"training.steps={STEPS}", "training.batch_size=2")
    assert "reusing the autoencoder" in result.stdout


@pytest.mark.slow
def test_n_steps_and_n_more_equal_2n(folder: Path) -> None:
    half = ("run=runs/halves", f"training.steps={STEPS // 2}")
    train(folder, *half)
    train(folder, "resume=runs/halves", f"training.steps={STEPS}")
    assert_same_run(folder / "runs" / "halves", folder / "runs" / "smoke-001")


@pytest.mark.slow
def test_a_run_goes_on_with_the_autoencoder_it_began_with(folder: Path) -> None:
    train(folder, "runs=alone", "run=alone/x", f"training.steps={STEPS // 2}")
    (autoencoder,) = (folder / "alone").glob("autoencoder-*")
    shutil.rmtree(autoencoder)
    told = train(folder, "runs=alone", "resume=alone/x", f"training.steps={STEPS}").stdout
    assert "autoencoder in" not in told and not autoencoder.exists()
    assert_same_run(folder / "alone" / "x", folder / "runs" / "smoke-001")


def start_and_wait(folder: Path, name: str, steps: int) -> Process:
    process = start(folder, f"run=runs/{name}", "resume=auto")
    wait_for_step(process, folder / "runs" / name, steps)
    return process


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(folder: Path) -> None:
    train(folder, "run=runs/two", f"training.steps={STEPS}", "parallel=ddp", processes=2)
    ours, unbroken = losses(folder / "runs" / "two"), losses(folder / "runs" / "smoke-001")
    assert ours == pytest.approx(unbroken, rel=1e-5)


@pytest.mark.slow
def test_kill_9_loses_at_most_one_interval(folder: Path) -> None:
    for steps in (3, 6):
        process = start_and_wait(folder, "killed", steps)
        process.kill()
        process.communicate()
    ours = losses(folder / "runs" / "killed")
    final = max(STEPS, max(ours))
    train(folder, "resume=runs/killed", f"training.steps={final}")
    ours, unbroken = losses(folder / "runs" / "killed"), losses(folder / "runs" / "smoke-001")
    assert sorted(ours) == list(range(1, final + 1))
    assert {step: ours[step] for step in unbroken} == unbroken


@pytest.mark.slow
def test_run_folder_in_use_is_refused(folder: Path) -> None:
    process = start_and_wait(folder, "busy", 1)
    try:
        told = train(folder, "resume=runs/busy", code=2).stderr
        assert f"in use by process {process.pid}" in told
    finally:
        process.kill()
        process.communicate()


def test_samples_carry_what_reproduces_them(folder: Path) -> None:
    prompt = 'a "red" circle, (above) #1 a=b ${x} [null] 1984! 赤い丸 🔴'
    words = ("num_images=2", "steps=3", "guidance=2.5", "seed=5")
    listed = run(folder, "sample.py", f"prompt={prompt}", *words, "out=one").stdout.splitlines()
    paths = [folder / line for line in listed[-3:]]
    assert [path.exists() for path in paths] == [True] * 3
    with Image.open(paths[1]) as opened:
        facts = json.loads(opened.text["mmdit"])  # type: ignore[attr-defined]
        assert opened.text["prompt"] == facts["prompt"] == prompt  # type: ignore[attr-defined]
        pixels = opened.tobytes()
    assert facts["seed"] == 6
    again = run(
        folder,
        "sample.py",
        f"prompt={facts['prompt']}",
        f"checkpoint={facts['weights']}",
        "num_images=1",
        "out=two",
        *(f"{key}={facts[key]}" for key in ("seed", "steps", "guidance", "height", "width")),
    ).stdout.splitlines()
    with Image.open(folder / again[-2]) as opened:
        assert opened.tobytes() == pixels


def test_evaluation_writes_table_and_images(folder: Path) -> None:
    told = run(folder, "eval/compositional.py", "prompts_per_task=3", "steps=2").stdout
    out = folder / told.splitlines()[-1]
    report = json.loads(out.with_suffix(".json").read_text())
    for split in ("validation", "held_out"):
        table = report["splits"][split]
        assert table["overall"]["detector_on_truth"] == 1.0
        tasks = [row["accuracy"] for name, row in table.items() if name != "overall"]
        assert table["overall"]["accuracy"] == pytest.approx(sum(tasks) / 6)
    assert out.exists()


@pytest.mark.slow
def test_truncated_checkpoint_is_named(folder: Path) -> None:
    train(folder, "run=runs/short", "training.steps=2")
    weights = sorted((folder / "runs" / "short").glob("checkpoints/*/ema/*.safetensors"))[-1]
    os.truncate(weights, weights.stat().st_size // 2)
    for script, words in (
        ("sample.py", ("prompt=a circle", "checkpoint=runs/short")),
        ("sample.py", ("prompt=a circle", f"checkpoint={weights.parent}")),
        (
            "train.py",
            (*SMOKE, "training.steps=4", "resume=runs/short"),
        ),
    ):
        told = run(folder, script, *words, code=2).stderr
        assert "damaged" in told
        assert f"ema/{weights.name}" in told
