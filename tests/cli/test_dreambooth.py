"""DreamBooth: class images are made once by the initial model, and fill half of every batch."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmdit
from mmdit.adapters.adapter import Adapter
from mmdit.runs.checkpoint import checkpoints_in, read_weights
from tests.ready_process import Ready
from tests.training_for_tests import ALONE, command, losses, run

PROMPTS = ("instance_prompt=a red, 'new' circle", "class_prompt=a circle")
SMALL = (
    *("experiment=dreambooth", "precision=fp32", "initial=runs/base", "data.root=photos"),
    *("sampling.steps=2", "prior.images=6", "adapter.rank=4", "schedule.warmup_steps=2"),
    *("training.steps=6", "training.log_every=1", "training.evaluate_every=6"),
    *("training.save_every=3", "ema.every=2"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run `runs/base`, five `photos`, and a DreamBooth run of both."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    run(folder, "train.py", "experiment=smoke", "precision=fp32", "run=runs/base")
    run(folder, "train.py", *SMALL, *PROMPTS, "run=runs/whole")
    return folder


def class_images(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("class-images-*")
    return found


@pytest.mark.slow
def test_the_initial_model_makes_the_class_images(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    made = class_images(folder)
    assert len(list(made.glob("*.png"))) == 6
    recipe = json.loads((made / "recipe.json").read_text())
    assert recipe["prompt"] == "a circle"
    assert recipe["weights_sha256"] == read_weights(folder / "runs" / "base").sha256
    images = mmdit.load_pipeline("runs/base")("a circle", num_images=6, steps=2, seed=0)
    for i, pixels in enumerate(images):
        with Image.open(made / f"{i:06d}.png") as image:
            metadata = json.loads(image.info["mmdit"])
            saved = torch.from_numpy(np.array(image))
        assert metadata["seed"] == i
        assert (saved.int() - pixels.int()).abs().max() <= 1  # made in another batch
    config = checkpoints_in(folder / "runs" / "whole")[-1].manifest["config"]
    assert config["instance_prompt"] == "a red, 'new' circle"
    assert config["data"]["found"].keys() == {"instance", "class"}
    assert config["data"]["found"]["instance"]["images"] == 5
    assert config["data"]["found"]["class"]["images"] == 6
    assert isinstance(read_weights(folder / "runs" / "whole").module(), Adapter)


@pytest.mark.slow
def test_images_that_are_there_are_used_again(folder: Path) -> None:
    made = class_images(folder)
    before = {path: path.stat().st_mtime_ns for path in sorted(made.glob("*.png"))}
    pixels = np.stack([np.array(Image.open(path)) for path in before])
    for n in (1, 4):
        (made / f"{n:06d}.png").unlink()
    result = run(folder, "train.py", *SMALL, *PROMPTS, "run=runs/again", "prior.batch_size=1")
    assert f"making 2 of 6 class images in runs/{made.name}" in result.stdout
    written = [path.stat().st_mtime_ns != at for path, at in before.items()]
    assert written == [n in (1, 4) for n in range(6)]
    again = np.stack([np.array(Image.open(path)) for path in before])
    assert np.abs(again.astype(int) - pixels).max() <= 1
    result = run(folder, "train.py", *SMALL, *PROMPTS, "run=runs/reused")
    assert f"reusing the 6 class images of runs/{made.name}" in result.stdout
    assert losses(folder / "runs" / "reused") == losses(folder / "runs" / "again")


@pytest.mark.slow
def test_a_killed_generation_goes_on_where_it_stopped(folder: Path) -> None:
    words = (*SMALL, *PROMPTS, "runs=other", "run=other/x", "prior.images=300")
    process = Ready(command("train.py", *words)[1:], cwd=folder, env=ALONE)
    deadline = time.monotonic() + 120
    while len(list((folder / "other").glob("class-images-*/*.png"))) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (made,) = (folder / "other").glob("class-images-*")
    there = {path: path.stat().st_mtime_ns for path in made.glob("*.png")}
    assert len(there) < 300
    result = run(folder, "train.py", *words)
    assert f"making {300 - len(there)} of 300 class images" in result.stdout
    assert len(list(made.glob("*.png"))) == 300
    assert all(path.stat().st_mtime_ns == at for path, at in there.items())


@pytest.mark.slow
def test_two_halves_and_two_processes_equal_an_unbroken_run(folder: Path) -> None:
    run(folder, "train.py", *SMALL, *PROMPTS, "run=runs/parts", "training.steps=3")
    told = (folder / "runs" / "parts" / "command.txt").read_text()
    assert "instance_prompt=a red, " in told and "'class_prompt=a circle'" in told
    run(folder, "train.py", *SMALL, *PROMPTS, "resume=runs/parts")
    whole = losses(folder / "runs" / "whole")
    assert losses(folder / "runs" / "parts") == whole
    words = (*SMALL, *PROMPTS, "runs=two", "run=two/x", "parallel=ddp")
    run(folder, "train.py", *words, processes=2)
    assert len(list((folder / "two").glob("class-images-*/*.png"))) == 6
    assert losses(folder / "two" / "x") == pytest.approx(whole, abs=1e-4)


@pytest.mark.slow
def test_without_a_class_prompt_there_are_no_class_images(folder: Path) -> None:
    words = (*SMALL, PROMPTS[0], "runs=alone", "run=alone/x")
    for more in ((), ("class_prompt=null", "run=alone/y")):
        run(folder, "train.py", *words, *more)
        config = json.loads((folder / "alone" / "x" / "config.json").read_text())
        assert config["class_prompt"] is None
        assert config["data"]["found"]["images"] == 5
    assert not list((folder / "alone").glob("class-images-*"))


@pytest.mark.slow
def test_images_of_the_instance_are_sampled(folder: Path) -> None:
    words = ("checkpoint=runs/whole", "prompt=a red, 'new' circle", "num_images=2", "steps=2")
    run(folder, "sample.py", *words, "out=images")
    assert len(list((folder / "images").glob("*red-new-circle*.png"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("instance_prompt=",), "instance_prompt='' must not be empty"),
        (("instance_prompt=a circle", "class_prompt= "), "class_prompt=' ' must not be empty"),
        (("instance_prompt=a ${seed}",), "must not have ${"),
        ((), "instance_prompt has no value and needs one"),
        ((*PROMPTS, "initial=null"), "adapter= needs weights to adapt: initial="),
        ((*PROMPTS, "initial=null", "~adapter"), "initial=<source>"),
        ((*PROMPTS, "prior.images=0"), "prior.images=0 must be a whole number"),
        ((*PROMPTS, "prior.share=1"), "prior.share=1 must be a finite number above 0 and below 1"),
        ((*PROMPTS, "prior.seed=-1"), "prior.seed=-1"),
        ((*PROMPTS, "prior.guidance=nan"), "prior.guidance=nan"),
        ((*PROMPTS, "data.root=nowhere"), "root 'nowhere' must be a folder"),
        ((*PROMPTS, "data.root=broken"), "1 of 2 images of broken cannot be used"),
        ((*PROMPTS, "data.crop=random"), "instance of the mixture: data.crop=random"),
        ((*PROMPTS, "data.max_ratio=4", "data.root=wide"), "data.max_ratio=1 crops to squares"),
        ((*PROMPTS, "experiment=smoke"), "instance_prompt is a key of experiment=dreambooth"),
    ],
)
def test_mistakes_are_one_message(folder: Path, words: tuple[str, ...], message: str) -> None:
    for name in ("broken", "wide"):
        (folder / name).mkdir(exist_ok=True)
        Image.new("RGB", (96, 32)).save(folder / name / "good.png")
    (folder / "broken" / "bad.png").write_bytes(b"no image")
    named = {word.partition("=")[0] for word in words}
    kept = [word for word in SMALL if word.partition("=")[0] not in named]
    if "experiment=smoke" in words:
        kept = ["initial=runs/base"]
    if "~adapter" in words:
        kept.remove("adapter.rank=4")
    result = run(folder, "train.py", *kept, *words, "runs=refused", code=2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list((folder / "refused").glob("dreambooth*"))


@pytest.mark.slow
def test_a_mistake_in_the_adapter_shows_before_images_are_made(folder: Path) -> None:
    before = sorted((folder / "runs").iterdir())
    words = (*SMALL, *PROMPTS, "prior.seed=77", "adapter.rank=0", "run=runs/none")
    assert "rank=0 must be" in run(folder, "train.py", *words, code=2).stderr
    assert sorted((folder / "runs").iterdir()) == before


@pytest.mark.slow
def test_the_prior_may_be_the_models_own_predictions(folder: Path) -> None:
    small = (word for word in SMALL if not word.startswith("prior."))
    words = (*small, *PROMPTS, "prior=prediction", "ema.every=1")
    before = {path.name for path in (folder / "runs").glob("class-images-*")}
    run(folder, "train.py", *words, "run=runs/own")
    half = ("training.steps=3", "schedule.warmup_steps=2", "training.evaluate_every=3")
    run(folder, "train.py", *words, "run=runs/own_parts", *half)
    run(folder, "train.py", *words, "resume=runs/own_parts")
    whole, parts = (read_weights(folder / "runs" / name, "raw") for name in ("own", "own_parts"))
    assert whole.sha256 == parts.sha256
    assert before == {path.name for path in (folder / "runs").glob("class-images-*")}
    assert losses(folder / "runs" / "own") != losses(folder / "runs" / "whole")
