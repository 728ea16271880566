"""Files in 8-bit floats: plain ones, and ComfyUI's with a scale beside each weight."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmdit
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.public import exported, matrices_of
from mmdit.errors import UserError
from mmdit.nn.stored import CodedWeight

EIGHT = torch.float8_e4m3fn
P = "model.diffusion_model."
QKV = f"{P}joint_blocks.0.x_block.attn.qkv"
KINDS = {"mmditx": ("mmdit", P), "t5": ("t5", "")}
Tensors = dict[str, Tensor]


def loaded(path: Path, kind: str, **options: Any) -> Any:
    return (mmdit.load_t5 if kind == "t5" else mmdit.load_mmdit)(path, **options)


def compute(network: Any, kind: str) -> Tensor:
    with torch.no_grad():
        if kind == "t5":
            return network(torch.tensor([[3, 7, 1]]))
        generator = torch.Generator().manual_seed(0)
        shapes = ((2, 16, 8, 8), (2,), (2, 10), (2, 3, 12))
        return network(*(torch.rand(shape, generator=generator) for shape in shapes))


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_rounded_to_8_bits_with_a_scale(tiny, tmp_path, name):
    (kind, prefix), network = KINDS[name], tiny(name)
    path = mmdit.save_single_file(network, tmp_path / "x.safetensors", quantized="scaled_fp8")
    own = dict(exported(network, "original"))
    matrices = matrices_of(network, "original", kind)
    assert 10 < len(matrices) < len(own)
    file = {key.removeprefix(prefix): tensor for key, tensor in load_file(path).items()}
    assert file.pop("scaled_fp8").shape == (0,)
    again = dict(exported(loaded(path, kind, dtype=torch.float32), "original"))
    assert again.keys() == own.keys()
    for key, tensor in own.items():
        stored = file.pop(key)
        if key not in matrices:
            assert torch.equal(stored, tensor) and torch.equal(again[key], tensor)
            continue
        scale = file.pop(key.replace(".weight", ".scale_weight"))
        assert stored.dtype == EIGHT and scale.shape == () and scale.dtype == torch.float32
        assert stored.float().abs().max() == 448  # the largest weight
        assert torch.equal(again[key], stored.float() * scale)
        # Half of the last of four bits; smaller numbers are rounded to multiples of 2^-9.
        assert (again[key] - tensor).abs().le(tensor.abs() / 16 + scale / 2**10).all()
    assert not file


@pytest.mark.parametrize("quantized", ["scaled_fp8", "fp8"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_a_kept_network_computes_what_the_decoded_one_does(tiny, tmp_path, name, quantized, dtype):
    kind, network = KINDS[name][0], tiny(name).bfloat16()
    path = mmdit.save_single_file(network, tmp_path / "x.safetensors", quantized=quantized)
    decoded = loaded(path, kind, dtype=dtype)
    kept = loaded(path, kind, dtype=dtype, keep_quantized=True)
    assert kept.compute_dtype == decoded.compute_dtype == (dtype or torch.bfloat16)
    assert torch.equal(compute(kept, kind), compute(decoded, kind))
    codes = [p for p in kept.parameters() if isinstance(p, CodedWeight)]
    assert sum(p.numel() for p in codes) > 0.8 * sum(p.numel() for p in kept.parameters())
    assert all(p.stored_bytes == p.numel() for p in codes)
    own = compute(network.float(), kind)
    assert (compute(decoded.float(), kind) - own).norm() < 0.2 * own.norm()


def test_plain_8_bit_floats_are_written_as_they_are(tiny, tmp_path):
    path = mmdit.save_single_file(tiny("t5"), tmp_path / "t5.safetensors", quantized="fp8")
    archive = open_file(path)
    kinds = {re.sub(r"\d", "i", key): info.dtype for key, info in archive.infos.items()}
    assert kinds["encoder.block.i.layer.i.DenseReluDense.wo.weight"] == "F8_E4M3"
    assert kinds["shared.weight"] == kinds["encoder.final_layer_norm.weight"] == "F32"
    assert not any("scale" in key for key in archive.infos)


def test_all_models_of_a_pipeline_are_in_one_file(tiny_published, tmp_path):
    pipe = mmdit.load_pipeline(tiny_published)
    path = mmdit.save_single_file(pipe, tmp_path / "x.safetensors", quantized="scaled_fp8")
    marks = [key for key in load_file(path) if key.endswith("scaled_fp8")]
    assert sorted(marks) == [f"{P}scaled_fp8", "text_encoders.t5xxl.transformer.scaled_fp8"]
    images = [
        mmdit.load_pipeline(
            path, tokenizers=tiny_published, dtype=torch.float32, keep_quantized=keep
        )("a red cat", seed=1, steps=2)
        for keep in (False, True)
    ]
    assert torch.equal(*images)
    assert 0 < (images[0].float() - pipe("a red cat", seed=1, steps=2).float()).abs().mean() < 25


def scaled(network: Any, path: Path) -> Tensors:
    return load_file(mmdit.save_single_file(network, path, quantized="scaled_fp8"))


def test_files_of_other_programs_are_read(tiny, tmp_path):
    """With scales of inputs, a mark in float32, of two values, and weights without a scale."""
    tensors = scaled(tiny("mmditx"), tmp_path / "x.safetensors")
    expected = mmdit.load_mmdit(tmp_path / "x.safetensors", dtype=torch.float32).state_dict()
    for mark in (torch.empty(0), torch.empty(2), torch.empty(2, dtype=EIGHT)):
        tensors[f"{P}scaled_fp8"] = mark
        tensors[f"{QKV}.scale_input"] = torch.tensor([0.5])
        tensors[f"{QKV}.scale_weight"] = tensors[f"{QKV}.scale_weight"].reshape(1)
        save_file(tensors, path := tmp_path / "other.safetensors")
        options = {"dtype": torch.float32, "num_heads": 3}
        read = mmdit.load_mmdit(path, **options).state_dict()
        assert all(torch.equal(read[key], value) for key, value in expected.items())
    own = tensors[f"{QKV}.weight"].float()
    del tensors[f"{QKV}.scale_weight"]  # which then is one
    save_file(tensors, path)
    read = dict(exported(mmdit.load_mmdit(path, **options), "original"))
    assert torch.equal(read[f"{QKV.removeprefix(P)}.weight"], own)


def put(key: str, tensor: Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({key: tensor})


FAULTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a mark with values": (put(f"{P}scaled_fp8", torch.ones(7)), "should be an empty tensor"),
    "a mark of integers": (put(f"{P}scaled_fp8", torch.ones(2).int()), "has 2 values of I32"),
    "no mark": (lambda t: t.pop(f"{P}scaled_fp8"), "those of a quantized model in another format"),
    "a scale of nothing": (put(f"{P}other.scale_weight", torch.ones(())), "1 unexpected: other"),
    "a scale elsewhere": (put("elsewhere.scale_weight", torch.ones(())), "1 unexpected: elsewhere"),
    "a scale of plain numbers": (
        put(f"{QKV}.weight", torch.ones(576, 192)),
        "scales a weight of F32, not of 8-bit floats",
    ),
    "a scale of each row": (
        put(f"{QKV}.scale_weight", torch.ones(576)),
        "should be one number, but is [576] F32",
    ),
    "a scale in integers": (
        put(f"{QKV}.scale_weight", torch.ones((), dtype=torch.int64)),
        "should be one number, but is [] I64",
    ),
    "NaN": (put(f"{QKV}.scale_weight", torch.tensor(float("nan"))), "is nan, not a factor"),
    "infinity": (put(f"{QKV}.scale_weight", torch.tensor(float("inf"))), "is inf, not a factor"),
    "a negative scale": (put(f"{QKV}.scale_weight", torch.tensor(-1.0)), "is -1.0, not a factor"),
    "NaN in a weight": (
        lambda t: t[f"{QKV}.weight"].view(torch.uint8).view(-1)[:1].fill_(0x7F),
        "NaN or infinite: joint_blocks.0.x_block.attn.qkv.weight",
    ),
    "a scale too large for the weight": (
        put(f"{QKV}.scale_weight", torch.tensor(3e38)),
        "NaN or infinite: joint_blocks.0.x_block.attn.qkv.weight",
    ),
    "a missing weight": (lambda t: t.pop(f"{QKV}.weight"), "1 missing"),
}


@pytest.mark.few(14)
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("keep", [False, True])
def test_what_is_wrong_is_named(tiny, tmp_path, name, keep):
    change, expected = FAULTS[name]
    tensors = {k: t.clone() for k, t in scaled(tiny("mmditx"), tmp_path / "x.safetensors").items()}
    change(tensors)
    save_file(tensors, path := tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=re.escape(expected)) as refusal:
        mmdit.load_mmdit(path, num_heads=3, keep_quantized=keep)
    assert str(path) in str(refusal.value)


def test_what_8_bits_cannot_hold_is_not_written(tiny, tmp_path):
    network = tiny("mmditx")
    weight = network.blocks[0].image.mlp.fc1.weight
    path = tmp_path / "x.safetensors"
    with torch.no_grad():
        weight[0, 0] = 1000.0
    with pytest.raises(UserError, match=r"fc1\.weight has values up to 1000, too large"):
        mmdit.save_single_file(network, path, quantized="fp8")
    mmdit.save_single_file(network, path, quantized="scaled_fp8")
    assert mmdit.load_mmdit(path).blocks[0].image.mlp.fc1.weight[0, 0] == 1000
    path.unlink()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    for quantized in ("fp8", "scaled_fp8"):
        with pytest.raises(UserError, match="NaN or infinite"):
            mmdit.save_single_file(network, path, quantized=quantized)
    with torch.no_grad():
        weight.zero_()
    mmdit.save_single_file(network, path, quantized="scaled_fp8")
    assert not mmdit.load_mmdit(path).blocks[0].image.mlp.fc1.weight.any()


def test_what_has_no_quantized_form_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="is for transformers and T5"):
        mmdit.save_single_file(tiny("clip_l"), tmp_path / "x.safetensors", quantized="fp8")
    with pytest.raises(UserError, match="quantized"):
        mmdit.save_single_file(tiny("mmditx"), tmp_path / "x.safetensors", quantized="Q8_0")
    assert not list(tmp_path.iterdir())
