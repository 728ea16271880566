"""Changes of linear layers: zero at first, live as merged, removed without a trace."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmdit
from mmdit.adapters import write_adapter
from mmdit.adapters.adapter import Adapter, adapter_in, attach, attached, detach, fuse, rescale
from mmdit.adapters.layers import AdaptedLinear, Change, DoRA, LoKr, LoRA, Whole, dora, split
from mmdit.adapters.low_bit import quantize
from mmdit.errors import UserError
from mmdit.registry import build, describe

MAKES: dict[str, Callable[..., Change]] = {
    "lora": partial(LoRA, rank=4, alpha=6.0),
    "dora": partial(dora, rank=3),
    "dora per input": lambda **widths: DoRA(change=LoRA(rank=3, **widths), per_input=True),
    "lokr": partial(LoKr, factor=4, rank=2),
    "lokr whole": partial(LoKr, factor=4),
    "lokr both": partial(LoKr, factor=8, rank=2, first_rank=1, alpha=3.0),
    "lokr with norms": lambda **widths: DoRA(change=LoKr(factor=4, **widths)),
}
each_kind = pytest.mark.parametrize("kind", MAKES)


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 16)


def change_of(layer: nn.Linear, kind: str) -> Change:
    torch.manual_seed(1)
    change = MAKES[kind](inputs=layer.in_features, outputs=layer.out_features)
    change.reset_parameters(layer.weight)
    return change


@torch.no_grad()
def moved(module: nn.Module, seed: int = 2) -> nn.Module:
    """As after training: no weight is where it began."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return module


