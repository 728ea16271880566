"""Training from weights: whole models and adapters, resumed, opened, exported and refused."""

import json
from pathlib import Path

import pytest
import torch

import mmdit
from mmdit.adapters.adapter import Adapter
from mmdit.adapters.words import token_of
from mmdit.cli.build import freeze_in
from mmdit.export import export_adapter
from mmdit.registry import describe
from mmdit.runs.checkpoint import checkpoints_in, read_weights
from mmdit.runs.native import weights_hash
from tests.ready_process import Ready
from tests.training_for_tests import (
    ALONE,
    assert_same_run,
    command,
    losses,
    run,
    wait_for_step,
)

pytestmark = pytest.mark.slow  # they share two runs
SMOKE = ("experiment=smoke", "precision=fp32")
LORA = (*SMOKE, "initial=runs/base", "adapter=lora", "adapter.rank=4", "name=lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, `runs/base`, and an adapter of it, `runs/lora-001`."""
    folder = tmp_path_factory.mktemp("work")
    run(folder, "train.py", *SMOKE, "run=runs/base")
    run(folder, "train.py", *LORA)
    return folder


def moved(folder: Path) -> str:
    """A base whose average has left the start, where no gradient reaches the text."""
    if not (folder / "runs" / "moved").exists():
        run(folder, "train.py", *SMOKE, "ema.every=1", "run=runs/moved", "training.steps=20")
    return "runs/moved"


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_an_adapter_holds_the_adapter_alone(folder: Path) -> None:
    base, lora = folder / "runs" / "base", folder / "runs" / "lora-001"
    read = read_weights(lora)
    adapter = read.module()
    assert isinstance(adapter, Adapter)
    assert all(name.startswith("mmdit.") for name in read.tensors)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in read.tensors} == {"down", "up"}
    newest = checkpoints_in(lora)[-1]
    assert not list(lora.glob("checkpoints/frozen*"))
    digest = read_weights(base).sha256
    assert newest.manifest["config"]["initial_sha256"] == digest
    pipe = mmdit.load_pipeline(base)
    sampled = {"image_size": pipe.image_size, "steps": pipe.steps, "guidance": pipe.guidance}
    assert adapter.base == {"source": str(base.resolve()), "sha256": digest, **sampled}


def test_it_opens_as_the_model_with_the_adapter(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    base = mmdit.load_pipeline("runs/base")
    adapted = mmdit.load_pipeline("runs/lora-001")
    assert [*adapted.adapters] == ["adapter"]
    images = {"prompt": "a red circle", "steps": 2, "seed": 3}
    with_adapter = adapted(**images)
    base.load_lora("runs/lora-001")
    assert torch.equal(base(**images), with_adapter)
    adapted.unload_lora()
    base.unload_lora()
    assert (
        weights_hash(adapted)
        == weights_hash(base)
        == weights_hash(mmdit.load_pipeline("runs/base"))
    )


def test_the_first_step_sees_the_model_itself(folder: Path) -> None:
    """The first loss of a LoRA equals that of finetuning the network itself."""
    run(folder, "train.py", *SMOKE, "initial=runs/base", "name=full")
    run(folder, "train.py", *LORA, "adapter=dora", "name=dora")
    first = [metrics(folder / "runs" / name)[0] for name in ("lora-001", "full-001", "dora-001")]
    assert first[0]["loss"] == first[1]["loss"] == first[2]["loss"]
    later = [metrics(folder / "runs" / name)[4]["loss"] for name in ("lora-001", "full-001")]
    assert later[0] != later[1]


def test_finetuning_changes_what_is_named_alone(folder: Path) -> None:
    words = ("initial=runs/base", "train=[clip_l,mmdit.blocks.0]", "name=part", "data.samples=16")
    run(folder, "train.py", *SMOKE, *words, "training.steps=2", "training.evaluate_every=2")
    before = read_weights(folder / "runs" / "base", "ema").tensors
    after = read_weights(folder / "runs" / "part-001", "raw").tensors
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("text.clip_l.") for name in changed)
    assert any(name.startswith("mmdit.blocks.0.") for name in changed)
    assert all(name.startswith(("text.clip_l.", "mmdit.blocks.0.")) for name in changed)


