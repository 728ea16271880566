"""Checkpoints are complete or absent, and all damage is detected."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit.errors import UserError
from mmdit.processes import Processes
from mmdit.runs import tensors as tensor_files
from mmdit.runs.checkpoint import (
    Checkpoint,
    checkpoints_in,
    read_manifest,
    read_weights,
    sealed,
    step_folders,
)
from mmdit.runs.native import Weights, tensors_hash
from mmdit.runs.retention import Retention
from mmdit.runs.saving import Saver

WRITER = Path(__file__).with_name("endless_writer.py")
GROUPS = ("raw", "ema", "frozen", "optimizer")
KINDS = ("raw", "ema", "optimizer", "manifest")


def groups(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Groups of tensors like those of a run."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shared = normal(4, 3)
    return {
        "raw": {
            "layer.weight": normal(8, 6),
            "tied.a": shared,
            "tied.b": shared,
            "half": normal(5).bfloat16(),
            "transposed": normal(2, 3).t(),
            "scalar": normal(),
            "empty": normal(0, 4),
        },
        "ema": {"layer.weight": normal(8, 6)},
        "frozen": {"table": torch.arange(15.0).reshape(3, 5)},
        "optimizer": {
            "layer.weight:step": torch.tensor(7.0),
            "codes": torch.arange(9, dtype=torch.uint8),
            "count": torch.tensor(2**40),
        },
    }


def save(
    saver: Saver,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    **metrics: float,
) -> None:
    saver.save(
        step=step,
        finished=False,
        tensors=groups(step) if tensors is None else tensors,
        descriptions={"raw": {"class": "Thing"}, "ema": {"class": "Thing"}},
        metrics={name.replace("_", "/"): value for name, value in metrics.items()},
    )


def room(saver: Saver, checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Zeros with the shapes of the tensors in a checkpoint."""
    return {
        name: {
            key: torch.zeros(fact.shape, dtype=fact.dtype)
            for key, fact in saver.facts(checkpoint, name).items()
        }
        for name in GROUPS
    }


def equal(
    one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]
) -> bool:
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(
            torch.equal(one[name][k], other[name][k]) and one[name][k].dtype == other[name][k].dtype
            for k in one[name]
        )
        for name in one
    )


Make = Callable[..., Saver]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """`make(**keep)`: a saver for the run folder `tmp_path`."""
    opened: list[Saver] = []

    def new(*, asynchronous: bool = True, **keep: object) -> Saver:
        retention = Retention(**keep)  # type: ignore[arg-type]
        saver = Saver(
            tmp_path, Processes(), keep=retention, config={"seed": 1}, asynchronous=asynchronous
        )
        opened.append(saver)
        return saver

    yield new
    for saver in opened:
        saver.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_tensors_are_loaded_as_they_were_saved(make: Make, asynchronous: bool) -> None:
    saver = make(asynchronous=asynchronous)
    assert saver.latest() is None
    save(saver, 10, ema_loss=0.5)
    assert saver.wait().step == 10
    found = make().latest()
    assert found == saver.wait()
    assert found is not None
    assert (found.step, found.finished, found.metrics) == (10, False, {"ema/loss": 0.5})
    loaded = room(saver, found)
    saver.load(found, loaded)
    assert equal(loaded, groups(10))


def test_a_manifest_states_where_a_checkpoint_comes_from(make: Make) -> None:
    saver = make()
    save(saver, 1)
    manifest = read_manifest(saver.wait().folder)
    assert manifest["config"] == {"seed": 1}
    assert manifest["world_size"] == 1
    assert manifest["descriptions"]["ema"] == {"class": "Thing"}
    assert manifest["code"]["torch"] == torch.__version__
    assert {name.partition("/")[0] for name in manifest["files"]} == {"raw", "ema", "optimizer"}
    assert {len(facts["sha256"]) for facts in manifest["files"].values()} == {64}


