"""Checkpoints written by several processes together, and read by any number."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmdit.processes import Processes

SCRIPT = Path(__file__).with_name("saving_process.py")
Reports = list[dict[str, Any]]


def start(processes: int, *words: str) -> list[Reports]:
    """Start several processes; returns the reports of each on each `<what>=<run folder>`."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *torchrun, str(SCRIPT), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]


def alone(what: str, run: Path) -> dict[str, Any]:
    """The report of this process."""
    spec = importlib.util.spec_from_file_location("saving_process", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    report: dict[str, Any] = script.act(what, run, Processes())
    return report


@pytest.mark.slow
def test_a_checkpoint_is_loaded_by_another_number_of_processes(tmp_path: Path) -> None:
    assert alone("save", tmp_path / "one") == {"dtensor": False, "step": 5}
    two, plain, loaded, failed = start(
        2,
        f"save={tmp_path / 'two'}",
        f"save_plain={tmp_path / 'plain'}",
        f"load={tmp_path / 'one'}",
        f"fail={tmp_path / 'full'}",
    )
    assert two == [{"dtensor": True, "step": 5}] * 2
    assert plain == [{"dtensor": False, "step": 5}] * 2
    for report in (*loaded, alone("load", tmp_path / "two"), alone("load", tmp_path / "plain")):
        assert report["equal"]
        facts = report["facts"]
        assert (facts["first.weight:exp_avg"], facts["step"]) == ([7, 5], [])
    # One process could not write: neither hung, and no checkpoint was committed.
    assert all("disk is full" in report["error"] for report in failed)
    assert [report["latest"] for report in failed] == [4, 4]
    assert failed[0]["there"] == ["step_00000004"]


@pytest.mark.slow
def test_replicated_shards_are_written_once_and_read_by_three(tmp_path: Path) -> None:
    start(4, f"save_replicas={tmp_path}")
    assert [report["equal"] for report in start(3, f"load={tmp_path}")[0]] == [True] * 3
    assert alone("load", tmp_path)["equal"]
