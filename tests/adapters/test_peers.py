"""PEFT and diffusers as judges: what is written here works there, and the other way round."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import mmdit
from mmdit.adapters.adapter import Adapter
from mmdit.adapters.layers import Change, LoRA, dora
from mmdit.adapters.writing import write_adapter
from tests.adapters.test_adapters import moved

MAKES: dict[str, Callable[..., Change]] = {
    "lora": partial(LoRA, rank=3, alpha=2.0),
    "dora": partial(dora, rank=3, alpha=2.0),
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
ENCODERS = {f"text_encoder{n}": None for n in ("", "_2", "_3")}
WITHOUT_TEXT = {**ENCODERS, **{f"tokenizer{n}": None for n in ("", "_2", "_3")}}


# Imported once they are needed: both take seconds.
@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def peft() -> ModuleType:
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published, t5_length=20)


@pytest.fixture
def network(diffusers: ModuleType, tiny_published: Path) -> nn.Module:
    return diffusers.SD3Transformer2DModel.from_pretrained(tiny_published, subfolder="transformer")


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, times, vectors and contexts."""
    generator = torch.Generator().manual_seed(5)
    z, vector, context = (
        torch.randn(2, *shape, generator=generator) for shape in ((16, 8, 8), (40,), (97, 48))
    )
    return z, torch.tensor([0.3, 0.8]), vector, context


@torch.no_grad()
def ours(pipe: mmdit.Pipeline) -> Tensor:
    return pipe.mmdit(*inputs())


@torch.no_grad()
def theirs(network: nn.Module) -> Tensor:
    z, t, vector, context = inputs()
    return network(
        hidden_states=z,
        timestep=1000 * t,
        pooled_projections=vector,
        encoder_hidden_states=context,
        return_dict=False,
    )[0]


def adapted_by_peft(*modules: nn.Module) -> list[str]:
    """The layers that have a change which is not zero."""
    from peft.tuners.lora import LoraLayer

    return [
        name
        for module in modules
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer) and all(up.weight.any() for up in layer.lora_B.values())
    ]


def assert_same(actual: Tensor, expected: Tensor, base: Tensor) -> None:
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# --- from here to there ---


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("lora", "attention"),
        ("dora", "all"),
        ("lora", "all"),
        ("dora", "attention"),
        ("lora", "attention+mlp"),
        ("dora", "attention+mlp"),
    ],
)
def test_a_network_in_diffusers_and_in_peft(
    diffusers, peft, pipe, network, tiny_published, tmp_path, kind, targets
) -> None:
    base = ours(pipe)
    torch.testing.assert_close(theirs(network), base, atol=1e-4, rtol=1e-4)
    adapter = moved(Adapter.over(pipe, MAKES[kind], targets=targets))
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect="diffusers", root=pipe)
    folder = write_adapter(adapter, tmp_path / "peft", dialect="peft", root=pipe)
    pipe.load_lora(adapter)
    expected = ours(pipe)
    pipe.unload_lora()
    in_peft = peft.PeftModel.from_pretrained(network, folder)
    assert len(adapted_by_peft(in_peft)) == len(adapter.changes)
    assert_same(theirs(in_peft), expected, base)
    whole = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_published, **WITHOUT_TEXT)
    whole.load_lora_weights(str(path))
    assert len(adapted_by_peft(whole.transformer)) == len(adapter.changes)
    assert_same(theirs(whole.transformer), expected, base)


def test_ranks_and_alphas_of_each_layer_in_peft(peft, pipe, network, tmp_path) -> None:
    base = ours(pipe)
    few = Adapter.over(pipe, partial(LoRA, rank=2, alpha=1.0), blocks=[0])
    many = Adapter.over(pipe, partial(LoRA, rank=4, alpha=12.0), blocks=[1, 2], targets="all")
    adapter = moved(Adapter(changes={**few.changes, **many.changes}))
    folder = write_adapter(adapter, tmp_path / "peft", dialect="peft", root=pipe)
    pipe.load_lora(adapter)
    expected = ours(pipe)
    pipe.unload_lora()
    in_peft = peft.PeftModel.from_pretrained(network, folder)
    assert len(adapted_by_peft(in_peft)) == len(adapter.changes)
    assert_same(theirs(in_peft), expected, base)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", MAKES)
def test_text_encoders_in_diffusers(diffusers, peft, pipe, tiny_published, tmp_path, kind) -> None:
    parts = ["mmdit", "clip_l", "clip_g"]
    adapter = moved(Adapter.over(pipe, MAKES[kind], targets="attention+mlp", parts=parts))
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect="diffusers", root=pipe)
    whole = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_published)
    whole.load_lora_weights(str(path))
    found = adapted_by_peft(whole.transformer, whole.text_encoder, whole.text_encoder_2)
    assert len(found) == len(adapter.changes)
    with torch.no_grad():
        context, _, vector, _ = whole.encode_prompt(
            "a red cat", None, None, do_classifier_free_guidance=False, max_sequence_length=20
        )
    base = pipe.encode(["a red cat"])
    pipe.load_lora(adapter)
    condition = pipe.encode(["a red cat"])
    pipe.unload_lora()
    assert_same(context, condition.c_ctxt, base.c_ctxt)
    assert_same(vector, condition.c_vec, base.c_vec)


