"""Adapter files that nobody should load: each ends in one message, and nothing has happened."""

import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmdit
from mmdit.adapters.adapter import Adapter
from mmdit.adapters.layers import LoRA
from mmdit.adapters.reading import read_adapter
from mmdit.adapters.writing import write_adapter
from mmdit.errors import UserError
from tests.adapters.test_adapters import moved

Tensors = dict[str, Tensor]
Q = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
LYCORIS = "lycoris_transformer_blocks_0_attn_to_q"
CONV = "lycoris_pos_embed_proj"
FUSED = "lora_unet_joint_blocks_0_x_block_attn_qkv"
SECONDS = 5.0  # on a busy machine; most take a hundredth


@pytest.fixture(scope="module")
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published)


@pytest.fixture(scope="module")
def tensors(pipe, tmp_path_factory) -> Tensors:
    """A file that is fine, and has no header."""
    torch.manual_seed(0)
    adapter = moved(Adapter.over(pipe, partial(LoRA, rank=4)))
    path = tmp_path_factory.mktemp("fine") / "a.safetensors"
    found = load_file(write_adapter(adapter, path, dialect="diffusers", root=pipe))
    save_file(found, path)
    read_adapter(path, pipe)
    return found


def assert_refused(pipe: mmdit.Pipeline, path: Path, *parts: str) -> None:
    """One message, quickly, with the file and these parts, and the model is as it was."""
    before = {key: id(value) for key, value in pipe.state_dict(keep_vars=True).items()}
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        pipe.load_lora(path)
    assert time.perf_counter() - start < SECONDS
    message = str(caught.value)
    assert "\n" not in message
    for part in (path.name, *parts):
        assert part in message, message
    after = {key: id(value) for key, value in pipe.state_dict(keep_vars=True).items()}
    assert after == before and pipe.adapters == {}


# --- tensors that are not what they should be ---


