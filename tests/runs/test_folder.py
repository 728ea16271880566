"""Run folders: locking, which run is resumed, and what may differ then."""

import errno
import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit.cli.commands import how_to_resume
from mmdit.errors import UserError
from mmdit.processes import Processes
from mmdit.runs.checkpoint import checkpoints_in, newest_finished, runs_in, step_folders
from mmdit.runs.folder import RunFolder, open_run
from mmdit.runs.retention import Retention
from mmdit.runs.saving import Saver

CONFIG: dict[str, Any] = {"seed": 0, "training": {"steps": 10}, "optimizer": {"lr": 0.1}}


def save(
    run: Path, step: int, config: Mapping[str, Any] = CONFIG, *, finished: bool = False
) -> None:
    with Saver(run, Processes(), keep=Retention(last=5), config=config) as saver:
        saver.save(
            step=step,
            finished=finished,
            tensors={"raw": {"w": torch.ones(1)}},
            descriptions={},
            metrics={},
        )


def opened(root: Path, **changes: Any) -> Path:
    arguments = {"name": "a", "run": None, "resume": "auto", "config": CONFIG, **changes}
    folder = open_run(root, **arguments)
    folder.close()
    return folder.path


def test_the_newest_run_with_steps_left_is_resumed(tmp_path: Path) -> None:
    for number, step in ((1, 4), (2, 6), (3, 10)):
        save(tmp_path / f"a-{number:03d}", step)
    assert opened(tmp_path).name == "a-002"
    assert opened(tmp_path, config={**CONFIG, "training": {"steps": 11}}).name == "a-003"
    with pytest.raises(UserError, match=r"resume=a-1: .* the runs in .* are .*a-002, .*a-003$"):
        opened(tmp_path, resume="a-1")


ODD_NAMES = ["a[1]", "x*", "what?", "sweep/a", "sweep/[b]/c*", "ümlaut", "with space", "a-001"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_run_of_any_name_is_resumed(tmp_path: Path, name: str) -> None:
    for other in ("a1", "xy", "whatx", "sweep/x", "a"):  # which a glob pattern would match
        save(tmp_path / f"{other}-009", 4)
    assert opened(tmp_path, name=name, resume=None) == tmp_path / f"{name}-001"
    save(tmp_path / f"{name}-001", 4)
    assert opened(tmp_path, name=name) == tmp_path / f"{name}-001"
    assert opened(tmp_path, name=name, resume=None) == tmp_path / f"{name}-002"
    assert {tmp_path / f"{name}-001", tmp_path / f"{name}-002"} <= {*runs_in(tmp_path)}


@pytest.mark.parametrize(
    "name",
    [
        *("", "/abs", "../../x", "a/../../x", ".", "..", "a//b", "a/", "./a", " a", "a\n", "a\0b"),
        *("x" * 300, "a/" + "ü" * 130, "a\x1b[31m"),
    ],
)
def test_invalid_names_are_rejected_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^name=") as refusal:
        opened(tmp_path, name=name, resume=None)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "sweep/a[1]", "sweep/deep/a"])
def test_the_newest_finished_run_is_found_in_subfolders(tmp_path: Path, name: str) -> None:
    for run in ("b-001", name):
        save(tmp_path / run, 10, finished=True)
        (tmp_path / run / "config.json").write_text("{}")
    save(tmp_path / "autoencoder-1", 10, finished=True)  # without a config
    assert newest_finished(tmp_path) == tmp_path / name
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        opened(tmp_path, resume="nowhere")


def schedule(steps: int, *, begun: int = 10, decay: int | None = 4, final: float = 0.0) -> Any:
    """A config that trains for the length of its schedule, unless `begun` changes it."""
    end = {"steps": steps, "final": final} | ({} if decay is None else {"decay_steps": decay})
    return {**CONFIG, "training": {"steps": max(steps, begun)}, "schedule": end}


