"""Plots of the figures of many recipes, made with matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmdit.study.curves import Mean, Recipe
from mmdit.study.plots import Style, curve_of, frame, name_at_the_right, numbered, png, styles

DASHED: dict[str, Any] = {"color": "#888888", "linestyle": "--", "linewidth": 1}


class Panel(NamedTuple):
    """One of several plots in a column.

    Attributes:
        label: what the y axis shows.
        line: of another level than that of the initial model, at which a line is dotted.
    """

    figure: str
    title: str
    label: str = "accuracy"
    line: float | None = None


def over(
    x_of: Callable[[Recipe], Sequence[float]],
    x_label: str,
    panels: Sequence[Panel],
    recipes: Sequence[Recipe],
    base: Mapping[str, float],
) -> bytes:
    """Figures of all recipes, with 95 % intervals at the end; dashed is the initial model.

    Args:
        x_of: where the evaluations of a recipe are on the x axis, where the initial model is at 0;
            those with NaN are left out.
        base: the figures of the initial model; it may lack some.
    """
    look = styles([recipe.name for recipe in recipes])
    height = max(4.5, 0.19 * len(recipes) + 1.2) * len(panels)
    figure = Figure(figsize=(13, height), facecolor="white")
    for row, panel in enumerate(panels):
        above = figure.axes[0] if row else None
        axes = figure.add_subplot(len(panels), 1, row + 1, sharex=above)
        ends, highest = [], 1.0
        for recipe in recipes:
            style, means = look[recipe.name], list(recipe.figures[panel.figure].values())
            x = [0.0, *x_of(recipe)]
            if isnan(x[-1]):
                continue
            y = [base.get(panel.figure, float("nan")), *(mean.mean for mean in means)]
            curve_of(axes, x, y, style)
            drawn = [point for point in zip(x, y, strict=True) if not isnan(point[1])]
            if not isnan(means[-1].half_width):
                axes.errorbar(x[-1], y[-1], means[-1].half_width, color=style.colour, alpha=0.5)
            if drawn:
                ends.append((*drawn[-1], recipe.name))
                highest = max(highest, *(value for _, value in drawn))
        if panel.figure in base:
            axes.axhline(base[panel.figure], **DASHED)
        if panel.line is not None:
            axes.axhline(panel.line, **{**DASHED, "linestyle": ":"})
        axes.set_ylim(-0.02, highest + 0.02)
        frame(axes, x_label, panel.label)
        axes.set_title(panel.title, fontsize=10)
        name_at_the_right(figure, axes, ends, look)
    figure.tight_layout(h_pad=2)
    return png(figure)


def compute_of(recipe: Recipe) -> list[float]:
    """The operations until each evaluation in TFLOP; NaN if they were not counted."""
    return [recipe.tflop_per_step * step for step in recipe.steps]


def numbered_axes(recipes: Sequence[Recipe]) -> tuple[Figure, Axes, dict[str, Style]]:
    """Empty axes whose points are numbered, with the names of the numbers at the right."""
    look = styles([recipe.name for recipe in recipes])
    figure = Figure(figsize=(13, max(6, 0.21 * len(recipes) + 0.6)), facecolor="white")
    axes = figure.add_subplot()
    for row, (name, style) in enumerate(look.items()):
        at = (1.03, 0.99 - 0.99 * row / max(len(look), 25))
        label = f"{style.place}  {name}"
        axes.text(*at, label, transform=axes.transAxes, fontsize=9, va="top", color=style.colour)
    return figure, axes, look


def end_of(axes: Axes, x: Mean, y: Mean, style: Style) -> None:
    """The numbered point of a recipe at the end of training, with 95 % intervals."""
    if isnan(x.mean) or isnan(y.mean):
        return
    axes.errorbar(
        *(x.mean, y.mean),
        yerr=None if isnan(y.half_width) else y.half_width,
        xerr=None if isnan(x.half_width) else x.half_width,
        color=style.colour,
        alpha=0.35,
        linewidth=1,
    )
    numbered(axes, x.mean, y.mean, style)
