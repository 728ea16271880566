import errno
import itertools
import json
import os
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

import mmdit
import mmdit.cli.eval.autoencoder
from mmdit.cli import CONFIGS, images, sample
from mmdit.cli.subject import Subject, open_named
from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.loading import Public, Run
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.controlnet import ControlledMMDiT, ControlNet
from mmdit.pipeline import Samples, to_pixels
from mmdit.published import published_objective
from tests.checkpoints_for_tests import write_checkpoint
from tests.kills_for_tests import forked

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
    found = open_named(CONFIG, {"checkpoint": "~/run"}, [])
    assert isinstance(found, Run)
    assert found.path == home / "run" / "checkpoints" / "step_00000001" / "ema"


def test_a_folder_without_weights_is_told_what_it_lacks(home):
    with pytest.raises(UserError, match=r"empty: this folder has neither a complete checkpoint"):
        open_named(CONFIG, {"checkpoint": "~/empty"}, [])


def test_public_weights_keep_their_name(home):
    save_file({"x": torch.zeros(1)}, home / "empty" / "x.safetensors")
    for name in ("~/empty", "~/empty/x.safetensors"):
        found = open_named(CONFIG, {"checkpoint": name}, [])
        assert isinstance(found, Public) and found.name == name


def test_no_run_at_all_is_told(home, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match="there is no finished run in runs/"):
        open_named(CONFIG, {}, [])