def test_two_parts_equal_an_unbroken_run(folder: Path) -> None:
    words = (*LORA, "adapter.dropout=0.3")
    run(folder, "train.py", *words, "run=runs/whole", "training.save_every=3")
    run(folder, "train.py", *words, "run=runs/parts", "training.steps=3", "schedule.warmup_steps=2")
    run(folder, "train.py", *words, "resume=runs/parts", "training.steps=6")
    whole, parts = (read_weights(folder / "runs" / name, "raw") for name in ("whole", "parts"))
    assert whole.sha256 == parts.sha256
    assert losses(folder / "runs" / "whole") == losses(folder / "runs" / "parts")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["lora", "textual_inversion"])
def test_two_processes_have_the_losses_of_one(folder: Path, kind: str, parallel: str) -> None:
    words = (*LORA, "adapter.targets=all", "training.save_every=6")
    if kind == "textual_inversion":
        base = moved(folder)
        words = (*SMOKE, f"initial={base}", "adapter=textual_inversion", "training.save_every=6")
        words = (*words, "adapter.words=[circle,square,triangle]", "text.dropout=0")
    one = folder / "runs" / f"{kind}_alone"
    if not one.exists():
        run(folder, "train.py", *words, f"run={one}")
    both = folder / "runs" / f"{kind}_{parallel}"
    run(folder, "train.py", *words, f"run={both}", f"parallel={parallel}", processes=2)
    wanted, found = losses(one), losses(both)
    assert found.keys() == wanted.keys()
    assert [found[step] for step in wanted] == pytest.approx([*wanted.values()], rel=1e-5)
    tensors = read_weights(both, "raw").tensors
    for name, tensor in read_weights(one, "raw").tensors.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-4)


def test_an_adapter_of_a_changed_model_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = read_weights(folder / "runs" / "lora-001")
    description = {**weights.description, "base": {**weights.description["base"], "sha256": "0"}}
    mmdit.runs.native.save_tensors(
        tmp_path / "a.safetensors", weights.tensors, {"description": description}
    )
    with pytest.raises(mmdit.UserError, match="whose weights have changed since"):
        mmdit.load_pipeline(tmp_path / "a.safetensors")
    description["base"]["source"] = str(tmp_path / "gone")
    mmdit.runs.native.save_tensors(
        tmp_path / "a.safetensors", weights.tensors, {"description": description}
    )
    with pytest.raises(mmdit.UserError, match=r"is an adapter of .*gone"):
        mmdit.load_pipeline(tmp_path / "a.safetensors")


