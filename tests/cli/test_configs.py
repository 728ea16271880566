"""Configs mirror objects: one yaml is one class, and every key is an argument of it."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import mmdit.engine.ema
import mmdit.engine.parallel
import mmdit.engine.schedules
import mmdit.flow.caches
import mmdit.flow.grids
import mmdit.flow.guidance
import mmdit.flow.paths
import mmdit.flow.predictions
import mmdit.flow.schedule
import mmdit.flow.solvers
import mmdit.flow.timesteps
import mmdit.flow.transitions
import mmdit.latents.sources
from mmdit.cli.keys import check_keys, known_keys

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))

VARIANTS = {
    "objective/path": mmdit.flow.paths,
    "objective/timesteps": mmdit.flow.timesteps,
    "objective/prediction": mmdit.flow.predictions,
    "objective/shift": mmdit.flow.schedule,
    "solver": mmdit.flow.solvers,
    "transition": mmdit.flow.transitions,
    "guide": mmdit.flow.guidance,
    "schedule": mmdit.engine.schedules,
    "ema": mmdit.engine.ema,
    "grid": mmdit.flow.grids,
    "parallel": mmdit.engine.parallel,
    "latents": mmdit.latents.sources,
}


# What wrappers and objectives share, and no variant of its own.
HELPERS = {
    *(
        "Coefficients",
        "like",
        "GuidedPair",
        "squeezed",
        "EMA",
        "take_in",
        "frozen",
        "local",
        "gamma_of",
    ),
    *("Trajectory", "sample", "log_prob", "kl", "copied", "expect_cacheable"),
    *("Parallel", "world_size", "check_started", "whole", "Read", "LatentSource", "encode"),
}


def snake_case(name: str) -> str:
    """LDMLinear is ldm_linear, MatchedEDM matched_edm, FPrediction f_prediction."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def variants(module: ModuleType) -> dict[str, Any]:
    """Concrete public classes and functions that a module defines, by their name in snake_case."""
    return {
        snake_case(name): value
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and name not in HELPERS
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.isabstract(value)
    }


@pytest.mark.parametrize("group", VARIANTS)
def test_a_variant_group_and_its_module_are_the_same_set(group):
    classes = variants(VARIANTS[group])
    files = {
        file.stem: yaml.safe_load(file.read_text()) for file in (CONFIGS / group).glob("*.yaml")
    }
    assert files.keys() == classes.keys()
    for name, config in files.items():
        assert resolve(config["_target_"]) is classes[name]


def test_every_cache_has_a_yaml_of_its_name():
    """FirstBlockCache is cache=first_block."""
    classes = {
        name.removesuffix("_cache"): cls for name, cls in variants(mmdit.flow.caches).items()
    }
    files = {file.stem: yaml.safe_load(file.read_text()) for file in (CONFIGS / "cache").iterdir()}
    assert {name: resolve(config["_target_"]) for name, config in files.items()} == classes


def resolve(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def nodes(config: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`, and where it stands."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield place, config
        for key, value in config.items():
            yield from nodes(value, f"{place}.{key}")
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from nodes(value, f"{place}[{i}]")


def arguments(node: dict[str, Any]) -> list[str]:
    """Its keys, and what its defaults list fills in: `path: edm`, or `/guide@inner: ...`."""
    filled = [
        group.rpartition("@")[2].partition(".")[0]
        for entry in node.get("defaults", ())
        if isinstance(entry, dict)
        for group in entry
    ]
    directives = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_", "defaults"}
    return [*filled, *(key for key in node if key not in directives)]


NODES = [
    pytest.param(node, id=place)
    for file in FILES
    for place, node in nodes(yaml.safe_load(file.read_text()), str(file.relative_to(CONFIGS)))
]


@pytest.mark.parametrize("node", NODES)
def test_every_target_exists_and_takes_the_keys_of_its_yaml(node):
    signature = inspect.signature(resolve(node["_target_"]))
    # Scripts may add what one part tells another, so not every argument must be here.
    signature.bind_partial(**dict.fromkeys(arguments(node)))
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds  # would swallow a misspelt key


@pytest.mark.parametrize(
    "group", [f"objective/{part}" for part in ("path", "timesteps", "prediction", "shift")]
)
def test_every_variant_of_the_objective_builds_as_its_yaml_says(group):
    for file in (CONFIGS / group).glob("*.yaml"):
        config = yaml.safe_load(file.read_text())
        resolve(config.pop("_target_"))(**config)


@pytest.mark.parametrize("file", sorted((CONFIGS / "text").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_text_config_builds(file, tiny_published):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [f"text={file.stem}"]).text
    if OmegaConf.is_missing(config, "source"):  # of public weights
        config["source"] = str(tiny_published)
    text = instantiate(config)
    assert text.encode([""]).c_vec.shape == (1, text.pooled_width)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "memory"])
def test_every_key_of_the_shipped_configs_is_read(name):
    known = known_keys(name, CONFIGS)
    experiments = [f"experiment={file.stem}" for file in (CONFIGS / "experiment").glob("*.yaml")]
    groups = ["autoencoder=published", "autoencoder=sd3", "posthoc=power_functions"]
    for word in [*experiments, *groups, "metrics=study", "++clip.training.accumulation=4"]:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            check_keys(compose(name, [word]), known, (), CONFIGS)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_no_plain_key_has_the_name_of_a_group(file):
    """Hydra would take `word=star` for the choice of configs/word/star.yaml."""
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    values = yaml.safe_load(file.read_text())
    plain = {key for key, value in values.items() if not isinstance(value, dict | list)}
    assert not plain & groups
