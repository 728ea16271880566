"""Models under the prefixes of training wrappers, and in the nested dicts of pickles."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmdit
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.diagnosis import explain_absent
from mmdit.checkpoints.headers import Info
from mmdit.checkpoints.locate import Place
from mmdit.checkpoints.public import exported, find
from mmdit.errors import UserError
from mmdit.models.mmdit import MMDiT
from mmdit.registry import describe

P = "model.diffusion_model."
WRAPPED = ["diffusion_model.", "model.", "net.", "module.", "module._orig_mod.", "model.module."]
WRAPPED += ["base_model.model.", "ema.model.diffusion_model.", "transformer."]


@pytest.fixture
def transformer(tiny) -> MMDiT:
    return tiny("mmdit")


@pytest.fixture
def whole(tiny_published, tmp_path) -> dict[str, Tensor]:
    """A single file with five models, the transformer among them; its header is lost."""
    pipe = mmdit.load_pipeline(tiny_published, t5_length=20)
    return load_file(mmdit.save_single_file(pipe, tmp_path / "whole.safetensors"))


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert describe(one) == describe(other)
    for key, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[key], value), key


@pytest.mark.few(6)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", WRAPPED)
def test_one_wrapper_is_seen_through(transformer, tmp_path, caplog, prefix, layout):
    tensors = {prefix + key: value for key, value in exported(transformer, layout)}
    save_file(tensors, tmp_path / "x.safetensors")
    same(mmdit.load_mmdit(tmp_path / "x.safetensors"), transformer)
    assert f"reading the SD3 transformer from the keys under '{prefix}'" in caplog.text


@pytest.mark.few(2)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.", "net.", "model.module."])
def test_beside_other_models_each_is_found(tiny_published, whole, tmp_path, prefix):
    path = tmp_path / "x.safetensors"
    metadata = open_file(tmp_path / "whole.safetensors").metadata
    save_file({key.replace(P, prefix): value for key, value in whole.items()}, path, metadata)
    pipe = mmdit.load_pipeline(tiny_published, t5_length=20)
    again = mmdit.load_pipeline(path, t5_length=20, tokenizers=tiny_published)
    for key, value in pipe.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_whole_file_may_be_wrapped(tiny_published, whole, tmp_path):
    path = tmp_path / "x.safetensors"
    metadata = open_file(tmp_path / "whole.safetensors").metadata
    save_file({f"module.{key}": value for key, value in whole.items()}, path, metadata)
    again = mmdit.load_pipeline(path, t5_length=20, tokenizers=tiny_published)
    same(again.mmdit, mmdit.load_mmdit(tiny_published))


@pytest.mark.parametrize("kind", ["autoencoder", "clip_g", "t5", "controlnet"])
def test_other_models_are_seen_through_their_wrappers_too(tiny, tmp_path, kind):
    model = tiny(kind)
    path = mmdit.save_single_file(model, tmp_path / "x.safetensors")
    metadata = open_file(path).metadata
    save_file({f"module.{k}": v.clone() for k, v in load_file(path).items()}, path, metadata)
    same(Place(path).load(kind), model)


def test_a_prefix_can_be_named(transformer, tmp_path):
    tensors = {f"my.own.{key}": value for key, value in exported(transformer, "original")}
    tensors |= {f"ema.{key}": value + 1 for key, value in exported(transformer, "original")}
    save_file(tensors, path := tmp_path / "x.safetensors")
    same(mmdit.load_mmdit(f"{path}:my.own"), transformer)
    assert not torch.equal(mmdit.load_mmdit(f"{path}:ema").positions, transformer.positions)
    for wrong in ("em", "my.ow", "ema.ema"):
        with pytest.raises(UserError, match=r"has no tensors under .*keys begin with (ema|my)"):
            mmdit.load_mmdit(f"{path}:{wrong}")
    with pytest.raises(UserError, match="there is no such file"):
        mmdit.load_mmdit(f"{tmp_path}/none.safetensors:ema")
    odd = path.rename(tmp_path / "a:b.safetensors")  # a colon in a name chooses nothing
    same(mmdit.load_mmdit(f"{odd}:my.own"), transformer)


# Pickles


def optimizer(model: MMDiT) -> dict:
    adam = torch.optim.AdamW(model.parameters())
    for parameter in list(model.parameters())[:3]:
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    return adam.state_dict()


@pytest.fixture
def saved(transformer, tmp_path):
    """`saved(**parts)`: a pickle with these nested dicts, and the state of an optimizer."""

    def save(**parts: object) -> Path:
        content = {**parts, "opt": optimizer(transformer), "step": 5, "args": {"lr": 0.1}}
        torch.save(content, path := tmp_path / "last.pt")
        return path

    return save


def test_the_only_model_of_a_training_pickle_is_taken(transformer, saved, caplog):
    tensors = dict(exported(transformer, "original"))
    for parts in ({"model": tensors}, {"weights": {f"module.{k}": v for k, v in tensors.items()}}):
        same(mmdit.load_mmdit(saved(**parts), allow_pickle=True), transformer)
        assert f"the file has these parts: {next(iter(parts))}, opt" in caplog.text


def test_of_several_models_of_a_pickle_one_is_chosen(transformer, saved):
    tensors = dict(exported(transformer, "original"))
    averaged = {key: value * 2 for key, value in tensors.items()}
    path = saved(model=tensors, ema={"state_dict": averaged})
    message = r"under 'model', 'ema\.state_dict': choose one, e\.g\. .*:mod"
    with pytest.raises(UserError, match=message):
        mmdit.load_mmdit(path, allow_pickle=True)
    same(mmdit.load_mmdit(f"{path}:model", allow_pickle=True), transformer)
    ema = mmdit.load_mmdit(f"{path}:ema", allow_pickle=True)
    assert torch.equal(ema.positions, 2 * transformer.positions)
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        mmdit.load_mmdit(f"{path}:ema")
    with pytest.raises(UserError, match=r"'model' holds the SD3.*'opt' holds the state of an"):
        mmdit.load_t5(path, allow_pickle=True)


def test_a_pickle_nested_without_end_is_refused(tmp_path):
    content: dict = {}
    content["again"] = content
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="does not hold a state dict of tensors"):
        mmdit.load_mmdit(tmp_path / "x.pt", allow_pickle=True)


def test_a_pickle_of_thousands_of_dicts_is_refused_soon(tmp_path):
    content = {f"part{i}": {"w": torch.zeros(1)} for i in range(2000)}
    torch.save(content, tmp_path / "x.pt")
    start = time.process_time()
    with pytest.raises(UserError, match="holds 2,000 nested dicts"):
        mmdit.load_mmdit(tmp_path / "x.pt", allow_pickle=True)
    torch.save({"a." * 10**5: torch.zeros(1)}, tmp_path / "y.pt")
    with pytest.raises(UserError, match="a tensor's name has 200,000 characters"):
        mmdit.load_mmdit(tmp_path / "y.pt", allow_pickle=True)
    assert time.process_time() - start < 5  # it took 20 s where all were named


@pytest.mark.parametrize("within", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_what_wrappers_left_inside_of_keys_is_named(transformer, tmp_path, within):
    """As where each block was compiled by itself."""
    tensors = {
        re.sub(r"(_blocks\.\d+\.)", rf"\1{within}.", key): value
        for key, value in exported(transformer, "original")
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"put '{within}.' inside the keys"):
        mmdit.load_mmdit(tmp_path / "x.safetensors")
    tensors = {
        key.replace("joint_blocks.", f"joint_blocks.{within}."): tensors[key] for key in tensors
    }
    save_file(tensors, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="inside the keys") as refusal:
        mmdit.load_mmdit(tmp_path / "y.safetensors")
    assert "; it holds" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("transformer_blocks.0.attn.to_q.ia3_l", "another adapter"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.x", "the T5 encoder"),
        ("t5xxl", "textual inversion"),
    ],
)
def test_digits_in_a_name_are_not_those_of_a_block(tmp_path, key, what):
    save_file({key: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"it holds .*{what}"):
        mmdit.load_mmdit(tmp_path / "x.safetensors")


# What is not a model


def test_a_folder_of_peft_is_named(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "stabilityai/sd3"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = r"describes a LoRA .*Only base weights .*base model is 'stabilityai/sd3'"
    with pytest.raises(UserError, match=message):
        mmdit.load_pipeline(tmp_path)
    lora = {"base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)}
    save_file(lora, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message) as refusal:
        mmdit.load_mmdit(tmp_path)
    assert "ncomplete" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "key", "what"),
    [
        (
            "pytorch_lora_weights",
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
            "LoRA",
        ),
        ("learned_embeds", "<cat-toy>", "textual inversion"),
        ("ip-adapter", "image_proj.proj.weight", "IP-Adapter"),
    ],
)
def test_a_folder_with_files_that_are_no_models_says_what_they_are(tmp_path, name, key, what):
    save_file({key: torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    for loader in (mmdit.load_pipeline, mmdit.load_autoencoder):
        with pytest.raises(UserError, match=f"{name}.safetensors holds .*{what}") as refusal:
            loader(tmp_path)
        assert "ncomplete" not in str(refusal.value)


@pytest.mark.parametrize("repeated", ["model.", "a.", "lora"])
def test_thousands_of_long_keys_are_refused_soon(repeated):
    keys = {repeated * (450 // len(repeated)) + str(i): Info((1,), "F32") for i in range(10_000)}
    archive = SimpleNamespace(infos=keys, metadata={}, name="x", parts=())
    start = time.process_time()
    assert find(archive, "mmdit") is None
    assert "holds no SD3 transformer" in explain_absent(archive, "mmdit")
    assert time.process_time() - start < 5  # about 0.3 s; it took 16 s where each was searched