def test_a_manifest_states_the_hash_of_each_module(make: Make, tmp_path: Path) -> None:
    """The hash of its tensors and the frozen ones is known without reading them again."""
    saver = make()
    save(saver, 1)
    tensors, checkpoint = groups(1), saver.wait()
    for name in ("raw", "ema"):
        digest = tensors_hash({**tensors[name], **tensors["frozen"]})
        assert checkpoint.weights_sha256(name) == digest == checkpoint.read(name).sha256
        assert tensors_hash(checkpoint.read(name).tensors) == digest


def test_frozen_weights_are_written_once(make: Make, tmp_path: Path) -> None:
    saver = make(last=5)
    for step in (1, 2):
        save(saver, step)
    newest, again = saver.wait(), make(last=5)
    assert again.latest() == newest
    save(again, 3)
    again.wait()
    (folder,) = (tmp_path / "checkpoints").glob("frozen*")
    (file,) = folder.iterdir()
    for checkpoint in checkpoints_in(tmp_path):
        stated = checkpoint.manifest["frozen"]
        assert stated["folder"] == folder.name == f"frozen_{stated['sha256'][:16]}"
        assert list(stated["files"]) == [file.name]
        assert torch.equal(checkpoint.read("ema").tensors["table"], groups(1)["frozen"]["table"])


@pytest.mark.parametrize("missing", [True, False])
def test_frozen_weights_are_verified(make: Make, tmp_path: Path, missing: bool) -> None:
    saver = make()
    for step in (1, 2):
        save(saver, step)
    saver.wait()
    (file,) = tmp_path.glob("checkpoints/frozen*/*")
    if missing:
        file.unlink()
    else:
        damage(file, random.Random(0))
    with pytest.raises(UserError, match=r"all checkpoints of .* are damaged .*frozen_\w{16}/shard"):
        saver.latest()
    with pytest.raises(UserError, match=r"damaged: frozen_\w{16}/shard.*share .*frozen_\w{16}: "):
        read_weights(tmp_path)
    assert checkpoints_in(tmp_path)[-1].read("optimizer").tensors


def test_an_older_checkpoint_contains_its_frozen_weights(make: Make, tmp_path: Path) -> None:
    """It is opened and resumed; checkpoints saved from then on share the frozen weights."""
    saver = make()
    save(saver, 1)
    folder = saver.wait().folder
    (tmp_path / "checkpoints").joinpath(read_manifest(folder)["frozen"]["folder"]).rename(
        folder / "frozen"
    )
    manifest = read_manifest(folder)
    shared = manifest.pop("frozen")
    del manifest["weights_sha256"]
    manifest["files"] |= {f"frozen/{name}": facts for name, facts in shared["files"].items()}
    (folder / "manifest.json").write_bytes(sealed(manifest))
    again = make()
    found = again.latest()
    assert found is not None and found.step == 1
    loaded = room(again, found)
    again.load(found, loaded)
    assert equal(loaded, {name: dict(group) for name, group in groups(1).items()})
    tensors = {**groups(1)["ema"], **groups(1)["frozen"]}
    assert read_weights(tmp_path).sha256 == tensors_hash(tensors) == found.weights_sha256("ema")
    save(again, 2)
    assert again.wait().manifest["frozen"]["sha256"] == shared["sha256"]
    (folder / "frozen" / "shard-x.safetensors").touch()
    assert found.fault("ema") == "frozen/shard-x.safetensors is not part of it"


def test_changes_after_save_returned_are_not_written(make: Make) -> None:
    saver = make()
    tensors = {"raw": {"w": torch.zeros(200_000)}}
    save(saver, 1, tensors)
    tensors["raw"]["w"].fill_(1.0)
    assert not saver.wait().read("raw").tensors["w"].any()


