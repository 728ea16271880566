"""Starting `train.py` and other scripts as a user does, and comparing the runs that come of it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import torch

from mmdit.engine.loggers import read_metrics
from mmdit.runs.checkpoint import checkpoints_in
from tests import ready_process
from tests.ready_process import Ready

Process = subprocess.Popen[str] | Ready
ROOT = Path(__file__).resolve().parents[1]
SMOKE = (
    *("experiment=smoke", "precision=fp32", "training.save_every=2"),
    *("model.depth=2", "model.width=48"),
)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it: the same sums everywhere


def command(script: str, *words: str, processes: int = 0) -> list[str]:
    """A command line; 0 processes is one without torchrun."""
    start = [sys.executable]
    if processes:
        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *meeting]
    return [*start, str(ROOT / script), *words]


def run(
    folder: Path, script: str, *words: str, code: int = 0, processes: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` to its end, which must be as `code` says."""
    line = command(script, *words, processes=processes)
    if processes:
        result = subprocess.run(
            line, cwd=folder, env=ALONE, capture_output=True, text=True, timeout=300
        )
    else:
        result = ready_process.run(line[1:], cwd=folder, env=ALONE)
    assert result.returncode == code, result.stdout + result.stderr
    assert code == 1 or "Traceback" not in result.stderr
    return result


def train(
    folder: Path, *words: str, code: int = 0, processes: int = 0
) -> subprocess.CompletedProcess[str]:
    """The smallest training, to its end."""
    return run(folder, "train.py", *SMOKE, *words, code=code, processes=processes)


def start(folder: Path, *words: str, processes: int = 0) -> Process:
    """The smallest training, without an end."""
    line = command("train.py", *SMOKE, "training.steps=100000", *words, processes=processes)
    if not processes:
        return Ready(line[1:], cwd=folder, env=ALONE)
    return subprocess.Popen(line, cwd=folder, env=ALONE, stdout=PIPE, stderr=PIPE, text=True)


def wait_for_step(process: Process, run_folder: Path, step: int) -> None:
    """Return when a step has been logged."""
    deadline = time.monotonic() + 120
    while max(losses(run_folder), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def losses(run_folder: Path) -> dict[float, float]:
    """step -> training loss."""
    rows = read_metrics(run_folder / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def tensors(run_folder: Path, name: str = "raw") -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    return checkpoints_in(run_folder)[-1].read(name).tensors


def assert_same_run(resumed: Path, unbroken: Path) -> None:
    """Every logged loss and every bit of the newest checkpoints are equal."""
    assert losses(resumed) == losses(unbroken)
    for name in ("raw", "ema", "optimizer"):
        ours, theirs = tensors(resumed, name), tensors(unbroken, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def status(run_folder: Path) -> dict[str, object]:
    """What `status.json` says."""
    return json.loads((run_folder / "status.json").read_text())