def test_the_header_is_not_needed_for_the_strength(pipe, tmp_path) -> None:
    """Other programs, and diffusers before 0.34, take alpha for the rank."""
    adapter = moved(Adapter.over(pipe, partial(LoRA, rank=4, alpha=1.0)))
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect="diffusers", root=pipe)
    with safe_open(path, framework="pt") as file:
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
        stem = "transformer.transformer_blocks.0.attn.to_q"
        down, up = (file.get_tensor(f"{stem}.lora_{end}.weight") for end in "AB")
    assert stated["transformer.r"] == stated["transformer.lora_alpha"] == 4
    at = "mmdit.blocks.0.image.attention_in.q"
    delta = adapter.changes[at].of_weight(pipe.get_submodule(at).weight)
    torch.testing.assert_close(up @ down, delta)


# --- from there to here ---

CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 10},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "lora_alpha": 3,
        "rank_pattern": {
            "to_q": 2,
            r"transformer_blocks\.0\.attn\.to_k": 7,
            "^transformer_blocks.1.attn.to_v": 5,
        },
        "alpha_pattern": {"add_k_proj": 9, r"transformer_blocks\.[12]\.attn\.to_(q|k)": 1},
    },
    "dora": {"lora_alpha": 10, "use_dora": True},
    "all": {"lora_alpha": 5, "target_modules": "all"},
    "all dora": {"lora_alpha": 5, "use_dora": True, "target_modules": "all"},
    "all patterns": {
        "lora_alpha": 1,
        "use_rslora": True,
        "target_modules": "all",
        "rank_pattern": {"norm_out.linear": 1, "pos_embed.proj": 2},
        "alpha_pattern": {"pos_embed.proj": 3},
    },
}
WAYS = ("PeftModel.save_pretrained", "save_lora_weights", "save_lora_adapter")
# Of each config and each way one is quick.
FIRST = [("patterns", WAYS[1]), ("all dora", WAYS[0]), ("rslora", WAYS[2])]
CASES = FIRST + [pair for c in CONFIGS for w in WAYS if (pair := (c, w)) not in FIRST]


@torch.no_grad()
def trained(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for name, weight in network.named_parameters():
        if "lora_" in name:
            noise = 0.1 * torch.randn(weight.shape, generator=generator)
            weight.copy_(weight * (1 + noise) if "magnitude" in name else weight + noise)
    return network


@pytest.mark.few(3)
@pytest.mark.parametrize(("config", "way"), CASES)
def test_what_peft_trained_is_the_same_here(
    diffusers, peft, pipe, network, tmp_path, config, way
) -> None:
    settings = {"r": 4, "target_modules": ATTENTION, **CONFIGS[config]}
    if settings["target_modules"] == "all":  # with the patches, a convolution, and the last norm
        kinds = (nn.Linear, nn.Conv2d)
        names = [name for name, layer in network.named_modules() if isinstance(layer, kinds)]
        assert {"pos_embed.proj", "norm_out.linear", "proj_out"} <= {*names}
        settings["target_modules"] = names
    settings = peft.LoraConfig(**settings)
    if way == "PeftModel.save_pretrained":
        network = trained(peft.get_peft_model(network, settings))
        network.save_pretrained(tmp_path)
    else:
        network.add_adapter(settings)
        trained(network)
    if way == "save_lora_adapter":
        network.save_lora_adapter(tmp_path)
    elif way == "save_lora_weights":
        diffusers.StableDiffusion3Pipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=peft.get_peft_model_state_dict(network),
            transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
        )
    base = ours(pipe)
    pipe.load_lora(tmp_path)
    actual, layers = ours(pipe), sum(".changes." in name for name in pipe.state_dict())
    pipe.unload_lora()
    assert layers == sum("lora_" in name for name, _ in network.named_parameters())
    assert_same(actual, theirs(network), base)


def test_text_encoders_that_peft_trained_are_the_same_here(
    diffusers, peft, pipe, tiny_published, tmp_path
) -> None:
    whole = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_published)
    found = {}
    for name, alpha in (("text_encoder", 2), ("text_encoder_2", 12)):
        encoder = getattr(whole, name)
        config = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=["q_proj", "fc1"])
        peft.inject_adapter_in_model(config, encoder)
        trained(encoder)
        found[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(encoder)
        found[f"{name}_lora_adapter_metadata"] = config.to_dict()
    whole.save_lora_weights(tmp_path, **found)
    with torch.no_grad():
        context, _, vector, _ = whole.encode_prompt(
            "a red cat", None, None, do_classifier_free_guidance=False, max_sequence_length=20
        )
    base = pipe.encode(["a red cat"])
    pipe.load_lora(tmp_path)
    condition = pipe.encode(["a red cat"])
    pipe.unload_lora()
    assert_same(condition.c_ctxt, context, base.c_ctxt)
    assert (vector - base.c_vec).abs().max() > 1e-3
    torch.testing.assert_close(condition.c_vec, vector, atol=1e-4, rtol=1e-4)
