"""The study's statistics: non-dominated sorting, averaged ranks, correlations, trends (Sec. 5.1).

In every control setting, the variants that no other dominates in CLIP score (higher is better) and
Frechet distance (lower is better) get rank 1 and are removed; those then not dominated get rank 2,
and so on. A variant's ranks are averaged over the settings. Only the order of scores matters, not
their units.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from mmdit.errors import UserError
from mmdit.keys import generator_for

Floats: TypeAlias = NDArray[np.floating[Any]]
MOST_NAMED = 10  # problems listed in a message


class Point(NamedTuple):
    """The scores of one variant in one control setting."""

    clip: float  # higher is better
    fd: float  # lower is better


class Run(NamedTuple):
    """The scores of one training run: one variant, seed and dataset."""

    variant: str
    seed: int
    dataset: str
    protocol: str
    samples: int | None  # images behind each score; None where unknown
    points: Mapping[Any, Point]  # by sampler setting

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}, {self.dataset}"


class Control(NamedTuple):
    """A control setting, within which variants are ranked: a dataset and a sampler setting."""

    dataset: str
    setting: Hashable


class RankTable(NamedTuple):
    """The front number of every variant in every control setting, separately for each seed."""

    variants: list[str]
    seeds: list[int]
    controls: list[Control]
    fronts: NDArray[np.int64]  # (seed, control, variant), from 1


class Average(NamedTuple):
    """A mean over control settings and seeds; without an interval if there is only one seed."""

    mean: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval, the number after a plus-minus sign."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def fronts(points: Sequence[Point]) -> NDArray[np.int64]:
    """The number of the non-dominated front of each point, from 1.

    A point dominates another if it is no worse in both scores and better in at least one. Equal
    points therefore do not dominate each other and share a front.

    Args:
        points: finite scores.
    """
    clip, fd = np.array(points, dtype=np.float64).reshape(-1, 2).T
    no_worse = (clip[:, None] >= clip) & (fd[:, None] <= fd)
    better = (clip[:, None] > clip) | (fd[:, None] < fd)
    dominates = no_worse & better  # (n, n): row over column
    numbers = np.zeros(len(clip), dtype=np.int64)
    while (left := numbers == 0).any():
        numbers[left & ~dominates[left].any(axis=0)] = numbers.max() + 1
    return numbers


def rank_table(runs: Sequence[Run], settings: Iterable[Hashable]) -> RankTable:
    """Sort the variants of every control setting into fronts.

    Runs are ranked within each seed, as the paper ranks one run of each variant: scores of
    different seeds are never compared. The order of `runs` does not matter.

    Args:
        runs: one for every variant, seed and dataset.
        settings: the sampler settings to rank in; each run must have scores in all of them.

    Raises:
        UserError: the runs cannot be compared, see `check`.
    """
    settings = list(settings)
    check(runs, settings)
    by_key = {(run.variant, run.seed, run.dataset): run for run in runs}
    variants, seeds, datasets = (sorted(set(names)) for names in zip(*by_key, strict=True))
    controls = [Control(dataset, setting) for dataset in datasets for setting in settings]
    numbers = [
        [fronts([by_key[v, seed, c.dataset].points[c.setting] for v in variants]) for c in controls]
        for seed in seeds
    ]
    return RankTable(variants, seeds, controls, np.array(numbers))


def check(runs: Sequence[Run], settings: Sequence[Hashable]) -> None:
    """Reject runs that cannot be compared.

    Raises:
        UserError: fewer than two variants; different protocols or sample counts; a variant, seed
            and dataset twice, or not at all; a setting without scores; a score that is not finite.
    """
    variants = sorted({run.variant for run in runs})
    if len(variants) < 2:
        found = f"the only one is {variants[0]}" if variants else "there are none"
        raise UserError(f"a ranking compares at least 2 variants, but {found}")
    for field in ("protocol", "samples"):
        holders: dict[Any, Run] = {}
        for run in runs:
            holders.setdefault(getattr(run, field), run)
        if len(holders) > 1:
            differing = "; ".join(f"{value!r} ({run})" for value, run in holders.items())
            raise UserError(f"the runs differ in {field} and cannot be ranked: {differing}")
    keys = [(run.variant, run.seed, run.dataset) for run in runs]
    _refuse(
        (str(run) for i, run in enumerate(runs) if keys[i] in keys[:i]),
        "each variant, seed and dataset needs exactly one run; there are several of",
    )
    pairs = sorted({(run.seed, run.dataset) for run in runs})
    _refuse(
        (
            f"{variant}, seed {seed}, {dataset}"
            for variant in variants
            for seed, dataset in pairs
            if (variant, seed, dataset) not in keys
        ),
        "every variant needs the same seeds and datasets; there is no run of",
    )
    wanted = [(run, setting) for run in runs for setting in settings]
    _refuse(
        (f"{run}: {setting}" for run, setting in wanted if setting not in run.points),
        "every variant needs scores in every setting; there are none of",
    )
    _refuse(
        (
            f"{run}: {setting}: clip {run.points[setting].clip}, fd {run.points[setting].fd}"
            for run, setting in wanted
            if not all(math.isfinite(score) for score in run.points[setting])
        ),
        "scores must be finite numbers; these are not:",
    )


def _refuse(problems: Iterable[str], what: str) -> None:
    found = list(problems)
    if found:
        more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise UserError(f"{what} {'; '.join(found[:MOST_NAMED])}{more}")


def average_ranks(
    table: RankTable,
    chosen: Callable[[Control], bool] = lambda control: True,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Average] | None:
    """Each variant's rank, averaged over the chosen control settings, then over the seeds.

    The interval is the 95 % percentile bootstrap over seeds: seeds are drawn with replacement, the
    same ones for all variants. It is never wider than the range over the seeds; with two or three
    seeds it is little more informative than that range.

    Args:
        table: the front numbers.
        chosen: whether a control setting is included.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        Averages by variant, or None if no setting is chosen.
    """
    columns = [i for i, control in enumerate(table.controls) if chosen(control)]
    if not columns:
        return None
    by_seed = table.fronts[:, columns].mean(axis=1)  # (seed, variant)
    mean, count = by_seed.mean(axis=0), len(table.seeds)
    if count == 1:
        return {v: Average(float(mean[i]), None, None) for i, v in enumerate(table.variants)}
    generator = generator_for(seed, "bootstrap")
    draws = torch.randint(count, (resamples, count), generator=generator).numpy()
    low, high = np.quantile(by_seed[draws].mean(axis=1), (0.025, 0.975), axis=0)
    return {
        v: Average(float(mean[i]), float(low[i]), float(high[i]))
        for i, v in enumerate(table.variants)
    }


class Correlation(NamedTuple):
    """The correlation of two metrics."""

    pearson: float
    spearman: float
    points: int


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Pearson's and Spearman's coefficients; None for fewer than three points or constant values.

    Spearman's is Pearson's coefficient of the ranks, where equal values share their mean rank.
    """
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    a, b = np.array(x, dtype=np.float64), np.array(y, dtype=np.float64)
    return Correlation(_pearson(a, b), _pearson(_ranks(a), _ranks(b)), len(a))


def _pearson(a: Floats, b: Floats) -> float:
    return float(np.corrcoef(a, b)[0, 1].clip(-1, 1))


def _ranks(values: Floats) -> Floats:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]


class PowerLaw(NamedTuple):
    """y = scale * x ** exponent, with the fraction of the variance of log y that it explains."""

    scale: float
    exponent: float
    r_squared: float

    def __call__(self, x: float) -> float:
        return float(self.scale * x**self.exponent)


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Fit a power law to positive points by least squares in log-log space.

    Returns:
        None if fewer than three x are more than 10 % apart: two budgets do not determine a trend,
        and runs of matched cost have nearly the same x.
    """
    apart: list[float] = []
    for value in sorted(x):
        if not apart or value > 1.1 * apart[-1]:
            apart.append(value)
    if len(apart) < 3:
        return None
    log_x, log_y = np.log(x), np.log(y)
    exponent, offset = np.polyfit(log_x, log_y, 1)
    spread = ((log_y - log_y.mean()) ** 2).sum()
    left = ((log_y - offset - exponent * log_x) ** 2).sum()
    return PowerLaw(
        float(np.exp(offset)), float(exponent), float(1 - left / spread) if spread else 1.0
    )
