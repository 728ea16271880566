"""Memory that training takes in each process.

Protocol `memory-1`: bytes of tensors at the peak of a training step, by purpose. The step is run on
tensors without values (`mmdit/engine/footprint.py`), for any number of processes; weights, moments
and averages are constant, gradients and activations are counted when the total is at its peak. Not
included are the allocator's overhead, the CUDA context (about half a GB) and workspaces of
libraries.

`measure=true` also makes real steps with the same config, and reads the statistics of the CUDA
allocator, or of the CPU's allocator by means of the profiler.
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
GPUS = (8, 12, 16, 24, 32, 40, 48, 80)  # GiB
CONTEXT = 0.5e9  # bytes of CUDA and its libraries
VERBATIM = ("out",)


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, predict, measure if requested, write the results."""
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
    """The report: the setting, and bytes by class."""
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
    report["trained"] = sum(w.numel() for w in pipeline.parameters() if w.requires_grad)
    report["fits"] = [size for size in GPUS if predicted.total + CONTEXT <= size * 2**30]
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
    """Tables of the GB of one process, by class."""
    network, trained = report["parameters"]["mmdit"], report["trained"]
    lines = [
        f"{report['protocol']}: {report['model']}, {network:,} parameters, {trained:,} "
        f"trained, {report['optimizer']}, "
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
    predicted = "\n".join(lines) + "\n" + table(("GB of a process", "at the peak", "at most"), rows)
    if report["device"] == "cuda":
        sizes = ", ".join(map(str, report["fits"])) or "none of those up to 80"
        predicted += f"\nfits a GPU of {sizes} GB, with 0.5 GB for CUDA itself\n"
    if "measured" not in report:
        return predicted
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
    return predicted + "\n" + table(header, compared)


def main() -> None:
    """Run the evaluation according to the command line."""
    store_formulations()
    launch(job, config_name="memory", verbatim=VERBATIM)
