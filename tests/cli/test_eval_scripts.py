"""The measurements of a trained model, run on a tiny one, and what they refuse."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from torch import nn

import mmdit
import mmdit.cli.eval.efficiency
from mmdit.atomic import file_hash
from mmdit.cli.launch import launch
from mmdit.data.captions import TASKS, short_caption, vocabulary
from mmdit.data.shapes import Shapes
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import LogitNormal
from mmdit.loading import open_source
from mmdit.metrics.compositional import judge
from mmdit.metrics.reconstruction import psnr, ssim
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.parity.random_weights import models_of_size, write_random
from mmdit.pipeline import Pipeline, from_pixels, to_pixels
from mmdit.runs.checkpoint import read_weights
from mmdit.runs.native import save_module
from mmdit.text.clip_pair import CLIPPair
from mmdit.text.conditioning import TextConditioner, TextEncoder
from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer
from tests.checkpoints_for_tests import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DATA = {"_target_": "mmdit.data.Shapes", "image_size": 32, "seed": 3}
CONFIG_OF = {"autoencoder": "evaluate_autoencoder"}  # the others are named like their scripts

Run = Callable[..., str]


def clip(projection_width: int | None = None) -> TextEncoder:
    tokenizer = CLIPWordTokenizer(words=vocabulary(), length=16, pad_with_end=True)
    size = {"vocabulary_size": 96, "width": 8, "depth": 2, "num_heads": 1, "length": 16}
    model = CLIPTextModel(**size, projection_width=projection_width)
    return TextEncoder(tokenizer=tokenizer, model=model)


def tiny_pipeline() -> Pipeline:
    t5 = TextEncoder(
        tokenizer=T5WordTokenizer(words=vocabulary(), length=16),
        model=T5Encoder(vocabulary_size=96, width=16, depth=1, num_heads=1, hidden=16),
    )
    network = MMDiT(
        depth=3,
        width=16,
        num_heads=2,
        latent_channels=4,
        context_width=16,
        pooled_width=16,
        position_size=16,
    )
    return Pipeline(
        mmdit=network,
        text=TextConditioner(clip_l=clip(), clip_g=clip(), t5=t5),
        autoencoder=Autoencoder(latent_channels=4, width=32, multipliers=[1, 1], blocks=0),
        objective=Objective(
            path=RectifiedFlow(), timesteps=LogitNormal(), prediction=Velocity(), shift=Shift()
        ),
        image_size=32,
        steps=2,
        guidance=2.0,
    )


def tiny_clip() -> CLIPPair:
    image = CLIPImageModel(
        width=8, depth=1, num_heads=1, image_size=32, patch_size=8, projection_width=8
    )
    return CLIPPair(text=clip(projection_width=8), image=image)


@pytest.fixture
def folder(tmp_path: Path, randomize: Callable[[nn.Module, int], nn.Module]) -> Path:
    """A folder with a finished run of random weights, runs/tiny-001, and clip.safetensors."""
    torch.manual_seed(0)
    pipeline = randomize(tiny_pipeline(), 0)
    run = tmp_path / "runs" / "tiny-001"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"data": DATA}))
    write_checkpoint(run, 1, {"ema": pipeline, "raw": pipeline})
    save_module(tmp_path / "clip.safetensors", randomize(tiny_clip(), 1))
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(script, *words, code=0)`: what a script of eval/ prints; on stderr, where code is 2."""

    def call(name: str, *words: str, code: int = 0) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        GlobalHydra.instance().clear()
        module = import_module(f"mmdit.cli.eval.{name}")
        capsys.readouterr()

        def start() -> None:
            config_name = CONFIG_OF.get(name, name)
            launch(module.job, config_name=config_name, verbatim=module.VERBATIM)

        if code == 0:
            start()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            start()
        message = capsys.readouterr().err
        assert stop.value.code == code
        assert "Traceback" not in message
        return message

    return call


def report_of(told: str) -> dict[str, Any]:
    path = next(line for line in told.splitlines() if line.endswith(".json"))
    report: dict[str, Any] = json.loads(Path(path).read_text(), parse_constant=pytest.fail)
    for line in told.splitlines():
        if line.endswith((".json", ".md", ".png")):
            assert Path(line).is_file()
    markdown = Path(path).with_suffix(".md").read_text()
    assert markdown in told
    assert report["weights_sha256"][:16] in markdown
    return report


def checkpoint(folder: Path) -> Path:
    return folder / "runs/tiny-001/checkpoints/step_00000001/ema"


