"""Weights are read once, however many models are loaded from them."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import mmdit
from mmdit.checkpoints import archive, headers
from mmdit.checkpoints.hashes import content_hash
from mmdit.cli.subject import open_subject
from mmdit.errors import UserError
from mmdit.loading import Public, Run, open_source
from mmdit.runs.native import save_module
from mmdit.text.conditioning import ENCODERS
from tests.checkpoints_for_tests import write_checkpoint


@pytest.fixture(scope="module")
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published, t5_length=20)


@pytest.fixture(scope="module")
def run(pipe: mmdit.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_checkpoint(folder, 1, {"ema": pipe, "raw": pipe})
    return folder


@pytest.mark.parametrize("among", ["", "run/checkpoints"])
def test_a_folder_of_runs_or_of_checkpoints_is_not_a_model(run: Path, among: str) -> None:
    with pytest.raises(UserError, match=r"holds several runs or checkpoints: name one, as .*run"):
        open_source(run.parent / among)


def test_a_diffusers_folder_with_a_manifest_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert mmdit.is_native(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert not mmdit.is_native(tmp_path)


def test_the_home_of_nobody_is_a_users_mistake() -> None:
    for call in (mmdit.load_pipeline, mmdit.is_native):
        with pytest.raises(UserError, match="~nobody_here has no home folder here"):
            call("~nobody_here/run")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes read from each safetensors file, by path."""
    count: Counter[str] = Counter()
    opened = io.open

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            n = super().readinto(buffer)
            count[str(self.name)] += n or 0
            return n

        def read(self, size: int | None = -1) -> Any:
            content = super().read(-1 if size is None else size)
            count[str(self.name)] += len(content or b"")
            return content

    def counting(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "rb" and str(file).endswith(".safetensors"):
            return io.BufferedReader(Counted(str(file)))
        return opened(file, mode, *args, **options)

    monkeypatch.setattr(io, "open", counting)
    return count


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the data hashed with SHA-256."""
    sizes: list[int] = []
    real, of_file = hashlib.sha256, hashlib.file_digest

    class Counted:
        def __init__(self, data: Any = b"") -> None:
            self.inner = real()
            self.update(data)

        def update(self, data: Any) -> None:
            sizes.append(memoryview(data).nbytes)
            self.inner.update(data)

        def hexdigest(self) -> str:
            return self.inner.hexdigest()

    def file_digest(file: Any, name: str) -> Any:
        place = file.tell()
        sizes.append(file.seek(0, io.SEEK_END) - place)
        file.seek(place)
        return of_file(file, name)

    monkeypatch.setattr(hashlib, "sha256", Counted)
    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    yield sizes


def config(**given: Any) -> Any:
    text = {f"use_{kind}": True for kind in ENCODERS}
    keys = {"device": "cpu", "precision": "fp32", "weights": "ema", "preset": None, "runs": "runs"}
    return OmegaConf.create({**keys, "text": text, **given})


def test_the_weights_of_a_run_are_read_and_hashed_once(
    run: Path, read: Counter[str], hashed: list[int]
) -> None:
    """Including verification and the hash that image metadata state."""
    subject = open_subject(config(), {"checkpoint": str(run)})
    files = {str(path): path.stat().st_size for path in run.rglob("*/ema/*.safetensors")}
    assert read.keys() == files.keys()
    header = max(len(headers.read_header(Path(path)).raw) for path in files)
    for path, size in files.items():
        assert size <= read[path] <= size + header + 4 * io.DEFAULT_BUFFER_SIZE  # read ahead
    manifest = 2 * (run / "checkpoints" / "step_00000001" / "manifest.json").stat().st_size
    assert sum(files.values()) <= sum(hashed) <= sum(files.values()) + manifest
    assert len(subject.facts["weights_sha256"]) == 64


def test_the_header_of_a_file_with_five_models_is_read_once(
    pipe: mmdit.Pipeline, tiny_published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mmdit.save_single_file(pipe, tmp_path / "five.safetensors")
    seen: list[Path] = []

    def counted(path: Path) -> headers.Header:
        seen.append(path)
        return headers.read_header(path)

    monkeypatch.setattr(archive, "read_header", counted)
    before = content_hash.cache_info().misses
    opened = mmdit.load_pipeline(path, tokenizers=tiny_published, t5_length=20)
    assert seen == [path]
    assert content_hash.cache_info().misses == before + 1  # its content is hashed once, too
    assert opened.state_dict().keys() == pipe.state_dict().keys()


def test_a_source_is_recognized_as_a_run_or_as_public(
    run: Path, pipe: mmdit.Pipeline, tmp_path: Path
) -> None:
    save_module(tmp_path / "ours.safetensors", pipe.autoencoder)
    mmdit.save_single_file(pipe.autoencoder, tmp_path / "public.safetensors")
    for source in (run, run / "checkpoints" / "step_00000001", tmp_path / "ours.safetensors"):
        assert isinstance(open_source(source), Run)
    assert isinstance(open_source(tmp_path / "public.safetensors"), Public)
    of_run, exported = open_source(run), tmp_path / "run.safetensors"
    save_module(exported, pipe)
    assert open_source(exported).sha256 == of_run.sha256
    assert of_run.sha256 != open_source(tmp_path / "ours.safetensors").sha256
