"""Sources: files, folders of many kinds, and the hub with and without a network."""

import json
import os
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

import mmdit
from mmdit.checkpoints import locate
from mmdit.checkpoints.archive import write_archive
from mmdit.checkpoints.folders import write_model
from mmdit.checkpoints.locate import Place
from mmdit.checkpoints.presets import PRESETS
from mmdit.checkpoints.public import exported
from mmdit.errors import UserError
from mmdit.registry import describe


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Folders


def test_the_plain_file_is_preferred_to_its_variants(tiny, tmp_path):
    folder = tmp_path / "transformer"
    write_model(tiny("mmditx").half(), folder, max_bytes=400_000)
    for path in folder.glob("*.safetensors*"):  # the half-precision variant of transformers
        name = path.name.replace("model-", "model.fp16-").replace("index.json", "index.fp16.json")
        path.rename(folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(index.read_text().replace("model-", "model.fp16-"))
    assert mmdit.load_mmdit(tmp_path).compute_dtype == torch.float16
    tensors = dict(exported(tiny("mmditx"), "diffusers"))
    write_archive(folder / "diffusion_pytorch_model.safetensors", tensors)
    for source in (tmp_path, folder):
        assert mmdit.load_mmdit(source).compute_dtype == torch.float32


def test_single_files_and_encoders_beside_each_other(tiny, tmp_path):
    for name, file in (
        ("mmdit", "sd3.safetensors"),
        ("t5", "text_encoders/t5xxl_fp16.safetensors"),
    ):
        mmdit.save_single_file(tiny(name), tmp_path / file)
    assert len(mmdit.load_mmdit(tmp_path).blocks) == 2
    assert mmdit.load_t5(tmp_path).width == 16
    mmdit.save_single_file(tiny("mmditx"), tmp_path / "sd3.5.safetensors")
    with pytest.raises(UserError, match=r"several files with a SD3 transformer: name one"):
        mmdit.load_mmdit(tmp_path)
    with pytest.raises(UserError, match=r"holds no SD3 autoencoder: no .* in .*vae and"):
        mmdit.load_autoencoder(tmp_path)


def test_shards_without_their_index(tiny, tmp_path):
    write_model(tiny("t5"), tmp_path / "text_encoder_3", max_bytes=3000)
    (tmp_path / "text_encoder_3" / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds \d+ shards, but no \*.safetensors.index.json"):
        mmdit.load_t5(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("mmditx", {"num_layers": 9}, "num_layers is 9, but the weights have 3"),
        ("mmditx", {"num_attention_heads": 4}, "num_heads 4 contradicts the weights"),
        ("mmditx", {"qk_norm": None}, "qk_norm is None, but the weights have rms_norm"),
        ("mmditx", {"dual_attention_layers": []}, "dual_attention_layers is []"),
        ("mmditx", {"num_attention_heads": "many"}, "num_attention_heads is 'many'"),
        ("autoencoder", {"latent_channels": 4}, "latent_channels is 4, but the weights have 16"),
        ("autoencoder", {"scaling_factor": None}, "scaling_factor is None"),
        ("clip_l", {"hidden_act": 3}, "hidden_act is 3"),
        ("clip_l", {"hidden_act": "relu"}, "activation='relu' must be one of"),
        ("clip_l", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj is relu"),
    ],
)
def test_a_config_that_contradicts_the_weights(tiny, tmp_path, name, changes, expected):
    write_model(tiny(name), tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(UserError) as refusal:
        Place(tmp_path).load(name.removesuffix("x"))
    assert expected in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 99999])
def test_a_config_that_is_none(tiny, tmp_path, text):
    write_model(tiny("t5"), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        mmdit.load_t5(tmp_path)


def test_scale_and_shift_come_from_the_config(tiny, tmp_path):
    write_model(tiny("autoencoder"), tmp_path)
    edit(tmp_path / "config.json", scaling_factor=0.25, shift_factor=0.5)
    autoencoder = mmdit.load_autoencoder(tmp_path)
    assert (autoencoder.scale, autoencoder.shift) == (0.25, 0.5)


def test_a_flipped_bit_is_found_unless_nobody_is_to_look(tiny, tmp_path):
    path = mmdit.save_single_file(tiny("mmdit"), tmp_path / "x.safetensors")
    assert mmdit.load_mmdit(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert mmdit.load_mmdit(path, verify=False)
    with pytest.raises(UserError, match="SHA-256"):
        mmdit.load_mmdit(path)


# The hub

REQUEST = httpx.Request("GET", "https://huggingface.co")
REFUSALS = {
    "gated": (
        errors.GatedRepoError("403", response=httpx.Response(403, request=REQUEST)),
        ("is gated", "accept its license at https://huggingface.co/some/model", "hf auth login"),
    ),
    "unknown": (
        errors.RepositoryNotFoundError("404", response=httpx.Response(404, request=REQUEST)),
        ("no such file or folder here, nor such a model on the hub",),
    ),
    "revision": (
        errors.RevisionNotFoundError("404", response=httpx.Response(404, request=REQUEST)),
        ("some/model is on the hub, but has no such branch, tag or commit",),
    ),
    "file": (
        errors.RemoteEntryNotFoundError("404", response=httpx.Response(404, request=REQUEST)),
        ("there is no such file here", "listed at https://huggingface.co/some/model/tree/main"),
    ),
    "offline": (
        errors.LocalEntryNotFoundError("Cannot find it.\nA long story."),
        ("not in the hub's cache", "(Cannot find it.)", "hf download some/model"),
    ),
    "connection": (httpx.ConnectError("no route"), ("could not be reached (no route)",)),
    "timeout": (httpx.ReadTimeout("timed out"), ("could not be reached (timed out)",)),
    "disk": (OSError(28, "No space left on device"), ("No space left on device",)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_hub_refuses(monkeypatch, name):
    error, expected = REFUSALS[name]

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    for source in ("some/model", "some/model@v2", "some/model@v2/sub/one.safetensors"):
        with pytest.raises(UserError) as refusal:
            mmdit.load_mmdit(source)
        message = str(refusal.value)
        assert message.startswith(source) and "\n" not in message
        assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    "source",
    [
        *("none.safetensors", "a/b.safetensors", "a/b/c", "../up", "/no/such", "two words"),
        *("here/b", "here/b/c.safetensors", "a/b/c.ckpt", "a/b@../c.safetensors", "a/b@"),
    ],
)
def test_what_is_no_hub_id_is_not_looked_up_there(tmp_path, monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: 1 / 0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no such file or folder$"):
        mmdit.load_mmdit(source)


class Hub:
    """A hub with one repository: what huggingface_hub would fetch, by the patterns it is given."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.revisions: list[str | None] = []

    def snapshot_download(self, name, *, revision, allow_patterns, ignore_patterns):
        files = [f for f in self.repository.rglob("*") if f.is_file()]
        names = [f.relative_to(self.repository).as_posix() for f in files]
        chosen = filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in chosen:
            self.fetch(name, file, revision)
        return str(self.cache)

    def hf_hub_download(self, name, file, *, revision):
        return str(self.fetch(name, file, revision))

    def fetch(self, name: str, file: str, revision: str | None) -> Path:
        assert name == "some/model"
        self.revisions.append(revision)
        path = self.cache / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.repository / file, path)
        return path

    def fetched(self) -> list[str]:
        files = (f for f in self.cache.rglob("*") if f.is_file())
        return sorted(f.relative_to(self.cache).as_posix() for f in files)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "there", tmp_path / "cache")
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(hub, name))
    return hub


def test_only_the_folders_that_are_wanted_are_fetched(tiny, hub):
    for kind, folder in (("t5", "text_encoder_3"), ("autoencoder", "vae")):
        mmdit.save_diffusers(tiny(kind), hub.repository / folder)
    for name in ("sd3.safetensors", "text_encoder_3/model.fp16.safetensors", "flax_model.msgpack"):
        (hub.repository / name).write_bytes(b"large")
    assert mmdit.load_t5("some/model").width == 16
    assert hub.fetched() == [
        "text_encoder_3/config.json",
        "text_encoder_3/model.safetensors",
        "vae/config.json",
    ]
    assert set(hub.revisions) == {None}


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        ("clip_l", mmdit.load_clip),
        ("t5", mmdit.load_t5),
        ("autoencoder", mmdit.load_autoencoder),
        ("controlnet", mmdit.load_controlnet),
    ],
)
def test_a_repository_may_hold_one_model(tiny, hub, kind, load):
    mmdit.save_diffusers(tiny(kind), hub.repository)
    assert describe(load("some/model@v1.0")) == describe(tiny(kind))
    assert set(hub.revisions) == {"v1.0"}


def test_a_preset_names_its_repository_for_every_model(tiny, hub, monkeypatch):
    mmdit.save_diffusers(tiny("t5"), hub.repository / "text_encoder_3")
    some = PRESETS["sd3.5-medium"]._replace(hub="some/model")
    monkeypatch.setitem(PRESETS, "sd3.5-medium", some)
    assert mmdit.load_t5("sd3.5-medium").width == 16


def test_a_single_file_of_a_repository(tiny, hub):
    mmdit.save_single_file(tiny("mmdit"), hub.repository / "sub" / "one.safetensors")
    (hub.repository / "sub" / "two.safetensors").write_bytes(b"large")
    for revision in (None, "refs"):
        at = f"@{revision}" if revision else ""
        model = mmdit.load_mmdit(f"some/model{at}/sub/one.safetensors")
        assert describe(model) == describe(tiny("mmdit"))
        assert hub.revisions.pop() == revision
    assert hub.fetched() == ["sub/one.safetensors"]
    with pytest.raises(UserError, match=r"named like owner/name/file\.safetensors"):
        mmdit.load_mmdit("some/model")


def test_without_a_network_the_cache_serves(tiny, tmp_path, monkeypatch):
    """The layout of the hub's cache, and a hub that cannot be reached."""
    repository = tmp_path / "models--some--model"
    mmdit.save_diffusers(tiny("t5"), repository / "snapshots" / "abc" / "text_encoder_3")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = locate.download("some/model", ["text_encoder_3"])
    assert Place(path).weights_of("t5")[1].name == "text_encoder_3"
    with pytest.raises(UserError, match=r"other/model.*not in the hub's cache"):
        locate.download("other/model", ["text_encoder_3"])


@pytest.mark.parametrize("load", [mmdit.load_mmdit, mmdit.load_pipeline, mmdit.load_autoencoder])
def test_what_is_neither_file_nor_folder_is_named_as_such(tmp_path, load):
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    for path in (pipe, tmp_path / "device.safetensors"):
        with pytest.raises(UserError, match=f"{path} is not a regular file"):
            load(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "float16"])
@pytest.mark.parametrize("load", [mmdit.load_mmdit, mmdit.load_pipeline, mmdit.load_autoencoder])
def test_a_dtype_that_models_cannot_compute_in_is_refused(tmp_path, load, dtype):
    """Before anything is looked for: there is nothing there."""
    with pytest.raises(UserError, match=r"dtype=.* must be one of torch\.float16, "):
        load(tmp_path, dtype=dtype)