def test_attention_of_a_run(run, folder):
    report = report_of(run("attention", "samples=3", "batch_size=2", "image_sizes=[32,64]"))
    assert (report["protocol"], report["samples"], report["seed"]) == ("attention-1", 3, 0)
    assert report["weights_sha256"] == read_weights(checkpoint(folder)).sha256
    for size, tokens in (("32", 64 + 32), ("64", 256 + 32)):
        seen = report["sizes"][size]
        assert list(seen) == ["t=0.1", "t=0.5", "t=0.9", "all t"]
        for rows in seen.values():
            assert [row["block"] for row in rows] == [
                "blocks.0",
                "blocks.1",
                "last_block",
                "last 3",
            ]
            for row in rows:
                expected = row["normalized_entropy"] * math.log(tokens)
                assert row["entropy"] == pytest.approx(expected, rel=1e-5)
        # Over all times: the largest of the largest, the mean of the means.
        levels = [seen[f"t={t}"][0] for t in (0.1, 0.5, 0.9)]
        assert seen["all t"][0]["max_logit"] == max(row["max_logit"] for row in levels)
        mean = sum(row["entropy"] for row in levels) / 3
        assert seen["all t"][0]["entropy"] == pytest.approx(mean, rel=1e-5)


def test_attention_of_random_weights(run):
    told = run("attention", "random=tiny", "samples=1", "image_sizes=[32]", "levels=[0.5]")
    report = report_of(told)
    assert report["weights"] == "random weights, tiny"
    assert [row["block"] for row in report["sizes"]["32"]["t=0.5"]][-1] == "last 4"
    assert Path("results/attention-tiny/attention-entropy.png").is_file()


def test_encoders_by_subset(run, folder):
    words = ("samples=6", "validation_samples=3", "steps=1", "clip=clip.safetensors")
    report = report_of(run("encoders", *words))
    rows = report["rows"]
    assert [row["unconditional"] for row in rows] == ["zeros", "encoded"] + ["zeros"] * 7
    assert [len(row["encoders"]) for row in rows] == [3, 3, 2, 2, 1, 2, 1, 1, 0]
    assert all(row.keys() >= {"clip", "accuracy", "loss", "levels"} for row in rows)
    assert rows[0]["loss"] == rows[1]["loss"]  # no guidance enters it
    assert len({row["loss"] for row in rows[1:]}) == 8
    assert rows[0]["clip"] != rows[1]["clip"]
    assert report["clip_sha256"] == read_weights(folder / "clip.safetensors").sha256
    assert (report["samples"], report["validation_samples"]) == (6, 3)


ONLY_STEPS = ("thresholds=[]", "forecasts=[]", "intervals=[]")


def test_efficiency_is_relative_to_the_most_steps(run):
    words = ("samples=6", "steps=[4,1,2]", "clip=clip.safetensors", *ONLY_STEPS)
    report = report_of(run("efficiency", *words))
    rows = report["rows"]
    assert report["score"] == "clip" and report["others"] == []
    assert [row["steps"] for row in rows] == [1, 2, 4]
    assert [row["function_evaluations"] for row in rows] == [2, 4, 8]  # two sides of guidance
    assert [row["saved"] for row in rows] == [0.75, 0.5, 0.0]
    assert rows[0]["distance"] > rows[1]["distance"] > rows[2]["distance"] == 0
    whole = rows[-1]["clip"]
    for row in rows:
        assert row["path_length"] > 0
        expected = 100 * (whole - row["clip"]) / whole if whole > 0 else None
        assert row["relative_loss_percent"] == (expected and pytest.approx(expected))