def test_it_is_exported_for_other_programs_and_sampled_with(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for dialect in ("diffusers", "sd-scripts", "comfyui"):
        out = Path(f"{dialect}.safetensors")
        export_adapter(Path("runs/lora-001"), out, dialect=dialect)
        pipe, wanted = mmdit.load_pipeline("runs/base"), mmdit.load_pipeline("runs/lora-001")
        pipe.load_lora(out)
        pipe.fuse_lora()
        wanted.fuse_lora()
        for (name, ours), theirs in zip(
            pipe.state_dict().items(), wanted.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, msg=name)
    words = ("prompt=a red circle", "steps=1", "num_images=1", "checkpoint=runs/base")
    done = run(folder, "sample.py", *words, "lora=comfyui.safetensors:0.5,runs/lora-001")
    image = folder / next(line for line in done.stdout.splitlines() if line.endswith(".png"))
    text = json.loads(mmdit_metadata(image))
    assert [(part["source"], part["scale"]) for part in text["lora"]] == [
        ("comfyui.safetensors", 0.5),
        ("runs/lora-001", 1.0),
    ]
    assert all(len(part["sha256"]) == 64 for part in text["lora"])


def mmdit_metadata(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return next(value for key, value in image.text.items() if value.startswith("{"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("initial=runs/none",), "runs/none"),
        (("initial=runs/lora-001",), "is an adapter: start from the model that it was trained on"),
        (("initial=runs/base", "model=toy_dit"), "the model comes with initial=runs/base"),
        (("initial=runs/base", "text.clip_l.model.width=96"), "the text comes with"),
        (("adapter=lora",), "adapter= needs weights to adapt"),
        (("train=[mmdit]",), "needs weights to start from"),
        (("initial=runs/base", "train=[unet]"), "train='unet' must be one of"),
        (("initial=runs/base", "train=[mmdit.block.0]"), "has no such part. Did you mean"),
        (("initial=runs/base", "adapter=lora", "train=[mmdit]"), "exclude each other"),
        (("initial=runs/base", "adapter=lora", "adapter.rank=0"), "rank=0 must be"),
        (("initial=runs/base", "adapter=lora", "adapter.rank=99999"), "rank=99999 must be"),
        (("initial=runs/base", "adapter=lora", "adapter.alpha=0"), "alpha=0 must be"),
        (("initial=runs/base", "adapter=lora", "adapter.targets=unet"), "targets='unet' must be"),
        (("initial=runs/base", "base_dtype=bf16"), "base_dtype is for what adapters leave"),
        (("initial=runs/base", "model.depth=3"), "may be changed"),
        (("initial=runs/base", "model.position_grid=0"), "position_grid"),
        (("initial=runs/base", "adapter=lora", "model.position_grid=4"), "leaves the network"),
        (("initial=runs/base", "adapter=textual_inversion"), "words"),
        (("initial=runs/base", "adapter=textual_inversion", "adapter.words=[a b]"), "one word"),
        (("initial=runs/base", "prior=prediction", "prior.prompt=a"), "but none changes a layer"),
        (
            ("initial=runs/base", "adapter=lora", "prior=prediction", "prior.prompt=null"),
            "needs what the model is to keep",
        ),
        (("initial=runs/base", "probe=new_word"), "data"),
        (("initial=runs/base", "adapter=lora", "adapter.parts=null"), "parts"),
        (("extra_channels=4",), "needs weights to start from"),
        (("initial=runs/base", "adapter=lora", "extra_channels=4"), "leaves the network"),
    ],
)
def test_a_mistake_ends_in_one_message(folder: Path, words, message) -> None:
    told = run(folder, "train.py", *SMOKE, *words, code=2).stderr
    assert message in told and "Traceback" not in told
    lines = told.strip().splitlines()
    assert len(lines) == 1, told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runs/base", "holds a Pipeline, not an adapter"),
        ("runs/lora-001:strong", "the scale 'strong' must be a number"),
        ("nothing.safetensors", "there is no such file"),
        ("", "lora= must name"),
    ],
)
def test_what_cannot_be_attached_is_refused(folder: Path, words: str, message: str) -> None:
    given = ("prompt=a", "steps=1", "num_images=1", "checkpoint=runs/base", f"lora={words}")
    assert message in run(folder, "sample.py", *given, code=2).stderr


def test_frozen_weights_may_be_bf16(folder: Path) -> None:
    words = ("base_dtype=bf16", "name=half", "training.steps=2", "sampling.steps=3")
    run(folder, "train.py", *LORA, *words)
    assert mmdit.load_pipeline(folder / "runs" / "half-001").steps == 3  # as it was trained
    pipe = mmdit.load_pipeline(folder / "runs" / "base")
    freeze_in(pipe, "bf16")
    assert {weight.dtype for weight in pipe.mmdit.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in pipe.autoencoder.parameters()} == {torch.float32}
    stored = read_weights(folder / "runs" / "half-001").tensors.values()
    assert {tensor.dtype for tensor in stored} == {torch.float32}


def test_new_words_may_begin_as_the_mean_of_others(folder: Path) -> None:
    starts = "start_words={cyan: [red, green]}"
    words = ("initial=runs/base", "training.steps=1", "text.dropout=1", "ema.every=1")
    output = run(folder, "train.py", *SMOKE, *words, starts, "run=runs/started").stdout
    assert "cyan begins as the mean of red, green" in output
    base, started = (mmdit.load_pipeline(folder / "runs" / name) for name in ("base", "started"))
    for ours, theirs in zip(started.text.encoders, base.text.encoders, strict=True):
        cyan, red, green = (token_of(ours.tokenizer, word) for word in ("cyan", "red", "green"))
        weight = theirs.model.token_embedding.weight
        expected = weight.clone()
        expected[cyan] = (weight[red] + weight[green]) / 2
        assert torch.equal(ours.model.token_embedding.weight, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("start_words={cyan: [magenta]}",), "do not know the word 'magenta'"),
        (("start_words={cyan: []}",), "start_words"),
        (("start_words={cyan: [red]}", "adapter=lora"), "adapter.start"),
        (("start_words=red",), "start_words"),
    ],
)
def test_starts_that_make_no_sense_are_refused(folder: Path, words, message: str) -> None:
    given = (*SMOKE, "initial=runs/base", *words)
    assert message in run(folder, "train.py", *given, code=2).stderr


