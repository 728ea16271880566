"""What the comparisons of runs have in common: reading them, and what they started from."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from mmdit.cli.launch import Verbatim
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.loading import open_source
from mmdit.printable import logger
from mmdit.study.curves import Comparison, Mean, Recipe, Study, read_study
from mmdit.study.records import finite

log = logger(__name__)
VERBATIM = ("runs", "out")


def read_runs_of(text: Verbatim, comparison: Comparison) -> Study:
    """The runs in the folder runs=.

    Raises:
        UserError: there is nothing to compare, or matplotlib for the plots is missing.
    """
    if "runs" not in text:
        raise UserError(f"give runs=<folder of runs of experiment={comparison.experiment}>")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plots need matplotlib: pip install -e '.[plots]'")
    return read_study(Path(text["runs"]), comparison)


def measured(study: Study, config: DictConfig, **changes: Any) -> dict[str, float]:
    """The figures of the model that the runs started from, without those that it lacks.

    Args:
        changes: values of the probe that differ from those of the runs.

    Raises:
        UserError: it is not there any more, or has other weights.
    """
    source = open_source(study.initial)
    if source.sha256 != study.initial_sha256:
        raise UserError(f"{study.initial} has other weights than those that the runs started from")
    log.info("measuring %s", study.initial)
    probe = instantiate({**study.probe, **changes})()
    pipe = source.pipeline().to(available(config.device)).eval()
    found, figures = probe(pipe), study.comparison.figures
    return {figure: found[metric] for figure, metric in figures.items() if metric in found}


def facts(protocol: str, study: Study) -> dict[str, Any]:
    """The first part of the JSON file."""
    return {
        "protocol": protocol,
        "weights": study.initial,
        "initial_sha256": study.initial_sha256,
        "probe": study.probe,
    }


def plain(mean: Mean) -> dict[str, float | None]:
    """A mean for the JSON file, which has no NaN."""
    return {"mean": finite(mean.mean), "half_width": finite(mean.half_width)}


def all_seeds(recipes: Sequence[Recipe]) -> list[int]:
    """The seeds that recipes were run with."""
    return sorted({seed for recipe in recipes for seed in recipe.seeds})


def name_of(recipe: Recipe, seeds: Sequence[int]) -> str:
    """The name for the table, with the seeds if they are not those of the other recipes."""
    fewer = recipe.seeds != list(seeds)
    return recipe.name + (f" (seeds {', '.join(map(str, recipe.seeds))})" if fewer else "")


def about_means(seeds: Sequence[int]) -> str:
    """What the table's numbers are."""
    numbers = ", ".join(map(str, seeds))
    return f"Means over seeds {numbers}; ± is half of Student's 95 % interval."
