"""Adapter files of all programs: each gives the same weights, and nothing is passed over."""

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmdit
from mmdit.adapters.adapter import Adapter
from mmdit.adapters.layers import Change, DoRA, LoKr, LoRA, dora
from mmdit.adapters.reading import read_adapter
from mmdit.adapters.writing import DIALECTS, write_adapter
from mmdit.errors import UserError
from tests.adapters.test_adapters import moved

PREFIX = "transformer."


@pytest.fixture(scope="module")
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published)


def made(pipe: mmdit.Pipeline, make: Callable[..., Change], **targets: object) -> Adapter:
    torch.manual_seed(0)
    adapter = Adapter.over(pipe, make, **targets)  # type: ignore[arg-type]
    moved(adapter)
    return adapter


def deltas(pipe: mmdit.Pipeline, adapter: Adapter) -> dict[str, Tensor]:
    return {
        name: change.of_weight(pipe.get_submodule(name).weight)
        for name, change in adapter.changes.items()
    }


def assert_same(pipe: mmdit.Pipeline, found: Adapter, wanted: Adapter) -> None:
    ours, theirs = deltas(pipe, found), deltas(pipe, wanted)
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(ours[name], delta, atol=1e-6, rtol=1e-5)


# --- written here, read here ---


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_written_is_read(pipe, tmp_path, dialect, targets, kind) -> None:
    make = {"lora": partial(LoRA, rank=3, alpha=2.0), "dora": partial(dora, rank=2)}[kind]
    adapter = made(pipe, make, targets=targets)
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect=dialect, root=pipe)
    assert_same(pipe, read_adapter(path, pipe), adapter)


@pytest.mark.parametrize("dialect", ["diffusers", "sd-scripts", "comfyui"])
def test_text_encoders_are_written_too(pipe, tmp_path, dialect) -> None:
    parts = ["mmdit", "clip_l", "clip_g", *(["t5"] if dialect != "diffusers" else [])]
    adapter = made(pipe, partial(LoRA, rank=2), targets="attention+mlp", parts=parts)
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect=dialect, root=pipe)
    assert_same(pipe, read_adapter(path, pipe), adapter)


@pytest.mark.parametrize(
    "make",
    [
        partial(LoKr, factor=4, rank=2),
        partial(LoKr, factor=4),
        partial(LoKr, factor=8, rank=2, first_rank=1, alpha=3.0),
        lambda **widths: DoRA(change=LoKr(factor=4, **widths)),
    ],
)
@pytest.mark.parametrize("targets", ["attention+mlp", "all"])
def test_lokr_is_written_for_comfyui(pipe, tmp_path, make, targets) -> None:
    adapter = made(pipe, make, targets=targets)
    path = tmp_path / "a.safetensors"
    if isinstance(next(iter(adapter.changes.values())), DoRA) and targets == "all":
        with pytest.raises(UserError, match="DoRA over LoKr has no keys here"):
            write_adapter(adapter, path, dialect="comfyui", root=pipe)
        return
    write_adapter(adapter, path, dialect="comfyui", root=pipe)
    assert_same(pipe, read_adapter(path, pipe), adapter)
    with pytest.raises(UserError, match="choose comfyui"):
        write_adapter(adapter, path, dialect="diffusers", root=pipe)


def test_ranks_that_differ_are_stated_layer_by_layer(pipe, tmp_path) -> None:
    one = made(pipe, partial(LoRA, rank=2, alpha=1.0), blocks=[0])
    two = made(pipe, partial(LoRA, rank=4, alpha=12.0), blocks=[1, 2], targets="all")
    adapter = Adapter(changes={**one.changes, **two.changes})
    for dialect in DIALECTS:
        path = write_adapter(
            adapter, tmp_path / f"{dialect}.safetensors", dialect=dialect, root=pipe
        )
        assert_same(pipe, read_adapter(path, pipe), adapter)


