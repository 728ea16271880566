"""How much of its teacher's accuracy each student keeps: a table and plots of a folder of runs.

Protocol `few-steps-1`: the figures that runs of `experiment=few_steps probe=student` logged,
averaged over seeds, beside those of their teacher, measured now with the same prompts and noise:
sampled as its students are, and as it samples by default.
"""

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from mmdit.cli.eval.comparison import (
    VERBATIM,
    about_means,
    all_seeds,
    facts,
    measured,
    name_of,
    plain,
    read_runs_of,
)
from mmdit.cli.eval.subject import made, table, write_results
from mmdit.cli.launch import Verbatim, launch
from mmdit.errors import UserError
from mmdit.loading import open_source
from mmdit.study.curves import Recipe, Study, mean_of
from mmdit.study.few_steps import FEW_STEPS, kept
from mmdit.study.records import finite

PROTOCOL = "few-steps-1"
FIGURES = ("accuracy", "accuracy_in_one", "accuracy_held_out", "diversity", "pixel_deviation")


class Teacher(NamedTuple):
    """What the students started from, with its default sampling."""

    steps: int
    guidance: float
    figures: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        return self.figures["accuracy"]


def job(config: DictConfig, text: Verbatim) -> None:
    """Read the runs, measure the teacher, write the results."""
    study = read_runs_of(text, FEW_STEPS)
    recipes = study.recipes()
    base, teacher = measured(study, config), teacher_of(study, config)
    report: dict[str, Any] = {
        **facts(PROTOCOL, study),
        "teacher": teacher._asdict(),
        "initial_figures": base,
        "recipes": [as_json(recipe, teacher) for recipe in recipes],
        "notes": notes_on(recipes, study),
    }
    from mmdit.study import few_steps_plots as plots  # matplotlib is an extra

    out = made(Path(text.get("out") or Path(text["runs"]) / "few_steps"))
    drawn = {".png": plots.over_compute(recipes, base, teacher.accuracy, study.probe["steps"])}
    write_results(out, "few_steps", report, as_markdown(recipes, base, teacher, study), drawn)


def teacher_of(study: Study, config: DictConfig) -> Teacher:
    """The model that the students started from, measured with its default steps and guidance.

    Raises:
        UserError: it has no image right, so that nothing can be kept of its accuracy.
    """
    pipe = open_source(study.initial).pipeline()
    figures = measured(study, config, steps=pipe.steps, guidance=None)
    if not figures["accuracy"]:
        raise UserError(
            f"{study.initial} has no image right in {pipe.steps} steps at guidance "
            f"{pipe.guidance:g}: train it longer before it teaches"
        )
    del figures["accuracy_in_one"]  # of guided steps, which no student takes
    return Teacher(pipe.steps, pipe.guidance, figures)


def as_json(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """A recipe for the JSON file."""
    return {
        "recipe": recipe.name,
        "seeds": recipe.seeds,
        "tflop_per_step": finite(recipe.tflop_per_step),
        "kept": plain(kept(recipe.last("accuracy"), teacher.accuracy)),
        "kept_in_one": plain(kept(recipe.last("accuracy_in_one"), teacher.accuracy)),
        "figures": {
            figure: {step: plain(mean) | {"seeds": mean.seeds} for step, mean in means.items()}
            for figure, means in recipe.figures.items()
        },
    }


def notes_on(recipes: list[Recipe], study: Study) -> list[str]:
    """What was left out of the study and of its plot."""
    not_counted = [recipe.name for recipe in recipes if isnan(recipe.tflop_per_step)]
    return [
        *study.notes,
        *(f"Not in few_steps.png, no operations counted: {name}." for name in not_counted),
    ]


def as_markdown(
    recipes: list[Recipe], base: Mapping[str, float], teacher: Teacher, study: Study
) -> str:
    """The teacher, the teacher sampled as its students are, and the recipes, best first."""
    steps, seeds = study.probe["steps"], all_seeds(recipes)

    def row(figures: Mapping[str, float]) -> list[object]:
        return [mean_of([figures[f]] if f in figures else []) for f in FIGURES]

    own = f"the teacher, {teacher.steps} steps at guidance {teacher.guidance:g}"
    rows: list[list[object]] = [
        ["", own, *row(teacher.figures), "", "", ""],
        ["", "the teacher, sampled like a student", *row(base), "", "", ""],
    ]
    for place, recipe in enumerate(recipes, 1):
        shares = [kept(recipe.last(f), teacher.accuracy) for f in ("accuracy", "accuracy_in_one")]
        spent = recipe.tflop_per_step * recipe.steps[-1]
        compute = "-" if isnan(spent) else f"{spent:.3g}"
        ends = [recipe.last(figure) for figure in FIGURES]
        rows.append([place, name_of(recipe, seeds), *ends, *shares, compute])
    names = (f"in {steps} steps", "in 1 step", "held out", "diversity", "pixel deviation")
    shared = (f"of the teacher's in {steps}", "in 1", "TFLOP")
    probe = study.probe
    lines = [
        f"{PROTOCOL}: accuracy at the end of training, from {study.initial}",
        "",
        table(["", "recipe", *names, *shared], rows),
        f"{about_means(seeds)} {probe['prompts_per_task']} images for each task; diversity of "
        f"{probe['diversity_prompts']} prompts with {probe['members']} images each.",
        f"Held-out accuracy and diversity are in {steps} steps, those of the teacher in its own.",
        "The intervals of shares are those of the students; the teacher is one model.",
        *notes_on(recipes, study),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="few_steps", verbatim=VERBATIM)
