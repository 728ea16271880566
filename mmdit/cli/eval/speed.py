"""Speed of our models compared with diffusers and transformers on the same weights.

Protocol `speed-1`: in each case both sides get the same weights and inputs and alternate, eager
(the code as it is) and compiled (ours by `model.compile()`, theirs block by block); times are
medians over the repeats. A training step is forward, squared error, backward and AdamW (theirs with
torch's defaults), with bf16 autocast and fp32 weights; everything else computes in `dtype`. Before
timing, the outputs are compared. Memory is the peak increase during the first eager call.
"""

import ctypes
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mmdit.checkpoints.folders import write_model
from mmdit.checks import one_of, seed_number, whole_number
from mmdit.cli.eval.results import write_new
from mmdit.cli.launch import Verbatim, launch
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.parity.cases import (
    CASES,
    D24,
    Call,
    Case,
    compiled,
    our_call,
    random_inputs,
    random_model,
    their_call,
    twin,
)
from mmdit.parity.load_time import measure_loading, timed
from mmdit.printable import logger, show

log = logger("mmdit.speed")
PROTOCOL = "speed-1"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 0.1, "fp32": 1e-3}  # largest difference over largest value
MODES = ("eager", "compiled")
LOAD = "load"  # a special case, measured by `mmdit.parity.load_time`


class Row(NamedTuple):
    """Measurements of a case: ms by mode, FLOPs of its matrix products, peak bytes."""

    case: str
    ours: dict[str, float]
    theirs: dict[str, float]
    flops: int
    our_memory: int | None  # None where not available
    their_memory: int | None


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, measure all cases, write the results."""
    check(config)
    device = available(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ceiling = product_ceiling(device, DTYPES[config.dtype])
    rows: list[Row] = []
    loads: list[dict[str, Any]] = []
    for name in config.cases:
        if name == LOAD:
            loads = measure_load(config.repeats)
        else:
            rows.append(measure(name, CASES[name], config, device))
    report = {
        "protocol": PROTOCOL,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "ceiling": ceiling,
        **{key: config[key] for key in ("dtype", "repeats", "seed")},
        "rows": [row._asdict() for row in rows],
        "loading": loads,
    }
    out = Path(text.get("out") or "results/speed")
    out.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(report, rows)
    text_of = {".json": json.dumps(report, indent=1).encode(), ".md": markdown.encode()}
    show(*markdown.split("\n"), *write_new(out, "speed", text_of))


def check(config: DictConfig) -> None:
    """Raise UserError for an invalid config, before anything is built."""
    for peer in ("diffusers", "transformers"):
        if importlib.util.find_spec(peer) is None:
            raise UserError(f"{peer} is not installed: pip install -e '.[test]'")
    for key, known in (("cases", (*CASES, LOAD)), ("modes", MODES)):
        asked = [config[key]] if isinstance(config[key], str) else list(config[key] or [])
        if not asked or not set(asked) <= set(known) or isinstance(config[key], str):
            raise UserError(f"{key}={config[key]} must be a list of some of {', '.join(known)}")
    one_of("dtype", config.dtype, DTYPES)
    whole_number("repeats", config.repeats)
    if config.threads is not None:
        whole_number("threads", config.threads)
    seed_number("seed", config.seed)


# Measuring


def measure(name: str, case: Case, config: DictConfig, device: torch.device) -> Row:
    """Measure a case in all modes, both sides alternating."""
    train = case.use == "train"
    dtype = torch.float32 if train else DTYPES[config.dtype]
    torch.manual_seed(config.seed)
    torch.compiler.reset()
    our_model = random_model(case.model, dtype)
    their_model = twin(case.kind, our_model).to(device)
    our_model.to(device)
    drawn = random_inputs(case, dtype, generator_for(config.seed, "inputs", name))
    x = {key: value.to(device) for key, value in drawn.items()}
    forward = case._replace(use="forward") if train else case
    with torch.no_grad():
        flops = operations(our_call(forward, our_model, x)) * (3 if train else 1)
    calls: dict[tuple[str, str], Call] = {}
    for mode in config.modes:
        models: tuple[nn.Module, nn.Module] = (our_model, their_model)
        if mode == "compiled":
            models = (
                compiled(case.kind, our_model, ours=True),
                compiled(case.kind, their_model, ours=False),
            )
        calls[mode, "ours"] = our_call(case, models[0], x)
        calls[mode, "theirs"] = their_call(case, models[1], x)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with torch.set_grad_enabled(train):
        compare(name, our_call(forward, our_model, x), their_call(forward, their_model, x), config)
        peak = {side: peak_memory(calls[config.modes[0], side], device) for side in SIDES}
        for call in calls.values():
            call()  # compiles, and warms the caches
        for _ in tqdm(range(config.repeats), desc=name, unit="turn", disable=None):
            for key, call in calls.items():
                seconds[key].append(seconds_of(call, device))
    times = {key: 1000 * statistics.median(found) for key, found in seconds.items()}
    ours, theirs = ({mode: times[mode, side] for mode in config.modes} for side in SIDES)
    return Row(name, ours, theirs, flops, peak["ours"], peak["theirs"])


SIDES = ("ours", "theirs")


@torch.no_grad()
def compare(name: str, ours: Call, theirs: Call, config: DictConfig) -> None:
    """Raise RuntimeError if the two sides' outputs differ, as times would not be comparable."""
    a, b = ours().float(), theirs().float()
    difference = ((a - b).abs().max() / b.abs().max()).item()
    if not difference <= TOLERANCE[config.dtype]:  # also for NaN
        raise RuntimeError(f"{name}: outputs differ by {difference:.1e} of the largest value")


