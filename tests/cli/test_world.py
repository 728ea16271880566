"""Training goes on in the world of shapes that the initial model knows."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from mmdit.cli import CONFIGS
from mmdit.cli.initial import keep_world
from mmdit.loading import Public, Run
from mmdit.runs.checkpoint import config_beside


def config_of(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", ["seed=2", *words])


def run_of(folder: Path, **data: object) -> Run:
    """Weights of a run whose config states this data."""
    weights = folder / "run" / "checkpoints" / "step_00000010" / "ema"
    weights.mkdir(parents=True)
    (folder / "run" / "config.json").write_text(json.dumps({"data": data}))
    run = object.__new__(Run)
    run.path = weights
    return run


def test_another_seed_stays_in_the_world_of_the_initial_model(tmp_path: Path) -> None:
    run = run_of(tmp_path, _target_="mmdit.data.Shapes", seed=0)
    config = config_of("experiment=alignment")
    assert (config.data.seed, config.probe.data.seed) == (2, 2)
    keep_world(config, run, set())
    assert (config.data.seed, config.probe.data.seed, config.prompt_source.data.seed) == (0, 0, 0)
    assert config.seed == config.collector.seed == 2
    config = config_of("data.seed=5")
    keep_world(config, run, {"data.seed"})
    assert config.data.seed == 5


@pytest.mark.parametrize(
    "data", [{}, {"_target_": "mmdit.data.Folder", "seed": 0}, {"_target_": "mmdit.data.Mixture"}]
)
def test_other_weights_leave_the_world_as_it_is(tmp_path: Path, data: dict[str, object]) -> None:
    config = config_of()
    keep_world(config, run_of(tmp_path, **data), set())
    assert config.data.seed == 2
    keep_world(config, object.__new__(Public), set())
    assert config.data.seed == 2


def test_a_config_is_found_beside_weights(tmp_path: Path) -> None:
    run = run_of(tmp_path, seed=3)
    for path in (run.path, run.path.parent, tmp_path / "run"):
        assert config_beside(path) == {"data": {"seed": 3}}
    assert config_beside(tmp_path / "elsewhere") == {}