def images(pipe: mmdit.Pipeline) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    condition = pipe.encode(["a red cat", "two dogs"])
    z = torch.randn(2, 16, 8, 8, generator=generator)
    with torch.no_grad():
        return pipe.mmdit(z, torch.tensor([0.3, 0.8]), condition.c_vec, condition.c_ctxt)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_change_is_exactly_zero(layer: nn.Linear, kind: str, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    x = torch.randn(5, 24, dtype=dtype)
    adapted = AdaptedLinear(layer)
    adapted.changes["new"], adapted.scales["new"] = change_of(layer, kind), 1.0
    assert torch.equal(adapted(x), layer(x))
    assert torch.equal(adapted.fused_weight(), layer.weight)


@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_live_equals_merged(layer: nn.Linear, kind: str, bias: bool) -> None:
    layer = nn.Linear(24, 16, bias=bias).double()
    change = moved(change_of(layer, kind).double())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    live = AdaptedLinear(layer)
    live.changes["a"], live.scales["a"] = change, 0.7
    merged = F.linear(x, layer.weight + 0.7 * change.of_weight(layer.weight), layer.bias)
    assert not torch.allclose(merged, layer(x))
    torch.testing.assert_close(live(x), merged)


def test_lora_is_alpha_over_rank_times_b_a(layer: nn.Linear) -> None:
    lora = moved(change_of(layer, "lora"))
    expected = 6.0 / 4 * lora.up.weight @ lora.down.weight
    torch.testing.assert_close(lora.of_weight(layer.weight), expected)


@pytest.mark.parametrize(("kind", "axis"), [("dora", 1), ("dora per input", 0)])
def test_dora_has_the_norms_that_it_learned(layer: nn.Linear, kind: str, axis: int) -> None:
    dora = moved(change_of(layer, kind))
    changed = layer.weight + dora.of_weight(layer.weight)
    torch.testing.assert_close(changed.norm(dim=axis), dora.magnitude)


def test_norms_over_a_weight_of_zero_start_at_nothing_too() -> None:
    """As in a new modulation, all of whose weights are zero."""
    layer = nn.Linear(24, 16)
    nn.init.zeros_(layer.weight)
    adapted = AdaptedLinear(layer)
    adapted.changes["a"], adapted.scales["a"] = change_of(layer, "dora"), 1.0
    x = torch.randn(5, 24)
    assert torch.equal(adapted(x), layer(x))
    assert torch.equal(adapted.fused_weight(), layer.weight)
    moved(adapted.changes["a"])
    assert adapted(x).isfinite().all() and not torch.equal(adapted(x), layer(x))


def test_lokr_is_a_kronecker_product(layer: nn.Linear) -> None:
    lokr = moved(change_of(layer, "lokr"))
    assert lokr.first().shape == (4, 4) and lokr.second().shape == (4, 6)
    expected = lokr.scale * torch.kron(lokr.first(), lokr.second())
    torch.testing.assert_close(lokr.of_weight(layer.weight), expected)
    assert (split(1536, 16), split(2432, 16), split(7, 4), split(36, None)) == (16, 16, 1, 6)


@each_kind
def test_only_a_change_gets_gradients_and_at_first_what_is_zero_learns(
    layer: nn.Linear, kind: str
) -> None:
    layer.requires_grad_(False)
    change = change_of(layer, kind)
    adapted = AdaptedLinear(layer)
    adapted.changes["a"], adapted.scales["a"] = change, 1.0
    adapted(torch.randn(5, 24)).square().sum().backward()
    assert layer.weight.grad is None
    assert sum(float(w.grad.abs().sum()) for w in change.parameters() if w.grad is not None) > 0


def test_dropout_is_for_training_alone(layer: nn.Linear) -> None:
    lora = moved(LoRA(inputs=24, outputs=16, rank=4, dropout=0.5))
    x = torch.randn(3, 24)
    outputs = [lora(x, layer(x), layer.weight, layer.bias) for _ in range(2)]
    assert not torch.equal(*outputs)
    lora.eval()
    torch.testing.assert_close(
        lora(x, layer(x), layer.weight, layer.bias), x @ lora.of_weight(layer.weight).T
    )


# --- a whole pipeline ---


@each_kind
def test_at_first_a_model_is_as_without_the_adapter(pipe: mmdit.Pipeline, kind: str) -> None:
    before = images(pipe)
    attach(pipe, Adapter.over(pipe, MAKES[kind], targets="all"), "new")
    assert torch.equal(images(pipe), before)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_removed_leaves_no_trace(pipe: mmdit.Pipeline, fused: bool) -> None:
    before, state = images(pipe), {k: v.clone() for k, v in pipe.state_dict().items()}
    parts = ["mmdit", "clip_l", "t5"]
    adapter = moved(Adapter.over(pipe, MAKES["lora"], targets="all", parts=parts))
    attach(pipe, adapter, "style")
    live = images(pipe)
    assert not torch.allclose(live, before)
    if fused:
        fuse(pipe)
        torch.testing.assert_close(images(pipe), live, atol=1e-4, rtol=1e-4)
    detach(pipe)
    assert attached(pipe) == {}
    assert not any(isinstance(m, AdaptedLinear) for m in pipe.modules())
    assert list(pipe.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in pipe.state_dict().items())
    assert torch.equal(images(pipe), before)


def test_several_adapters_add_up_each_with_its_scale(pipe: mmdit.Pipeline) -> None:
    weight = pipe.mmdit.get_submodule("blocks.0.image.attention_in.q").weight.clone()
    one, two = (moved(Adapter.over(pipe, MAKES["lora"]), seed) for seed in (3, 4))
    attach(pipe, one, "one", scale=0.8)
    attach(pipe, two, "two")
    rescale(pipe, "two", -0.5)
    assert attached(pipe) == {"one": 0.8, "two": -0.5}
    at = "mmdit.blocks.0.image.attention_in.q"
    fuse(pipe)
    expected = weight + 0.8 * one.changes[at].of_weight(weight)
    expected = expected - 0.5 * two.changes[at].of_weight(weight)
    torch.testing.assert_close(pipe.get_submodule(at).weight, expected)
    with pytest.raises(UserError, match="fused"):
        detach(pipe, "one")
    with pytest.raises(UserError, match="fused"):
        rescale(pipe, "one", 1.0)
    with pytest.raises(UserError, match="fused"):
        attach(pipe, moved(Adapter.over(pipe, MAKES["lora"])), "three")


def test_a_model_with_adapters_is_saved_once_they_are_fused(
    pipe: mmdit.Pipeline, tmp_path: Path
) -> None:
    attach(pipe, moved(Adapter.over(pipe, MAKES["lora"], targets="all")), "style", scale=0.5)
    for save in (mmdit.save_single_file, mmdit.save_diffusers):
        with pytest.raises(UserError, match="fuse_lora"):
            save(pipe, tmp_path / "a.safetensors")
    pipe.fuse_lora()
    mmdit.save_diffusers(pipe, tmp_path / "fused")
    assert torch.equal(images(mmdit.load_pipeline(tmp_path / "fused")), images(pipe))


def test_the_pipeline_has_it_all(pipe: mmdit.Pipeline, tmp_path: Path) -> None:
    before = images(pipe)
    adapter = moved(Adapter.over(pipe, MAKES["lora"]))
    path = write_adapter(adapter, tmp_path / "my.style.safetensors", dialect="diffusers", root=pipe)
    assert pipe.load_lora(path, 0.8) == "my_style" and pipe.load_lora(path) == "my_style_2"
    pipe.lora_scale("my_style_2", 0.25)
    assert pipe.adapters == {"my_style": 0.8, "my_style_2": 0.25}
    pipe.unload_lora("my_style_2")
    pipe.fuse_lora()
    assert pipe.adapters == {"my_style": 0.8} and not torch.equal(images(pipe), before)
    pipe.unload_lora("my_style")
    assert pipe.adapters == {} and torch.equal(images(pipe), before)
    assert pipe.load_lora(adapter, name="own") == "own"
    with pytest.raises(UserError, match="without dots"):
        pipe.load_lora(adapter, name="v1.2")


def test_scale_zero_is_off_and_one_of_two_can_go(pipe: mmdit.Pipeline) -> None:
    before = images(pipe)
    attach(pipe, moved(Adapter.over(pipe, MAKES["lora"])), "one", scale=0)
    assert torch.equal(images(pipe), before)
    attach(pipe, moved(Adapter.over(pipe, MAKES["dora"], targets="attention+mlp")), "two")
    two = images(pipe)
    detach(pipe, "one")
    assert list(attached(pipe)) == ["two"] and torch.equal(images(pipe), two)


def test_an_adapter_is_built_again_from_its_description(pipe: mmdit.Pipeline) -> None:
    base = {"source": "runs/a", "sha256": "0" * 64}
    for make in MAKES.values():
        adapter = moved(Adapter.over(pipe, make, targets="all", base=base))
        again = build(describe(adapter))
        assert describe(again) == describe(adapter) and again.base == base
        again.load_state_dict(adapter.state_dict())
        attach(pipe, adapter, "a")
        shared = adapter_in(pipe, "a", base)
        assert describe(shared) == describe(adapter)
        assert {k: v.data_ptr() for k, v in shared.state_dict().items()} == {
            k: v.data_ptr() for k, v in adapter.state_dict().items()
        }
        detach(pipe)


def test_targets(pipe: mmdit.Pipeline) -> None:
    def of(**given: object) -> list[str]:
        return list(Adapter.over(pipe, partial(LoRA, rank=1), **given).changes)  # type: ignore[arg-type]

    attention = of()
    streams, heads = 2 * 2 + 1, 3 + 1  # text and image of two blocks, image of the last
    assert len(attention) == (streams * heads) + 3 + heads  # last text: q, k, v; one dual attention
    both = of(targets="attention+mlp")
    assert {*both} - {*attention} and all(".mlp.fc" in n for n in {*both} - {*attention})
    everything = of(targets="all")
    linears = [n for n, m in pipe.mmdit.named_modules() if isinstance(m, nn.Linear)]
    assert everything == [f"mmdit.{name}" for name in linears]
    last = of(targets="all", blocks="1-2")
    assert {n.split(".")[1] for n in last} == {"blocks", "last_block"}
    assert not any(n.startswith("mmdit.blocks.0.") for n in last)
    assert of(blocks=[0]) == [n for n in attention if n.startswith("mmdit.blocks.0.")]
    clip = of(parts=["clip_g"], targets="attention+mlp")
    assert len(clip) == 3 * 6 and all(n.startswith("text.clip_g.model.layers.") for n in clip)
    assert len(of(parts=["t5"], targets="attention+mlp")) == 2 * 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": "atention"}, "targets='atention' must be one of.* Did you mean attention"),
        ({"parts": ["unet"]}, "parts='unet' must be one of"),
        ({"parts": "mmdit"}, "parts='mmdit' must be a list"),
        ({"parts": []}, "names no layer"),
        ({"blocks": [7]}, "blocks 0 to 2, not 7"),
        ({"blocks": "2-1"}, "must be indices like '0,12-23'"),
        ({"blocks": [-1]}, "must be a whole number"),
        ({"blocks": [True]}, "must be a whole number"),
    ],
)
def test_targets_that_are_not_there(pipe: mmdit.Pipeline, given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adapter.over(pipe, MAKES["lora"], **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0 must be"),
        ({"rank": 65}, "rank=65 must be a whole number from 1 to 24"),
        ({"rank": 4, "alpha": 0}, "alpha=0 must be"),
        ({"rank": 4, "alpha": float("nan")}, "alpha=nan must be"),
        ({"rank": 4, "dropout": 1.0}, "dropout=1.0 must be"),
    ],
)
def test_ranks_and_alphas_that_make_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(inputs=24, outputs=16, **arguments)