def test_a_stable_run_can_be_lengthened_before_its_decay(tmp_path: Path) -> None:
    run = tmp_path / "a-001"
    save(run, 6, schedule(10))
    assert opened(tmp_path, config=schedule(20)) == run
    save(run, 10, schedule(10), finished=True)
    with pytest.raises(UserError, match=r"schedule.steps was 10, now 20") as refusal:
        opened(tmp_path, config=schedule(20))
    copying, removing = re.findall(r"(?:cp|rm) -r [^&,]+", str(refusal.value))
    for command in (copying, removing):
        subprocess.run(shlex.split(command), check=True)
    (copy,) = re.findall(r"resume=(\S+)", str(refusal.value).partition("rm -r")[2])
    assert opened(tmp_path, resume=copy, config=schedule(20)) == Path(copy)
    assert [c.step for c in checkpoints_in(Path(copy))] == [6]
    shutil.rmtree(step_folders(run)[0])
    with pytest.raises(UserError, match=r"none is kept \(training.keep_every"):
        opened(tmp_path, resume=str(run), config=schedule(20))


@pytest.mark.parametrize(
    ("final", "advice"),
    [(0.0, "train anew.*schedule=warmup_constant"), (0.1, "add schedule.steps=10 .* 0.1 x lr")],
)
def test_a_cosine_cannot_be_lengthened_and_the_message_says_what_can(
    tmp_path: Path, final: float, advice: str
) -> None:
    save(tmp_path / "a-001", 6, schedule(10, decay=None, final=final))
    with pytest.raises(UserError, match=rf"schedule.steps was 10, now 20.*{advice}"):
        opened(tmp_path, config=schedule(20, decay=None, final=final))
    save(tmp_path / "b-001", 6)
    with pytest.raises(UserError) as other:
        opened(tmp_path, name="b", config={**CONFIG, "seed": 1, "training": {"steps": 20}})
    assert "schedule" not in str(other.value)


def test_a_run_without_a_checkpoint_is_resumed_last(tmp_path: Path) -> None:
    save(tmp_path / "a-001", 4)
    killed_at_once = open_run(tmp_path, name="a", run=None, resume=None, config=CONFIG)
    killed_at_once.close()
    assert killed_at_once.path.name == "a-002"
    assert opened(tmp_path).name == "a-001"
    shutil.rmtree(tmp_path / "a-001")
    assert opened(tmp_path, config={**CONFIG, "seed": 1}).name == "a-003"
    assert opened(tmp_path).name == "a-002"


def test_repeating_a_command_after_the_end_starts_no_new_run(tmp_path: Path) -> None:
    save(tmp_path / "a-001", 10, finished=True)
    assert opened(tmp_path).name == "a-001"
    assert opened(tmp_path, config={**CONFIG, "seed": 1}).name == "a-002"


def test_a_changed_learning_rate_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "a-001", 4)
    with caplog.at_level(logging.INFO):
        opened(tmp_path, config={**CONFIG, "optimizer": {"lr": 0.01}})
    assert "a different value: optimizer.lr was 0.1, now 0.01" in caplog.text


