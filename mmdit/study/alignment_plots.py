"""Plots of what post-training gains and what it costs, made with matplotlib."""

from collections.abc import Mapping, Sequence

from mmdit.study.alignment import ENOUGH_ACCURACY, ENOUGH_DIVERSITY
from mmdit.study.curve_plots import DASHED, Panel, compute_of, end_of, numbered_axes, over
from mmdit.study.curves import Recipe
from mmdit.study.plots import curve_of, frame, png

PANELS = (
    Panel("accuracy", "accuracy"),
    Panel("accuracy_held_out", "accuracy on combinations held out of training"),
    Panel("diversity", "diversity of the images of one prompt", "diversity"),
)


def over_compute(recipes: Sequence[Recipe], base: Mapping[str, float]) -> bytes:
    """Accuracies and diversity against the operations of training, of runs that counted them."""
    return over(compute_of, "compute of post-training in TFLOP", PANELS, recipes, base)


def accuracy_against_diversity(recipes: Sequence[Recipe], base: Mapping[str, float]) -> bytes:
    """The path of each recipe from the initial model to its end, numbered as in the table.

    Evaluations without diversity are left out of the path.
    """
    figure, axes, look = numbered_axes(recipes)
    axes.axvline(ENOUGH_DIVERSITY, **DASHED)
    axes.axhline(ENOUGH_ACCURACY, **DASHED)
    nan = float("nan")
    start = (base.get("diversity", nan), base.get("accuracy", nan))
    for recipe in recipes:
        diversity = [start[0], *(m.mean for m in recipe.figures["diversity"].values())]
        accuracy = [start[1], *(m.mean for m in recipe.figures["accuracy"].values())]
        curve_of(axes, diversity, accuracy, look[recipe.name])
        end_of(axes, recipe.last("diversity"), recipe.last("accuracy"), look[recipe.name])
    axes.plot(*start, "o", color="white", markeredgecolor="#222222", markersize=9, zorder=5)
    frame(axes, "diversity of the images of one prompt", "accuracy")
    axes.set_title(
        f"white: before; dashed: accuracy {ENOUGH_ACCURACY:g} and diversity {ENOUGH_DIVERSITY:g}",
        fontsize=10,
    )
    figure.tight_layout()
    return png(figure)
