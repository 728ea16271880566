"""However many processes train, and however they share the work, the losses are the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit.data.order import ShuffledOrder
from mmdit.engine.loggers import read_metrics
from mmdit.engine.posthoc import snapshots_in

pytestmark = pytest.mark.slow  # seventeen runs
SCRIPT = Path(__file__).with_name("parallel_process.py")
ROOT = Path(__file__).resolve().parents[2]

# A sample that step 5 sees; in the second process's share of it.
POISONED = ShuffledOrder(size=20, seed=0)(5 * 8 + 6, 1)[0]

# The same 20 steps of 8 samples in many ways, and runs that go on with another number of processes.
PLANS: dict[int, list[dict[str, Any]]] = {
    1: [
        {"name": "single", "parallel": "single"},
        {"name": "workers", "parallel": "single", "workers": 2},
        {"name": "full", "parallel": "single", "activations": "full"},
        {"name": "selective", "parallel": "single", "activations": "selective"},
        {"name": "muon", "parallel": "single", "optimizer": "muon"},
        {"name": "one", "folder": "one_to_two", "parallel": "single", "steps": 10},
    ],
    2: [
        {"name": "ddp", "parallel": "ddp"},
        {"name": "ddp_parts", "parallel": "ddp", "accumulation": 2, "workers": 2},
        {"name": "fsdp", "parallel": "fsdp"},
        {"name": "fsdp_parts", "parallel": "fsdp", "accumulation": 4},
        {"name": "fsdp_full", "parallel": "fsdp", "activations": "full"},
        {"name": "fsdp_muon", "parallel": "fsdp", "optimizer": "muon"},
        {"name": "two", "folder": "one_to_two", "parallel": "fsdp"},
        {"name": "first", "folder": "two_to_one", "parallel": "fsdp", "steps": 10},
        {"name": "poisoned_ddp", "parallel": "ddp", "poison": [5, POISONED], "save_every": 2},
        {"name": "poisoned_fsdp", "parallel": "fsdp", "poison": [5, POISONED], "save_every": 2},
    ],
    4: [
        {"name": "ddp4", "parallel": "ddp", "workers": 2},
        {"name": "hsdp4", "parallel": "hsdp", "accumulation": 2},
    ],
}
LATER = [{"name": "last", "folder": "two_to_one", "parallel": "single"}]


def start(folder: Path, count: int, plan: list[dict[str, Any]]) -> None:
    """Carry out a plan in `count` processes."""
    (folder / f"plan_{count}.json").write_text(json.dumps(plan))
    command = [sys.executable, str(SCRIPT), str(folder)]
    if count > 1:
        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", *meeting]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all plans have been carried out."""
    folder = tmp_path_factory.mktemp("parallel")
    for count, plan in PLANS.items():
        start(folder, count, plan)
    start(folder, 1, LATER)
    return folder


def losses(folder: Path, name: str) -> list[float]:
    rows = read_metrics(folder / name / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def reports(folder: Path, run: str, name: str) -> list[dict[str, Any]]:
    """What each process tells."""
    found = sorted((folder / run).glob(f"{name}_[0-9].json"))
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.parametrize(
    "name",
    [
        *("workers", "full", "selective", "ddp", "ddp_parts", "fsdp", "fsdp_parts", "fsdp_full"),
        *("ddp4", "hsdp4"),
    ],
)
def test_losses_are_those_of_one_process(folder: Path, name: str) -> None:
    found = losses(folder, name)
    assert len(found) == 20
    assert found == pytest.approx(losses(folder, "single"), rel=1e-5)
    assert found[-1] < 0.9 * found[0]


def test_averages_are_those_of_one_process(folder: Path) -> None:
    def last(name: str) -> float:
        return read_metrics(folder / name / "metrics.jsonl")[-1]["ema/loss"]

    for name in ("ddp", "fsdp", "hsdp4"):
        assert last(name) == pytest.approx(last("single"), rel=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp4", "one_to_two", "two_to_one"])
def test_snapshots_for_other_averages_are_those_of_one_process(folder: Path, name: str) -> None:
    for mine, its in zip(snapshots_in(folder / name), snapshots_in(folder / "single"), strict=True):
        torch.testing.assert_close(mine.tensors(), its.tensors(), rtol=1e-4, atol=1e-5)


def test_muon_sees_whole_matrices(folder: Path) -> None:
    assert losses(folder, "fsdp_muon") == pytest.approx(losses(folder, "muon"), rel=1e-4)


@pytest.mark.parametrize("name", ["one_to_two", "two_to_one"])
def test_a_run_goes_on_with_another_number_of_processes(folder: Path, name: str) -> None:
    assert losses(folder, name) == pytest.approx(losses(folder, "single"), rel=1e-5)


@pytest.mark.parametrize("name", ["workers", "ddp", "ddp_parts", "fsdp_parts", "ddp4", "hsdp4"])
def test_each_step_sees_the_same_samples(folder: Path, name: str) -> None:
    def seen(run: str) -> dict[int, list[int]]:
        by_step: dict[int, list[int]] = {}
        for report in reports(folder, run, run):
            for step, indices in report["seen"]:
                by_step.setdefault(step, []).extend(indices)
        return {step: sorted(indices) for step, indices in by_step.items()}

    assert seen(name) == seen("single")


@pytest.mark.parametrize("name", ["poisoned_ddp", "poisoned_fsdp"])
def test_a_loss_that_is_not_finite_in_one_process_stops_both_in_that_step(
    folder: Path, name: str
) -> None:
    told = [report["told"] for report in reports(folder, name, name)]
    steps = [max(step for step, _ in r["seen"]) for r in reports(folder, name, name)]
    assert len(told) == 2 and steps == [5, 5]
    assert told[0] == told[1]
    assert "step 5: the loss is" in told[0]
    assert f"not finite for samples [{POISONED}]" in told[0]
