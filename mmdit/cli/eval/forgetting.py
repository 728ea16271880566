"""What finetuning taught and what it cost: a table and plots of a folder of runs.

Protocol `forgetting-1`: the accuracies that runs of `experiment=shapes_new_word` logged, averaged
over seeds, beside those of the model that they started from, measured now with the same prompts and
noise. `lost` is the accuracy on the old tasks before training less that after it.
"""

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
from mmdit.study.curves import Recipe, Study
from mmdit.study.word import FORGETTING

PROTOCOL = "forgetting-1"


def job(config: DictConfig, text: Verbatim) -> None:
    """Read the runs, measure the initial model, write the results."""
    study = read_runs_of(text, FORGETTING)
    recipes = study.recipes()
    base = measured(study, config)
    report: dict[str, Any] = {
        **facts(PROTOCOL, study),
        "initial_accuracies": base,
        "recipes": [as_json(recipe, base) for recipe in recipes],
        "notes": study.notes,
    }
    from mmdit.study import forgetting_plots as plots  # matplotlib is an extra

    out = made(Path(text.get("out") or Path(text["runs"]) / "forgetting"))
    drawn = {
        ".png": plots.taught_against_lost(recipes, base),
        "-steps.png": plots.over_steps(recipes, base),
    }
    write_results(out, "forgetting", report, as_markdown(recipes, base, study), drawn)


def as_json(recipe: Recipe, base: dict[str, float]) -> dict[str, Any]:
    """A recipe for the JSON file."""
    return {
        "recipe": recipe.name,
        "seeds": recipe.seeds,
        "lost": base["old"] - recipe.last("old").mean,
        "accuracies": {
            figure: {step: plain(mean) for step, mean in means.items()}
            for figure, means in recipe.figures.items()
        },
    }


def as_markdown(recipes: list[Recipe], base: dict[str, float], study: Study) -> str:
    """The recipes, best first."""
    seeds, figures = all_seeds(recipes), FORGETTING.figures
    rows: list[list[object]] = [["", "before", *(f"{base[f]:.2f}" for f in figures), ""]]
    for place, recipe in enumerate(recipes, 1):
        old = recipe.last("old")
        lost = old._replace(mean=base["old"] - old.mean)
        rows.append([place, name_of(recipe, seeds), *map(recipe.last, figures), lost])
    header = ["", "recipe", "phrase taught", "word in other tasks", "old tasks", "lost"]
    lines = [
        f"{PROTOCOL}: accuracy at the end of training, from {study.initial}",
        "",
        table(header, rows),
        f"{about_means(seeds)} "
        f"{study.probe['prompts_per_task']} images for each task, {study.probe['steps']} steps.",
        *study.notes,
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="forgetting", verbatim=VERBATIM)
