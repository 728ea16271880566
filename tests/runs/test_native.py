"""The native format: files load as they were saved, and what does not fit is never built."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mmdit.checkpoints import building
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.uvit import UViT
from mmdit.registry import describe
from mmdit.runs.checkpoint import read_weights
from mmdit.runs.native import load_tensors, save_module, save_tensors
from mmdit.text.conditioning import AbsentEncoder, TextEncoder
from mmdit.text.tokenizers import CLIPWordTokenizer
from tests.hostile_process import measured


def test_a_module_is_loaded_as_it_was_saved(tmp_path):
    path = tmp_path / "ours.safetensors"
    save_tensors(path, {"a": torch.arange(3)}, {"facts": {"step": 2, "names": ["b"]}})
    tensors, header = load_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert header == {"facts": {"step": 2, "names": ["b"]}}


@pytest.mark.parametrize(
    "header", [{"format": "pt"}, {"description": "an SD3 model"}, {"a": "[" * 50_000}, None]
)
def test_a_file_of_another_project_is_rejected(tmp_path, header):
    path = tmp_path / "public.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(UserError, match=r"public\.safetensors was not written by this project: it"):
        read_weights(path).module()


def vae(**changes):
    return {
        **describe(Autoencoder(latent_channels=4, width=32, multipliers=[1], blocks=0)),
        **changes,
    }


def clip(**changes):
    words = CLIPWordTokenizer(words=["red"], length=4, pad_with_end=True)
    encoder = TextEncoder(tokenizer=words, model=CLIPTextModel(**TOWER))
    described = describe(encoder)
    for name, value in changes.items():
        part = "tokenizer" if name in ("words", "length") else "model"
        described[part] = {**described[part], name: value}
    return described


TOWER = {"vocabulary_size": 8, "width": 8, "depth": 2, "num_heads": 2, "length": 4}
TOWER |= {"activation": "gelu", "projection_width": None}
NET = {"class": "MMDiT", "depth": 2, "width": 8, "num_heads": 2, "context_width": 8}
NET |= {"pooled_width": 8, "position_size": 4, "position_grid": 4}
UVIT = {"class": UViT.__name__, **{key: value for key, value in NET.items() if key != "class"}}


def nested(levels):
    description = {"class": "Autoencoder"}
    for _ in range(levels):
        description = {"class": "TextEncoder", "model": description}
    return description


DESCRIPTIONS = {
    "depth": ({**NET, "depth": 10_000}, "model of more than 200 tensors"),
    "depth without end": ({**NET, "depth": 10**18}, "model of more than 200 tensors"),
    "depth of another": ({**UVIT, "depth": 10_001}, "model of more than 200 tensors"),
    "layers": (clip(depth=10_000), "model of more than 200 tensors"),
    "blocks": (vae(blocks=10**6), "model of more than 200 tensors"),
    "levels": (vae(multipliers=[1] * 10_000), "model of more than 200 tensors"),
    "width": ({**NET, "width": 100_000}, "does not fit MMDiT"),
    "width without end": ({**NET, "width": 2**62}, "cannot be built"),
    "positions": ({**NET, "position_size": 10**6}, "does not fit MMDiT"),
    "vocabulary": (clip(vocabulary_size=10**8), "does not fit TextEncoder"),
    "places": (clip(length=5000), "length 5000 must be from 3 to 4096"),
    "words": (clip(words=["a"] * 100_000), "a vocabulary of 100,004 words"),
    "a huge number": ({**NET, "width": 10**4000}, "of 4001 digits, must be below 2^63"),
    "a negative number": ({**NET, "depth": -3}, "depth=-3 must be a whole number of at least 1"),
    "zero": ({**NET, "num_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
    "a fraction": ({**NET, "depth": 2.5}, "depth=2.5 must be a whole number"),
    "levels of description": (nested(100), "nested more than 32 levels deep"),
    "another kind": ({"class": "TextEncoder", "tokenizer": 3, "model": []}, "cannot be built"),
    "no table": ([1], "a description of a class must be a table of arguments, not [1]"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_is_compared_before_it_is_built(tmp_path, monkeypatch, name):
    monkeypatch.setattr(building, "MOST_BUILT", 200)  # 6,000 take a second
    description, message = DESCRIPTIONS[name]
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"description": json.dumps(description)})
    with pytest.raises(UserError) as refusal:
        read_weights(path).module()
    assert str(path) in str(refusal.value)
    assert message in str(refusal.value)


def test_a_module_without_tensors_is_loaded_on_the_cpu(tmp_path):
    absent = AbsentEncoder(width=4, pooled_width=4, length=5)
    save_module(tmp_path / "x.safetensors", absent)
    assert read_weights(tmp_path / "x.safetensors").module().tokenize(["a"]).shape == (1, 5)
    assert read_weights(tmp_path / "x.safetensors").module().device == torch.device("cpu")


@pytest.fixture
def written(tmp_path, randomize):
    module = randomize(Autoencoder(latent_channels=4, width=32, multipliers=[1], blocks=0), 1)
    save_module(tmp_path / "vae.safetensors", module)
    return tmp_path / "vae.safetensors", module


def test_loaded_weights_equal_those_saved(written):
    path, module = written
    again = read_weights(path).module()
    assert not again.training
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert all(weight.requires_grad for weight in again.parameters())
    path.write_bytes(bytes(path.stat().st_size))  # a loaded module does not change with its file
    assert torch.equal(again.state_dict()["scale"], module.scale)


def test_a_flipped_bit_is_detected(written):
    path, _ = written
    whole = path.read_bytes()
    for place in range(9, len(whole), len(whole) // 15):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError):
            read_weights(path).module()


@pytest.mark.parametrize("sealed", [True, False])
def test_weights_that_are_not_finite_are_rejected(written, sealed):
    path, module = written
    torch.nn.init.constant_(module.decoder.conv_in.bias, torch.inf)
    metadata = {"description": describe(module)}
    if sealed:
        save_tensors(path, module.state_dict(), metadata)
    else:  # as written by older versions
        metadata = {key: json.dumps(value) for key, value in metadata.items()}
        save_file(module.state_dict(), path, metadata)
    with pytest.raises(UserError, match=r"1 tensors have values that are NaN or infinite"):
        read_weights(path).module()


def test_older_files_without_a_hash_are_loaded(written):
    path, module = written
    save_file(module.state_dict(), path, {"description": json.dumps(describe(module))})
    assert torch.equal(read_weights(path).module().scale, module.scale)


@pytest.mark.slow
def test_a_malicious_description_is_rejected_within_seconds_and_200_mb(tmp_path):
    paths = []
    for name, (description, _) in DESCRIPTIONS.items():
        paths.append(tmp_path / f"{name}.safetensors")
        metadata = {"description": json.dumps(description)}
        save_file({"a": torch.zeros(1)}, paths[-1], metadata=metadata)
    for case in measured(paths):
        assert case["raised"].startswith("UserError: "), case
        assert case["seconds"] < 4, case  # 2.1 on a slow processor
        assert case["megabytes"] < 200, case