def test_efficiency_of_caches_and_intervals_beside_fewer_steps(run):
    words = ("samples=4", "batch_size=3", "steps=[2,6]", "thresholds=[0,1]", "forecasts=[[2,1]]")
    told = run("efficiency", *words, "intervals=[[0.3,0.9]]")
    report = report_of(told)
    assert Path(next(line for line in told.splitlines() if line.endswith(".png"))).is_file()
    assert report["protocol"] == "efficiency-2"
    rows = {row["setting"]: row for row in report["others"]}
    evaluations = {name: row["function_evaluations"] for name, row in rows.items()}
    assert [*rows] == [
        *("first block 0", "first block 1", "taylor 2 order 1"),
        *("guidance 0.3-0.9, 6 steps", "guidance 0.3-0.9, 2 steps"),
        *("guidance 0.3-0.9, first block 0", "guidance 0.3-0.9, first block 1"),
        "guidance 0.3-0.9, taylor 2 order 1",
    ]
    assert (evaluations["first block 0"], rows["first block 0"]["distance"]) == (12, 0)
    assert evaluations["first block 1"] < 12
    assert evaluations["taylor 2 order 1"] == 8
    assert (
        evaluations["guidance 0.3-0.9, 6 steps"] == evaluations["guidance 0.3-0.9, first block 0"]
    )
    control = {row["steps"]: row["distance"] for row in report["rows"]}
    row = rows["taylor 2 order 1"]  # at 8 of 4 to 12 evaluations: (1/4 - 1/8) / (1/4 - 1/12)
    assert row["fewer_steps_distance"] == pytest.approx(0.25 * control[2] + 0.75 * control[6])
    assert row["saved"] == pytest.approx(1 / 3)
    assert row["cache"] == {"class": "TaylorCache", "interval": 2, "order": 1, "warmup_steps": 0}
    assert row["distance"] > 0 and row["guidance_interval"] is None
    assert "At 6 steps, beside fewer steps" in told


@pytest.mark.parametrize(
    ("found", "expected"),
    [([0.2, 0.45, 0.5], [60.0, 10.0, 0.0]), ([0.6, 0.5], [-20.0, 0.0]), ([0.1, 0.0], [None, None])],
)
def test_relative_losses(found, expected):
    report = {"rows": [{"steps": i, "accuracy": score} for i, score in enumerate(found)]}
    report["others"] = []
    mmdit.cli.eval.efficiency.add_losses(report)
    losses = [row["relative_loss_percent"] for row in report["rows"]]
    assert losses == pytest.approx(expected)
    assert report["score"] == "accuracy"


def test_fewer_steps_are_interpolated_as_the_error_of_a_first_order_solver():
    points = [(n, 3 / n + 1) for n in (4.0, 10.0, 50.0)]
    for n in (4.0, 7.0, 10.0, 20.0, 50.0):
        assert mmdit.cli.eval.efficiency.between(points, n) == pytest.approx(3 / n + 1)
    for n in (3.9, 50.1):
        assert mmdit.cli.eval.efficiency.between(points, n) is None


@torch.no_grad()
def test_autoencoder_figures_are_those_of_its_reconstructions(run, folder):
    words = ("checkpoint=runs/tiny-001", "samples=5", "batch_size=2", "clip=clip.safetensors")
    report = report_of(run("autoencoder", *words, "precision=fp32"))
    truth = Shapes(split="validation", image_size=32, seed=3).batch(range(5)).images
    autoencoder = mmdit.load_autoencoder(checkpoint(folder))
    again = to_pixels(autoencoder.decode(autoencoder.encode(from_pixels(truth))))
    pairs = list(zip(again.split(1), truth.split(1), strict=True))
    assert report["psnr"] == pytest.approx(sum(psnr(*pair) for pair in pairs) / 5, abs=0.01)
    assert report["ssim"] == pytest.approx(sum(ssim(*pair) for pair in pairs) / 5, abs=1e-3)
    assert report["fd"] > 0
    assert (report["samples"], report["latent_channels"], report["factor"]) == (5, 4, 2)


@pytest.mark.slow
def test_compositional_asks_for_a_new_word_too(run, folder):
    words = ("checkpoint=runs/tiny-001", "word=star", "splits=[held_out]", "prompts_per_task=2")
    told = run("compositional", *words, "steps=1")
    report = json.loads((folder / told.splitlines()[-3]).read_text())
    assert [*report["splits"]] == ["held_out", "star"]
    assert report["splits"]["star"]["overall"]["detector_on_truth"] == 1.0
    assert "word='stra' must be one of" in run("compositional", words[0], "word=stra", code=2)