def test_some_of_q_k_v_alone_can_be_fused(pipe, tmp_path) -> None:
    whole = made(pipe, partial(LoRA, rank=2, alpha=3.0))
    some = {n: c for n, c in whole.changes.items() if n.endswith((".q", ".v"))}
    some["mmdit.blocks.0.image.attention_in.q"] = moved(
        LoRA(inputs=64, outputs=64, rank=5, alpha=1.0)
    )
    adapter = Adapter(changes=some)
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect="sd-scripts", root=pipe)
    read = read_adapter(path, pipe)
    keys = {n: c for n, c in read.changes.items() if n.endswith(".k")}
    assert all(not delta.any() for delta in deltas(pipe, Adapter(changes=keys)).values())
    rest = {n: c for n, c in read.changes.items() if n not in keys}
    assert_same(pipe, Adapter(changes=rest), adapter)


# --- every spelling that is about ---


def spelled(pipe, tmp_path, alpha: float = 2.0) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter, and its file in diffusers' spelling, without alpha."""
    adapter = made(pipe, partial(LoRA, rank=4, alpha=alpha))
    folder = write_adapter(adapter, tmp_path / "spelled", dialect="peft", root=pipe)
    tensors = load_file(folder / "adapter_model.safetensors")
    return adapter, {key.replace("base_model.model.", PREFIX): t for key, t in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], prefix: str, down: str, up: str) -> dict[str, Tensor]:
    found = {}
    for key, tensor in tensors.items():
        stem, end = key.removeprefix(PREFIX).split(".lora_")
        stem = stem.replace(".", "_") if prefix.endswith("_") else stem
        found[f"{prefix}{stem}.{down if end.startswith('A') else up}.weight"] = tensor.clone()
    return found


