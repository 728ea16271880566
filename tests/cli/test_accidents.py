"""Whatever befalls a run, it ends by saying what happened and goes on from its last checkpoint."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from mmdit.engine.loggers import read_metrics
from mmdit.processes import restart_remarks
from mmdit.runs.checkpoint import checkpoints_in
from mmdit.runs.folder import RunFolder
from tests.training_for_tests import (
    ALONE,
    ROOT,
    assert_same_run,
    losses,
    start,
    status,
    tensors,
    train,
    wait_for_step,
)

SCRIPT = Path("tests") / "cli" / "accident_process.py"
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an unbroken run of STEPS steps, `runs/whole`, and its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("work")
    train(folder, "run=runs/whole", f"training.steps={STEPS}", "training.keep_every=4")
    return folder


def assert_begins_alike(ours: Path, whole: Path) -> None:
    """Every loss that both have logged is the same; and `ours` goes on at least to the end."""
    mine, its = losses(ours), losses(whole)
    assert {step: mine[step] for step in its} == its
    assert sorted(mine) == list(range(1, len(mine) + 1))


def finish(folder: Path, name: str, *words: str) -> Path:
    """Let a run go on to its end; to step STEPS, unless it has gone further already."""
    path = folder / "runs" / name
    steps = max(STEPS, checkpoints_in(path)[-1].step + 2)
    train(folder, f"resume=runs/{name}", f"training.steps={steps}", *words)
    return path


# --- signals ---


@pytest.mark.slow
def test_each_signal_saves_marks_and_tells_how_to_go_on(folder: Path) -> None:
    stopped = folder / "runs" / "stopped"
    step = 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        process = start(folder, "run=runs/stopped", "resume=auto")
        wait_for_step(process, stopped, step + 3)
        process.send_signal(number)
        told, complained = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert step == 0 or f"going on with runs/stopped at step {step}" in told
        step = checkpoints_in(stopped)[-1].step
        assert status(stopped) == {
            "state": "PREEMPTED",
            "process": process.pid,
            "step": step,
            "signal": number.name,
        }
        assert f"stopped by {number.name} after step {step}; saved in" in complained
        assert complained.rstrip().endswith("resume=runs/stopped")
        assert "Traceback" not in complained
    finish(folder, "stopped")
    assert_begins_alike(stopped, folder / "runs" / "whole")
    assert status(stopped)["state"] == "FINISHED"


# --- several processes ---


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_goes_on_with_one(folder: Path) -> None:
    path = folder / "runs" / "two_to_one"
    process = start(folder, "run=runs/two_to_one", "parallel=ddp", processes=2)
    wait_for_step(process, path, 3)
    process.terminate()  # torchrun, which passes it on
    _, told = process.communicate(timeout=60)
    step = checkpoints_in(path)[-1].step
    assert status(path)["state"] == "PREEMPTED" and status(path)["step"] == step
    assert told.count("stopped by SIGTERM") == 1
    assert "torchrun --nproc_per_node=2 train.py" in told
    finish(folder, "two_to_one")
    ours, whole = losses(path), losses(folder / "runs" / "whole")
    assert [ours[step] for step in whole] == pytest.approx(list(whole.values()), rel=1e-5)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(folder: Path) -> None:
    path = folder / "runs" / "one_to_two"
    shutil.copytree(folder / "runs" / "whole", path)
    for checkpoint in checkpoints_in(path):
        if checkpoint.step > 4:
            shutil.rmtree(checkpoint.folder)
    told = train(
        folder,
        *("resume=runs/one_to_two", f"training.steps={STEPS}", "parallel=fsdp"),
        processes=2,
    )
    lines = told.stdout.splitlines()
    assert lines.count("going on with runs/one_to_two at step 4") == 1
    assert sum("finished runs/one_to_two" in line for line in lines) == 1
    assert "Warning" not in told.stderr
    whole = losses(folder / "runs" / "whole")
    assert losses(path) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "processes", "message"),
    [
        (["parallel=ddp"], 0, "parallel=ddp is for processes that torchrun starts"),
        ([], 2, "parallel=single is for one process, and torchrun started 2"),
        (["parallel=ddp", "resume=runs/whole"], 2, "run folder runs/whole is in use by process"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(
    folder: Path, words: list[str], processes: int, message: str
) -> None:
    held = RunFolder(folder / "runs" / "whole")
    told = train(folder, *words, code=1 if processes else 2, processes=processes).stderr
    held.close()
    assert [line.startswith(message) for line in told.splitlines()].count(True) == 1
    if processes:
        assert f"traceback : {message}" in told.partition("Root Cause")[2]
    else:
        assert told.count("\n") == 1


def small(
    path: Path,
    settings: Mapping[str, object],
    *words: str,
    processes: int = 0,
    restarts: int = 0,
) -> list[str]:
    """The command of a training that takes a hundredth of a second a step."""
    launcher = []
    if processes:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        launcher += [f"--max-restarts={restarts}"] if restarts else []
    return [sys.executable, *launcher, str(SCRIPT), str(path), json.dumps(settings), *words]


@pytest.mark.slow
def test_a_hung_process_ends_the_run_and_shows_where_it_hangs(tmp_path: Path) -> None:
    settings = {"steps": 10, "parallel": "ddp", "hang": 1, "timeout": 4}
    ended = subprocess.run(
        small(tmp_path / "run", settings, processes=2),
        cwd=ROOT,
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1
    assert "Timeout (0:00:04)!" in ended.stderr
    assert re.search(r'accident_process\.py", line \d+ in wait_for_nothing', ended.stderr)
    assert [checkpoint.step for checkpoint in checkpoints_in(tmp_path / "run")] == [3]


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "killed"
    process = subprocess.Popen(
        small(path, {"steps": 60, "parallel": "ddp", "pause": 0.05}, processes=2, restarts=1),
        cwd=ROOT,
        env={**ALONE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(process, path, 8)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    told, complained = process.communicate(timeout=200)
    assert process.returncode == 0, complained
    assert re.search(r"going on with .* at step \d+", told)
    train_small(tmp_path / "whole", steps=60)
    assert losses(path) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize(
    ("environment", "words", "expected"),
    [
        ({}, [], []),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, [], []),
        ({"TORCHELASTIC_MAX_RESTARTS": "1"}, [], ["_STORE=1", "add resume=auto"]),
        ({"TORCHELASTIC_MAX_RESTARTS": "1"}, ["resume=auto"], ["_STORE=1"]),
        (
            {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            ["model=toy", "resume=auto"],
            [],
        ),
    ],
)
def test_what_a_restart_needs_is_said(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    words: list[str],
    expected: list[str],
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    for name in ("TORCHELASTIC_MAX_RESTARTS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    remarks = restart_remarks(words)
    assert len(remarks) == len(expected)
    assert all(part in remark for part, remark in zip(expected, remarks, strict=True))


# --- disk and loader ---


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[None]:
    """A file system of a few MB at `path`; the test is skipped where none can be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(f"a file system of {megabytes} MB cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(folder: Path) -> None:
    disk = folder / "disk"
    size = sum(
        p.stat().st_size for p in checkpoints_in(folder / "runs/whole")[-1].folder.rglob("*")
    )
    with small_disk(disk, int(1.6 * size / 2**20)):
        told = train(folder, "run=disk/run", f"training.steps={STEPS}", code=2).stderr
        assert "the disk is full or its quota exceeded" in told
        assert told.count("\n") == 1
        assert [checkpoint.step for checkpoint in checkpoints_in(disk / "run")] == [2]
        assert not any((disk / "run").glob("checkpoints/*.tmp"))
        assert status(disk / "run")["state"] == "FAILED"
        more = ["mount", "-o", f"remount,size={int(4 * size / 2**20)}m", str(disk)]
        subprocess.run(more, check=True)
        train(folder, "resume=disk/run", f"training.steps={STEPS}")
        assert_same_run(disk / "run", folder / "runs" / "whole")


@pytest.mark.slow
def test_neither_loader_workers_nor_a_stop_of_them_all_change_the_losses(folder: Path) -> None:
    path = folder / "runs" / "workers"
    process = start(folder, "run=runs/workers", "training.workers=2")
    wait_for_step(process, path, 3)
    for child in children(process.pid):  # as a batch system does
        os.kill(child, signal.SIGTERM)
    process.terminate()
    process.communicate(timeout=60)
    assert status(path)["state"] == "PREEMPTED"
    finish(folder, "workers", "training.workers=2")
    assert_begins_alike(path, folder / "runs" / "whole")


def children(process: int) -> list[int]:
    """The processes that a process has started, and that live."""
    found: list[str] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += (task / "children").read_text().split()
    return [int(child) for child in found if lives(child)]


def lives(process: str) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return "Z (zombie)" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


# --- kill -9, at length: pytest -m slow ---


def last_logged(path: Path) -> int:
    """The last step that `metrics.jsonl` holds a whole line of."""
    return int(max((row["step"] for row in read_metrics(path / "metrics.jsonl")), default=0))


def measured(path: Path) -> list[dict[str, float]]:
    """Every row of `metrics.jsonl`, without what depends on the machine."""
    clocks = ("images_per_second", "data_wait", "memory_gb")
    rows = read_metrics(path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]


def assert_bit_equal(ours: Path, whole: Path) -> None:
    assert measured(ours) == measured(whole)
    for name in ("raw", "ema", "optimizer"):
        mine, its = tensors(ours, name), tensors(whole, name)
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in its), name


