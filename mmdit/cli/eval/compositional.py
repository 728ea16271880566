"""Compositional accuracy: how well images follow their prompts in six tasks, judged from pixels.

Protocol `compositional-1`: for each task of GenEval, one image is generated for each of the short
prompts of the first n scenes of the validation split (new images of attribute combinations in the
training data) and of the held-out split (combinations that are not in the training data). With
`word`, also of scenes that contain one shape, which the model may have been taught later. An image
is correct if it contains exactly the objects and relations of its prompt. There are two controls:
the detector on renderings of the same scenes (its own errors), and on the images of other prompts
of the same task (chance).
"""

import math
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from mmdit.checks import seed_number, whole_number
from mmdit.cli.eval.subject import generate, results_folder, shapes_for, write_results
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.subject import PARTS, Subject, open_subject
from mmdit.data.captions import TASKS, short_caption
from mmdit.data.shapes import Shapes
from mmdit.metrics.compositional import judge
from mmdit.plots import grid_image, png

PROTOCOL = "compositional-1"
VERBATIM = ("checkpoint", "out", *PARTS)


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, build the model, measure accuracy, write the results."""
    for key, least in (("prompts_per_task", 2), ("batch_size", 1)):
        whole_number(key, config[key], least)
    seed_number("seed", config.seed)
    subject = open_subject(config, text)
    pipe = subject.pipe
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        **subject.facts,
        "seed": config.seed,
        "prompts_per_task": config.prompts_per_task,
        "steps": config.steps or pipe.steps,
        "guidance": pipe.guidance if config.guidance is None else config.guidance,
        "solver": instantiate(config.solver).func.__name__,
        "splits": {},
    }
    shown: list[tuple[Tensor, str, bool]] = []
    same_scenes = config.copy()
    same_scenes.seed = 0  # scenes do not depend on the seed of the noise
    taught = [config.word] if config.word is not None else []
    for split in (*config.splits, *taught):
        data = scenes_for(subject, same_scenes, split)
        table, examples = measure(subject, data, report, config)
        report["splits"][split] = table
        shown += examples if split == config.splits[0] else []
    out = results_folder(text, subject.path, "compositional")
    plots = {".png": png(examples_image(shown))}
    write_results(out, "compositional", report, as_markdown(report), plots)


def scenes_for(subject: Subject, config: DictConfig, split: str) -> Shapes:
    """The shapes that a run was trained on; for public weights, at their image size.

    Args:
        split: of the data; or `config.word`, for scenes that contain this shape.
    """
    size = None if subject.run else subject.pipe.image_size
    word = split if split == config.word else None
    split = "validation" if word else split
    return shapes_for(subject.run, config, split, image_size=size, word=word)


def measure(
    subject: Subject, data: Shapes, report: dict[str, Any], config: DictConfig
) -> tuple[dict[str, Any], list[tuple[Tensor, str, bool]]]:
    """Accuracy of each task with its two controls, and the judged images."""
    n = report["prompts_per_task"]
    table: dict[str, Any] = {}
    examples: list[tuple[Tensor, str, bool]] = []
    options = {"steps": report["steps"], "guidance": report["guidance"]}
    for task in TASKS:
        scenes = [data.scene_for_task(task, i) for i in range(n)]
        prompts = [short_caption(scene) for scene in scenes]
        with subject.autocast():
            label = f"{data.containing or data.split}, {task}"
            images = generate(subject.pipe, prompts, config, label=label, **options).images
        right = judge(data, scenes, images)
        truth = judge(data, scenes, torch.stack([torch.from_numpy(data.render(s)) for s in scenes]))
        shuffled = judge(data, scenes, images.roll(n // 2, dims=0))
        table[task] = {
            "accuracy": sum(right) / n,
            "standard_error": math.sqrt(sum(right) / n * (1 - sum(right) / n) / n),
            "detector_on_truth": sum(truth) / n,
            "shuffled_prompts": sum(shuffled) / n,
        }
        examples += [(images[i], prompts[i], right[i]) for i in range(n)]
    names = ("accuracy", "detector_on_truth", "shuffled_prompts")
    table["overall"] = {name: sum(table[t][name] for t in TASKS) / len(TASKS) for name in names}
    errors = [table[task]["standard_error"] for task in TASKS]
    table["overall"]["standard_error"] = math.hypot(*errors) / len(TASKS)
    return table, examples


def as_markdown(report: dict[str, Any]) -> str:
    """The metrics of every split as a table."""
    lines = [f"{report['protocol']}: {report['weights']}", ""]
    for split, table in report["splits"].items():
        lines += [
            f"| {split} | accuracy | detector on truth | shuffled prompts |",
            "|---|---|---|---|",
        ]
        for task, row in table.items():
            cells = (
                f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}",
                f"{row['detector_on_truth']:.3f}",
                f"{row['shuffled_prompts']:.3f}",
            )
            lines.append(f"| {task} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def examples_image(shown: list[tuple[Tensor, str, bool]], per_row: int = 12) -> Image.Image:
    """Up to 24 successes, then up to 24 failures, spread over the tasks."""

    def spread(wanted: bool) -> list[tuple[Tensor, str, bool]]:
        some = [example for example in shown if example[2] is wanted]
        return some[:: max(1, len(some) // 24)][:24]

    chosen = spread(True) + spread(False)
    captions = [("" if right else "WRONG: ") + caption for _, caption, right in chosen]
    return grid_image(torch.stack([image for image, _, _ in chosen]), captions, columns=per_row)


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="compositional", verbatim=VERBATIM)