@pytest.mark.slow
def test_forgetting_compares_runs_with_what_they_started_from(run, folder):
    base = folder / "runs/tiny-001"
    shapes = {"_target_": "mmdit.data.Shapes", "image_size": 32}
    probe = {"_target_": "mmdit.study.WordAccuracy", "_partial_": True, "data": shapes}
    probe |= {"word": "star", "prompts_per_task": 2, "steps": 1}
    for seed in (0, 1):
        new = folder / f"runs/word/adapter=lora,seed={seed}"
        new.mkdir(parents=True)
        config = {"initial": str(base), "initial_sha256": open_source(base).sha256, "seed": seed}
        config |= {"probe": probe, "training": {"steps": 5}}
        (new / "config.json").write_text(json.dumps(config))
        row = {"step": 5, **{f"ema/accuracy_{key}": 0.5 for key in ("taught", "word", "old")}}
        (new / "metrics.jsonl").write_text(json.dumps(row))
    told = run("forgetting", "runs=runs/word").splitlines()
    out = folder / "runs/word/forgetting"
    assert [Path(line).name for line in told[-4:]] == [
        *("forgetting.json", "forgetting.md", "forgetting.png", "forgetting-steps.png")
    ]
    report = json.loads((out / "forgetting.json").read_text())
    assert report["initial_accuracies"].keys() == {"taught", "word", "old"}
    (recipe,) = report["recipes"]
    assert (recipe["recipe"], recipe["seeds"]) == ("adapter=lora", [0, 1])
    assert recipe["accuracies"]["word"]["5"] == {"mean": 0.5, "half_width": 0.0}
    assert "| 1 | adapter=lora | 0.50 ± 0.00 |" in (out / "forgetting.md").read_text()
    assert "give runs=" in run("forgetting", code=2)


@pytest.mark.slow
def test_alignment_compares_runs_with_what_they_started_from(run, folder):
    base = folder / "runs/tiny-001"
    shapes = {"_target_": "mmdit.data.Shapes", "image_size": 32}
    probe = {"_target_": "mmdit.study.AlignmentProbe", "_partial_": True, "data": shapes}
    probe |= {"prompts_per_task": 2, "diversity_prompts": 2, "members": 8, "steps": 1}
    probe |= {"other_steps": 1}
    config = {"initial": str(base), "initial_sha256": open_source(base).sha256, "probe": probe}
    figures = ("accuracy", "accuracy_held_out", "accuracy_other_sampler", "diversity")
    row = {"step": 5, "images_per_second": 2.0, "tflops": 3.0, "ema/pixel_deviation": 30.0}
    row |= {f"ema/{figure}": 0.875 for figure in (*figures, "accuracy_position")}
    for seed in (0, 1):
        new = folder / f"runs/aligned/algorithm=awm,seed={seed}"
        new.mkdir(parents=True)
        own = {"seed": seed, "training": {"steps": 5, "batch_size": 4}}
        (new / "config.json").write_text(json.dumps(config | own))
        (new / "metrics.jsonl").write_text(json.dumps(row))
    told = run("alignment", "runs=runs/aligned").splitlines()
    out = folder / "runs/aligned/alignment"
    assert [Path(line).name for line in told[-4:]] == [
        *("alignment.json", "alignment.md", "alignment.png", "alignment-compute.png")
    ]
    report = json.loads((out / "alignment.json").read_text())
    assert report["initial_figures"].keys() > {"accuracy", "pixel_deviation", "accuracy_position"}
    (recipe,) = report["recipes"]
    assert (recipe["recipe"], recipe["seeds"]) == ("algorithm=awm", [0, 1])
    assert recipe["tflop_per_step"] == 6.0
    assert recipe["figures"]["diversity"]["5"] == {"mean": 0.875, "half_width": 0.0, "seeds": 2}
    assert recipe["figures"]["diversity_place"]["5"]["mean"] is None
    assert recipe["best_diverse"]["step"] == 5
    assert "| 1 | algorithm=awm | 0.88 ± 0.00 |" in (out / "alignment.md").read_text()
    assert "give runs=" in run("alignment", code=2)


