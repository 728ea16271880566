"""Training on a folder of images, from pixels and from a cache, as a user does it."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image

import mmdit
from mmdit.cli.stages import check_until
from mmdit.data.shapes import Shapes
from mmdit.engine.loggers import read_metrics
from mmdit.errors import UserError
from mmdit.latents.cache import Cache, Samples
from mmdit.latents.encoding import HALF
from mmdit.latents.precompute import Precomputation
from mmdit.latents.sources import FromPixels
from mmdit.processes import Processes
from mmdit.runs.folder import RunFolder
from mmdit.runs.signals import Signals
from tests import ready_process
from tests.ready_process import Ready
from tests.training_for_tests import ALONE

ROOT = Path(__file__).resolve().parents[2]
SIDES = [(32, 32), (24, 48), (48, 24), (40, 33)]
PICTURES = (
    *("experiment=smoke", "precision=fp32", "data=folder", "data.root=photos"),
    *("data.unit=8", "data.max_ratio=2", "data.crop=centre", "data.validation_fraction=0.2"),
    *("data.mix={text: 1, synthetic: 1}", "data.index=index", "training.steps=4"),
)
PUBLIC = (
    *("text=published", "text.source=tiny", "text.t5_length=20"),
    *("autoencoder=published", "autoencoder.model.source=tiny"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_published) -> Path:
    """A folder to work in: images, and tiny public models."""
    shapes, folder = Shapes(split="train"), tmp_path_factory.mktemp("work")
    (folder / "tiny").symlink_to(tiny_published)
    (folder / "photos").mkdir()
    for i in range(32):
        height, width = SIDES[i % 4]
        image = Image.fromarray(shapes[i].image).resize((width, height))
        image.save(folder / "photos" / f"{i:02d}.png")
        (folder / "photos" / f"{i:02d}.txt").write_text(shapes.caption(100 + i))
        (folder / "photos" / f"{i:02d}.synthetic.txt").write_text(shapes.caption(200 + i))
    return folder


def command(script: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *words]


def run(folder: Path, script: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = ready_process.run(command(script, *words)[1:], cwd=folder, env=ALONE)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def losses(run_folder: Path) -> dict[float, float]:
    """step -> training loss."""
    rows = read_metrics(run_folder / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def train(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run(folder, "train.py", *PICTURES, *words, code=code)


@pytest.fixture(
    scope="module",
    params=[(), pytest.param(PUBLIC, marks=pytest.mark.slow)],
    ids=["trained", "public"],
)
def models(request, folder) -> tuple[str, ...]:
    """Which encoders; a run from pixels of each is there."""
    words: tuple[str, ...] = request.param
    train(folder, *words, "latents=from_pixels", f"run=runs/pixels{len(words)}")
    return words


@pytest.mark.slow
def test_losses_from_a_cache_are_those_from_pixels(folder, models):
    from_cache = ("latents=from_cache", "latents.shard_size=7", f"latents.root=made{len(models)}")
    output = train(folder, *models, *from_cache, "until=cache").stdout
    assert "writing 4 of 4 shards" in output
    words = (f"run=runs/cache{len(models)}", "training.workers=2")
    if models:
        words += ("text_device=cpu",)
    output = train(folder, *models, *from_cache, *words).stdout
    assert "writing" not in output and "in the cache made" in output
    ours, theirs = (losses(folder / "runs" / f"{s}{len(models)}") for s in ("cache", "pixels"))
    assert len(theirs) == 4
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_on_public_encoders_paints(folder, models):
    words = ("prompt=a red circle", f"checkpoint=runs/pixels{len(models)}", "steps=2", "seed=1")
    assert (
        run(folder, "sample.py", *words, "num_images=1", "out=out").stdout.count("seed1.png") == 1
    )


@pytest.mark.slow
def test_a_cache_of_another_autoencoder_is_refused(folder):
    made = (*PUBLIC, "latents=from_cache", "latents.folder=mine", "until=cache")
    train(folder, *made)
    other = made[:3] + made[5:]  # the toy's own
    output = train(folder, *other, code=2).stderr
    assert "mine was made with another autoencoder (" in output
    assert "choose another folder" in output


class Making(Precomputation):
    """Makes shards of one sample out of nothing."""

    def __init__(self):
        self.data = self.autoencoder = self.text = None

    def _samples(self, cache, number, *_):
        return Samples([torch.ones(4, 2, 2)], [{"text": ("a circle",)}], {})


def test_a_full_disk_is_reported_and_finished_shards_stay(tmp_path, monkeypatch):
    def cache(folder=tmp_path):
        return Cache(folder, identity={}, samples=3, kinds=["text"], shard_size=1)

    calls = count()

    def full(handle):
        if next(calls) == 5:  # after cache.json and two shards with their notes
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        output = "could not be written .*No space left.* finished shards remain.* latents.fol"
        with pytest.raises(UserError, match=rf"^cache {tmp_path} {output}"):
            Making()(cache(), Processes())
    assert cache().missing() == [2]
    assert not list(tmp_path.glob("*.tmp"))
    Making()(cache(), Processes())
    assert cache().completed
    with pytest.raises(UserError, match=r"^cache /proc/cache could not be written"):
        Making()(cache(Path("/proc/cache")), Processes())


def test_a_cache_is_completed_only_by_who_holds_it(tmp_path):
    """One that was killed after its last shard, and goes on in two processes."""
    cache = Cache(tmp_path, identity={}, samples=1, kinds=["text"], shard_size=1)
    cache.begin()
    cache.write(0, Making()._samples(cache, 0))
    (tmp_path / "shard-00000.safetensors.0123.tmp").touch()
    left = sorted(path.name for path in tmp_path.iterdir())
    held = RunFolder(tmp_path)

    def go_on():
        held.close()  # of the fork's own handle: a lock lasts as long as any is open
        Making()(cache, Processes())

    other = multiprocessing.get_context("fork").Process(target=go_on)
    other.start()
    other.join(0.5)
    assert other.is_alive()  # it waits
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == left
    cache.complete()
    held.close()
    other.join(60)
    assert other.exitcode == 0
    assert cache.completed


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_images_wherever_they_are(folder):
    shutil.copytree(folder / "photos", folder / "few")
    train(folder, "latents=from_pixels", "run=runs/few", "data.root=few", "training.steps=2")
    (folder / "few").rename(folder / "moved")
    goes_on = ("latents=from_pixels", "resume=runs/few", "data.root=moved", "training.steps=3")
    output = train(folder, *goes_on).stdout
    assert "reusing the autoencoder" not in output and "training the autoencoder" not in output
    for path in sorted((folder / "moved").glob("0*.*"))[:6]:
        path.unlink()
    output = train(folder, *goes_on[:3], "training.steps=4", code=2).stderr
    assert "config differs: data.found.content was" in output and "data.found.images was" in output


def test_scores_of_shapes_are_refused_for_other_images(folder):
    output = train(folder, "metrics=study", "latents=from_pixels", code=2).stderr
    assert output.startswith("metrics: its CLIP and its prompts are those of data=shapes")


@pytest.mark.slow
def test_a_lora_of_public_weights_opens_their_encoders_for_the_cache_and_prompts_alone(folder):
    words = ("initial=tiny", "adapter=lora", "optimizer.lr=1e-3", "image_size=32")
    plain, cached = "run=runs/lora_pixels", "run=runs/lora_cache"
    train(folder, *words, "latents=from_pixels", plain)
    train(folder, *words, "latents=from_cache", "latents.root=lora_cache", cached)
    ours, theirs = (
        read_metrics(folder / "runs" / f"lora_{source}" / "metrics.jsonl")
        for source in ("cache", "pixels")
    )
    for name in ("loss", "ema/loss", "raw/loss"):
        found, expected = ([row[name] for row in rows if name in row] for rows in (ours, theirs))
        assert expected and found == pytest.approx(expected, rel=1e-5), name


def test_a_caption_of_many_images_is_encoded_once(monkeypatch, tiny_published):
    pipe = mmdit.load_pipeline(tiny_published)
    text, batches = pipe.text.requires_grad_(False), []
    make = Precomputation(
        data=None, autoencoder=pipe.autoencoder, text=text, autocast=nullcontext, threads=1
    )
    encode = text.t5.forward
    monkeypatch.setattr(text.t5, "forward", lambda ids: batches.append(len(ids)) or encode(ids))
    texts = ["a cat", "a dog", "a cat", "a cat"]
    with Signals() as signals:
        found = make._encoded("t5", text.t5, texts, signals, cache=None)
    assert batches == [2]
    torch.testing.assert_close(found.hidden, encode(text.t5.tokenize(texts)).hidden.to(HALF))


def test_encoders_that_are_trained_stay_with_the_network(folder):
    output = train(folder, "text_device=cpu", code=2).stderr
    assert output.startswith("text_device=cpu is for encoders that are not trained")


def test_only_stages_that_there_are_can_be_stopped_at():
    pixels = FromPixels.__new__(FromPixels)
    for until, told in (("tea", "must be one of autoencoder, cache"), ("cache", "from_cache")):
        with pytest.raises(UserError, match=told):
            check_until(until, pixels)
    check_until("autoencoder", pixels)


@pytest.mark.slow
def test_sigterm_leaves_finished_shards_and_two_processes_make_the_rest(folder):
    words = ("data=shapes", "data.samples=2000", "latents=from_cache", "latents.folder=shapes")
    words = ("experiment=smoke", "precision=fp32", *words, "latents.shard_size=20")
    process = Ready(command("train.py", *words, "until=cache")[1:], cwd=folder, env=ALONE)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shapes/*.safetensors"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "finished shards stay in shapes" in output and "the same command" in output
    made = {p: p.stat().st_mtime_ns for p in folder.glob("shapes/*.safetensors")}
    assert 2 <= len(made) < 100

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    subprocess.run(
        [*torchrun, *command("train.py", *words, "until=cache", "parallel=ddp")[1:]],
        cwd=folder,
        env=ALONE,
        check=True,
        timeout=300,
    )
    assert len(list(folder.glob("shapes/*.safetensors"))) == 100
    assert not list(folder.glob("shapes/*.json.tmp")) and not list(
        folder.glob("shapes/shard*.json")
    )
    assert all(p.stat().st_mtime_ns == time_ for p, time_ in made.items())