def cast(key: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda t: t.update({key: t[key].to(dtype)})


def put(**found: Tensor) -> Callable[[Tensors], object]:
    return lambda t: t.update({key: value.clone() for key, value in found.items()})


def shaped(key: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda t: t.update({key: torch.ones(shape)})


def only(**found: Tensor) -> Callable[[Tensors], object]:
    return lambda t: (t.clear(), t.update(found))


def lokr(stem: str = LYCORIS, /, **factors: tuple[int, ...]) -> Callable[[Tensors], object]:
    return only(**{f"{stem}.lokr_{name}": torch.ones(shape) for name, shape in factors.items()})


TENSORS: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    # dtypes
    "int64 weights": (cast(A, torch.int64), (A, "dtype I64")),
    "int8 weights": (cast(B, torch.int8), (B, "dtype I8")),
    "bool weights": (cast(A, torch.bool), (A, "dtype BOOL")),
    "complex weights": (cast(A, torch.complex64), (A, "dtype C64")),
    "a bool as alpha": (put(**{f"{Q}.alpha": torch.tensor(True)}), (f"{Q}.alpha", "dtype BOOL")),
    # shapes
    "a scalar as matrix": (shaped(A), (A, "0 dimensions")),
    "a vector as matrix": (shaped(B, 64), (B, "1 dimensions")),
    "five dimensions": (shaped(A, 4, 64, 1, 1, 1), (A, "5 dimensions")),
    "a kernel in a linear layer": (shaped(A, 4, 16, 2, 2), (Q, "4 x 16 x 2 x 2", "4 x 64")),
    "no values": (shaped(A, 4, 0), (A, "is empty: it is 4 x 0")),
    "rank 0": (lambda t: t.update({A: t[A][:0], B: t[B][:, :0]}), (A, "is empty")),
    "a rank above the width": (
        put(**{A: torch.ones(65, 64), B: torch.ones(64, 65)}),
        (Q, "rank of 65 is above"),
    ),
    "an enormous rank": (
        put(**{A: torch.ones(100_000, 64), B: torch.ones(64, 100_000)}),
        (A, "far too large for a layer of 64 x 64"),
    ),
    "two alphas in one": (put(**{f"{Q}.alpha": torch.ones(2)}), (f"{Q}.alpha", "one number")),
    "an alpha of no values": (put(**{f"{Q}.alpha": torch.ones(0)}), (f"{Q}.alpha", "is empty")),
    # values
    "alpha 1e30": (put(**{f"{Q}.alpha": torch.tensor(1e30)}), (Q, "alpha is 1e+30", "rank of 4")),
    "alpha 1e-30": (put(**{f"{Q}.alpha": torch.tensor(1e-30)}), (Q, "alpha is 1e-30")),
    "alpha below zero": (put(**{f"{Q}.alpha": torch.tensor([-4])}), (Q, "alpha is -4")),
    "alpha infinite": (put(**{f"{Q}.alpha": torch.tensor(torch.inf)}), (Q, "infinite")),
    "NaN in 8 bits": (
        lambda t: t.update({A: torch.full((4, 64), torch.nan).to(torch.float8_e4m3fn)}),
        (A, "NaN"),
    ),
    # DoRA
    "norms of wrong length": (shaped(f"{Q}.dora_scale", 63, 1), (Q, "63 x 1")),
    "a norm without dimensions": (shaped(f"{Q}.dora_scale"), (f"{Q}.dora_scale", "0 dimensions")),
    "norms alone": (
        only(**{f"{Q}.dora_scale": torch.ones(64, 1)}),
        (Q, "alone is not a change"),
    ),
    "norms of a convolution's channels": (
        only(
            **{
                f"{CONV}.dora_scale": torch.ones(1, 16, 1, 1),
                f"{CONV}.lora_down.weight": torch.ones(2, 16, 2, 2),
                f"{CONV}.lora_up.weight": torch.ones(64, 2, 1, 1),
            }
        ),
        (CONV, "convolution are not supported"),
    ),
    "norms of inputs of a fused layer": (
        only(
            **{
                f"{FUSED}.dora_scale": torch.ones(1, 64),
                f"{FUSED}.lora_down.weight": torch.ones(2, 64),
                f"{FUSED}.lora_up.weight": torch.ones(192, 2),
            }
        ),
        (FUSED, "each input of a fused matrix"),
    ),
    # LoKr
    "blocks that do not divide": (lokr(w1=(5, 4), w2=(16, 16)), (LYCORIS, "80 x 64", "64 x 64")),
    "a missing factor": (lokr(w1=(4, 4)), (LYCORIS, "lokr_w2 is incomplete")),
    "a factor given twice": (
        lokr(w1=(4, 4), w2=(16, 16), w2_a=(16, 2), w2_b=(2, 16)),
        (LYCORIS, "lokr_w2 is incomplete or given twice"),
    ),
    "a factor whole and in three": (
        lokr(CONV, w1=(4, 4), w2=(16, 4, 2, 2), t2=(2, 2, 2, 2)),
        (CONV, "lokr_w2 is incomplete or given twice"),
    ),
    "factors of other ranks": (
        lokr(w1=(4, 4), w2_a=(16, 2), w2_b=(3, 16)),
        (LYCORIS, "rank of lokr_w2 is 2", "3 in the other"),
    ),
    "three matrices that do not fit": (
        lokr(CONV, w1=(4, 4), w2_a=(2, 16), w2_b=(2, 4), t2=(3, 2, 2, 2)),
        (CONV, "lokr_t2 does not fit"),
    ),
    "a change of two kinds": (put(**{f"{Q}.diff": torch.ones(64, 64)}), (Q, "is not a change")),
    # keys
    "the same layer under two prefixes": (
        lambda t: t.update({key.removeprefix("transformer."): t[key].clone() for key in (A, B)}),
        ("changes mmdit.blocks.0.image.attention_in.q, which another layer",),
    ),
    "two adapters in one file": (
        lambda t: t.update({A.replace("_A", "_A.second"): t[A].clone()}),
        (A, "are the same"),
    ),
    "unicode": (
        put(**{"transformer.blöcke.0.\u202eattn.\x1b[31m\n": torch.ones(2)}),
        ("blöcke", r"\u202e", r"\x1b", r"\n", "is not a tensor of an adapter"),
    ),
    "a key that walks attributes": (
        put(**{"__class__.__dict__.lora_A.weight": torch.ones(4, 64)}),
        ("__class__.__dict__", "another architecture"),
    ),
    "no layer at all": (
        only(**{"lora_A.weight": torch.ones(4, 64), "lora_B.weight": torch.ones(64, 4)}),
        ("lora_A.weight", "is not a tensor of an adapter"),
    ),
    "SDXL": (
        only(
            **{
                f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn1_to_q.lora_{end}.weight": (
                    torch.ones(4, 4)
                )
                for i in range(300)
                for end in ("down", "up")
            }
        ),
        ("lora_unet_input_blocks_4_1", "300 of its layers", "another architecture"),
    ),
    "Flux": (
        only(
            **{
                f"transformer.single_transformer_blocks.{i}.proj_mlp.lora_{end}.weight": (
                    torch.ones(4, 4)
                )
                for i in range(38)
                for end in "AB"
            }
        ),
        ("single_transformer_blocks", "38 of its layers", "another architecture"),
    ),
    "a bias": (put(**{f"{Q}.lora_B.bias": torch.ones(64)}), (f"{Q}.lora_B.bias", "biases")),
    "LoHa": (put(**{f"{Q}.hada_w1_a": torch.ones(64, 2)}), (f"{Q}.hada_w1_a", "LoHa")),
    "a third matrix": (
        put(**{f"{Q}.lora_mid.weight": torch.ones(4, 4)}),
        (f"{Q}.lora_mid.weight", "third matrix"),
    ),
    "textual inversion of diffusers": (
        only(**{"<cat>": torch.ones(2, 16)}),
        ("<cat> is of textual inversion",),
    ),
    "textual inversion of another model": (
        only(clip_l=torch.ones(2, 16), clip_g=torch.ones(2, 25)),
        ("text.clip_g.model.token_embedding is 25 in it and 24 here",),
    ),
    "textual inversion with NaN": (
        only(clip_l=torch.full((2, 16), torch.nan)),
        ("clip_l has NaN or infinite values",),
    ),
    "textual inversion of AUTOMATIC1111": (
        only(emb_params=torch.ones(2, 16)),
        ("emb_params is of textual inversion",),
    ),
    "thousands of strange layers": (
        only(**{f"layer.{i}.lora_A.weight": torch.ones(1, 1) for i in range(3_000)}),
        ("3000 of its layers", "another architecture"),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(pipe, tensors, tmp_path, case) -> None:
    change, parts = TENSORS[case]
    found = dict(tensors)
    change(found)
    path = tmp_path / "hostile.safetensors"
    save_file({key: value.contiguous() for key, value in found.items()}, path)
    assert_refused(pipe, path, *parts)


# --- what is stated beside the weights ---

DEEP = '{"a":' * 5_000 + "1" + "}" * 5_000
HEADERS = {
    "a list": ("[1, 2]", ("lora_adapter_metadata is not a table",)),
    "an empty list": ("[]", ("lora_adapter_metadata is not a table",)),
    "not JSON": ("{r: 4}", ("lora_adapter_metadata is not JSON",)),
    "too deep": (DEEP, ("lora_adapter_metadata is not JSON", "too deeply")),
    "without alpha": ('{"transformer.r": 4}', ("mmdit: lora_alpha is missing",)),
    "of another adapter": ('{"transformer.peft_type": "LOHA"}', ("peft_type is 'LOHA'",)),
}
SETTINGS = {
    "another rank": ({"r": 8}, ("rank 4, but 8 is stated",)),
    "half a rank": ({"r": 4.5}, ("r is 4.5, not a positive whole number",)),
    "rank 0": ({"r": 0}, ("r is 0",)),
    "a rank of true": ({"r": True}, ("r is True",)),
    "an enormous rank": ({"r": 10**400}, ("r is 1000",)),
    "alpha NaN": ({"lora_alpha": float("nan")}, ("lora_alpha is nan",)),
    "alpha infinite": ({"lora_alpha": float("inf")}, ("lora_alpha is inf",)),
    "alpha 1e30": ({"lora_alpha": 1e30}, ("lora_alpha is 1e+30",)),
    "an enormous alpha": ({"lora_alpha": 10**400}, ("lora_alpha is 1000",)),
    "alpha below zero": ({"lora_alpha": -4}, ("lora_alpha is -4",)),
    "a text as alpha": ({"lora_alpha": "4"}, ("lora_alpha is '4'",)),
    "alpha above all scales": ({"lora_alpha": 900_000}, ("alpha is 900000 of a rank of 4",)),
    "a list as pattern": ({"alpha_pattern": [1]}, ("alpha_pattern is [1], not a table",)),
    "alpha 0 in a pattern": ({"alpha_pattern": {"to_q": 0}}, ("alpha_pattern of to_q is 0",)),
    "another rank in a pattern": ({"rank_pattern": {"to_q": 7}}, ("to_q", "but 7 is stated")),
    "a pattern without an end": ({"rank_pattern": {"(a+)+$": 7}}, ("(a+)+$", "intricate")),
    "a pattern that is none": ({"rank_pattern": {"to_[q": 7}}, ("to_[q", "not a pattern")),
    "many patterns": (
        {"rank_pattern": {f"a*b{i}*": 7 for i in range(99)}},
        ("rank_pattern has more than 10 regular expressions",),
    ),
    "DoRA without norms": ({"use_dora": True}, ("no norms (DoRA)", "use_dora=True")),
    "whole layers beside": ({"modules_to_save": ["proj_out"]}, ("modules_to_save=['proj_out']",)),
    "biases": ({"bias": "all"}, ("bias=all",)),
    "a transposed layer": ({"fan_in_fan_out": True}, ("fan_in_fan_out=True",)),
    "PiSSA": ({"init_lora_weights": "pissa"}, ("init_lora_weights=pissa",)),
    "repeated layers": ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
    "IA3": ({"peft_type": "IA3"}, ("peft_type is 'IA3'",)),
    "LoKr": ({"peft_type": "LOKR"}, ("peft_type is 'LOKR'",)),
}
CONFIGS = {
    "a list": ("[]", ("is not a description of an adapter",)),
    "a DreamBooth config": ('{"instance_prompt": "a dog"}', ("has no peft_type",)),
    "not JSON": ("{", ("cannot be read as JSON",)),
    "too deep": (DEEP, ("cannot be read as JSON", "too deeply")),
    "not text": (b"\xff\xfe\x00", ("cannot be read as JSON",)),
    "enormous": (b" " * (9 << 20), ("larger than",)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(pipe, tensors, tmp_path, case) -> None:
    text, parts = HEADERS[case]
    path = tmp_path / "hostile.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": text})
    assert_refused(pipe, path, *parts)


@pytest.mark.parametrize("where", ["header", "folder"])
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_refused(pipe, tensors, tmp_path, case, where) -> None:
    changed, parts = SETTINGS[case]
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **changed}
    if where == "header":
        path = tmp_path / "hostile.safetensors"
        stated = {f"transformer.{key}": value for key, value in settings.items()}
        save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(stated)})
    else:
        path = tmp_path
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(settings))
    assert_refused(pipe, path, *parts)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(pipe, tensors, tmp_path, case) -> None:
    content, parts = CONFIGS[case]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "adapter_config.json").write_bytes(content)
    assert_refused(pipe, tmp_path, "adapter_config.json", *parts)


