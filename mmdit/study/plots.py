"""The plots of a study's report, made with matplotlib, for twenty or more labelled variants.

A colour stands for a family of formulations ("rf/lognorm"); its members differ in shade, line and
marker. Where there is no room for names, points are labelled with their places in the ranking.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from mmdit.study.ranking import Point, PowerLaw, fronts

Record = Mapping[str, Any]

PALETTE = (
    *("#0b62a4", "#d95f02", "#238b45", "#c51b7d", "#6a3d9a", "#8c510a", "#444444"),
    *("#0a9396", "#b22222", "#7a7a00", "#5f7fbf", "#a0522d"),
)
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*<>hp"
INK, GRID = "#222222", "#e3e3e3"


class Style(NamedTuple):
    """The appearance of a variant, the same in every plot."""

    place: int  # in the ranking, from 1
    colour: tuple[float, float, float]
    line: str
    marker: str


def styles(variants: Sequence[str]) -> dict[str, Style]:
    """Styles by variant; `variants` are ordered from the best to the worst."""
    families: dict[str, list[str]] = {}
    for variant in variants:
        families.setdefault(re.split(r"[( ]", variant)[0], []).append(variant)
    found = {}
    for i, members in enumerate(families.values()):
        base = to_rgb(PALETTE[i % len(PALETTE)])
        for k, variant in enumerate(members):
            pale = 0.5 * k / max(len(members) - 1, 1)
            colour = (
                base[0] + pale * (1 - base[0]),
                base[1] + pale * (1 - base[1]),
                base[2] + pale * (1 - base[2]),
            )
            place = variants.index(variant) + 1
            found[variant] = Style(place, colour, LINES[k % 4], MARKERS[(i + k) % len(MARKERS)])
    return found


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes; the same figure always gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def scores_by_steps(records: Sequence[Record], look: Mapping[str, Style], weights: str) -> bytes:
    """Frechet distance and CLIP score against Euler steps at guidance 5.0 (Figure 3)."""
    figure = _figure(13, max(4.5, 0.19 * len(look) + 1.2))
    for column, (key, title, log) in enumerate(
        (("fd", "Fréchet distance ↓", True), ("clip", "CLIP score ↑", False))
    ):
        axes = figure.add_subplot(1, 2, column + 1)
        ends = []
        for variant, style in look.items():
            curves = [
                {
                    row["steps"]: row[key]
                    for row in record["scores"]
                    if (row["weights"], row["guidance"], row["solver"]) == (weights, 5.0, "euler")
                }
                for record in records
                if record["variant"] == variant
            ]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = [[curve[s] for curve in curves] for s in steps]
            means = [fmean(v) for v in values]
            curve_of(axes, steps, means, style)
            for s, v in zip(steps, values, strict=True):
                axes.plot([s, s], [min(v), max(v)], color=style.colour, linewidth=0.8, alpha=0.5)
            ends.append((steps[-1], means[-1], variant))
        frame(axes, "sampling steps", title)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([5, 10, 25, 50]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        if log:
            _log_y(axes)
        name_at_the_right(figure, axes, ends, look)
    figure.tight_layout(w_pad=2)
    return png(figure)


def trade_off(records: Sequence[Record], look: Mapping[str, Style], weights: str) -> bytes:
    """CLIP score against Frechet distance for each sampler setting, with a line along front 1."""
    rows = [
        {**row, "variant": record["variant"], "seed": record["seed"]}
        for record in records
        for row in record["scores"]
        if row["weights"] == weights and row["solver"] == "euler"
    ]
    samplers = sorted({(row["guidance"], row["steps"]) for row in rows}, reverse=True)
    rows_of_panels = (len(samplers) + 1) // 2
    figure = _figure(13, 4.6 * rows_of_panels)
    for i, (guidance, steps) in enumerate(samplers):
        axes = figure.add_subplot(rows_of_panels, 2, i + 1)
        points = {}
        for variant in look:
            mine = [
                row
                for row in rows
                if (row["variant"], row["guidance"], row["steps"]) == (variant, guidance, steps)
            ]
            points[variant] = Point(fmean(r["clip"] for r in mine), fmean(r["fd"] for r in mine))
        first = [
            point
            for point, front in zip(points.values(), fronts(list(points.values())), strict=True)
            if front == 1
        ]
        first.sort()
        axes.plot(
            [p.fd for p in first], [p.clip for p in first], color="#bbbbbb", linewidth=4, zorder=1
        )
        for variant, point in points.items():
            numbered(axes, point.fd, point.clip, look[variant])
        frame(axes, "Fréchet distance ↓", "CLIP score ↑")
        axes.set_title(f"{steps} steps, guidance {guidance:g}", fontsize=10, color=INK)
        axes.margins(0.08)
    figure.tight_layout()
    return png(figure)


def loss_by_flops(
    figures: Sequence[Record], look: Mapping[str, Style], law: PowerLaw | None
) -> bytes:
    """Validation loss against training FLOPs, one point per run (Figure 8)."""
    figure = _figure(9, max(4.2, 0.19 * len(look) + 1.2))
    axes = figure.add_subplot()
    ends = []
    for variant, style in look.items():
        mine = [f for f in figures if f["variant"] == variant]
        if not mine:
            continue
        x, y = [f["flops"] for f in mine], [f["loss"] for f in mine]
        axes.scatter(x, y, color=style.colour, marker=style.marker, s=34, zorder=3, linewidth=0)
        axes.plot(x, y, color=style.colour, linewidth=0.8, alpha=0.5)
        ends.append((fmean(x), fmean(y), variant))
    frame(axes, "training FLOPs", "validation loss, mean of seven levels")
    budgets = [f["flops"] for f in figures]
    axes.set_xscale("log")
    axes.set_xlim(min(budgets) / 1.5, max(budgets) * 1.5)
    if law is not None:
        line = [min(budgets) * (max(budgets) / min(budgets)) ** (i / 50) for i in range(51)]
        axes.plot(line, [law(x) for x in line], color="#888888", linestyle="--", zorder=2)
        axes.set_title(
            rf"loss = {law.scale:.3g} $\cdot$ FLOPs$^{{{law.exponent:.3f}}}$, "
            rf"$R^2$ = {law.r_squared:.2f}",
            fontsize=10,
            color=INK,
        )
    _log_y(axes)
    name_at_the_right(figure, axes, ends, look)
    figure.tight_layout()
    return png(figure)


def loss_and_accuracy(figures: Sequence[Record], look: Mapping[str, Style]) -> bytes:
    """Accuracy against validation loss: each variant's mean, connected to its runs."""
    figure = _figure(8, 5.2)
    axes = figure.add_subplot()
    for variant, style in look.items():
        mine = [f for f in figures if f["variant"] == variant]
        if not mine:
            continue
        x, y = fmean(f["loss"] for f in mine), fmean(f["accuracy"] for f in mine)
        for f in mine:
            axes.plot(
                [x, f["loss"]],
                [y, f["accuracy"]],
                color=style.colour,
                linewidth=0.8,
                marker=".",
                markersize=3,
                alpha=0.7,
            )
        numbered(axes, x, y, style)
    frame(axes, "validation loss, mean of seven levels", "accuracy")
    axes.margins(0.06)
    figure.tight_layout()
    return png(figure)


