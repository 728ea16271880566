"""What is trained after a run, from its result."""

import json
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from mmdit.cli.commands import quoted
from mmdit.cli.then import is_meant, passed_on, program
from tests.training_for_tests import run, train

THEN = """# @package _global_
defaults: [smoke, _self_]
name: second
training: {steps: 4, evaluate_every: 4, save_every: 4}
"""


def test_the_program_is_started_as_it_was() -> None:
    argv = ["train.py", "seed=1"]
    options = ["-W", "ignore", "-X", "dev", "-u"]
    assert program(["python", *options, *argv], argv) == [*options, "train.py"]
    module = ["python", "-m", "mmdit.cli.train", "seed=1"]
    assert program(module, ["/here/train.py", "seed=1"]) == ["-m", "mmdit.cli.train"]
    assert program(["python", "-c", "pass"], argv) == ["train.py"]  # forked


def test_the_value_of_a_flag_is_no_word() -> None:
    assert passed_on(["--config-dir", "data/conf", "seed=1"]) == [
        "--config-dir=data/conf",
        "seed=1",
    ]


@pytest.mark.parametrize("name", ["runs/a", "a,seed=0", "a (b)", "it's", 'say "x"', "é", "a\\"])
def test_names_are_what_hydra_reads(name: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"run={quoted(name)}"])
    assert override.value() == name


def test_what_holds_for_both_runs_is_passed_on() -> None:
    words = [
        *("experiment=smoke", "seed=3", "training.steps=10", "data.samples=50", "+data.extra=1"),
        *("model.depth=2", "logger=wandb", "logger.mode=offline", "resume=auto", "run=runs/a"),
        *("data/part@data.parts.x=folder", "precision=fp32", "--config-dir", "mine"),
    ]
    assert passed_on(words) == [
        *("seed=3", "data.samples=50", "+data.extra=1", "logger=wandb", "logger.mode=offline"),
        *("data/part@data.parts.x=folder", "precision=fp32", "--config-dir=mine"),
    ]
    assert passed_on(["--config-dir=mine"]) == ["--config-dir=mine"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ((), True),
        (("experiment=shapes_hour", "seed=1", "precision=fp32", "run=runs/a", "-cd", "x"), True),
        (("logger=wandb", "logger.mode=offline", "hydra.verbose=true", "--config-dir=x"), True),
        (("objective/timesteps=mode",), False),
        (("initial=runs/a", "adapter=lora"), False),
        (("data=folder",), False),
        (("+model.new=1",), False),
        (("~posthoc",), False),
        (("training.steps=10", "then=aligned"), True),
    ],
)
def test_what_follows_is_left_out_of_other_recipes(words: tuple[str, ...], meant: bool) -> None:
    assert is_meant(words) is meant


@pytest.mark.slow
def test_a_second_run_starts_from_the_first_and_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "second.yaml").write_text(THEN)
    words = ("then=second", "training.steps=4", "seed=5", "precision=fp32", "--config-dir=mine")
    told = train(tmp_path, *words).stdout
    assert "then: python train.py experiment=second initial=runs/smoke-001 run=" in told
    second = tmp_path / "runs" / "smoke-001-second"
    config = json.loads((second / "config.json").read_text())
    assert (config["name"], config["seed"], config["computed"]) == ("second", 5, "fp32")
    assert config["initial"] == "runs/smoke-001"
    before = (second / "metrics.jsonl").read_text()
    again = train(tmp_path, *words, "resume=auto")
    assert "smoke-001 is finished" in again.stdout and "001-second is finished" in again.stdout
    assert (second / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_in_a_sweep_the_next_command_is_told(tmp_path: Path) -> None:
    words = ("experiment=smoke", "training.steps=2", "then=lora", "seed=0,1", "-m")
    told = run(tmp_path, "train.py", *words).stdout
    assert told.count("then=lora is left to you here: python train.py experiment=lora") == 2


@pytest.mark.slow
def test_an_experiment_that_is_not_there_shows_at_once(tmp_path: Path) -> None:
    told = train(tmp_path, "then=alinged", code=2).stderr
    assert told.strip() == "then=alinged is not an experiment. Did you mean aligned?"
    assert not (tmp_path / "runs").exists()
