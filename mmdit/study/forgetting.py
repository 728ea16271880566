"""What finetuning taught and what it cost: accuracies of many runs over their steps.

The accuracies are those of `WordAccuracy`, which runs of `experiment=shapes_new_word` log at every
evaluation. Runs that differ only in their seed are one recipe.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from mmdit.engine.loggers import read_metrics
from mmdit.errors import UserError
from mmdit.runs.checkpoint import runs_in
from mmdit.study.records import read_json

FIGURES = ("taught", "word", "old")  # accuracy_taught and so on, see `WordAccuracy`
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
QUANTILES = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Curve(NamedTuple):
    """The accuracies of one run over its steps.

    Attributes:
        recipe: what it is called, the same for all seeds.
        accuracies: figure -> step -> accuracy.
    """

    recipe: str
    seed: int
    accuracies: Mapping[str, Mapping[int, float]]


class Mean(NamedTuple):
    """A mean over seeds, with half the width of its 95 % interval; NaN for a single seed."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        margin = "" if math.isnan(self.half_width) else f" ± {self.half_width:.2f}"
        return f"{self.mean:.2f}{margin}"


def mean_of(values: Sequence[float]) -> Mean:
    """The mean with Student's interval.

    Example:
        >>> str(mean_of([0.5, 0.6, 0.7]))
        '0.60 ± 0.25'
    """
    n = len(values)
    if n < 2:
        return Mean(fmean(values), math.nan)
    quantile = QUANTILES[n - 2] if n - 2 < len(QUANTILES) else 1.96
    return Mean(fmean(values), quantile * stdev(values) / math.sqrt(n))


class Recipe(NamedTuple):
    """The mean curves of a recipe.

    Attributes:
        seeds: the seeds it was run with.
        accuracies: figure -> step -> mean over the seeds.
    """

    name: str
    seeds: list[int]
    accuracies: dict[str, dict[int, Mean]]

    @property
    def steps(self) -> list[int]:
        """The steps of the evaluations."""
        return sorted(self.accuracies["word"])

    def last(self, figure: str) -> Mean:
        """An accuracy at the end of training."""
        return self.accuracies[figure][self.steps[-1]]


class Study(NamedTuple):
    """The runs of a folder.

    Attributes:
        initial, initial_sha256: the weights that all runs started from.
        probe: the config of `WordAccuracy`, which all runs share.
        curves: one of each run.
        notes: what was left out.
    """

    initial: str
    initial_sha256: str
    probe: dict[str, Any]
    curves: list[Curve]
    notes: list[str]

    def recipes(self) -> list[Recipe]:
        """The means over seeds, best first: by the word, then by the phrase that was taught."""
        found: dict[str, list[Curve]] = {}
        for curve in self.curves:
            found.setdefault(curve.recipe, []).append(curve)
        recipes = [averaged(name, curves) for name, curves in found.items()]
        return sorted(recipes, key=lambda r: (-r.last("word").mean, -r.last("taught").mean, r.name))


def averaged(name: str, curves: Sequence[Curve]) -> Recipe:
    """The mean curves of a recipe, at the steps that all of its runs evaluated."""
    means = {}
    for figure in FIGURES:
        steps = set.intersection(*(set(curve.accuracies[figure]) for curve in curves))
        means[figure] = {
            step: mean_of([curve.accuracies[figure][step] for curve in curves])
            for step in sorted(steps)
        }
    return Recipe(name, sorted(curve.seed for curve in curves), means)


def read_study(folder: Path) -> Study:
    """Read the finished runs of a folder that measured a word.

    Raises:
        UserError: there are none, or they started from different weights, or measured differently.
    """
    if not folder.is_dir():
        raise UserError(f"runs={folder}: there is no such folder")
    curves: list[Curve] = []
    notes: list[str] = []
    shared: dict[str, Any] = {}
    for run in runs_in(folder):
        config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
        name = run.relative_to(folder).as_posix()
        if not config.get("probe") or not config.get("initial"):
            notes.append(f"Ignored, without a probe: {name}.")
            continue
        curve = read_curve(run, config, name)
        if not all(config["training"]["steps"] in c for c in curve.accuracies.values()):
            notes.append(f"Ignored, not finished: {name}.")
            continue
        here = {key: config[key] for key in ("initial", "initial_sha256", "probe")}
        for key, value in here.items():
            if shared.setdefault(key, value) != value and key != "initial":
                raise UserError(
                    f"{run}: {key} differs from that of other runs in {folder}: compare runs "
                    "that started from the same weights and were measured in the same way"
                )
        curves.append(curve)
    if not curves:
        raise UserError(
            f"runs={folder}: no finished run in it measured a word: train some with "
            "experiment=shapes_new_word"
        )
    repeated = {c[:2] for i, c in enumerate(curves) if c[:2] in {d[:2] for d in curves[:i]}}
    if repeated:
        recipe, seed = min(repeated)
        raise UserError(f"runs={folder}: seed {seed} of {recipe} is there twice: give variant=")
    return Study(curves=curves, notes=notes, **shared)


def read_curve(run: Path, config: Mapping[str, Any], name: str) -> Curve:
    """The accuracies that a run has logged; none of a run that has just begun.

    Raises:
        UserError: its metrics cannot be read.
    """
    accuracies: dict[str, dict[int, float]] = {figure: {} for figure in FIGURES}
    try:
        for row in read_metrics(run / "metrics.jsonl"):
            for figure, values in accuracies.items():
                if (value := row.get(f"ema/accuracy_{figure}")) is not None:
                    values[int(row["step"])] = float(value)
    except OSError as error:
        raise UserError(f"{run / 'metrics.jsonl'} is not readable: {error}") from error
    recipe = config.get("variant") or re.sub(r"(^|,)seed=\d+$", "", name) or name
    return Curve(str(recipe), int(config["seed"]), accuracies)
