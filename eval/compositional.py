"""Does a model paint what it is told? Six tasks, scored by looking at the pixels.

Protocol `compositional-1`: for each task of GenEval, the short prompts of the first n scenes of the
validation split (combinations of attributes that training shows, in pictures it never saw) and of
the held-out split (combinations it never shows), one picture each. A picture counts if every
object and relation of its prompt is there and nothing else. Two controls: the detector on drawings
of the same scenes (its own errors), and on the pictures of the other prompts of the same task
(chance).
"""

import os

# Before torch starts its threads: ones that spin long while they wait starve a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

import mmdit
from configs.checks import whole
from configs.launch import Verbatim, launch
from mmdit.checkpoints.runs import find_weights, hash_of_weights, newest_finished
from mmdit.data.captions import TASKS, Scene, short_caption
from mmdit.data.shapes import Shapes
from mmdit.engine.pictures import grid_image
from mmdit.engine.precision import autocast, chosen_device
from mmdit.errors import UserError
from mmdit.metrics.compositional import judge
from mmdit.pipeline import Pipeline

log = logging.getLogger("mmdit.compositional")
PROTOCOL = "compositional-1"


def job(config: DictConfig, text: Verbatim) -> None:
    """Compose, build, measure, write."""
    n = whole(config, "prompts_per_task", 2)
    source = (
        Path(text["checkpoint"]) if text.get("checkpoint") else newest_finished(Path(config.runs))
    )
    if source is None:
        raise UserError(
            f"there is no finished run in {config.runs}/: give checkpoint=<run or file>"
        )
    weights = find_weights(source, config.weights)
    device = chosen_device(config.device)
    pipe = mmdit.load_pipeline(weights).to(device)
    pipe.autocast = autocast(device, config.precision)

    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        "weights": str(weights),
        "weights_sha256": hash_of_weights(weights),
        "seed": config.seed,
        "prompts_per_task": n,
        "steps": config.steps or pipe.steps,
        "guidance": pipe.guidance if config.guidance is None else config.guidance,
        "solver": instantiate(config.solver).func.__name__,
        "splits": {},
    }
    shown: list[tuple[Tensor, str, bool]] = []
    for split in config.splits:
        data = dataset(weights, config, split)
        table, examples = measure(pipe, data, report, config)
        report["splits"][split] = table
        shown += examples if split == config.splits[0] else []
    out = Path(text.get("out") or default_folder(weights))
    out.mkdir(parents=True, exist_ok=True)
    (out / "compositional.json").write_text(json.dumps(report, indent=1))
    markdown = as_markdown(report)
    (out / "compositional.md").write_text(markdown)
    draw_examples(shown, out / "compositional.png")
    print(markdown)
    for name in ("json", "md", "png"):
        print(out / f"compositional.{name}")


def dataset(weights: Path, config: DictConfig, split: str) -> Shapes:
    """The data the model was trained on, as its run folder says; else as the config says."""
    described = [p / "config.json" for p in weights.parents[:3] if (p / "config.json").is_file()]
    if described:
        arguments = json.loads(described[0].read_text())["data"]
    else:
        plain = {**OmegaConf.to_container(config, resolve=False), "seed": 0}  # type: ignore[dict-item]
        arguments = OmegaConf.to_container(OmegaConf.create(plain).data, resolve=True)
    if arguments.pop("_target_") != "mmdit.data.shapes.Shapes":
        raise UserError(f"{weights} was not trained on shapes: this measure knows no other data")
    return Shapes(split=split, **arguments)


def measure(
    pipe: Pipeline, data: Shapes, report: dict[str, Any], config: DictConfig
) -> tuple[dict[str, Any], list[tuple[Tensor, str, bool]]]:
    """Accuracy of each task with its two controls, and the pictures that were judged."""
    n = report["prompts_per_task"]
    table: dict[str, Any] = {}
    examples: list[tuple[Tensor, str, bool]] = []
    bar = tqdm(total=len(TASKS) * n, desc=f"painting, {data.split}", unit="image", disable=None)
    for task in TASKS:
        scenes = [data.scene_for_task(task, i) for i in range(n)]
        images = paint(pipe, scenes, report, config, bar)
        right = judge(data, scenes, images)
        truth = judge(data, scenes, torch.stack([torch.from_numpy(data.render(s)) for s in scenes]))
        shuffled = judge(data, scenes, images.roll(n // 2, dims=0))
        table[task] = {
            "accuracy": sum(right) / n,
            "standard_error": math.sqrt(sum(right) / n * (1 - sum(right) / n) / n),
            "detector_on_truth": sum(truth) / n,
            "shuffled_prompts": sum(shuffled) / n,
        }
        examples += [(images[i], short_caption(scenes[i]), right[i]) for i in range(n)]
    bar.close()
    names = ("accuracy", "detector_on_truth", "shuffled_prompts")
    table["overall"] = {name: sum(table[t][name] for t in TASKS) / len(TASKS) for name in names}
    errors = [table[task]["standard_error"] for task in TASKS]
    table["overall"]["standard_error"] = math.hypot(*errors) / len(TASKS)
    return table, examples


def paint(
    pipe: Pipeline, scenes: list[Scene], report: dict[str, Any], config: DictConfig, bar: tqdm
) -> Tensor:
    """One picture for the short prompt of each scene, (n, h, w, 3) uint8."""
    batches = []
    for start in range(0, len(scenes), config.batch_size):
        batch = scenes[start : start + config.batch_size]
        images = pipe(
            [short_caption(scene) for scene in batch],
            seeds=[config.seed + start + i for i in range(len(batch))],
            steps=report["steps"],
            guidance=report["guidance"],
            solver=instantiate(config.solver),
        )
        batches.append(images.cpu())
        bar.update(len(batch))
    return torch.cat(batches)


def default_folder(weights: Path) -> Path:
    """Beside the checkpoint, or `results/` for a file from elsewhere."""
    if (weights.parent / "manifest.json").is_file():
        return weights.parents[2] / "compositional" / weights.parent.name
    return Path("results") / weights.stem


def as_markdown(report: dict[str, Any]) -> str:
    """The figures of every split as a table."""
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


def draw_examples(shown: list[tuple[Tensor, str, bool]], path: Path, per_row: int = 12) -> None:
    """Up to 24 successes, then up to 24 failures, spread over the tasks."""

    def spread(wanted: bool) -> list[tuple[Tensor, str, bool]]:
        some = [example for example in shown if example[2] is wanted]
        return some[:: max(1, len(some) // 24)][:24]

    chosen = spread(True) + spread(False)
    captions = [("" if right else "WRONG: ") + caption for _, caption, right in chosen]
    grid_image(torch.stack([image for image, _, _ in chosen]), captions, columns=per_row).save(path)


if __name__ == "__main__":
    launch(job, config_name="compositional", verbatim=("checkpoint", "out"))
