"""Loss of quality with fewer sampling steps, and path lengths (Table 6).

Protocol `efficiency-1`: the same prompts and noise at each number of steps. The score is the CLIP
score if clip= is given, and otherwise compositional accuracy; the relative loss of s steps is
(score of most steps - score of s steps) / score of most steps, in percent. The path length of an
image is the sum of ||v dt|| over its steps, with the norm over all values of its latent.
"""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from mmdit.checks import seed_number, whole_number
from mmdit.cli.eval.subject import (
    generate,
    numbers,
    open_features,
    read_prompts,
    results_folder,
    sampling,
    scores,
    table,
    write_results,
)
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.subject import PARTS, open_subject
from mmdit.errors import UserError
from mmdit.metrics.path_length import MeasuredGuidance

PROTOCOL = "efficiency-1"
VERBATIM = ("checkpoint", "out", "prompts", "clip", *PARTS)
SCORES = {"clip": "CLIP score", "accuracy": "accuracy"}  # the first available one is used


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, build the model, sample at every number of steps, write the results."""
    for key, least in (("batch_size", 1), ("samples", 2)):
        whole_number(key, config[key], least)
    seed_number("seed", config.seed)
    counts = numbers(config, "steps", "at least two whole numbers", low=0, high=float("inf"))
    if len(counts) < 2 or not all(isinstance(count, int) for count in counts):
        raise UserError(f"steps={config.steps} must be a list of at least two whole numbers")
    subject = open_subject(config, text)
    prompts = read_prompts(subject, config, text)
    features, clip_facts = open_features(text, subject.pipe.device)
    if features is None and prompts.data is None:
        raise UserError("prompts=<file> needs clip=<CLIP>: accuracy is defined for shapes only")
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        **subject.facts,
        **clip_facts,
        "seed": config.seed,
        "samples": len(prompts.texts),
        **sampling(subject.pipe, config),
        "rows": [],
    }
    for steps in sorted(counts):
        guidance = MeasuredGuidance(inner=instantiate(config.guide))
        label, options = f"{steps} steps", {"steps": steps, "guidance": guidance}
        with subject.autocast():
            samples = generate(subject.pipe, prompts.texts, config, label=label, **options)
        lengths = guidance.lengths().double()
        report["rows"].append(
            {
                "steps": steps,
                "function_evaluations": samples.function_evaluations,
                "path_length": lengths.mean().item(),
                "path_length_standard_error": lengths.std().item() / len(lengths) ** 0.5,
                **scores(prompts, samples.images, features),
            }
        )
    add_losses(report)
    out = results_folder(text, subject.path, "efficiency")
    write_results(out, "efficiency", report, as_markdown(report))


def add_losses(report: dict[str, Any]) -> None:
    """Add each row's relative loss in percent against the last row, which has the most steps.

    The loss is None if the last row's score is not positive.
    """
    rows = report["rows"]
    score = next(name for name in SCORES if name in rows[-1])
    best = rows[-1][score]
    report["score"] = score
    for row in rows:
        row["relative_loss_percent"] = 100 * (best - row[score]) / best if best > 0 else None


def as_markdown(report: dict[str, Any]) -> str:
    """Table 6, one row for each number of steps."""
    score, most = report["score"], report["rows"][-1]["steps"]
    header = ("steps", SCORES[score], f"loss of {most} steps' score", "path length")
    rows = []
    for row in report["rows"]:
        loss = row["relative_loss_percent"]
        rows.append(
            (
                row["steps"],
                row[score],
                "none" if loss is None else f"{loss:.2f} %",
                f"{row['path_length']:.2f} ± {row['path_length_standard_error']:.2f}",
            )
        )
    head = (
        f"{report['protocol']}: {report['weights']}, sha256 {report['weights_sha256'][:16]}, "
        f"{report['samples']} samples, guidance {report['guidance']:g}, seed {report['seed']}\n"
    )
    return f"{head}\n{table(header, rows)}"


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="efficiency", verbatim=VERBATIM)
