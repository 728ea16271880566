"""Students of few steps: what they take over from their teacher, and whole runs."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

import mmdit
from mmdit.cli import CONFIGS
from mmdit.cli.initial import open_initial
from mmdit.engine.loggers import read_metrics
from mmdit.errors import UserError
from mmdit.models.interval import IntervalMMDiT
from mmdit.models.mmdit import MMDiT
from mmdit.runs.checkpoint import read_weights
from tests.training_for_tests import assert_same_run, losses, run

SMALL = (
    *("experiment=few_steps", "precision=fp32", "initial=runs/base", "data.samples=32"),
    *("schedule=warmup_constant", "schedule.warmup_steps=2"),  # of any length
    *("ema.every=1", "training.validation_size=4"),
    *("training.steps=6", "training.batch_size=4", "training.log_every=1"),
    *("training.evaluate_every=6", "training.save_every=3"),
)
REFLOW = ("student=reflow", "student.pairs=70", "student.teacher_steps=3")
LADD = ("student=ladd", *REFLOW[1:])  # with the pairs of reflow


def config_of(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", ["experiment=few_steps", *words])


def test_a_student_starts_as_its_teacher_and_samples_in_fewer_steps(tiny_published: Path) -> None:
    config = config_of(f"initial={tiny_published}")
    initial = open_initial(config, set())
    assert initial is not None
    teacher = mmdit.load_pipeline(tiny_published)
    pipe = initial.pipeline
    assert isinstance(pipe.mmdit, IntervalMMDiT)
    assert (pipe.steps, pipe.guidance) == (2, 1.0)
    assert (config.student.guidance, config.student.teacher_steps) == (
        teacher.guidance,
        teacher.steps,
    )
    options = {"prompt": "a red cat", "steps": 2, "guidance": 1.0}
    assert torch.equal(pipe(**options), teacher(**options))
    asked = config_of(f"initial={tiny_published}", "sampling.steps=5", "student=reflow")
    initial = open_initial(asked, {"sampling.steps", "student"})
    assert initial is not None and type(initial.pipeline.mmdit) is MMDiT
    assert (initial.pipeline.steps, initial.pipeline.guidance) == (5, 1.0)


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (("adapter=lora",), "adapter", "student=mean_flow has an embedding of its own"),
        (("objective=eps_linear",), "objective", r"LDMLinear and Epsilon.*student=reflow"),
        (("text.dropout=0.1",), "text.dropout", "keeps all text encoders"),
        (("objective=v_cos",), "objective", "Cosine and V"),
        (("model=toy",), "model", "the model comes with initial="),
        (("autoencoder=sd3",), "autoencoder", "the autoencoder comes with initial="),
    ],
)
def test_what_cannot_be_a_student_is_refused(
    tiny_published: Path, words: tuple[str, ...], given: str, message: str
) -> None:
    config = config_of(f"initial={tiny_published}", *words)
    with pytest.raises(UserError, match=message):
        open_initial(config, {given})


def test_a_student_needs_a_teacher() -> None:
    with pytest.raises(UserError, match="student= needs a teacher: initial="):
        open_initial(config_of(), set())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, `runs/base`, and a student of each kind."""
    folder = tmp_path_factory.mktemp("work")
    words = ("experiment=smoke", "precision=fp32", "ema.every=1", "training.steps=20")
    run(folder, "train.py", *words, "model.depth=2", "model.width=48", "run=runs/base")
    run(folder, "train.py", *SMALL, "run=runs/mean_flow")
    run(folder, "train.py", *SMALL, *REFLOW, "run=runs/reflow")
    run(folder, "train.py", *SMALL, *LADD, "run=runs/ladd")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_flow", "reflow", "ladd"])
def test_a_student_opens_and_samples_as_it_was_trained(folder: Path, name: str) -> None:
    out = f"images-{name}"
    words = (f"checkpoint=runs/{name}", "prompt=a red circle", f"out={out}")
    run(folder, "sample.py", *words)
    with Image.open(next((folder / out).glob("*circle*.png"))) as image:
        metadata = json.loads(image.info["mmdit"])
    assert (metadata["steps"], metadata["guidance"]) == (2, 1.0)
    assert metadata["function_evaluations"] == 2
    rows = read_metrics(folder / "runs" / name / "metrics.jsonl")
    assert {"ema/distance_1", "raw/distance_2"} <= rows[-1].keys()
    student = mmdit.load_pipeline(folder / "runs" / name)
    assert isinstance(student.mmdit, IntervalMMDiT) == (name == "mean_flow")
    if name != "mean_flow":
        saved = mmdit.save_single_file(student, folder / "student.safetensors")
        assert isinstance(mmdit.load_mmdit(saved), MMDiT)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("mean_flow", ()), ("reflow", REFLOW), ("ladd", LADD)])
def test_two_halves_equal_an_unbroken_run(folder: Path, name: str, words: tuple[str, ...]) -> None:
    halves = f"runs/halves-{name}"
    run(folder, "train.py", *SMALL, *words, f"run={halves}", "training.steps=3")
    run(folder, "train.py", *SMALL, *words, f"resume={halves}")
    assert_same_run(folder / halves, folder / "runs" / name)


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path) -> None:
    for name, words in (("mean_flow", ()), ("reflow", (*REFLOW, "runs=two")), ("ladd", LADD)):
        more = (f"run=two/{name}", "parallel=ddp")
        run(folder, "train.py", *SMALL, *words, *more, processes=2)
        one = losses(folder / "runs" / name)
        assert losses(folder / "two" / name) == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_a_student_may_be_taught_again(folder: Path) -> None:
    words = ("initial=runs/mean_flow", "training.steps=1", "run=runs/again")
    run(folder, "train.py", *SMALL, *words)
    config = json.loads((folder / "runs" / "again" / "config.json").read_text())
    assert (config["student"]["guidance"], config["student"]["teacher_steps"]) == (1.0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("words", [REFLOW, LADD], ids=["reflow", "ladd"])
def test_a_student_may_be_an_adapter(folder: Path, words: tuple[str, ...]) -> None:
    name = f"lora-{words[0].partition('=')[2]}"
    run(folder, "train.py", *SMALL, *words, "adapter=lora", f"run=runs/{name}")
    base, lora = (read_weights(folder / "runs" / each) for each in ("base", name))
    assert lora.module().base["sha256"] == base.sha256
    assert mmdit.load_pipeline(folder / "runs" / name).guidance == 1.0