# --- files that are none ---


def header(path: Path, entries: object, size: int = 0) -> None:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)  # with a hole in it


def entry(size: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}


FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "nothing": (lambda p: p.write_bytes(b""), ("it is empty",)),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({A: 1})), ("it is a pickle",)),
    "a web page": (lambda p: p.write_text("<!DOCTYPE html>"), ("web page",)),
    "a header alone": (lambda p: header(p, {A: entry(1024, 4, 64)}), ("cut off",)),
    "a header of another size": (
        lambda p: header(p, {A: entry(1024, 10**9, 64)}, 1024),
        ("is damaged",),
    ),
    "a size below zero": (lambda p: header(p, {A: entry(1024, -4, -64)}, 1024), ("damaged",)),
    "a size beyond 64 bits": (lambda p: header(p, {A: entry(1024, 2**70)}, 1024), ("damaged",)),
    "a hundred thousand keys": (
        lambda p: header(p, {f"{i}.lora_A.weight": entry(4, 1) for i in range(100_000)}, 4),
        ("damaged header", "parts"),
    ),
    "an unknown dtype": (
        lambda p: header(p, {A: {**entry(1024, 4, 64), "dtype": "Q4"}}, 1024),
        ("damaged",),
    ),
    "a rank of ten million": (
        lambda p: header(p, {A: entry(4 * 64 * 10**7, 10**7, 64)}, 4 * 64 * 10**7),
        (A, "far too large"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_refused(pipe, tmp_path, case) -> None:
    write, parts = FILES[case]
    path = tmp_path / "hostile.safetensors"
    write(path)
    assert_refused(pipe, path, *parts)


def test_a_file_that_was_cut_off_is_refused(pipe, tensors, tmp_path) -> None:
    path = tmp_path / "hostile.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(pipe, path, "cut off")


def test_a_pickle_is_refused(pipe, tensors, tmp_path) -> None:
    torch.save(tensors, tmp_path / "hostile.pt")
    assert_refused(pipe, tmp_path / "hostile.pt", "is a pickle, which can run code")


# --- what looks strange, and is right ---


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
@pytest.mark.parametrize("stem", [Q, FUSED, "transformer.norm_out.linear"])
def test_every_float_is_read(pipe, tmp_path, dtype, stem) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {Q: 64, FUSED: 192}.get(stem, 128)
    down, up = torch.randn(3, 64, generator=generator), torch.randn(rows, 3, generator=generator)
    down, up = down.to(dtype), up.to(dtype)
    path = tmp_path / "a.safetensors"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, path)
    read = read_adapter(path, pipe)
    found = [c.of_weight(pipe.get_submodule(n).weight) for n, c in read.changes.items()]
    expected = up.double() @ down.double()
    if stem.endswith("norm_out.linear"):
        expected = torch.cat([*expected.chunk(2)][::-1])
    torch.testing.assert_close(torch.cat(found).double(), expected, atol=1e-5, rtol=1e-5)
    pipe.load_lora(read)
    assert pipe.mmdit(*images()).isfinite().all()
    pipe.unload_lora()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e5m2], ids=str)