def test_a_damaged_older_run_does_not_stop_a_newer_one(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path / f"a-{number:03d}", 4)
    (step_folders(tmp_path / "a-001")[0] / "manifest.json").write_text("")
    assert opened(tmp_path).name == "a-002"
    (step_folders(tmp_path / "a-002")[0] / "manifest.json").write_text("")
    with pytest.raises(UserError, match="a-002"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_run_is_resumed_without_its_config_file(tmp_path: Path, content: str | None) -> None:
    run = tmp_path / "a-001"
    save(run, 4)
    if content is not None:
        (run / "config.json").write_text(content)
    assert opened(tmp_path, resume=str(run)) == run
    assert json.loads((run / "config.json").read_text()) == CONFIG


def test_a_run_without_a_checkpoint_is_resumed_with_its_own_config_alone(tmp_path: Path) -> None:
    run = opened(tmp_path)
    other = {**CONFIG, "seed": 1}
    with pytest.raises(UserError, match=r"its config differs: seed was 0, now 1"):
        opened(tmp_path, config=other, resume=str(run))
    assert json.loads((run / "config.json").read_text()) == CONFIG
    assert opened(tmp_path, resume=str(run)) == run


def test_a_checkpoint_of_another_run_is_rejected(tmp_path: Path) -> None:
    run = tmp_path / "a-001"
    save(run, 4)
    save(run, 6, {**CONFIG, "seed": 1})
    with pytest.raises(UserError, match=r"its config differs: seed was 1, now 0"):
        opened(tmp_path, resume=str(run))


def test_a_job_of_a_sweep_waits_for_the_process_that_runs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(tmp_path / "a")
    other = open_run(tmp_path, name="a", run=run, resume="finish", config=CONFIG)
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(opened, tmp_path, run=run, resume="finish")
        deadline = time.monotonic() + 10
        while not caplog.messages:
            assert time.monotonic() < deadline and not waiting.done()
            time.sleep(0.01)
        assert caplog.messages == [f"waiting for process {os.getpid()}, which is using {run}"]
        assert not waiting.done()
        save(other.path, 10, finished=True)
        other.close()
        assert waiting.result(10) == other.path


def test_a_different_config_gives_the_command_of_the_run(tmp_path: Path) -> None:
    save(tmp_path / "a-001", 4)
    folder = RunFolder(tmp_path / "a-001")
    folder.keep_command("python train.py model=x resume=a-001")
    folder.close()
    with pytest.raises(UserError, match=r"Give its own command: python train.py model=x resume=a"):
        opened(tmp_path, config={**CONFIG, "seed": 1})


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run folder .*file/x cannot be written.*runs="):
        RunFolder(tmp_path / "file" / "x")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("wait", [False, True])
def test_a_file_system_without_locks_is_not_mistaken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, wait: bool
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=rf"cannot be locked .*{os.strerror(number)}.*runs="):
        RunFolder(tmp_path, wait=wait)


@pytest.fixture
def child() -> Iterator[int]:
    """A forked process that waits until it is killed."""
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_forked_worker_does_not_hold_the_folder(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = RunFolder(tmp_path)
    request.getfixturevalue("child")
    with pytest.raises(UserError, match="in use"):
        RunFolder(tmp_path)  # a fork must not release it either
    folder.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            RunFolder(tmp_path).close()
            return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_how_to_resume() -> None:
    words = ["model=toy", "run=runs/x", "prompt=a b"]
    assert how_to_resume(Path("runs/x"), words) == (
        "python train.py model=toy 'prompt=a b' resume=runs/x"
    )
    command = how_to_resume(Path("runs/sw/seed=0,1"), ["seed=0"])
    assert command == """python train.py seed=0 'resume="runs/sw/seed=0,1"'"""
    sweep = ["-m", "seed=0,1", "run=x"]
    assert how_to_resume(None, sweep) == "python train.py -m seed=0,1 run=x"


@pytest.mark.parametrize("asked", ["auto", "bf16"])
def test_resuming_in_another_precision_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: str
) -> None:
    began = {**CONFIG, "precision": "auto", "computed": "bf16"}
    save(tmp_path / "a-001", 4, began)
    caplog.set_level(logging.INFO, "mmdit")
    caplog.clear()
    assert opened(tmp_path, config={**began, "precision": asked}).name == "a-001"
    assert not caplog.records
    # precision=auto on a machine without bf16
    assert opened(tmp_path, config={**began, "computed": "fp32"}).name == "a-001"
    assert re.search(
        r"a-001 was computed in bf16 so far and is computed in fp32 from now on.*precision=bf16$",
        caplog.text.strip(),
    )
    with pytest.raises(UserError, match="precision was 'auto', now 'fp32'"):
        opened(tmp_path, config={**began, "precision": "fp32", "computed": "fp32"})


def test_a_run_that_does_not_state_its_precision_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "a-001", 4, {**CONFIG, "precision": "auto"})
    caplog.clear()
    now = {**CONFIG, "precision": "auto", "computed": "fp32"}
    assert opened(tmp_path, config=now).name == "a-001"
    assert not caplog.records