def test_what_is_changed_by_name_is_said_and_described(folder: Path) -> None:
    words = ("model.position_grid=8", "model.qk_norm=true", "sampling.steps=3", "text.dropout=0.1")
    told = run(
        folder, "train.py", *SMOKE, "initial=runs/base", "name=changed", "objective=rf", *words
    ).stdout
    assert "note: model.position_grid=8 is not that of the weights, as asked" in told
    assert "note: model.qk_norm=True is not that of the weights, as asked" in told
    assert "note: objective is that of the config" in told
    base = mmdit.load_pipeline(folder / "runs" / "base")
    changed = mmdit.load_pipeline(folder / "runs" / "changed-001")
    assert changed.steps == 3 and changed.text.dropout == 0.1
    description = describe(changed.mmdit)
    assert (description["position_grid"], description["qk_norm"]) == (8, True)
    assert not torch.equal(changed.mmdit.positions, base.mmdit.positions)
    assert describe(changed.objective)["timesteps"]["class"] == "Uniform"
    assert describe(base.objective)["timesteps"]["class"] == "LogitNormal"


def test_new_words_are_trained_resumed_and_read_by_prompts(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    base = moved(folder)
    words = (
        *(f"initial={base}", "adapter=textual_inversion", "ema.every=1"),
        "adapter.words=[circle,circles]",
    )
    run(folder, "train.py", *SMOKE, *words, "run=runs/words", "training.log_every=1")
    halves = (*SMOKE, *words, "training.steps=3", "training.evaluate_every=3")
    run(folder, "train.py", *halves, "run=runs/word_halves")
    run(folder, "train.py", *SMOKE, *words, "resume=runs/word_halves")
    whole, twice = (read_weights(folder / "runs" / name) for name in ("words", "word_halves"))
    assert whole.sha256 == twice.sha256
    assert {name.rpartition(".")[2] for name in whole.tensors} == {"vectors"}
    base, taught = (mmdit.load_pipeline(f"runs/{name}") for name in ("moved", "words"))
    for prompt, same in (("a red square", True), ("a red circle", False)):
        images = [pipe(prompt, steps=2, seed=1) for pipe in (base, taught)]
        conditions = [pipe.encode([prompt]).c_ctxt for pipe in (base, taught)]
        assert torch.equal(*images) == torch.equal(*conditions) == same
    told = run(
        folder,
        "sample.py",
        "checkpoint=runs/moved",
        "lora=runs/words",
        "prompt=a circle",
        "steps=1",
    )
    image = folder / next(line for line in told.stdout.splitlines() if line.endswith(".png"))
    assert json.loads(mmdit_metadata(image))["lora"][0]["source"] == "runs/words"


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_an_adapter_that_was_killed_goes_on_as_if_it_had_not_been(folder: Path, kind: str) -> None:
    words = ("initial=runs/base", f"adapter={kind}", "training.save_every=2", "ema.every=1")
    long = ("training.steps=100000", "training.evaluate_every=100000", f"run=runs/killed_{kind}")
    line = command("train.py", *SMOKE, *words, *long)
    process = Ready(line[1:], cwd=folder, env=ALONE)
    wait_for_step(process, folder / "runs" / f"killed_{kind}", 7)
    process.kill()
    process.wait()
    end = ("training.steps=14", "training.evaluate_every=100000")
    run(folder, "train.py", *SMOKE, *words, *end, f"resume=runs/killed_{kind}")
    run(folder, "train.py", *SMOKE, *words, *end, f"run=runs/unbroken_{kind}")
    assert_same_run(folder / "runs" / f"killed_{kind}", folder / "runs" / f"unbroken_{kind}")
