"""Plots of what finetuning taught and what it cost, made with matplotlib."""

from collections.abc import Mapping, Sequence

from mmdit.study.curve_plots import DASHED, Panel, end_of, numbered_axes, over
from mmdit.study.curves import Recipe
from mmdit.study.plots import frame, png

PANELS = (
    Panel("taught", 'the phrase that was taught, "a red star"'),
    Panel("word", "the word in the five other tasks"),
    Panel("old", "the six tasks without the word"),
)


def over_steps(recipes: Sequence[Recipe], base: Mapping[str, float]) -> bytes:
    """Each accuracy against steps."""
    return over(lambda recipe: recipe.steps, "steps", PANELS, recipes, base)


def taught_against_lost(recipes: Sequence[Recipe], base: Mapping[str, float]) -> bytes:
    """Accuracy with the word against the change of that without it, numbered as in the table."""
    figure, axes, look = numbered_axes(recipes)
    axes.axvline(0, **DASHED)
    for recipe in recipes:
        old = recipe.last("old")
        change = old._replace(mean=old.mean - base["old"])
        end_of(axes, change, recipe.last("word"), look[recipe.name])
    frame(axes, "change on the six tasks without the word", "the word in the five other tasks")
    figure.tight_layout()
    return png(figure)
