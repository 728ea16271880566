"""Sample GenEval's prompts, in the folder layout of its official evaluator (Table 5).

Protocol `geneval-1`: sample i of every prompt starts from the noise of seed + i. Prompts are those
of the official evaluation_metadata.jsonl (metadata=), or short captions of toy scenes, cycling
through the tasks. Existing images are not generated again.
"""

import json
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from mmdit.atomic import file_hash, write_atomically
from mmdit.checks import seed_number, whole_number
from mmdit.cli.eval.subject import sampling, shapes_for
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.subject import PARTS, Subject, open_subject
from mmdit.metrics.geneval import GenEvalFolder, Metadata, read_metadata, scene_metadata
from mmdit.printable import show
from mmdit.study.protocol import scenes_of

PROTOCOL = "geneval-1"
VERBATIM = ("checkpoint", "out", "metadata", *PARTS)


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, build the model, sample missing images, write the report."""
    for key, least in (("samples_per_prompt", 1), ("batch_size", 1), ("prompts", 1)):
        whole_number(key, config[key], least)
    seed_number("seed", config.seed, images=config.samples_per_prompt)
    given = Path(text["metadata"]) if "metadata" in text else None
    lines = read_metadata(given) if given else None
    subject = open_subject(config, text)
    lines = toy_metadata(subject, config) if lines is None else lines
    pipe = subject.pipe
    settings: dict[str, Any] = {
        "protocol": PROTOCOL,
        **subject.facts,
        "metadata_sha256": file_hash(given) if given else None,
        "seed": config.seed,
        "steps": pipe.steps if config.steps is None else config.steps,
        "height": pipe.image_size if config.height is None else config.height,
        "width": pipe.image_size if config.width is None else config.width,
        **sampling(pipe, config),
    }
    pipe.latent_size(settings["height"], settings["width"])
    folder = GenEvalFolder(Path(text.get("out") or Path("results") / "geneval"), settings)
    wanted = [
        (index, sample)
        for index, line in enumerate(lines)
        for sample in folder.missing(index, line, config.samples_per_prompt)
    ]
    fill(folder, subject, lines, wanted, config, settings)
    done = {
        **settings,
        "prompts": len(lines),
        "samples_per_prompt": config.samples_per_prompt,
        "samples": len(lines) * config.samples_per_prompt,
    }
    write_atomically(folder.path / "report.json", json.dumps(done, indent=1).encode())
    there = done["samples"] - len(wanted)
    show(f"{len(wanted)} images generated, {there} existed already, in {folder.path}")
    show("to score them: python evaluation/evaluate_images.py <folder>, in the official repository")


def toy_metadata(subject: Subject, config: DictConfig) -> list[Metadata]:
    """Metadata of validation scenes, cycling through the tasks."""
    data = shapes_for(subject.run, config, "validation")
    return [scene_metadata(scene) for scene in scenes_of(data, config.prompts)]


def fill(
    folder: GenEvalFolder,
    subject: Subject,
    lines: list[Metadata],
    wanted: list[tuple[int, int]],
    config: DictConfig,
    settings: dict[str, Any],
) -> None:
    """Sample the wanted (prompt index, sample) pairs, writing each batch immediately."""
    options = {key: settings[key] for key in ("steps", "height", "width")}
    with tqdm(total=len(wanted), desc="sampling", unit="image", disable=None) as bar:
        for start in range(0, len(wanted), config.batch_size):
            batch = wanted[start : start + config.batch_size]
            with subject.autocast():
                images = subject.pipe(
                    [lines[index]["prompt"] for index, _ in batch],
                    seeds=[config.seed + sample for _, sample in batch],
                    guidance=instantiate(config.guide),
                    solver=instantiate(config.solver),
                    **options,
                )
            for (index, sample), pixels in zip(batch, images, strict=True):
                folder.write(index, sample, pixels)
            bar.update(len(batch))


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="geneval", verbatim=VERBATIM)