def test_an_adapter_of_another_model_changes_nothing(pipe: mmdit.Pipeline) -> None:
    before = [*pipe.state_dict()]
    at = "mmdit.blocks.0.image.attention_in.q"
    deep = {at: Whole(inputs=64, outputs=64), at.replace("0", "9"): Whole(inputs=64, outputs=64)}
    wide = {at: Whole(inputs=64, outputs=64), at[:-1] + "k": Whole(inputs=96, outputs=96)}
    for changes, message in ((deep, "has no mmdit.blocks.9"), (wide, "96 x 96 in it and 64 x 64")):
        with pytest.raises(UserError, match=message):
            attach(pipe, Adapter(changes=changes), "other")
    with pytest.raises(UserError, match="changes nothing"):
        attach(pipe, Adapter(changes={}), "empty")
    assert [*pipe.state_dict()] == before
    attach(pipe, moved(Adapter.over(pipe, MAKES["lora"])), "style")
    with pytest.raises(UserError, match="there already"):
        attach(pipe, Adapter.over(pipe, MAKES["lora"]), "style")
    with pytest.raises(UserError, match=r"no adapter 'stile'.* Did you mean style"):
        detach(pipe, "stile")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_base_in_8_bits_is_adapted_too(pipe: mmdit.Pipeline, kind: str) -> None:
    before = images(pipe)
    quantize(pipe.mmdit, kind)
    rounded = images(pipe)
    assert not torch.equal(rounded, before)
    assert (rounded - before).norm() < 0.1 * before.norm()
    for name in ("lora", "dora"):
        attach(pipe, Adapter.over(pipe, MAKES[name]), name)
    torch.testing.assert_close(images(pipe), rounded)
    detach(pipe, "dora")
    live = moved(Adapter.over(pipe, MAKES["lora"]))
    attach(pipe, live, "live")
    x = images(pipe)
    fuse(pipe)
    torch.testing.assert_close(images(pipe), x, atol=0.1, rtol=0.1)
