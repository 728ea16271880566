"""What post-training gained and what it cost: a table and plots of a folder of runs.

Protocol `alignment-1`: the figures that runs of `experiment=alignment` logged, averaged over seeds,
beside those of the model that they started from, measured now with the same prompts and noise.
"""

from collections.abc import Mapping
from math import isnan, nan
from pathlib import Path
from typing import Any

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
from mmdit.metrics.diversity import LEAST
from mmdit.study.alignment import (
    ALIGNMENT,
    ENOUGH_DIVERSITY,
    at_compute,
    best_diverse,
    shared_compute,
)
from mmdit.study.curves import Mean, Recipe, Study, mean_of
from mmdit.study.records import finite

PROTOCOL = "alignment-1"
COLUMNS = {
    "accuracy": "accuracy",
    "accuracy_held_out": "held out",
    "accuracy_other_sampler": "other sampler",
    "diversity": "diversity",
    "diversity_place": "place",
    "diversity_colour": "colour",
    "pixel_deviation": "pixel deviation",
    "accuracy_position": "position task",
}


def job(config: DictConfig, text: Verbatim) -> None:
    """Read the runs, measure the initial model, write the results."""
    study = read_runs_of(text, ALIGNMENT)
    recipes = study.recipes()
    base = measured(study, config)
    report: dict[str, Any] = {
        **facts(PROTOCOL, study),
        "initial_figures": base,
        "recipes": [as_json(recipe) for recipe in recipes],
        "notes": notes_on(recipes, study),
    }
    from mmdit.study import alignment_plots as plots  # matplotlib is an extra

    out = made(Path(text.get("out") or Path(text["runs"]) / "alignment"))
    drawn = {
        ".png": plots.accuracy_against_diversity(recipes, base),
        "-compute.png": plots.over_compute(recipes, base),
    }
    write_results(out, "alignment", report, as_markdown(recipes, base, study), drawn)


def as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe for the JSON file."""
    best = best_diverse(recipe)
    return {
        "recipe": recipe.name,
        "seeds": recipe.seeds,
        "tflop_per_step": finite(recipe.tflop_per_step),
        "best_diverse": best and {"step": best.step, "accuracy": plain(best.accuracy)},
        "figures": {
            figure: {step: plain(mean) | {"seeds": mean.seeds} for step, mean in means.items()}
            for figure, means in recipe.figures.items()
        },
    }


def notes_on(recipes: list[Recipe], study: Study) -> list[str]:
    """What was left out of the study and of its plots."""
    not_counted = [recipe.name for recipe in recipes if isnan(recipe.tflop_per_step)]
    no_diversity = [recipe.name for recipe in recipes if isnan(recipe.last("diversity").mean)]
    return [
        *study.notes,
        *(f"Not in alignment-compute.png, no operations counted: {name}." for name in not_counted),
        *(f"No point in alignment.png, without diversity at the end: {n}." for n in no_diversity),
    ]


def as_markdown(recipes: list[Recipe], base: Mapping[str, float], study: Study) -> str:
    """The recipes, best first."""
    seeds = all_seeds(recipes)
    before = [mean_of([base[figure]] if figure in base else []) for figure in COLUMNS]
    rows: list[list[object]] = [["", "before", *before, "", "", ""]]
    tflop = shared_compute(recipes)
    for place, recipe in enumerate(recipes, 1):
        ends = [of_seeds(recipe.last(figure), recipe) for figure in COLUMNS]
        best = best_diverse(recipe)
        at_best = "-" if best is None else f"{best.accuracy} (step {best.step})"
        spent = [
            shown(at_compute(recipe, figure, base.get(figure, nan), tflop))
            for figure in ("accuracy", "diversity")
        ]
        rows.append([place, name_of(recipe, seeds), *ends, at_best, *spent])
    header = ["", "recipe", *COLUMNS.values(), f"best at diversity ≥ {ENOUGH_DIVERSITY:g}"]
    spent_at = "the same compute" if isnan(tflop) else f"{tflop:.3g} TFLOP"
    header += [f"{figure} at {spent_at}" for figure in ("accuracy", "diversity")]
    probe = study.probe
    lines = [
        f"{PROTOCOL}: figures at the end of training, from {study.initial}",
        "",
        table(header, rows),
        f"{about_means(seeds)} "
        f"{probe['prompts_per_task']} images for each task, {probe['steps']} steps; diversity of "
        f"{probe['diversity_prompts']} prompts with {probe['members']} images each.",
        "The best is the highest mean accuracy over the evaluations of that mean diversity.",
        "The last two columns are at the compute of the shortest recipe, between evaluations.",
        f"A mean over fewer seeds says so; -: none has it. Diversity needs {LEAST} right images.",
        *notes_on(recipes, study),
    ]
    return "\n".join([*lines, ""])


def shown(value: float) -> str:
    """A mean without an interval."""
    return "-" if isnan(value) else f"{value:.2f}"


def of_seeds(mean: Mean, recipe: Recipe) -> str:
    """A mean, with the number of its seeds where others have no such figure."""
    count = len(recipe.seeds)
    return f"{mean} ({mean.seeds} of {count} seeds)" if 0 < mean.seeds < count else str(mean)


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="alignment", verbatim=VERBATIM)
