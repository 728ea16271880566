"""Plots of the accuracy of students over the compute of their training, made with matplotlib."""

from collections.abc import Mapping, Sequence

from mmdit.study.curve_plots import Panel, compute_of, over
from mmdit.study.curves import Recipe
from mmdit.study.few_steps import ENOUGH, ENOUGH_IN_ONE


def over_compute(
    recipes: Sequence[Recipe], base: Mapping[str, float], teacher: float, steps: int
) -> bytes:
    """Accuracies and diversity of runs that counted their operations.

    Args:
        base: the figures of the initial model, sampled as its students are.
        teacher: its accuracy with its own sampling; dotted is the share that should be kept.
        steps: of the students.
    """
    panels = (
        Panel("accuracy", f"accuracy in {steps} steps", line=ENOUGH * teacher),
        Panel("accuracy_in_one", "accuracy in one step", line=ENOUGH_IN_ONE * teacher),
        Panel("diversity", "diversity of the images of one prompt", "diversity"),
    )
    return over(compute_of, "compute of distillation in TFLOP", panels, recipes, base)