def operations(call: Call) -> int:
    """FLOPs of the matrix products in a call, without fused attention, which is not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def seconds_of(call: Call, device: torch.device) -> float:
    """Wall-clock time of a call, including all work that it starts on the device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Peak increase of memory during a first call, in bytes; None where not available."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # otherwise, reuse of freed memory would not be noticed
        trim(0)
    return timed(call).anonymous


def product_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n).to(device, dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(10))


def measure_load(rounds: int) -> list[dict[str, Any]]:
    """Measure loading the 2B transformer in bf16, 4.2 GB, from a file just written."""
    with tempfile.TemporaryDirectory(prefix="mmdit-speed-") as scratch:
        folder = Path(scratch) / "source"
        write_model(random_model(D24, torch.bfloat16), folder)
        return measure_loading(folder, Path(scratch), rounds=rounds)


# Reporting


def as_markdown(report: Mapping[str, Any], rows: list[Row]) -> str:
    """A table of times, ratios and memory by case; a ratio above 1 is in our favour."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"{report['protocol']}: {report['device']}, {report['threads']} threads, {versions}",
        f"{report['dtype']}, median of {report['repeats']} turns, ms; product ceiling "
        f"{report['ceiling'] / 1e12:.2f} TFLOP/s",
        "",
    ]
    modes = [mode for mode in MODES if rows and mode in rows[0].ours]
    if rows:
        heads = [f"{mode}: ours | theirs | ratio" for mode in modes]
        heads += ["best against their eager", "share of ceiling", "GB ours | GB theirs"]
        lines += [f"| case | {' | '.join(heads)} |", "|---" * (3 * len(modes) + 5) + "|"]
    for row in rows:
        cells = [
            f"{row.ours[mode]:.1f} | {row.theirs[mode]:.1f} | "
            f"{row.theirs[mode] / row.ours[mode]:.2f}"
            for mode in modes
        ]
        best = min(row.ours.values())
        eager = row.theirs.get("eager")
        cells.append("" if eager is None else f"{eager / best:.2f}")
        cells.append(f"{row.flops / best * 1000 / report['ceiling']:.0%}")
        for memory in (row.our_memory, row.their_memory):
            cells.append("" if memory is None else f"{memory / 1e9:.2f}")
        lines.append(f"| {row.case} | {' | '.join(cells)} |")
    if report["loading"]:
        first = report["loading"][0]
        what = f"loading {first['bytes'] / 1e9:.2f} GB of {first['dtype']}, best"
        lines += ["", f"| {what} | seconds | GB anonymous |", "|---|---|---|"]
        for load in report["loading"]:
            extra = "" if load["anonymous"] is None else f"{load['anonymous'] / 1e9:.2f}"
            lines.append(f"| {load['what']} | {load['seconds']:.2f} | {extra} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="speed", verbatim=("out",))