def test_dtypes_may_differ_within_a_layer(pipe, tensors, tmp_path, dtype) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**tensors, A: tensors[A].to(dtype)}, path)
    at = "mmdit.blocks.0.image.attention_in.q"
    found = read_adapter(path, pipe).changes[at].of_weight(pipe.get_submodule(at).weight)
    expected = tensors[B].double() @ tensors[A].to(dtype).double()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    factors = {"w1": torch.ones(4, 4), "w2_a": torch.ones(16, 2), "w2_b": torch.ones(2, 16)}
    factors["w2_b"] = factors["w2_b"].to(dtype)
    save_file({f"{LYCORIS}.lokr_{name}": factor for name, factor in factors.items()}, path)
    found = read_adapter(path, pipe).changes[at].of_weight(pipe.get_submodule(at).weight)
    assert (found == 2).all()


def images() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    z, vector, context = (
        torch.randn(1, *shape, generator=generator) for shape in ((16, 8, 8), (40,), (97, 48))
    )
    return z, torch.tensor([0.3]), vector, context


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor([[2.0]])])
def test_alpha_may_be_an_integer_or_in_a_list(pipe, tensors, tmp_path, alpha) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**tensors, f"{Q}.alpha": alpha}, path)
    found = read_adapter(path, pipe).changes["mmdit.blocks.0.image.attention_in.q"]
    assert found.scale == 0.5


def test_alpha_is_not_rounded_as_weights_are(pipe, tensors, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    found = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    save_file({**found, f"{Q}.alpha": torch.tensor(3.3)}, path)
    change = read_adapter(path, pipe).changes["mmdit.blocks.0.image.attention_in.q"]
    assert change.scale == pytest.approx(3.3 / 4, rel=1e-6)


def test_an_adapter_that_changes_nothing_is_named(pipe, tensors, tmp_path, caplog) -> None:
    path = tmp_path / "zero.safetensors"
    save_file({key: t.zero_() if "lora_B" in key else t for key, t in tensors.items()}, path)
    read_adapter(path, pipe)
    assert "changes nothing" in caplog.text
