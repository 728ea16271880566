"""Contribution of each text encoder, and of the unconditional input (App. B.2, B.3).

Protocol `encoders-1`: the same prompts and noise with each of the eight subsets of CLIP-L, CLIP-G
and T5; an omitted encoder contributes zeros, as when dropped in training. The unconditional input
is the empty prompt as the model encodes it; with all three encoders, both variants are compared:
zeros (the paper's training) and the encoding of "" (the public weights). Reported for each subset:
the CLIP score if clip= is given; for prompts of toy scenes also compositional accuracy, and the
validation loss (mean of its first seven levels), which does not involve guidance.
"""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from mmdit.checks import seed_number, whole_number
from mmdit.cli.eval.subject import (
    generate,
    open_features,
    read_prompts,
    results_folder,
    sampling,
    scores,
    shapes_for,
    table,
    write_results,
)
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.subject import PARTS, Subject, open_subject
from mmdit.errors import UserError
from mmdit.metrics.encoders import SUBSETS, with_encoders
from mmdit.metrics.validation import LEVELS, validation_loss
from mmdit.pipeline import Pipeline, to_latents
from mmdit.text.conditioning import EMPTY_PROMPTS, ENCODERS, NAMES

PROTOCOL = "encoders-1"
VERBATIM = ("checkpoint", "out", "prompts", "clip", *PARTS)


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, build the model, sample with every subset, write the results."""
    for key, least in (("validation_samples", 1), ("batch_size", 1)):
        whole_number(key, config[key], least)
    seed_number("seed", config.seed)
    subject = open_subject(config, text)
    prompts = read_prompts(subject, config, text)
    features, clip_facts = open_features(text, subject.pipe.device)
    if features is None and prompts.data is None:
        raise UserError("prompts=<file> needs clip=<CLIP>: accuracy is defined for shapes only")
    validation = latents_of(subject, config) if prompts.data is not None else None
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        **subject.facts,
        **clip_facts,
        "seed": config.seed,
        "samples": len(prompts.texts),
        "validation_samples": config.validation_samples if validation else 0,
        "steps": subject.pipe.steps if config.steps is None else config.steps,
        **sampling(subject.pipe, config),
        "rows": [],
    }
    usual = subject.pipe.text.empty_prompt
    for kept in SUBSETS:
        with subject.autocast():
            loss = measured_loss(with_encoders(subject.pipe, kept), validation, config)
        for empty in EMPTY_PROMPTS if kept == ENCODERS else (usual,):
            view = with_encoders(subject.pipe, kept, empty_prompt=empty)
            options = {"steps": report["steps"], "guidance": instantiate(config.guide)}
            with subject.autocast():
                samples = generate(view, prompts.texts, config, label=name_of(kept), **options)
            row = {"encoders": list(kept), "unconditional": empty}
            report["rows"].append({**row, **scores(prompts, samples.images, features), **loss})
    out = results_folder(text, subject.path, "encoders")
    write_results(out, "encoders", report, as_markdown(report))


@torch.no_grad()
def latents_of(subject: Subject, config: DictConfig) -> tuple[Tensor, list[str]]:
    """Latents and captions of validation images, at the image size of training."""
    pipe = subject.pipe
    source = subject.run
    data = shapes_for(source, config, "validation", image_size=pipe.image_size)
    latents, captions = [], []
    for start in range(0, config.validation_samples, config.batch_size):
        stop = min(start + config.batch_size, config.validation_samples)
        images, texts, _ = data.batch(range(start, stop))
        with subject.autocast():
            latents.append(to_latents(pipe.autoencoder, images))
        captions += texts
    return torch.cat(latents), captions


def measured_loss(
    pipe: Pipeline, validation: tuple[Tensor, list[str]] | None, config: DictConfig
) -> dict[str, Any]:
    """The validation loss and its levels; empty without latents."""
    if validation is None:
        return {}
    options = {"seed": config.seed, "batch_size": config.batch_size}
    levels = validation_loss(pipe, *validation, **options)
    by_level = {f"{t:g}": loss for t, loss in zip(LEVELS, levels, strict=True)}
    return {"loss": sum(levels[:-1]) / len(levels[:-1]), "levels": by_level}


def name_of(kept: tuple[str, ...]) -> str:
    """The usual names of encoders: `CLIP-L + T5`."""
    return " + ".join(NAMES[kind] for kind in kept) or "none"


def as_markdown(report: dict[str, Any]) -> str:
    """A table with a row for each subset."""
    figures = {"clip": "CLIP score", "accuracy": "accuracy", "loss": "validation loss"}
    shown = {key: name for key, name in figures.items() if key in report["rows"][0]}
    rows = [
        (name_of(tuple(row["encoders"])), row["unconditional"], *(row[key] for key in shown))
        for row in report["rows"]
    ]
    head = (
        f"{report['protocol']}: {report['weights']}, sha256 {report['weights_sha256'][:16]}, "
        f"{report['samples']} samples, {report['steps']} steps at guidance {report['guidance']:g}, "
        f"seed {report['seed']}\n"
    )
    return f"{head}\n{table(('encoders', 'unconditional', *shown.values()), rows)}"


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="encoders", verbatim=VERBATIM)