def test_compositional_samples_an_image_for_each_scene_of_each_split(run, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    words = ("checkpoint=~/runs/tiny-001", "prompts_per_task=2", "steps=1", "batch_size=1")
    told = run("compositional", *words, "precision=fp32")
    out = folder / "runs/tiny-001/compositional/step_00000001"
    files = [f"{out}/compositional.{suffix}" for suffix in ("json", "md", "png")]
    assert told.splitlines()[-3:] == files
    report = json.loads((out / "compositional.json").read_text())
    assert report["protocol"] == "compositional-1" and list(report["splits"]) == [
        "validation",
        "held_out",
    ]
    assert report["weights_sha256"] == read_weights(checkpoint(folder)).sha256
    for split, rows in report["splits"].items():
        assert list(rows) == [*TASKS, "overall"]
        assert rows["overall"]["detector_on_truth"] == 1.0, split
    drawn = Shapes(split="validation", image_size=32, seed=3)
    prompts = [short_caption(drawn.scene_for_task("counting", i)) for i in range(2)]
    pipe = mmdit.load_pipeline(checkpoint(folder))
    images = pipe(prompts, seeds=[0, 1], steps=1)
    right = judge(drawn, [drawn.scene_for_task("counting", i) for i in range(2)], images)
    assert report["splits"]["validation"]["counting"]["accuracy"] == sum(right) / 2


def test_autoencoder_on_a_folder_of_images(run, folder):
    photos = folder / "photos" / "sub"
    photos.mkdir(parents=True)
    for i, mode in enumerate(("RGB", "RGBA", "L")):
        Image.new(mode, (40 + i, 30)).save(photos / f"{i}.png")
    words = ("checkpoint=runs/tiny-001", "images=photos", "samples=3", "image_size=16")
    report = report_of(run("autoencoder", *words))
    assert (report["images"], report["image_size"], report["samples"]) == ("photos", 16, 3)
    (photos / "0.png").write_text("not an image")
    assert "0.png cannot be read" in run("autoencoder", *words, code=2)
    assert "contains 3 images" in run("autoencoder", *words[:2], "samples=4", code=2)


def test_geneval_goes_on_where_it_was_stopped(run, folder):
    words = ("prompts=6", "steps=1", "out=photos")
    assert "12 images generated, 0 existed already" in run(
        "geneval", *words, "samples_per_prompt=2"
    )
    out = folder / "photos"
    paths = sorted(out.glob("*/samples/*.png"))
    names = [path.relative_to(out).as_posix() for path in paths]
    assert names == [f"{i:05d}/samples/{j:04d}.png" for i in range(6) for j in range(2)]
    before = {path: path.read_bytes() for path in paths}
    paths[3].unlink()
    paths[4].write_bytes(b"kept as it is")
    told = run("geneval", *words, "samples_per_prompt=3")
    assert "7 images generated, 11 existed already" in told
    assert paths[3].read_bytes() == before[paths[3]]  # from the same noise
    assert paths[4].read_bytes() == b"kept as it is"
    report = json.loads((out / "report.json").read_text())
    assert (report["samples"], report["samples_per_prompt"], report["seed"]) == (18, 3, 0)
    assert report["weights_sha256"] == read_weights(checkpoint(folder)).sha256
    assert "seed 0, not 1" in run("geneval", *words, "seed=1", code=2)


def test_geneval_paints_the_official_list(run, folder):
    line = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "bench"}
    (folder / "list.jsonl").write_text(json.dumps(line) + "\n")
    run("geneval", "metadata=list.jsonl", "steps=1", "out=photos", "samples_per_prompt=1")
    kept = (folder / "photos" / "00000" / "metadata.jsonl").read_text()
    assert json.loads(kept) == line
    (folder / "list.jsonl").write_text("{")
    assert "line 1 is not JSON" in run("geneval", "metadata=list.jsonl", "out=other", code=2)
    assert not (folder / "other").exists()


