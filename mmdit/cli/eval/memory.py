"""How much memory does training take in each process?

Protocol `memory-1`: bytes of tensors at the peak of a training step, by what they hold. The step is
rehearsed on tensors without values (`mmdit/engine/footprint.py`), for as many processes as asked;
weights, moments and averages are constant, gradients and activations are what they are when all
together is greatest. What the allocator adds, the CUDA context (about half a GB) and the libraries'
own workspaces come on top.

`measure=true` makes real steps with the same config and asks the allocator: of CUDA, or of the CPU
by what the profiler saw of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mmdit.cli.build import build_pipeline, count
from mmdit.cli.eval.subject import made, table, write_results
from mmdit.cli.formulations import store_formulations
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.memory.gauges import measure
from mmdit.cli.memory.plan import Plan, planned
from mmdit.cli.memory.prediction import CLASSES, Footprint, predict
from mmdit.engine.footprint import (
    CAST,
    GRADIENTS,
    KEPT,
)
from mmdit.processes import Processes, join, leave

PROTOCOL = "memory-1"
VERBATIM = ("out",)


def job(config: DictConfig, text: Verbatim) -> None:
    """Compose, check, predict, measure, report."""
    processes = Processes()
    try:
        plan = planned(config)
        if config.measure:
            processes = join(plan.device, 600.0)
        predicted = predict(plan)
        measured = measure(plan, processes) if config.measure else None
    finally:
        leave()
    if not processes.main:
        return
    report = as_report(plan, predicted, measured)
    out = made(Path(text.get("out") or "results/memory"))
    write_results(out, "memory", report, as_markdown(report))


def as_report(
    plan: Plan, predicted: Footprint, measured: Mapping[str, int] | None
) -> dict[str, Any]:
    """Bytes, and what they are of."""
    config = plan.config
    choices = HydraConfig.get().runtime.choices
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        "torch": torch.__version__,
        **{name: choices[name] for name in ("model", "optimizer", "parallel")},
        "parameters": {},
        "world_size": plan.world_size,
        "replicas": config.parallel.get("replicas"),
        "batch": plan.batch,
        **{name: config[name] for name in ("image_size", "activation_checkpointing")},
        "accumulation": config.training.accumulation,
        "encoders": list(config.encoders or ()),
        "device": plan.device.type,
        "precision": {torch.bfloat16: "bf16", torch.float32: "fp32"}[plan.dtype],
        "peak": predicted.peak,
        "largest": predicted.largest,
        "kept_by_forward": predicted.kept,
        "kept_by_backward": predicted.gradients,
        "total": predicted.total,
    }
    with torch.device("meta"):
        pipeline = build_pipeline(config)
    report["text_length"] = pipeline.text.context_length
    report["parameters"] = {name: count(part) for name, part in pipeline.named_children()}
    if measured is not None:
        whole = {
            **{name: predicted.largest[name] for name in CLASSES if name != CAST},
            KEPT: predicted.kept,
            GRADIENTS: predicted.gradients,
            "total": predicted.total,
        }
        report["measured"] = {
            name: {
                "predicted": size,
                "measured": measured[name],
                "deviation": (size - measured[name]) / max(measured[name], 1),
            }
            for name, size in whole.items()
        }
    return report


def as_markdown(report: Mapping[str, Any]) -> str:
    """GB of one process, by class."""
    network = report["parameters"]["mmdit"]
    lines = [
        f"{report['protocol']}: {report['model']}, {network:,} parameters, {report['optimizer']}, "
        f"{report['parallel']} over {report['world_size']}, on {report['device']} in "
        f"{report['precision']}",
        f"each process: {report['batch']} samples of {report['image_size']} x "
        f"{report['image_size']} pixels and {report['text_length']} tokens, "
        f"activation_checkpointing={report['activation_checkpointing']}",
        "",
    ]
    rows: list[tuple[object, ...]] = [
        (name, report["peak"][name] / 1e9, report["largest"][name] / 1e9) for name in CLASSES
    ]
    rows.append(("**all**", report["total"] / 1e9, ""))
    told = "\n".join(lines) + "\n" + table(("GB of a process", "at the peak", "at most"), rows)
    if "measured" not in report:
        return told
    names = {
        KEPT: "kept by the forward pass",
        GRADIENTS: "gradients, complete",
        "total": "**all, at the peak**",
    }
    compared = [
        (
            names.get(name, name),
            row["predicted"] / 1e9,
            row["measured"] / 1e9,
            f"{100 * row['deviation']:+.1f} %",
        )
        for name, row in report["measured"].items()
    ]
    header = ("GB of a process", "predicted", "measured", "deviation")
    return told + "\n" + table(header, compared)


def main() -> None:
    """Evaluate as the command line asks."""
    store_formulations()
    launch(job, config_name="memory", verbatim=VERBATIM)