def train_small(path: Path, **settings: object) -> None:
    subprocess.run(small(path, settings), cwd=ROOT, env=ALONE, check=True, capture_output=True)


@pytest.mark.slow
def test_50_kills_at_any_moment(tmp_path: Path) -> None:
    kills, interval, draw = 50, 3, random.Random(0)
    path = tmp_path / "killed"
    parent = subprocess.Popen(
        small(path, {"steps": 10**6}, "again"),
        cwd=ROOT,
        env=ALONE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    lost: list[int] = []
    reached, leftovers, resumed = 0, 0, 0
    try:
        for _ in range(kills):
            while not (line := parent.stdout.readline()).startswith("child "):
                pass
            child = int(line.split()[1])
            time.sleep(draw.uniform(0.0, 0.6))
            os.kill(child, signal.SIGKILL)
            while (line := parent.stdout.readline()) != "ended\n":
                if found := re.search(r"going on with .* at step (\d+)", line):
                    lost.append(reached - int(found[1]))
                    resumed += 1
            reached = last_logged(path)
            leftovers += any(path.glob("checkpoints/*.tmp"))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
    steps = last_logged(path) + 10
    train_small(path, steps=steps)
    train_small(tmp_path / "whole", steps=steps)
    print(
        f"{kills} kills, {leftovers} of them during a save, {resumed} resumes from a checkpoint, "
        f"at most {max(lost)} steps lost, {steps} steps"
    )
    assert resumed > kills / 2 and leftovers > 0
    assert min(lost) >= 0 and max(lost) <= interval
    assert_bit_equal(path, tmp_path / "whole")


@pytest.mark.slow
def test_kills_of_train_py(tmp_path: Path) -> None:
    draw, lost = random.Random(1), []
    path = tmp_path / "runs" / "killed"
    words = ("run=runs/killed", "resume=auto", "training.save_every=3")
    reached = 0
    for i in range(8):
        process = start(tmp_path, *words)
        if i % 2:  # at any moment of the start, and of training
            wait_for_step(process, path, reached + 1)
        time.sleep(draw.uniform(0.0, 3.0))
        process.kill()
        told, _ = process.communicate()
        if found := re.search(r"going on with runs/killed at step (\d+)", told):
            lost.append(reached - int(found[1]))
        reached = last_logged(path)
    steps = reached + 6
    for name in ("killed", "whole"):
        train(tmp_path, f"run=runs/{name}", "resume=auto", f"training.steps={steps}")
    print(f"8 kills, {len(lost)} resumes from a checkpoint, {lost} steps lost, {steps} steps")
    assert len(lost) >= 3 and max(lost) <= 3
    assert_same_run(path, tmp_path / "runs" / "whole")


@pytest.mark.slow
def test_kills_of_one_of_two_processes(tmp_path: Path) -> None:
    draw, lost, seconds = random.Random(2), [], []
    path = tmp_path / "killed"
    reached = 0
    for i in range(10):
        settings = {"steps": 10**6, "parallel": ("ddp", "fsdp")[i % 2]}
        process = subprocess.Popen(
            small(path, settings, processes=2),
            cwd=ROOT,
            env=ALONE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_step(process, path, reached + 1)
        time.sleep(draw.uniform(0.0, 1.0))
        ranks = children(process.pid)
        os.kill(draw.choice(ranks), signal.SIGKILL)
        killed = time.monotonic()
        told, _ = process.communicate(timeout=100)
        seconds.append(time.monotonic() - killed)
        assert process.returncode == 1
        assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
        found = re.search(r"going on with .* at step (\d+)", told)
        assert (found is None) == (i == 0)
        if found is not None:
            lost.append(reached - int(found[1]))
        reached = last_logged(path)
    steps = reached + 6
    train_small(path, steps=steps)
    train_small(tmp_path / "whole", steps=steps)
    print(
        f"10 kills, {lost} steps lost, {steps} steps, torchrun ended after at most "
        f"{max(seconds):.1f} s"
    )
    assert min(lost) >= 0 and max(lost) <= 3
    ours, whole = losses(path), losses(tmp_path / "whole")
    assert ours == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_kills_of_loader_workers(tmp_path: Path) -> None:
    draw, kills = random.Random(3), 20
    settings = {"steps": 200, "workers": 2, "pause": 0.03}
    path = tmp_path / "killed"
    process = subprocess.Popen(
        small(path, settings), cwd=ROOT, env=ALONE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(kills):
        wait_for_step(process, path, last_logged(path) + 1)
        time.sleep(draw.uniform(0.0, 0.3))
        while not (workers := children(process.pid)):  # new ones are being started
            assert process.poll() is None
        os.kill(draw.choice(workers), signal.SIGKILL)
    assert process.poll() is None
    reached = last_logged(path)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    train_small(tmp_path / "whole", steps=200)
    print(f"{kills} kills within {reached} steps")
    assert_bit_equal(path, tmp_path / "whole")
