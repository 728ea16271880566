"""What the probe of many runs measured over their steps, averaged over seeds.

A run logs the figures of its probe at every evaluation. Runs that differ only in their seed are one
recipe. A `Comparison` says which figures are compared.
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
from mmdit.study.records import finite, read_json

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
QUANTILES = (
    *(12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Comparison(NamedTuple):
    """What is compared of which runs.

    Attributes:
        experiment: whose runs are compared, for messages.
        probe: name of the class of their probe.
        figures: name of a figure here -> its name among the probe's metrics.
        order: the figures that recipes are sorted by, the first before the others.
        required: the figures that every evaluation has; it may lack the others.
        students: whether the runs are of students of few steps; the others are left out.
    """

    experiment: str
    probe: str
    figures: Mapping[str, str]
    order: Sequence[str]
    required: Sequence[str]
    students: bool = False


class Curve(NamedTuple):
    """The figures of one run over its steps.

    Attributes:
        recipe: what it is called, the same for all seeds.
        steps: the evaluations that have all required figures.
        figures: figure -> step -> value.
        tflop_per_step: operations of a training step in TFLOP, with its share of sampling where the
            model makes its images itself; NaN if they were not counted.
    """

    recipe: str
    seed: int
    steps: frozenset[int]
    figures: Mapping[str, Mapping[int, float]]
    tflop_per_step: float


class Mean(NamedTuple):
    """A mean over seeds, with half the width of its 95 % interval; NaN for a single seed.

    Attributes:
        seeds: their number; 0 if none has the figure, whose mean is then NaN.
    """

    mean: float
    half_width: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
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
        return Mean(fmean(values) if n else math.nan, math.nan, n)
    quantile = QUANTILES[n - 2] if n - 2 < len(QUANTILES) else 1.96
    return Mean(fmean(values), quantile * stdev(values) / math.sqrt(n), n)


class Recipe(NamedTuple):
    """The mean curves of a recipe.

    Attributes:
        seeds: the seeds it was run with.
        steps: the evaluations that all of its runs have.
        figures: figure -> step -> mean over the seeds that have the figure at that step.
        tflop_per_step: operations of a training step in TFLOP; NaN if a run did not count them.
    """

    name: str
    seeds: list[int]
    steps: list[int]
    figures: dict[str, dict[int, Mean]]
    tflop_per_step: float

    def last(self, figure: str) -> Mean:
        """A figure at the end of training."""
        return self.figures[figure][self.steps[-1]]


class Study(NamedTuple):
    """The runs of a folder.

    Attributes:
        comparison: what was read of them.
        initial, initial_sha256: the weights that all runs started from.
        probe: the config of the probe, which all runs share.
        curves: one of each run.
        notes: what was left out.
    """

    comparison: Comparison
    initial: str
    initial_sha256: str
    probe: dict[str, Any]
    curves: list[Curve]
    notes: list[str]

    def recipes(self) -> list[Recipe]:
        """The means over seeds, best first by the figures of `comparison.order`.

        Raises:
            UserError: the runs of one have no evaluation at the same step.
        """
        found: dict[str, list[Curve]] = {}
        for curve in self.curves:
            found.setdefault(curve.recipe, []).append(curve)
        recipes = [averaged(name, curves) for name, curves in found.items()]
        order = self.comparison.order
        return sorted(recipes, key=lambda r: (*(-r.last(f).mean for f in order), r.name))


def averaged(name: str, curves: Sequence[Curve]) -> Recipe:
    """The mean curves of a recipe, at the steps that all of its runs evaluated.

    Raises:
        UserError: there are none.
    """
    steps = sorted(frozenset.intersection(*(curve.steps for curve in curves)))
    if not steps:
        raise UserError(f"the runs of {name} have no evaluation at the same step: give variant=")
    means = {
        figure: {
            step: mean_of([c.figures[figure][step] for c in curves if step in c.figures[figure]])
            for step in steps
        }
        for figure in curves[0].figures
    }
    seeds = sorted(curve.seed for curve in curves)
    return Recipe(name, seeds, steps, means, fmean(curve.tflop_per_step for curve in curves))


def read_study(folder: Path, comparison: Comparison) -> Study:
    """Read the finished runs of a folder that the comparison is about.

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
        if problem := unfit(config, comparison):
            notes.append(f"Ignored, {problem}: {name}.")
            continue
        curve = read_curve(run, config, name, comparison)
        if config["training"]["steps"] not in curve.steps:
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
            f"runs={folder}: no finished run in it has a probe {comparison.probe}: train some with "
            f"experiment={comparison.experiment}"
        )
    repeated = {c[:2] for i, c in enumerate(curves) if c[:2] in {d[:2] for d in curves[:i]}}
    if repeated:
        recipe, seed = min(repeated)
        raise UserError(f"runs={folder}: seed {seed} of {recipe} is there twice: give variant=")
    return Study(comparison=comparison, curves=curves, notes=notes, **shared)


def unfit(config: Mapping[str, Any], comparison: Comparison) -> str:
    """Why a run is not among those that are compared; empty if it is."""
    probe = config.get("probe") or {}
    if probe.get("_target_", "").rpartition(".")[2] != comparison.probe:
        return f"without a probe {comparison.probe}"
    if not config.get("initial"):
        return "without initial weights"
    if bool(config.get("student")) != comparison.students:
        student = "a student, which samples in other steps than the initial model"
        return "not a student of few steps" if comparison.students else student
    return ""


def read_curve(run: Path, config: Mapping[str, Any], name: str, comparison: Comparison) -> Curve:
    """The figures that a run has logged; none of a run that has just begun.

    Raises:
        UserError: its metrics cannot be read.
    """
    figures: dict[str, dict[int, float]] = {figure: {} for figure in comparison.figures}
    tflop: list[float] = []  # of a sample
    try:
        for row in read_metrics(run / "metrics.jsonl"):
            for figure, metric in comparison.figures.items():
                if (value := finite(row.get(f"ema/{metric}"))) is not None:
                    figures[figure][int(row["step"])] = value
            rate, images = finite(row.get("tflops")), finite(row.get("images_per_second"))
            if rate and images:
                tflop.append(rate / images)
    except OSError as error:
        raise UserError(f"{run / 'metrics.jsonl'} is not readable: {error}") from error
    recipe = config.get("variant") or re.sub(r"(^|,)seed=\d+$", "", name) or name
    return Curve(
        recipe=str(recipe),
        seed=int(config["seed"]),
        steps=frozenset.intersection(*(frozenset(figures[f]) for f in comparison.required)),
        figures=figures,
        tflop_per_step=fmean(tflop) * config["training"]["batch_size"] if tflop else math.nan,
    )
