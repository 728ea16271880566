"""Plots of what finetuning taught and what it cost, made with matplotlib."""

from collections.abc import Mapping, Sequence
from math import isnan

from matplotlib.figure import Figure

from mmdit.study.forgetting import FIGURES, Recipe
from mmdit.study.plots import curve_of, frame, name_at_the_right, numbered, png, styles

TITLES = {
    "taught": 'the phrase that was taught, "a red star"',
    "word": "the word in the five other tasks",
    "old": "the six tasks without the word",
}


def over_steps(recipes: Sequence[Recipe], base: Mapping[str, float]) -> bytes:
    """Each accuracy against steps, with 95 % intervals at the end; dashed is the initial model."""
    look = styles([recipe.name for recipe in recipes])
    figure = Figure(figsize=(13, max(4.5, 0.19 * len(recipes) + 1.2) * 3), facecolor="white")
    for row, key in enumerate(FIGURES):
        axes = figure.add_subplot(3, 1, row + 1)
        ends = []
        for recipe in recipes:
            style, means = look[recipe.name], recipe.accuracies[key]
            steps = [0, *means]
            values = [base[key], *(m.mean for m in means.values())]
            curve_of(axes, steps, values, style)
            last = recipe.last(key)
            if not isnan(last.half_width):
                axes.errorbar(steps[-1], last.mean, last.half_width, color=style.colour, alpha=0.5)
            ends.append((float(steps[-1]), last.mean, recipe.name))
        axes.axhline(base[key], color="#888888", linestyle="--", linewidth=1)
        axes.set_ylim(-0.02, 1.02)
        frame(axes, "steps", "accuracy")
        axes.set_title(TITLES[key], fontsize=10)
        name_at_the_right(figure, axes, ends, look)
    figure.tight_layout(h_pad=2)
    return png(figure)


def taught_against_lost(recipes: Sequence[Recipe], base: Mapping[str, float]) -> bytes:
    """Accuracy with the word against the change of that without it, numbered as in the table."""
    look = styles([recipe.name for recipe in recipes])
    figure = Figure(figsize=(13, max(6, 0.21 * len(recipes) + 0.6)), facecolor="white")
    axes = figure.add_subplot()
    axes.axvline(0, color="#888888", linestyle="--", linewidth=1)
    for recipe in recipes:
        word, old = recipe.last("word"), recipe.last("old")
        change = old.mean - base["old"]
        style = look[recipe.name]
        if not isnan(word.half_width):
            axes.errorbar(
                *(change, word.mean, word.half_width, old.half_width),
                color=style.colour,
                alpha=0.35,
                linewidth=1,
            )
        numbered(axes, change, word.mean, style)
    for row, (name, style) in enumerate(look.items()):
        at = (1.03, 0.99 - 0.99 * row / max(len(look), 25))
        label = f"{style.place}  {name}"
        axes.text(*at, label, transform=axes.transAxes, fontsize=9, va="top", color=style.colour)
    frame(axes, "change on the six tasks without the word", "the word in the five other tasks")
    figure.tight_layout()
    return png(figure)
