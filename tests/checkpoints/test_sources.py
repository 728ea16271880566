"""Sources: files, folders of many kinds, and the hub with and without a network."""

import json
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import errors

import mmdit
from mmdit.checkpoints import sources
from mmdit.checkpoints.archive import write_archive
from mmdit.checkpoints.folders import write_model
from mmdit.checkpoints.public import exported
from mmdit.checkpoints.sources import load_model, weights_of
from mmdit.errors import UserError


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
    assert mmdit.load_mmdit(tmp_path).dtype == torch.float16
    tensors = dict(exported(tiny("mmditx"), "diffusers"))
    write_archive(folder / "diffusion_pytorch_model.safetensors", tensors)
    for source in (tmp_path, folder):
        assert mmdit.load_mmdit(source).dtype == torch.float32


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
        ("clip_l", {"hidden_act": "relu"}, "activation 'relu' must be one of"),
        ("clip_l", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj is relu"),
    ],
)
def test_a_config_that_contradicts_the_weights(tiny, tmp_path, name, changes, expected):
    write_model(tiny(name), tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(UserError) as refusal:
        load_model(tmp_path, name.removesuffix("x"))
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


def test_a_flipped_bit_is_found_on_demand(tiny, tmp_path):
    path = mmdit.save_single_file(tiny("mmdit"), tmp_path / "x.safetensors")
    assert mmdit.load_mmdit(path, verify=True)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert mmdit.load_mmdit(path)
    with pytest.raises(UserError, match="SHA-256"):
        mmdit.load_mmdit(path, verify=True)


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
    with pytest.raises(UserError) as refusal:
        mmdit.load_mmdit("some/model")
    message = str(refusal.value)
    assert message.startswith("some/model") and "\n" not in message
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    "source", ["none.safetensors", "a/b.safetensors", "a/b/c", "../up", "/no/such", "two words"]
)
def test_what_is_no_hub_id_is_not_looked_up_there(monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"there is no such file or folder$"):
        mmdit.load_mmdit(source)


def test_only_the_folders_that_are_wanted_are_fetched(tiny, tmp_path, monkeypatch):
    mmdit.save_diffusers(tiny("t5"), tmp_path / "text_encoder_3")
    asked = []

    def fetch(repository, *, allow_patterns, ignore_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert mmdit.load_t5("some/model").width == 16
    assert asked == [("some/model", ["*.json", "text_encoder_3/*"])]


def test_without_a_network_the_cache_serves(tiny, tmp_path, monkeypatch):
    """The layout of the hub's cache, and a hub that cannot be reached."""
    repository = tmp_path / "models--some--model"
    mmdit.save_diffusers(tiny("t5"), repository / "snapshots" / "abc" / "text_encoder_3")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = sources.download("some/model", ["text_encoder_3"])
    assert weights_of(path, "t5")[1].name == "text_encoder_3"
    with pytest.raises(UserError, match=r"other/model.*not in the hub's cache"):
        sources.download("other/model", ["text_encoder_3"])