def test_public_weights_are_measured_too(run, folder, t5_files):
    models = models_of_size("tiny", ("mmdit", "autoencoder", "t5"))
    weights = write_random(models, folder, seed=0, name="whole")["mmdit"]
    shutil.copytree(t5_files, folder / "words" / "tokenizer_3")
    words = ("checkpoint=whole.safetensors", "text.tokenizers=words", "precision=fp32")
    words += ("text.use_clip_l=false", "text.use_clip_g=false")
    looked = run("attention", *words, "image_sizes=[64]", "samples=2", "levels=[0.5]")
    report = report_of(looked)
    assert report["weights_sha256"] == file_hash(weights)
    rows = report["sizes"]["64"]["t=0.5"]
    assert [row["block"] for row in rows][-2:] == ["last_block", "last 4"]
    size = ("height=64", "width=64", "prompts=2", "steps=1", "samples_per_prompt=1")
    assert "2 images generated" in run("geneval", *words, *size)
    with Image.open("results/geneval/00001/samples/0000.png") as opened:
        assert opened.size == (64, 64)
    given = ("checkpoint=whole.safetensors", "samples=2", "precision=fp32")
    report = report_of(run("autoencoder", *given))
    assert (report["latent_channels"], report["factor"]) == (16, 8)
    assert report["weights_sha256"] == file_hash(weights)
    told = run("attention", *words, "preset=sd4", code=2)
    assert "preset='sd4' must be one of" in told


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("attention", ("levels=[0]",), "levels=[0] must be a list of times above 0"),
        ("attention", ("levels=[0.5,0.5]",), "none of them twice"),
        ("attention", ("samples=0",), "samples=0 must be a whole number of at least 1"),
        ("attention", ("image_sizes=[40]",), "40"),
        ("attention", ("image_sizes=[4096]",), "height=4096"),
        ("attention", ("random=huge",), "random='huge' must be one of"),
        ("attention", ("random=tiny", "image_sizes=[33]"), "33 must be a multiple of 16"),
        ("attention", ("random=tiny", "checkpoint=x"), "either"),
        ("attention", ("runs=nowhere",), "no finished run in nowhere/"),
        ("attention", ("checkpoint=nowhere.safetensors",), "no such file"),
        ("compositional", ("prompts_per_task=1",), "prompts_per_task=1 must be a whole number"),
        ("compositional", ("batch_size=0",), "batch_size=0 must be a whole number"),
        (
            "compositional",
            ("checkpoint=clip.safetensors",),
            "holds a CLIPPair, not a text-to-image",
        ),
        ("compositional", ("runs=nowhere",), "no finished run in nowhere/"),
        ("encoders", ("samples=0",), "samples=0"),
        ("encoders", ("text.use_t5=maybe",), "text.use_t5='maybe' must be true or false"),
        ("encoders", ("prompts=absent.txt",), "prompts=absent.txt cannot be read"),
        ("encoders", ("clip=runs/tiny-001",), "holds a Pipeline, not a CLIPPair"),
        ("encoders", ("guide=guidance_interval", "guide.low=2"), "low 2"),
        ("efficiency", ("steps=[50]",), "at least two whole numbers"),
        ("efficiency", ("steps=[5,2.5]",), "at least two whole numbers"),
        ("efficiency", ("steps=5",), "steps=5 must be a list"),
        ("efficiency", ("thresholds=0.1",), "thresholds=0.1 must be a list of numbers"),
        ("efficiency", ("thresholds=[0.1,0.1]",), "none of them twice"),
        ("efficiency", ("thresholds=[2]",), "threshold=2 must be a finite number"),
        ("efficiency", ("forecasts=[2,1]",), "must be a list of pairs of an interval and an order"),
        ("efficiency", ("forecasts=[[2,9]]",), "order=9 must be a whole number from 0 to 4"),
        ("efficiency", ("intervals=[[0.9,0.2]]",), "low 0.9 and high 0.2"),
        ("efficiency", ("intervals=[[0.9]]",), "must be a list of pairs of noise levels"),
        ("efficiency", ("solver=heun",), "leave the cache out (thresholds=[] forecasts=[])"),
        ("efficiency", ("guidance=nan",), "guidance=nan must be a finite number"),
        ("geneval", ("guidance=strong",), "guidance='strong' must be a finite number"),
        ("efficiency", ("batch_size=0",), "batch_size=0"),
        ("autoencoder", (), "give checkpoint="),
        ("autoencoder", ("checkpoint=clip.safetensors",), "holds a CLIPPair, not an Autoencoder"),
        ("autoencoder", ("checkpoint=runs/tiny-001", "images=absent"), "no such folder"),
        ("autoencoder", ("checkpoint=runs/tiny-001", "images=.", "image_size=15"), "multiple of 2"),
        ("geneval", ("metadata=absent.jsonl",), "metadata=absent.jsonl cannot be read"),
        ("geneval", ("samples_per_prompt=0",), "samples_per_prompt=0"),
        ("geneval", ("height=7",), "height=7 must be a multiple of"),
    ],
)
def test_a_mistake_ends_in_one_message(run, script, words, message):
    assert message in run(script, *words, code=2)


def test_prompts_of_a_file_need_a_clip_and_enough_lines(run, folder):
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    words = ("prompts=prompts.txt", "steps=[1,2]", *ONLY_STEPS)
    assert "needs clip=" in run("efficiency", *words, "samples=2", code=2)
    told = run("efficiency", *words, "samples=3", "clip=clip.safetensors", code=2)
    assert "has 2 lines, but samples=3" in told
    report = report_of(run("efficiency", *words, "samples=2", "clip=clip.safetensors"))
    assert "accuracy" not in report["rows"][0]


def test_the_hash_of_a_folder_is_that_of_its_weights(tmp_path):
    for name, content in (("a/x.safetensors", b"1"), ("b.safetensors", b"2"), ("c.txt", b"3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    first = open_source(tmp_path).sha256
    (tmp_path / "c.txt").write_bytes(b"other")
    assert open_source(tmp_path).sha256 == first
    (tmp_path / "b.safetensors").write_bytes(b"other")
    assert open_source(tmp_path).sha256 != first