def with_alpha(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    stems = {key.removesuffix(".weight").rpartition(".lora")[0] for key in tensors}
    return {**tensors, **{f"{stem}.alpha": torch.tensor(alpha) for stem in stems}}


SPELLINGS = {
    "diffusers": ("transformer.", "lora_A", "lora_B", False),
    "old diffusers": ("transformer.", "lora.down", "lora.up", False),
    "old diffusers with alpha": ("transformer.", "lora.down", "lora.up", True),
    "diffusers with alpha": ("transformer.", "lora_A", "lora_B", True),
    "peft state dict": ("", "lora_A", "lora_B", False),
    "peft state dict with its adapter": ("", "lora_A.default", "lora_B.default", False),
    "mixed tools": ("transformer.", "lora_down", "lora_up", True),
    "PeftModel.save_pretrained": ("base_model.model.", "lora_A", "lora_B", False),
    "OneTrainer": ("lora_transformer_", "lora_down", "lora_up", True),
    "LyCORIS": ("lycoris_", "lora_down", "lora_up", True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_diffusers_layers(pipe, tmp_path, spelling) -> None:
    prefix, down, up, has_alpha = SPELLINGS[spelling]
    adapter, tensors = spelled(pipe, tmp_path, alpha=2.0 if has_alpha else 4.0)
    tensors = renamed(tensors, prefix, down, up)
    save_file(with_alpha(tensors, 2.0) if has_alpha else tensors, tmp_path / "a.safetensors")
    assert_same(pipe, read_adapter(tmp_path / "a.safetensors", pipe), adapter)


def fused(adapter: Adapter, prefix: str, down: str, up: str, *, third: bool) -> dict[str, Tensor]:
    """As sd-scripts writes Q, K and V that were trained apart: by hand, from its source."""
    found: dict[str, Tensor] = {}
    changes = adapter.changes
    for name, change in changes.items():
        if not name.endswith(".q"):
            continue
        block = name.removeprefix("mmdit.").replace(".image.", ".x_block.")
        block = block.replace(".text.", ".context_block.").replace("last_block.", "blocks.2.")
        block = block.replace("attention2_in.q", "attn2.qkv").replace("attention_in.q", "attn.qkv")
        stem = f"joint_{block}".replace(".", "_" if prefix.endswith("_") else ".")
        three = [changes[name[:-1] + part] for part in "qkv"]
        found[f"{prefix}{stem}.{down}.weight"] = torch.cat([c.down.weight for c in three])
        found[f"{prefix}{stem}.{up}.weight"] = torch.block_diag(*(c.up.weight for c in three))
        alpha = change.scale * change.rank
        found[f"{prefix}{stem}.alpha"] = torch.tensor(alpha if third else 3 * alpha)
    return {key: value.detach().clone() for key, value in found.items()}


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("lora_unet_", "lora_down", "lora_up"),
        ("diffusion_model.", "lora_A", "lora_B"),
        ("model.diffusion_model.", "lora_A", "lora_B"),
        ("lycoris_", "lora_down", "lora_up"),
    ],
)
def test_every_spelling_of_the_single_files_layers(pipe, tmp_path, prefix, down, up) -> None:
    whole = made(pipe, partial(LoRA, rank=4, alpha=2.0))
    qkv = {n: c for n, c in whole.changes.items() if n[-2:] in (".q", ".k", ".v")}
    adapter = Adapter(changes=qkv)
    save_file(fused(adapter, prefix, down, up, third=False), tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors", pipe)
    assert_same(pipe, read, adapter)
    assert {c.rank for c in read.changes.values()} == {4}  # not 12: what others use was zero


def test_a_file_at_a_third_of_its_strength_is_named(pipe, tmp_path, caplog) -> None:
    whole = made(pipe, partial(LoRA, rank=4, alpha=2.0))
    qkv = Adapter(changes={n: c for n, c in whole.changes.items() if n[-2:] in (".q", ".k", ".v")})
    right = fused(qkv, "lora_unet_", "lora_down", "lora_up", third=False)
    wrong = fused(qkv, "lora_unet_", "lora_down", "lora_up", third=True)
    stated = {"ss_network_dim": "4", "ss_network_alpha": "2.0"}
    for tensors, metadata, warned in ((right, stated, False), (wrong, stated, True)):
        caplog.clear()
        save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
        with caplog.at_level(logging.WARNING, logger="mmdit"):
            read = read_adapter(tmp_path / "a.safetensors", pipe)
        assert ("a third of the strength" in caplog.text) == warned
    third = {n: d / 3 for n, d in deltas(pipe, qkv).items()}
    for name, delta in deltas(pipe, read).items():  # as other programs, which do not warn
        torch.testing.assert_close(delta, third[name])
    # Without metadata, other layers of the file show what its rank and alpha are.
    other = whole.changes["mmdit.blocks.0.image.attention_out"]
    stem = "lora_unet_joint_blocks_0_x_block_attn_proj"
    wrong[f"{stem}.lora_down.weight"] = other.down.weight.detach()
    wrong[f"{stem}.lora_up.weight"] = other.up.weight.detach()
    wrong[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(wrong, tmp_path / "a.safetensors")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mmdit"):
        read_adapter(tmp_path / "a.safetensors", pipe)
    assert "a third of the strength" in caplog.text


def test_peft_states_alpha_beside_the_weights(pipe, tmp_path) -> None:
    adapter = made(pipe, partial(LoRA, rank=4, alpha=8.0))
    folder = write_adapter(adapter, tmp_path / "peft", dialect="peft", root=pipe)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")
    assert_same(pipe, read_adapter(folder, pipe), adapter)
    config |= {"use_rslora": True, "lora_alpha": 4.0}  # over the root of the rank
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert_same(pipe, read_adapter(folder, pipe), adapter)


def test_lokr_of_a_fused_layer_is_cut_where_that_is_exact(pipe, tmp_path) -> None:
    torch.manual_seed(0)
    stem = "lycoris_joint_blocks_0_x_block_attn_qkv"
    at = "mmdit.blocks.0.image.attention_in"
    for first, kinds in ((torch.randn(6, 4), LoKr), (torch.randn(8, 4), object)):
        second = torch.randn(192 // len(first), 16)
        save_file({f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second}, tmp_path / "a.safetensors")
        read = read_adapter(tmp_path / "a.safetensors", pipe)
        assert all(isinstance(change, kinds) for change in read.changes.values())
        expected = torch.kron(first, second).chunk(3)
        for part, delta in zip("qkv", expected, strict=True):
            torch.testing.assert_close(deltas(pipe, read)[f"{at}.{part}"], delta)


@pytest.mark.parametrize("second", ["whole", "of two", "of three"])
@pytest.mark.parametrize("norms", [None, "of outputs"])
def test_lokr_of_a_convolution_value_by_value(pipe, tmp_path, second, norms) -> None:
    """As LyCORIS computes it in training, here written out for each weight of the kernel."""
    torch.manual_seed(0)
    stem, at, rank, alpha = "lycoris_pos_embed_proj", "mmdit.patch_embedding.proj", 2, 3.0
    w1 = torch.randn(4, 4)  # of 64 = 4 x 16 outputs and 16 = 4 x 4 channels
    a, b = torch.randn(16, rank), torch.randn(rank, 4, 2, 2)
    t, p, q = torch.randn(rank, rank, 2, 2), torch.randn(rank, 16), torch.randn(rank, 4)
    whole = torch.randn(16, 4, 2, 2)
    keys, w2 = {
        "whole": ({"lokr_w2": whole}, lambda o, i, x, y: whole[o, i, x, y]),
        "of two": (
            {"lokr_w2_a": a, "lokr_w2_b": b.flatten(1)},
            lambda o, i, x, y: a[o] @ b[:, i, x, y],
        ),
        "of three": (
            {"lokr_t2": t, "lokr_w2_a": p, "lokr_w2_b": q},
            lambda o, i, x, y: p[:, o] @ t[:, :, x, y] @ q[:, i],
        ),
    }[second]
    scale = 1.0 if second == "whole" else alpha / rank
    expected = torch.empty(64, 16, 2, 2)
    for o, i, x, y in itertools.product(range(64), range(16), range(2), range(2)):
        expected[o, i, x, y] = scale * w1[o // 16, i // 4] * w2(o % 16, i % 4, x, y)
    found = {**keys, "lokr_w1": w1, "alpha": torch.tensor(alpha)}
    weight = pipe.get_submodule(at).weight.detach()
    changed = weight + expected.flatten(1)
    if norms:
        found["dora_scale"] = torch.rand(64, 1, 1, 1)
        changed = changed / changed.norm(dim=1, keepdim=True) * found["dora_scale"].flatten(1)
    save_file({f"{stem}.{k}": v.clone() for k, v in found.items()}, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors", pipe)
    torch.testing.assert_close(weight + deltas(pipe, read)[at], changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(256, 1), (1, 64)])
def test_norms_of_outputs_and_of_inputs_as_lycoris_has_them(pipe, tmp_path, shape) -> None:
    torch.manual_seed(0)
    stem, at = "lycoris_transformer_blocks_0_ff_net_0_proj", "mmdit.blocks.0.image.mlp.fc1"
    down, up, norms = torch.randn(2, 64), torch.randn(256, 2), torch.rand(shape)
    found = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": norms}
    found["alpha"] = torch.tensor(1.0)
    save_file({f"{stem}.{k}": v for k, v in found.items()}, tmp_path / "a.safetensors")
    weight = pipe.get_submodule(at).weight.detach()
    changed = weight + 0.5 * up @ down
    changed *= norms / (changed * changed).sum(1 if shape[1] == 1 else 0, keepdim=True).sqrt()
    delta = deltas(pipe, read_adapter(tmp_path / "a.safetensors", pipe))[at]
    torch.testing.assert_close(weight + delta, changed, atol=1e-6, rtol=1e-5)


def test_swapped_halves_are_swapped_back(pipe, tmp_path) -> None:
    """diffusers stores scale and shift of two layers the other way round."""
    at = {"mmdit.output.modulation.linear": "norm_out.linear"}
    at["mmdit.last_block.text.modulation.linear"] = "transformer_blocks.2.norm1_context.linear"
    torch.manual_seed(0)
    for ours, theirs in at.items():
        up, down = torch.randn(128, 2), torch.randn(2, 64)
        keys = {
            f"transformer.{theirs}.lora_A.weight": down,
            f"transformer.{theirs}.lora_B.weight": up,
        }
        save_file(keys, tmp_path / "a.safetensors")
        delta = deltas(pipe, read_adapter(tmp_path / "a.safetensors", pipe))[ours]
        torch.testing.assert_close(delta, torch.cat([*(up @ down).chunk(2)][::-1]))


def test_the_patch_embedding_may_be_a_convolution(pipe, tmp_path) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(3, 16, 2, 2), torch.randn(64, 3, 1, 1)
    keys = {"lora_unet_x_embedder_proj.lora_down.weight": down}
    keys["lora_unet_x_embedder_proj.lora_up.weight"] = up
    save_file(keys, tmp_path / "a.safetensors")
    found = deltas(pipe, read_adapter(tmp_path / "a.safetensors", pipe))
    expected = torch.einsum("orxy,rchw->ochw", up, down).flatten(1)
    torch.testing.assert_close(found["mmdit.patch_embedding.proj"], expected)


# --- what is refused ---

Q = "transformer.transformer_blocks.0.attn.to_q"


def mutations() -> dict[str, tuple[Callable[[dict[str, Tensor]], object], str]]:
    def swap(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
        return lambda t: t.update({key: value(t[key])})

    a, b = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
    deeper = a.replace("blocks.0", "blocks.30")
    return {
        "a missing half": (lambda t: t.pop(b), "its up matrix is missing"),
        "another rank": (swap(a, lambda x: x[:3]), "its rank is 3 in the down matrix and 4"),
        "another width": (
            swap(a, lambda x: x[:, :60].contiguous()),
            "down matrix is 4 x 60 where.*4 x 64",
        ),
        "another block": (
            lambda t: t.update({deeper: t.pop(a), deeper.replace("_A", "_B"): t.pop(b)}),
            "more or other blocks",
        ),
        "another architecture": (
            lambda t: t.update({"unet.down_blocks.0.attn1.to_q.lora_A.weight": t[a]}),
            "another architecture",
        ),
        "NaN": (swap(a, lambda x: x * float("nan")), "has NaN or infinite values"),
        "infinity": (swap(b, lambda x: x + float("inf")), "has NaN or infinite values"),
        "alpha 0": (lambda t: t.update({f"{Q}.alpha": torch.tensor(0.0)}), "alpha is 0"),
        "alpha NaN": (lambda t: t.update({f"{Q}.alpha": torch.tensor(torch.nan)}), "NaN"),
        "two alphas": (
            lambda t: t.update({f"{Q}.alpha": torch.tensor(1.0)}),
            "alpha is 1, but 4 is",
        ),
        "alpha alone": (
            lambda t: t.update({"transformer.proj_out.alpha": torch.tensor(1.0)}),
            "alpha alone is not a change",
        ),
        "rank 0": (lambda t: t.update({a: t[a][:0], b: t[b][:, :0]}), "is empty: it is 0 x 64"),
        "a weight of the model": (
            lambda t: t.update({"transformer.proj_out.weight": torch.zeros(64, 64)}),
            "is not a tensor of an adapter",
        ),
        "LoHa": (lambda t: t.update({f"{Q}.hada_w1_a": torch.zeros(2, 2)}), "is of LoHa"),
        "an attribute walk": (
            lambda t: t.update({"__class__.__init__.__globals__.lora_A.weight": t[a]}),
            "another architecture",
        ),
        "the same twice": (
            lambda t: t.update({f"{Q}.lora.down.weight": t[a].clone()}),
            "are the same",
        ),
    }


@pytest.mark.parametrize("mutation", mutations())
def test_a_mutated_file_is_refused(pipe, tmp_path, mutation) -> None:
    change, message = mutations()[mutation]
    adapter = made(pipe, partial(LoRA, rank=4, alpha=2.0))
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect="diffusers", root=pipe)
    with mmdit.checkpoints.archive.safe_open(path, framework="pt") as file:
        metadata = {"lora_adapter_metadata": file.metadata()["lora_adapter_metadata"]}
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata=metadata)
    with pytest.raises(UserError, match=message):
        read_adapter(path, pipe)


def test_what_is_no_adapter_is_refused(pipe, tmp_path, tiny_published) -> None:
    with pytest.raises(UserError, match="is not a tensor of an adapter; weights of a model"):
        read_adapter(tiny_published / "transformer/diffusion_pytorch_model.safetensors", pipe)
    with pytest.raises(UserError, match="is not an adapter: a folder of PEFT holds"):
        read_adapter(tiny_published, pipe)
    with pytest.raises(UserError, match="there is no such file"):
        read_adapter(tmp_path / "none.safetensors", pipe)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="is empty"):
        read_adapter(tmp_path / "empty.safetensors", pipe)
    adapter = made(pipe, partial(LoRA, rank=4))
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect="diffusers", root=pipe)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError):
        read_adapter(path, pipe)