READERS = {
    "sample": lambda path: images.open_image({"image": path}, "image"),
    "eval/autoencoder": lambda path: mmdit.cli.eval.autoencoder.open_image(path, 4),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_sixteen_bits_a_channel_are_scaled_to_eight(read, tmp_path):
    grey = np.full((4, 4), 128 * 257, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(read(tmp_path / "grey.png"), torch.full((4, 4, 3), 128, dtype=torch.uint8))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_not_an_image_is_refused_by_name(read, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    with pytest.raises(UserError, match=r"page\.eps cannot be read as an? .*: is not an image"):
        read(tmp_path / "page.eps")
    with pytest.raises(UserError, match=r"absent\.png cannot be read as an? .*: no such file"):
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
    with pytest.raises(UserError, match="is empty: write one prompt per line"):
        sample.read_prompts({"prompt_file": str(path)})


def test_a_prompt_file_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(sample, "LONGEST_PROMPT_FILE", 1000)
    with pytest.raises(UserError, match="prompt_file=/dev/zero is longer than 1,000 characters"):
        sample.read_prompts({"prompt_file": "/dev/zero"})


# Writing


class Stub:
    """A pipeline whose images cost nothing to generate, but the memory that they take."""

    image_size, steps, guidance = 256, 2, 1.0
    dtype = torch.float32
    text = SimpleNamespace(remarks=lambda prompts: [], t5=SimpleNamespace(length=1))
    objective = published_objective(3.0)

    def latent_size(self, height, width):
        return height // 8, width // 8

    def __init__(self):
        self.encoded, self.requests = [], []

    def encode(self, prompts):
        self.encoded.append(prompts)
        return Condition(torch.zeros(len(prompts), 1), torch.zeros(len(prompts), 1, 1))

    def sample(self, request, progress):
        pixels = np.full((request.count, request.height, request.width, 3), 7, np.uint8)
        return Samples(torch.from_numpy(pixels), request.seeds, 2)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(*overrides, prompt=...)`: the lines printed by sampling with a `Stub` into `out`."""

    def opened(pipe):
        facts = {"weights": "stub", "weights_sha256": None}
        return lambda *_, **__: Subject(pipe, nullcontext, Path("stub"), None, facts)

    def job(*overrides, pipe=None, **text):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("sample", list(overrides))
        monkeypatch.setattr(sample, "open_subject", opened(pipe or Stub()))
        prompt = {} if "prompt_file" in text else {"prompt": "a cat"}
        sample.job(config, {**prompt, "out": str(tmp_path / "out"), **text})
        return capsys.readouterr().out.splitlines()

    return job


def test_every_image_is_written_as_it_is_generated_and_none_is_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    run("num_images=1")  # what is imported and cached at the first
    peaks = []
    for count in (70, 140):
        tracemalloc.start()
        run(f"num_images={count}", "batch_size=4", "height=128", "width=128")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 70 * 128 * 128 * 3 / 10
    assert len(list((tmp_path / "out").glob("*-seed*.png"))) == 211


@pytest.mark.slow
def test_two_thousand_images_take_no_more_memory_than_a_hundred(run, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    peaks = []
    for count in (100, 2000):
        tracemalloc.start()
        run(f"num_images={count}", "batch_size=8")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 10e6  # all of them have 393 MB


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_distinct_prompt_is_encoded_once_and_alone(run, tmp_path, batch_size):
    pipe, batch = Stub(), f"batch_size={batch_size}"
    run("num_images=8", "guidance=4", batch, pipe=pipe)
    assert pipe.encoded == [[""], ["a cat"]]
    pipe = Stub()
    run("num_images=8", batch, pipe=pipe, negative_prompt="a dog")  # guidance is off
    assert pipe.encoded == [["a cat"]]
    (tmp_path / "prompts.txt").write_text("one\ntwo\none\n\none\n")
    pipe = Stub()
    run("num_images=2", "guidance=4", batch, pipe=pipe, prompt_file=str(tmp_path / "prompts.txt"))
    assert pipe.encoded == [[""], ["one"], ["two"]]


def facts_of(path):
    with Image.open(path) as image:
        return json.loads(image.text["mmdit"])


@pytest.mark.parametrize(
    ("words", "scale"),
    [
        ((), 1.0),
        (("guidance=3",), 3),
        (("++guide.scale=9",), 9),
        (("guide=guidance_rescale", "++guide.inner.scale=9"), 9),
    ],
)
def test_metadata_name_the_guidance_that_was_used(run, words, scale):
    image, _ = run("num_images=1", "height=32", "width=32", *words)
    assert facts_of(image)["guidance"] == scale


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=0", "steps=0 must be a whole number from 1 to 10,000"),
        ("height=8.5", "height=8.5 must be a whole number"),
        ("guidance=inf", "guidance=inf must be a finite number"),
        ("strength=0.5", "image and strength belong together"),
        ("num_images=0", "num_images"),
        ("batch_size=true", "batch_size"),
        ("compile=1", "compile=1 must be true or false"),
    ],
)
def test_what_no_model_could_do_is_refused_before_weights_are_looked_for(
    run, monkeypatch, word, message
):
    monkeypatch.setattr(sample, "open_subject", lambda *_, **__: pytest.fail("looked for weights"))
    with pytest.raises(UserError, match=message):
        run(word)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cache=taylor", "solver=heun"), "solver=heun does not work with a cache"),
        (("cache=first_block", "solver=euler_ancestral"), "solver=euler_ancestral does not"),
    ],
)
def test_caches_are_checked_with_solvers_before_weights_are_looked_for(
    run, monkeypatch, words, message
):
    monkeypatch.setattr(sample, "open_subject", lambda *_, **__: pytest.fail("looked for weights"))
    with pytest.raises(UserError, match=message):
        run(*words)


def test_a_cache_is_recorded_with_the_evaluations_that_it_left(run):
    words = ("num_images=2", "height=32", "width=32")
    first, _, told, _ = run(*words, "cache=first_block", "cache.threshold=0.2")
    assert told == "2 evaluations of the whole network per image"
    cache = {"class": "FirstBlockCache", "threshold": 0.2, "warmup_steps": 0}
    assert facts_of(first)["cache"] == {**cache, "max_consecutive": None}
    first, _, _ = run(*words)
    assert facts_of(first)["cache"] is None


def test_a_grid_has_thumbnails_of_at_most_64_images(run, tmp_path):
    *images, grid = run("num_images=64", "height=512", "width=256")
    assert len(images) == 64
    with Image.open(grid) as page:
        assert page.width <= 8 * (256 + 6) + 6 and page.height <= 8 * (256 + 60) + 6
    told = run("num_images=65")
    assert len(told) == 66 and told[-1].startswith("no grid is written for 65 images")
    assert len(list((tmp_path / "out").glob("*-grid.png"))) == 1


def test_samplings_into_one_folder_lose_nothing(run, tmp_path):
    children = [forked(lambda: run("num_images=4", "height=32", "width=32")) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert sum("-seed" in name for name in names) == 16
    assert sum("-grid" in name for name in names) == 4 and len(names) == 20


def test_a_full_disk_is_told_with_the_file_that_could_not_be_written(run, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(OSError) as caught:
        disk.setattr(os, "fsync", full)
        run("num_images=1", "seed=3")
    assert caught.value.filename == str(tmp_path / "out" / "00001-a-cat-seed3.png")
    assert list((tmp_path / "out").iterdir()) == []


# Control


@pytest.fixture(scope="module")
def control_net(tmp_path_factory):
    """A random control net for the tiny published pipeline, as a public file."""
    net = ControlNet(depth=3, width=64, num_heads=4, pooled_width=40, control_type="canny")
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return mmdit.save_single_file(net, tmp_path_factory.mktemp("net") / "canny.safetensors")


@pytest.fixture
def edges(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 38, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


@pytest.fixture
def follow(tiny_published, control_net, edges, tmp_path, monkeypatch, capsys):
    """`follow(*overrides, **text)`: the image that follows a control image, and its facts."""

    def job(*overrides, **text):
        words = ("num_images=1", "steps=3", "precision=fp32", "verify=false", *overrides)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("sample", list(words))
        given = {"prompt": "a cat", "checkpoint": str(tiny_published), "out": str(tmp_path / "o")}
        given |= {"control": str(edges), "controlnet": str(control_net), **text}
        sample.job(config, {key: value for key, value in given.items() if value is not None})
        path = capsys.readouterr().out.splitlines()[0]
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image)), facts_of(path)

    return job


def test_a_control_image_is_followed_as_written_out_by_hand(
    follow, tiny_published, control_net, edges
):
    image, facts = follow("control_strength=0.7", "guidance=3")
    pipe, net = mmdit.load_pipeline(tiny_published), mmdit.load_controlnet(control_net)
    with Image.open(edges) as opened:  # 50 x 38, cut to multiples of what the model needs
        cut = torch.from_numpy(np.array(opened))[1:49, 1:37]
    with torch.no_grad():
        pixels = cut.permute(2, 0, 1)[None].float() / 255 * 127.5 + 0.5  # Canny's own range
        control = pipe.autoencoder.encode(pixels)
        network = ControlledMMDiT(base=pipe.mmdit, control_net=net, strength=0.7)
        texts = [pipe.text.encode([prompt]) for prompt in ("a cat", "")]
        z, times = pipe.noise([0], 48, 36), pipe.objective.times(3).tolist()
        for t, t_next in itertools.pairwise(times):
            cond, uncond = (
                network(z, torch.tensor([t]), *text[:2], control=control) for text in texts
            )
            z = z + (t_next - t) * (uncond + 3 * (cond - uncond))
        expected = to_pixels(pipe.autoencoder.decode(z))[0]
    assert (image.int() - expected.int()).abs().max() <= 1
    assert facts["control_strength"] == 0.7 and facts["given"]["controlnet"] == str(control_net)
    plain, facts = follow("guidance=3", "height=48", "width=36", control=None, controlnet=None)
    assert (plain.int() - expected.int()).abs().max() > 5
    assert "control_strength" not in facts


def test_a_cache_on_the_command_line_saves_evaluations(follow):
    plain = {"control": None, "controlnet": None}
    words = ("guidance=3", "height=48", "width=36", "steps=6")
    _, full = follow(*words, **plain)
    _, facts = follow(*words, "cache=taylor", "cache.interval=2", **plain)
    assert (full["function_evaluations"], facts["function_evaluations"]) == (12, 8)
    image, facts = follow(*words, "cache=first_block", "cache.threshold=1", **plain)
    again, _ = follow(*words, "cache=first_block", "cache.threshold=1", **plain)
    assert 0 < facts["function_evaluations"] < 12
    assert torch.equal(image, again)


def test_a_control_image_takes_the_size_asked_for_or_that_of_the_image_to_start_from(
    follow, edges, tmp_path
):
    image, _ = follow("height=32", "width=16")
    assert image.shape == (32, 16, 3)
    Image.new("RGB", (16, 48)).save(tmp_path / "start.png")
    image, _ = follow("strength=0.5", image=str(tmp_path / "start.png"))
    assert image.shape == (48, 16, 3)


def test_the_control_net_may_lie_in_a_folder(follow, control_net, tmp_path):
    folder = mmdit.save_diffusers(mmdit.load_controlnet(control_net), tmp_path / "net")
    assert torch.equal(follow(controlnet=str(folder))[0], follow()[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"control": None}, "control=<image> and controlnet=<file, folder or hub id> belong"),
        ({"controlnet": None}, "control=<image> and controlnet=<file, folder or hub id> belong"),
        ({"control": "absent.png"}, r"control=absent\.png cannot be read as an image: no such"),
        ({"controlnet": "absent.safetensors"}, r"absent\.safetensors"),
    ],
)
def test_control_that_cannot_be_is_refused(follow, text, message):
    with pytest.raises(UserError, match=message):
        follow(**text)


def test_a_control_net_of_another_size_or_kind_is_refused(follow, tiny_published, tmp_path):
    narrow = ControlNet(depth=1, width=32, num_heads=4, pooled_width=40)
    path = mmdit.save_single_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"narrow.*has width 32, the model 64"):
        follow(controlnet=str(path))
    model = mmdit.load_mmdit(tiny_published)
    path = mmdit.save_single_file(model, tmp_path / "base.safetensors")
    with pytest.raises(UserError, match=r"base\.safetensors holds no SD3\.5 ControlNet"):
        follow(controlnet=str(path))
    with pytest.raises(UserError, match="control_strength=nan must be a finite number"):
        follow("control_strength=nan")


@pytest.mark.slow
def test_compiled_networks_follow_a_control_image_alike(follow):
    plain, compiled = (follow(f"compile={flag}", "guidance=3")[0] for flag in ("false", "true"))
    assert (plain.int() - compiled.int()).abs().max() <= 1


# Tables


@pytest.fixture
def images_of(tiny_published, tmp_path, monkeypatch, capsys):
    """`images_of(*overrides, **text)`: the images of two prompts, and the facts of the first."""
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\na red cat\n")

    def job(*overrides, **text):
        words = ("num_images=1", "steps=3", "precision=fp32", "verify=false", *overrides)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("sample", list(words))
        given = {"prompt_file": str(tmp_path / "prompts.txt"), "out": str(tmp_path / "o")}
        sample.job(config, {"checkpoint": str(tiny_published), **given, **text})
        *paths, _ = capsys.readouterr().out.splitlines()
        pixels = []
        for path in paths:
            with Image.open(path) as image:
                pixels.append(torch.from_numpy(np.array(image)).int())
        return torch.stack(pixels), facts_of(paths[0])

    return job


@pytest.mark.parametrize("batch_size", [1, 2])
def test_tables_give_the_same_images(images_of, batch_size):
    words = (f"batch_size={batch_size}", "solver=heun", "guidance=3")
    expected, facts = images_of(*words)
    assert facts["tables"] is False
    actual, facts = images_of(*words, "tables=true")
    assert facts["tables"] is True
    assert (actual - expected).abs().max() <= 1
    assert (expected[0] - expected[1]).abs().max() > 5


def test_tables_that_would_save_nothing_are_refused_before_anything_is_encoded(
    images_of, tmp_path, monkeypatch
):
    (tmp_path / "many.txt").write_text("\n".join(map(str, range(50))))
    monkeypatch.setattr(mmdit.Pipeline, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(UserError, match=r"tables would take .* bytes, more than the layers"):
        images_of("tables=true", prompt_file=str(tmp_path / "many.txt"))
    with pytest.raises(UserError, match="tables=1 must be true or false"):
        images_of("tables=1")