# Parts of plots


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), facecolor="white")


def curve_of(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    """Draw the curve of a variant."""
    axes.plot(
        *(x, y),
        color=style.colour,
        linestyle=style.line,
        marker=style.marker,
        markersize=4,
        linewidth=1.4,
    )


def frame(axes: Axes, x_label: str, y_label: str) -> None:
    """Label the axes, and leave of the frame only what is read."""
    axes.set_xlabel(x_label, color=INK, fontsize=10)
    axes.set_ylabel(y_label, color=INK, fontsize=10)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")


def _log_y(axes: Axes) -> None:
    """Make y logarithmic with round numbers as ticks: scores rarely span a power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def numbered(axes: Axes, x: float, y: float, style: Style) -> None:
    """Draw a disc with the variant's place in the ranking."""
    order = 3 + 1 / style.place  # better ones on top, each number on its own disc
    bright = 0.3 * style.colour[0] + 0.59 * style.colour[1] + 0.11 * style.colour[2] > 0.6
    axes.plot(
        *([x], [y], "o"),
        color=style.colour,
        markersize=12,
        markeredgecolor="white",
        zorder=order,
    )
    axes.annotate(
        str(style.place),
        *((x, y), (0, -0.4)),
        textcoords="offset points",
        ha="center",
        va="center",
        color=INK if bright else "white",
        fontsize=7,
        fontweight="bold",
        zorder=order,
    )


def name_at_the_right(
    figure: Figure, axes: Axes, ends: Iterable[tuple[float, float, str]], look: Mapping[str, Style]
) -> None:
    """Label each curve with its place and name at the right, spread so that none overlap."""
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # labels must not change the limits
    to_share = axes.transScale + axes.transLimits
    shares = [float(to_share.transform((x, y))[1]) for x, y, _ in ends]
    line_height = 0.155 / (axes.get_position().height * figure.get_figheight())
    heights = spread(shares, gap=min(line_height, 1 / max(len(ends) - 1, 1)))
    beside = blended_transform_factory(axes.transAxes, axes.transAxes)
    for (x, y, variant), height in zip(ends, heights, strict=True):
        style = look[variant]
        axes.annotate(
            f"{style.place}  {variant}",
            xy=(x, y),
            xytext=(1.05, height),
            textcoords=beside,
            va="center",
            fontsize=8,
            color=INK,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights so that they are at least `gap` apart and lie in [0, 1].

    The sum of squared displacements is minimal: after subtracting i gaps from the i-th height, the
    heights must not decrease, which is isotonic regression (decreasing neighbours are averaged).
    """
    groups: list[list[float]] = []
    for i, height in enumerate(heights):
        groups.append([height - i * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    level = [fmean(group) for group in groups for _ in group]
    top = max(1 - (len(level) - 1) * gap, 0.0)
    return [min(max(share, 0.0), top) + i * gap for i, share in enumerate(level)]
