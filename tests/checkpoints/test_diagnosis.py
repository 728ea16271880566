"""Each way in which a file can be wrong is told apart, and never loads anything."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mmdit
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.locate import Place
from mmdit.checkpoints.public import exported, find, kind_of, load, load_into
from mmdit.errors import UserError
from mmdit.models.mmdit import MMDiT
from mmdit.published import chosen_preset
from mmdit.registry import describe

Tensors = dict[str, Tensor]
P = "model.diffusion_model."
BLOCK = f"{P}joint_blocks."


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not re.search(pattern, k)}


def renamed(pattern: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, new, k): v for k, v in tensors.items()}


def changed(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        k: change(v).contiguous() if k == P + key else v for k, v in tensors.items()
    }


def plus(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{key: torch.ones(2) for key in keys}}


def only(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda _: {key: torch.ones(2) for key in keys}


def copied(source: int, target: int) -> Callable[[Tensors], Tensors]:
    old, new = f"{BLOCK}{source}.", f"{BLOCK}{target}."
    return lambda tensors: {
        **tensors,
        **{new + k.removeprefix(old): v.clone() for k, v in tensors.items() if k.startswith(old)},
    }


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return spoil


MLP = "joint_blocks.1.x_block.mlp.fc1.weight"
MUTATIONS = {
    "a key is missing": (
        without(r"\.1\.x_block\.mlp\.fc1\.bias"),
        ("1 missing: joint_blocks.1.x_block.mlp.fc1.bias", "incomplete: tensors of joint_blocks.1"),
    ),
    "keys of many blocks are missing": (
        without(r"x_block\.mlp\.fc1\.bias"),
        ("4 missing", "incomplete: tensors were left out"),
    ),
    "a key is renamed": (
        renamed(r"1\.x_block\.mlp\.fc1\.bias", "1.x_block.mlp.fc_1.bias"),
        ("1 missing", "1 unexpected", "renamed: joint_blocks.1.x_block.mlp.fc_1.bias for"),
    ),
    "a whole block is missing": (
        without(r"joint_blocks\.1\."),
        ("missing: joint_blocks.1.", ", ...", "joint_blocks.1 is missing completely"),
    ),
    "the last block is missing": (
        without(r"joint_blocks\.3\."),
        ("Block 2 is the last one in the file", "the blocks after it are missing"),
    ),
    "a block was added behind the last": (
        copied(3, 4),
        ("Block 3 is built as a last block", "blocks were added"),
    ),
    "a block in the middle was put last": (copied(1, 4), ("Block 3 is built as a last block",)),
    "a stray block": (
        renamed(
            r"joint_blocks\.1\.x_block\.mlp\.fc1\.bias", "joint_blocks.999999.x_block.mlp.fc1.bias"
        ),
        ("1 missing", "1 unexpected: joint_blocks.999999", "renamed"),
    ),
    "a matrix is transposed": (
        changed(MLP, lambda t: t.T),
        (f"1 misshapen: {MLP} [192, 384] instead of [384, 192]", "It is transposed"),
    ),
    "rows are cut off": (
        changed(MLP, lambda t: t[:100]),
        ("[100, 192] instead of [384, 192]", "Rows were cut off"),
    ),
    "a scalar in the place of a matrix": (
        changed("context_embedder.weight", lambda t: t[0, 0]),
        ("misshapen: context_embedder.weight [] instead of", "another model, or resized"),
    ),
    "a position table that is not square": (
        changed("pos_embed", lambda t: t[:, :30]),
        ("pos_embed [1, 30, 192] instead of [1, 25, 192]", "position table is not square"),
    ),
    "a key is added": (plus(f"{P}aesthetic.weight"), ("1 unexpected: aesthetic.weight", "added")),
    "a key outside of all prefixes": (plus("strange"), ("1 unexpected: strange", "added")),
    "the second attention of a block is missing": (
        without(r"joint_blocks\.1\.x_block\.attn2"),
        ("6 missing: joint_blocks.1.x_block.attn2.", "tensors of joint_blocks.1 were left out"),
    ),
    "the norms of a block are missing": (
        without(r"joint_blocks\.1\..*\.attn\.ln_"),
        ("4 missing: joint_blocks.1.context_block.attn.ln_q.weight", "tensors of joint_blocks.1"),
    ),
    "an autoencoder without its prefix": (
        plus("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"),
        ("2 unexpected: decoder.up", "those of an autoencoder (original layout)"),
    ),
    "LoRA beside the weights": (
        plus(f"{BLOCK}0.x_block.attn.qkv.lora_A.weight"),
        ("unexpected", "those of a LoRA"),
    ),
    "scales of a quantized model": (
        plus(f"{BLOCK}0.x_block.attn.qkv.comfy_quant", f"{BLOCK}0.x_block.attn.qkv.scale_weight"),
        ("2 unexpected", "those of a quantized model", "plain fp8"),
    ),
    "codes of a quantized model": (
        changed(MLP, lambda t: (100 * t).to(torch.int8)),
        (f"1 not of a floating-point type: {MLP} (I8)", "quantized"),
    ),
    "an optimizer": (plus(f"{P}exp_avg.x"), ("those of the state of an optimizer",)),
    "NaN": (changed(MLP, spoilt(float("nan"))), (f"NaN or infinite: {MLP}", "diverged")),
    "infinity": (changed(MLP, spoilt(-float("inf"))), (f"NaN or infinite: {MLP}", "damaged")),
    "no tensors": (lambda _: {}, ("holds no tensors at all",)),
    "something unknown": (only("a.b", "c"), ("nor any other known model", "a.b, c")),
    "LoRA of PEFT": (
        only("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"),
        ("it holds a LoRA", "only base weights can be loaded"),
    ),
    "LoRA of PEFT, under its own names": (
        only("base_model.model.transformer_blocks.0.attn.to_q.lora_B.default.weight"),
        ("it holds a LoRA",),
    ),
    "LoRA of the bare transformer": (
        only("transformer_blocks.0.attn.add_k_proj.lora_B.weight"),
        ("it holds a LoRA",),
    ),
    "LoRA of kohya": (
        only("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"),
        ("a LoRA",),
    ),
    "LoRA of ComfyUI": (
        only("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_down.weight"),
        ("a LoRA",),
    ),
    "LoKr": (only("lycoris_joint_blocks_0_x_block_attn_qkv.lokr_w1"), ("a LoRA or another",)),
    "an older LoRA of diffusers": (
        only("transformer.transformer_blocks.0.attn.processor.to_q_lora.down.weight"),
        ("a LoRA",),
    ),
    "PEFT, not merged": (
        renamed(r"(attn\.qkv)\.(weight|bias)$", r"\1.base_layer.\2"),
        ("adapters are not merged", "merge_and_unload()", "16 such keys", "Nothing was loaded"),
    ),
    "PEFT, not merged, with its prefix": (
        lambda tensors: (
            {
                "base_model.model." + k.removeprefix(P).replace("fc1.", "fc1.base_layer."): v
                for k, v in tensors.items()
            }
            | {
                "base_model.model.joint_blocks.0.x_block.mlp.fc1.lora_A.default.weight": torch.ones(
                    2
                )
            }
        ),
        ("adapters are not merged",),
    ),
    "a word's embedding": (only("<cat-toy>"), ("textual inversion",)),
    "the embeddings of a word": (only("clip_l", "clip_g"), ("textual inversion",)),
    "an IP-Adapter": (only("image_proj.proj.weight", "ip_adapter.1.to_k"), ("an IP-Adapter",)),
    "an optimizer alone": (only("state.0.exp_avg", "state.0.step"), ("state of an optimizer",)),
    "unknown weights beside the known": (
        only("first_stage_model.encoder.down.0.block.0.conv1.weight", "odd.blocks.0.weight"),
        ("an autoencoder", "it also holds 1 unknown tensors, such as odd.blocks.0"),
    ),
    "an unknown prefix": (
        renamed("^model.diffusion_model.", "my.own."),
        ("there are keys like its own under 'my.own.'", "x.safetensors:my.own"),
    ),
    "two transformers": (
        lambda t: {k.replace(P, new): v for k, v in t.items() for new in ("model.", "ema.")},
        ("holds 2 models of the kind SD3 transformer, under 'ema', 'model'", "x.safetensors:ema"),
    ),
    "a published prefix and a wrapper's": (
        lambda t: {k.replace(P, new): v for k, v in t.items() for new in (P, "ema.")},
        ("holds 2 models of the kind SD3 transformer, under 'model.diffusion_model', 'ema'",),
    ),
    "SDXL": (
        only(f"{P}input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x"),
        ("Stable Diffusion XL",),
    ),
    "a U-Net": (only("down_blocks.0.resnets.0.conv1.weight"), ("a U-Net",)),
    "Flux": (only("double_blocks.0.img_attn.qkv.weight"), ("it holds Flux",)),
    "a ControlNet": (
        only("controlnet_blocks.0.weight", "transformer_blocks.0.attn.qkv.weight"),
        ("a ControlNet: load it with load_controlnet",),
    ),
    "a CLIP": (only("text_model.encoder.layers.0.layer_norm1.weight"), ("a CLIP text tower",)),
    "a T5": (only("encoder.block.0.layer.0.SelfAttention.q.weight"), ("the T5 encoder",)),
}


@pytest.fixture
def transformer(randomize) -> MMDiT:
    """An MMDiT-X of four blocks, two with a second attention, one without, and the last."""
    sizes = {"depth": 4, "width": 192, "num_heads": 3, "context_width": 12, "pooled_width": 10}
    options = {"position_size": 6, "qk_norm": True, "dual_attention": [0, 1]}
    return randomize(MMDiT(**sizes, **options, mlp_ratio=2.0), seed=0)


def write(path: Path, tensors: Tensors) -> Path:
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path


@pytest.mark.few(20)
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_wrong_with_a_transformer(transformer, tmp_path, name):
    mutate, expected = MUTATIONS[name]
    tensors = dict(exported(transformer, "original", prefixed=True))
    path = write(tmp_path / "x.safetensors", mutate(tensors))
    with pytest.raises(UserError) as refusal:
        mmdit.load_mmdit(path)
    message = str(refusal.value)
    assert str(path) in message
    assert all(part in message for part in expected), message

    if "holds 2 models of the kind" not in message and (match := find(open_file(path), "mmdit")):
        before = {
            key: (id(v), v.clone()) for key, v in transformer.state_dict(keep_vars=True).items()
        }
        with pytest.raises(UserError, match="Nothing was loaded"):
            load_into(transformer, match)
        for key, value in transformer.state_dict(keep_vars=True).items():
            assert id(value) == before[key][0] and torch.equal(value, before[key][1]), key


@pytest.mark.parametrize(
    ("name", "mutate", "expected"),
    [
        ("t5", plus("decoder.block.0.layer.0.SelfAttention.q.weight"), "those of a T5 decoder"),
        ("t5", plus("lm_head.weight"), "those of a T5 decoder"),
        (
            "t5",
            lambda tensors: {**tensors, "shared.weight": tensors["shared.weight"] + 1},
            "encoder.embed_tokens.weight and shared.weight are one tensor stored twice",
        ),
        ("t5", without("shared|embed_tokens"), "1 missing: shared.weight"),
        ("clip_g", plus("visual.conv1.weight"), "a CLIP image tower: use the text"),
        ("clip_g", without(r"layers\.1\.self_attn"), "8 missing: text_model.encoder.layers.1.self"),
        ("controlnet", without("controlnet_blocks.1"), "2 missing: controlnet_blocks.1.weight"),
        (
            "controlnet",
            plus("transformer_blocks.0.attn.add_q_proj.weight"),
            "those of the SD3 transformer (diffusers layout)",
        ),
        ("autoencoder", without("encoder.down"), "missing: encoder.down.0.block.0"),
        ("autoencoder", plus("quant_conv.weight"), "1 unexpected: quant_conv.weight"),
    ],
)
def test_what_is_wrong_with_the_others(tiny, tmp_path, name, mutate, expected):
    model = tiny(name)
    own = mmdit.save_single_file(model, tmp_path / "own.safetensors")
    archive = open_file(own)
    tensors = mutate({key: archive[key] for key in archive.infos})
    save_file(tensors, tmp_path / "x.safetensors", archive.metadata)
    with pytest.raises(UserError, match="Nothing was loaded") as refusal:
        Place(tmp_path / "x.safetensors").load(name)
    assert expected in str(refusal.value)


@pytest.mark.parametrize("asked", ["mmdit", "autoencoder", "clip_l", "t5", "controlnet"])
@pytest.mark.parametrize("given", ["mmdit", "autoencoder", "clip_l", "t5", "controlnet"])
def test_one_model_given_as_another(tiny, tmp_path, given, asked):
    what = {
        "mmdit": "it holds the SD3 transformer",
        "autoencoder": "it holds an autoencoder",
        "clip_l": "it holds a CLIP text tower",
        "t5": "it holds the T5 encoder",
        "controlnet": "it holds a ControlNet",
    }
    if given == asked:
        return
    path = mmdit.save_single_file(tiny(given), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=what[given]):
        Place(path).load(asked)


@pytest.mark.few(2)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["mmditx", "autoencoder", "clip_g", "t5", "controlnet"])
def test_any_key_missing_or_misshapen_is_named(tiny, tmp_path, name, layout):
    """No shape that the architecture is read from can break the reader."""
    kind = kind_of(model := tiny(name))
    tensors = dict(exported(model, layout))
    hints = {"clip_g": {"num_heads": 2, "activation": "gelu"}}.get(kind, {})
    format = find(open_file(write(tmp_path / "x.safetensors", tensors)), kind).format
    alternatives = {*format.copies, *format.copies.values(), *format.arguments, format.identity}
    for key in sorted(tensors.keys() - alternatives)[::27]:
        others = {k: v for k, v in tensors.items() if k != key}
        for damaged in ({}, {key: torch.ones(())}, {key: torch.ones(0, 3)}):
            path = write(tmp_path / "x.safetensors", {**others, **damaged})
            with pytest.raises(UserError) as refusal:
                load(open_file(path), kind, hints=hints)
            assert key in str(refusal.value) or "none of the tensors" in str(refusal.value)


def test_weights_of_one_model_with_the_preset_of_another():
    with torch.device("meta"):
        medium = MMDiT(depth=24, width=1536, num_heads=24, qk_norm=True, dual_attention=range(13))
    with pytest.raises(UserError, match=r"sd3-medium does not fit .*: this is sd3.5-medium; use"):
        chosen_preset(medium, "sd3.5_medium.safetensors", "sd3-medium")


def test_heads_that_contradict_the_weights(transformer, tmp_path):
    path = mmdit.save_single_file(transformer, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="num_heads 4 contradicts the weights, which have 3"):
        mmdit.load_mmdit(path, num_heads=4)


def test_heads_that_nothing_tells(tiny, tmp_path, randomize):
    sizes = {"depth": 2, "width": 64, "context_width": 12, "pooled_width": 10, "position_size": 4}
    model = randomize(MMDiT(**sizes, num_heads=4), seed=0)
    path = write(tmp_path / "x.safetensors", dict(exported(model, "original")))
    with pytest.raises(UserError, match=r"does not state the number of heads.*give num_heads="):
        mmdit.load_mmdit(path)
    assert mmdit.load_mmdit(path, num_heads=4).blocks[0].image.attention_in.num_heads == 4


def test_a_description_in_the_header_cannot_contradict_the_shapes(transformer, tmp_path):
    """Shapes win; what is no description, or describes something else, is refused."""
    tensors = dict(exported(transformer, "original"))
    told = {"class": "Pipeline", "depth": 10**9, "position_grid": 3}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"mmdit.descriptions": json.dumps({"mmdit": told})})
    model = mmdit.load_mmdit(path)
    assert describe(model) == {**describe(transformer), "position_grid": 3}
    for damaged in ("{", "[]", '{"mmdit": 3}', '{"mmdit": {"surprise": 1}}'):
        save_file(tensors, path, {"mmdit.descriptions": damaged})
        with pytest.raises(UserError, match=r"x.safetensors.*(damaged|surprise)"):
            mmdit.load_mmdit(path)


def test_a_file_may_not_be_prefixed_in_part(tiny, tmp_path):
    """Bare tensors beside prefixed ones stand for none of them, even where the shape is right."""
    archive = open_file(mmdit.save_single_file(tiny("mmdit"), tmp_path / "own.safetensors"))
    whole = {key: archive[key] for key in archive.infos}
    prefix, some = "model.diffusion_model.", "model.diffusion_model.joint_blocks.0.x_block.mlp."
    bare = {key.removeprefix(prefix): t for key, t in whole.items() if key.startswith(some)}
    one = "x_embedder.proj.bias"
    for tensors, told in (
        (bare | {k: t for k, t in whole.items() if not k.startswith(some)}, "4 missing: joint"),
        (whole | {one: whole[prefix + one] + 1}, f"1 unexpected: {one} (not under {prefix})"),
        (whole | {one: whole[prefix + one], prefix + one: torch.ones(3)}, f"1 unexpected: {one}"),
        (whole | {k.removeprefix(prefix): t + 1 for k, t in whole.items()}, "unexpected: "),
    ):
        save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match="Nothing was loaded") as refusal:
            mmdit.load_mmdit(tmp_path / "x.safetensors")
        assert told in str(refusal.value), refusal.value