def test_a_group_may_be_empty_and_large_ones_become_several_files(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "FILE_SIZE", 1000)
    saver = make()
    tensors = {"raw": {str(i): torch.full((60,), float(i)) for i in range(20)}, "optimizer": {}}
    save(saver, 1, tensors)
    checkpoint = saver.wait()
    assert len(list((checkpoint.folder / "raw").iterdir())) == 5
    assert saver.facts(checkpoint, "optimizer") == {}
    loaded = room(saver, checkpoint)
    saver.load(checkpoint, {"raw": loaded["raw"]})
    assert equal({"raw": loaded["raw"]}, {"raw": tensors["raw"]})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2), "c": torch.zeros(1)}, "1 missing: c; 1 unexpected: b"),
        ({"a": torch.zeros(3), "b": torch.zeros(())}, r"1 misshapen: a \(2,\) instead of \(3,\)"),
        ({"a": torch.zeros(2).half(), "b": torch.zeros(())}, "dtype: a torch.float16, not torch.f"),
    ],
)
def test_loading_is_strict(make: Make, tensors: dict[str, Tensor], message: str) -> None:
    saver = make()
    save(saver, 1, {"raw": {"a": torch.ones(2), "b": torch.ones(())}})
    with pytest.raises(UserError, match=message):
        saver.load(saver.wait(), {"raw": tensors})
    assert not any(tensor.any() for tensor in tensors.values())


def file_of(checkpoint: Path, kind: str) -> Path:
    if kind == "manifest":
        return checkpoint / "manifest.json"
    return next((checkpoint / kind).iterdir())


