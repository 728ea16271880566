"""The plot of what is lost where evaluations of the network are saved, made with matplotlib."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mmdit.study.plots import INK, Style, curve_of, frame, png, styles

NAMES_PER_ROW = 4  # of the legend


class Measured(NamedTuple):
    """A setting of the sampler, measured."""

    evaluations: float  # of the network, per image
    score: float
    error: float  # standard error of the score
    distance: float  # of the latents to those of full sampling, relative


def against_evaluations(curves: Mapping[str, Sequence[Measured]], score: str) -> bytes:
    """Score and distance of several families of settings against evaluations.

    Args:
        curves: the settings of each family, by its name. The first family is the one that the
            others are to beat: a grey line, with a band of the standard error of its score.
        score: name of the score.
    """
    control, look = next(iter(curves)), styles([*curves])
    look[control] = look[control]._replace(colour=(0.55, 0.55, 0.55), line="--")
    figure = Figure(figsize=(13, 5.6), facecolor="white")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    band = sorted(curves[control])
    left.fill_between(
        [p.evaluations for p in band],
        [p.score - p.error for p in band],
        [p.score + p.error for p in band],
        color="#eeeeee",
    )
    for name, measured in curves.items():
        points = sorted(measured)
        apart = [p for p in points if p.distance > 0]  # which full sampling itself is not
        _curve(left, points, [p.score for p in points], look[name])
        _curve(right, apart, [p.distance for p in apart], look[name])
    for axes, label in ((left, score), (right, "relative distance of latents")):
        frame(axes, "evaluations of the network per image", label)
        axes.set_xscale("log")
        _round_ticks(axes.xaxis)
    if any(point.distance > 0 for measured in curves.values() for point in measured):
        right.set_yscale("log")
        _round_ticks(right.yaxis)
    figure.legend(
        left.get_lines(),
        [*curves],
        loc="lower center",
        ncols=NAMES_PER_ROW,
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )
    rows = -(-len(curves) // NAMES_PER_ROW)
    figure.tight_layout(rect=(0, 0.04 * rows + 0.01, 1, 1))
    return png(figure)


def _curve(axes: Axes, points: Sequence[Measured], y: Sequence[float], style: Style) -> None:
    curve_of(axes, [point.evaluations for point in points], y, style)


def _round_ticks(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
