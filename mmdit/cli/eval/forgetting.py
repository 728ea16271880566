"""What finetuning taught and what it cost: a table and plots of a folder of runs.

Protocol `forgetting-1`: the accuracies that runs of `experiment=shapes_new_word` logged, averaged
over seeds, beside those of the model that they started from, measured now with the same prompts and
noise. `lost` is the accuracy on the old tasks before training less that after it.
"""

import importlib.util
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from mmdit.cli.eval.subject import made, table, write_results
from mmdit.cli.launch import Verbatim, launch
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.loading import open_source
from mmdit.printable import logger
from mmdit.study.forgetting import FIGURES, Mean, Recipe, Study, read_study
from mmdit.study.records import finite

log = logger(__name__)
PROTOCOL = "forgetting-1"
VERBATIM = ("runs", "out")


def job(config: DictConfig, text: Verbatim) -> None:
    """Read the runs, measure the initial model, write the results."""
    if "runs" not in text:
        raise UserError("give runs=<folder of runs of experiment=shapes_new_word>")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plots need matplotlib: pip install -e '.[plots]'")
    folder = Path(text["runs"])
    study = read_study(folder)
    base = measured(study, config)
    recipes = study.recipes()
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        "weights": study.initial,
        "initial_sha256": study.initial_sha256,
        "probe": study.probe,
        "initial_accuracies": base,
        "recipes": [as_json(recipe, base) for recipe in recipes],
        "notes": study.notes,
    }
    from mmdit.study import forgetting_plots as plots  # matplotlib is an extra

    out = made(Path(text.get("out") or folder / "forgetting"))
    drawn = {
        ".png": plots.taught_against_lost(recipes, base),
        "-steps.png": plots.over_steps(recipes, base),
    }
    write_results(out, "forgetting", report, as_markdown(recipes, base, study), drawn)


def measured(study: Study, config: DictConfig) -> dict[str, float]:
    """The accuracies of the model that the runs started from.

    Raises:
        UserError: it is not there any more, or has other weights.
    """
    source = open_source(study.initial)
    if source.sha256 != study.initial_sha256:
        raise UserError(f"{study.initial} has other weights than those that the runs started from")
    log.info("measuring %s", study.initial)
    probe = instantiate(study.probe)()
    pipe = source.pipeline().to(available(config.device)).eval()
    found = probe(pipe)
    return {figure: found[f"accuracy_{figure}"] for figure in FIGURES}


def as_json(recipe: Recipe, base: dict[str, float]) -> dict[str, Any]:
    """A recipe for the JSON file."""
    return {
        "recipe": recipe.name,
        "seeds": recipe.seeds,
        "lost": base["old"] - recipe.last("old").mean,
        "accuracies": {
            figure: {step: plain(mean) for step, mean in means.items()}
            for figure, means in recipe.accuracies.items()
        },
    }


def plain(mean: Mean) -> dict[str, float | None]:
    """A mean for the JSON file, which has no NaN."""
    return {"mean": mean.mean, "half_width": finite(mean.half_width)}


def as_markdown(recipes: list[Recipe], base: dict[str, float], study: Study) -> str:
    """The recipes, best first."""
    seeds = sorted({seed for recipe in recipes for seed in recipe.seeds})
    rows: list[list[object]] = [["", "before", *(f"{base[f]:.2f}" for f in FIGURES), ""]]
    for place, recipe in enumerate(recipes, 1):
        old = recipe.last("old")
        lost = Mean(base["old"] - old.mean, old.half_width)
        fewer = "" if recipe.seeds == seeds else f" (seeds {', '.join(map(str, recipe.seeds))})"
        accuracies = (str(recipe.last(f)) for f in FIGURES)
        rows.append([place, recipe.name + fewer, *accuracies, str(lost)])
    header = ["", "recipe", "phrase taught", "word in other tasks", "old tasks", "lost"]
    lines = [
        f"{PROTOCOL}: accuracy at the end of training, from {study.initial}",
        "",
        table(header, rows),
        f"Means over seeds {', '.join(map(str, seeds))}; ± is half of Student's 95 % interval. "
        f"{study.probe['prompts_per_task']} images for each task, {study.probe['steps']} steps.",
        *study.notes,
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="forgetting", verbatim=VERBATIM)