def damage(path: Path, draw: random.Random) -> str:
    """Truncate a file or flip one of its bits; returns a description of the change."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.5:
        path.write_bytes(content[:place])
        return f"{path.name} cut at {place}"
    bit = draw.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} bit {bit} of byte {place}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_every_corruption_is_detected(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, count: int
) -> None:
    saver = make()
    for step in (1, 2):
        save(saver, step)
    newest = saver.wait().folder
    kept = tmp_path / "whole"
    shutil.copytree(newest, kept)
    draw, silent = random.Random(kind), []
    for _ in range(count):
        done = damage(file_of(newest, kind), draw)
        caplog.clear()
        found = saver.latest()
        named = any(
            "is damaged" in message and newest.name in message for message in caplog.messages
        )
        if found is None or found.step != 1 or not named:
            silent.append(done)
        for path in (tmp_path / "checkpoints").glob("*.damaged*"):
            shutil.rmtree(path)
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(kept, newest)
    assert silent == []
    assert saver.latest() is not None
    assert saver.wait().step == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_detected(make: Make, kind: str) -> None:
    saver = make()
    for step in (1, 2):
        save(saver, step)
    file_of(saver.wait().folder, kind).unlink()
    found = saver.latest()
    assert found is not None
    assert found.step == 1


def test_an_unexpected_file_is_detected(make: Make) -> None:
    saver = make()
    save(saver, 1)
    folder = saver.wait().folder / "raw"
    shutil.copy(next(folder.iterdir()), folder / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match=r"shard-00002.* is not part of it"):
        saver.latest()


def test_a_damaged_checkpoint_is_renamed_and_written_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = make(last=1)
    save(saver, 8)
    saver.wait()
    saver.keep = Retention(last=2)
    save(saver, 10)
    os.truncate(file_of(saver.wait().folder, "ema"), 40)
    with caplog.at_level(logging.WARNING):
        found = make(last=1).latest()
    assert found is not None
    assert found.step == 8
    assert "step_00000010 is damaged: ema/shard" in caplog.text
    assert "is 40 bytes, instead of" in caplog.text
    saver.keep = Retention(last=1)
    save(saver, 9)  # the damaged one, of a later step, must not push this one out
    saver.wait()
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_00000009"]
    assert (tmp_path / "checkpoints" / "step_00000010.damaged").is_dir()
    save(saver, 10)
    assert saver.wait().fault() is None


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(make: Make) -> None:
    saver = make()
    for step in (1, 2):
        save(saver, step)
    saver.wait()
    for folder in step_folders(saver.run):
        os.truncate(file_of(folder, "optimizer"), 3)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"all checkpoints .* damaged.*step_00000002.*_00000001"
        ):
            make().latest()


@pytest.mark.parametrize("content", ['{"files": null}', '{"files": 5}', "[]", "{}", "\xff"])
def test_an_empty_manifest_is_damaged(make: Make, content: str) -> None:
    saver = make()
    for step in (1, 2):
        save(saver, step)
    (saver.wait().folder / "manifest.json").write_text(content, encoding="latin-1")
    found = make().latest()
    assert found is not None and found.step == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"frozen": [1]},
        {"frozen": {}},
        {"frozen": {"folder": "../elsewhere", "files": {}}},
        {"frozen": {"folder": "frozen"}},
        {"files": []},
        {"files": {"ema/shard": {"bytes": 3}}},
        {"step": "two"},
        {"descriptions": None},
    ],
)
def test_a_manifest_of_another_version_is_not_read(
    make: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    saver = make()
    save(saver, 1)
    folder = saver.wait().folder
    facts = {**read_manifest(folder), **changes}
    (folder / "manifest.json").write_bytes(sealed(facts))
    with pytest.raises(UserError, match=r"step_00000001 was written by another version"):
        read_weights(tmp_path)


def test_a_renamed_checkpoint_is_ignored(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    saver = make()
    for step in (1, 2):
        save(saver, step)
    folder = saver.wait().folder
    folder.rename(folder.with_name("step_00000007"))
    found = make().latest()
    assert found is not None and found.step == 1
    assert "was written at step 2: the folder was renamed" in caplog.text


def test_manifests_are_compared_byte_by_byte(tmp_path: Path) -> None:
    facts = {"step": 1, "figures": {"loss": 1e-5}, "files": {"raw/x": {"bytes": 3}}}
    path = tmp_path / "manifest.json"
    path.write_bytes(sealed(facts))
    assert read_manifest(tmp_path) == facts
    for changed in (b" " + sealed(facts), sealed(facts).replace(b"1e-05", b"1E-05")):
        path.write_bytes(changed)
        with pytest.raises(UserError, match="changed"):
            read_manifest(tmp_path)
    path.write_bytes(json.dumps(facts).encode())
    with pytest.raises(UserError, match="changed"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({"last": 1}, [60]),
        ({"last": 3}, [40, 50, 60]),
        ({"last": 1, "every": 20}, [20, 40, 60]),
        ({"last": 2, "best": "ema/loss"}, [30, 50, 60]),
        ({"last": 1, "every": 50, "best": "ema/loss"}, [30, 50, 60]),
        ({"last": 1, "best": "ema/psnr"}, [60]),
    ],
)
def test_retention(
    make: Make, tmp_path: Path, keep: dict[str, object], expected: list[int]
) -> None:
    saver = make(**keep)
    losses = [0.9, float("nan"), 0.2, 0.2, 0.3, 0.25]  # the second 0.2 was measured at step 30
    for i, loss in enumerate(losses, 1):
        save(saver, 10 * i, {"raw": {"w": torch.ones(1)}}, ema_loss=loss)
    saver.wait()
    assert [checkpoint.step for checkpoint in checkpoints_in(tmp_path)] == expected
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.endswith("tmp")] == []


def test_deleting_a_linked_checkpoint_removes_only_the_link(make: Make, tmp_path: Path) -> None:
    saver = make(last=1)
    save(saver, 1)
    elsewhere = saver.wait().folder.rename(tmp_path / "another disk")
    (tmp_path / "checkpoints" / "step_00000001").symlink_to(elsewhere)
    (tmp_path / "checkpoints" / "notes.tmp").touch()
    save(saver, 2)
    saver.wait()
    found = make().latest()
    assert found is not None and found.step == 2
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert (elsewhere / "manifest.json").is_file()


@pytest.mark.parametrize("keep", [{"last": 0}, {"last": None}, {"every": 0}, {"every": 1.5}])
def test_invalid_retention_is_rejected(keep: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"^keep.* must be a whole number of at least 1"):
        Retention(**keep)  # type: ignore[arg-type]


def test_a_full_disk_leaves_the_previous_checkpoint(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make()
    save(saver, 1)
    saver.wait()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        save(saver, 2)
        with pytest.raises(
            UserError, match=r"step_00000002.*disk is full.*needs .* GB.* free"
        ) as refusal:
            saver.wait()
    assert f"this one keeps keep=2 checkpoints) and go on with resume={tmp_path};" in str(
        refusal.value
    )
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]
    found = saver.latest()
    assert found is not None
    assert found.step == 1
    save(saver, 2)
    assert saver.wait().step == 2


def test_a_failure_is_raised_by_the_next_save(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = make()

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refused)
        save(saver, 1)
        time.sleep(0.1)
        with pytest.raises(UserError, match=r"could not be written .*Permission denied"):
            save(saver, 2)
    assert saver.latest() is None


def test_a_really_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system of 2 MB cannot be mounted here")
    try:
        with Saver(small, Processes(), keep=Retention(last=1), config={}) as saver:
            save(saver, 1, {"raw": {"w": torch.zeros(200_000)}})
            saver.wait()
            save(saver, 2, {"raw": {"w": torch.zeros(400_000)}})
            with pytest.raises(UserError, match=r"disk is full.*needs 0\.00 GB"):
                saver.wait()
            found = saver.latest()
            assert found is not None
            assert found.step == 1
            assert [p.name for p in (small / "checkpoints").iterdir()] == ["step_00000001"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_at_any_moment_loses_at_most_one_interval(tmp_path: Path, kills: int) -> None:
    draw, lost, leftovers = random.Random(0), [], 0
    run = tmp_path / "run"
    parent = subprocess.Popen(
        [sys.executable, str(WRITER), str(run)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    reached = 0
    try:
        for _ in range(kills):
            _, found, child = parent.stdout.readline().split()
            lost.append(reached - int(found))
            time.sleep(draw.uniform(0.0, 0.3))
            os.kill(int(child), signal.SIGKILL)
            reached = int(found)
            while (line := parent.stdout.readline()) != "ended\n":
                reached = int(line.split()[1])
            leftovers += any(run.glob("checkpoints/*.tmp"))
    finally:
        parent.kill()
        parent.communicate()
    assert 0 <= max(lost) <= 1
    assert leftovers  # some were killed while writing


def test_weights_of_a_run_are_those_of_the_newest_intact_checkpoint(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = make()
    for step in (1, 2):
        save(saver, step)
    newest = saver.wait().folder
    named = [read_weights(source).path for source in (tmp_path, newest, newest / "ema")]
    assert named == [newest / "ema"] * 3
    os.truncate(file_of(newest, "ema"), 3)
    assert read_weights(tmp_path).path.parent.name == "step_00000001"
    assert "step_00000002 is damaged: ema/shard" in caplog.text
    assert read_weights(tmp_path, "raw").path.parent == newest
    for named in (newest, newest / "ema"):
        with pytest.raises(UserError, match=r"damaged: ema.* use an older one: .*step_00000001"):
            read_weights(named)
    assert newest.is_dir()  # reading changes nothing


def test_weights_that_training_deletes_meanwhile_are_searched_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make(last=1)
    save(saver, 1)
    saver.wait()
    read = Checkpoint.read

    def slow(checkpoint: Checkpoint, group: str) -> Weights:
        if checkpoint.step in going:
            save(saver, checkpoint.step + 1)
            saver.wait()
        return read(checkpoint, group)

    going = {1}
    monkeypatch.setattr(Checkpoint, "read", slow)
    path = read_weights(tmp_path).path
    assert path.parent.name == "step_00000002"
    going = {2}
    with pytest.raises(UserError, match=r"was deleted while it was read.*run the command again"):
        read_weights(path)
