"""Scores of a trained model by the paper's protocol, in `scores.json` of its run folder."""

import json
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from mmdit.atomic import write_atomically
from mmdit.cli.build import count
from mmdit.data.shapes import Shapes
from mmdit.errors import first_line
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast
from mmdit.printable import logger
from mmdit.runs.checkpoint import Checkpoint
from mmdit.runs.folder import RunFolder
from mmdit.study.protocol import PROTOCOL
from mmdit.text.clip_pair import CLIPPair

log = logger("mmdit.stages")


def is_finished(config: DictConfig, run: RunFolder) -> bool:
    """Whether a run has completed all steps and has the scores that `config` requests."""
    checkpoint = run.latest()
    if checkpoint is None or checkpoint.step < config.training.steps:
        return False
    if config.get("metrics") is None:  # the key is missing if the group is left out
        return True
    try:
        record = json.loads((run.path / "scores.json").read_text())
        measured = {key: record[key] for key in ("protocol", *protocol_of(config.metrics))}
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "%s cannot be used, so the run is scored again: %s",
            *(run.path / "scores.json", first_line(error)),
        )
        return False
    return measured == {"protocol": PROTOCOL, **protocol_of(config.metrics)}


def protocol_of(metrics: DictConfig) -> dict[str, int]:
    """The settings on which scores depend, with their names in `scores.json`."""
    return {
        "samples": metrics.samples,
        "references": metrics.references,
        "noise_seed": metrics.seed,
    }


def write_scores(
    config: DictConfig,
    run: Path,
    checkpoint: Checkpoint,
    pipelines: dict[str, Pipeline],
    clip: CLIPPair,
    data: Shapes,
    variant: str,
    precision: Autocast,
) -> None:
    """Score the averaged and the raw weights by the paper's protocol, and write `scores.json`.

    Args:
        config: config of the run.
        run: the run folder.
        checkpoint: the checkpoint that is scored.
        pipelines: pipelines with its weights, 'ema' and 'raw'.
        clip: the CLIP that computes metrics.
        data: the split from which scenes and real images are taken.
        variant: the run's name in a ranking.
        precision: context that sets the pipelines' precision.
    """
    protocol = instantiate(config.metrics)
    rows: list[dict[str, Any]] = []
    bar = tqdm(total=2 * protocol.evaluations, desc="scoring", unit="step", disable=None)
    for kind, pipe in pipelines.items():
        scored = protocol(pipe, clip, data, lambda *_: bar.update(), precision)
        rows += [{"weights": kind, **row} for row in scored]
    bar.close()
    network = pipelines["ema"].mmdit
    side = config.image_size // pipelines["ema"].autoencoder.factor
    length = pipelines["ema"].text.context_length
    flops = network.flops(height=side, width=side, text_length=length)
    steps, batch_size = checkpoint.step, config.training.batch_size
    record = {
        "protocol": PROTOCOL,
        "variant": variant,
        "seed": config.seed,
        "dataset": config.data._target_.rpartition(".")[2].lower(),
        **protocol_of(config.metrics),
        "weights_sha256": {kind: checkpoint.weights_sha256(kind) for kind in pipelines},
        "training": {
            "steps": steps,
            "skipped_steps": int(checkpoint.metrics.get("skipped_steps", 0)),
            "batch_size": batch_size,
            "parameters": count(network),
            # A backward pass costs two forward passes.
            "flops": 3.0 * flops * steps * batch_size,
        },
        "validation": {kind: levels(checkpoint.metrics, kind) for kind in pipelines},
        "scores": rows,
    }
    write_atomically(run / "scores.json", json.dumps(record, indent=1).encode())
    best = max((row for row in rows if row["weights"] == "ema"), key=lambda row: row["clip"])
    log.info(
        "  scores      %s (EMA, %d steps at guidance %g: CLIP %.4f, FD %.4f, accuracy %.3f)",
        *(run / "scores.json", best["steps"], best["guidance"]),
        *(best["clip"], best["fd"], best["accuracy"]),
    )


def levels(metrics: dict[str, float], kind: str) -> dict[str, Any]:
    """The validation loss of the weights `kind`, 'ema' or 'raw', and its parts by level of t."""
    prefix = f"{kind}/loss_t"
    by_level = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    return {"loss": metrics[f"{kind}/loss"], "levels": by_level}
