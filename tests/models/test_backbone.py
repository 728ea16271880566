"""Laws that hold for every backbone of Figure 4, whatever its way of joining text and image."""

import inspect
import re
from typing import get_type_hints

import pytest
import torch
from torch import nn

from mmdit.errors import UserError
from mmdit.models.backbone import PatchBackbone, Shared, changed, with_qk_norm
from mmdit.models.blocks import AttentionInput
from mmdit.models.cross_dit import CrossDiT
from mmdit.models.dit import DiT
from mmdit.models.mmdit import MMDiT
from mmdit.models.mmdit_three import MMDiTThree
from mmdit.models.uvit import UViT
from mmdit.nn.embeddings import position_table
from mmdit.nn.modulation import Modulation
from mmdit.nn.norms import RMSNorm
from mmdit.registry import build, describe
from tests.tiny import SIZES, Tiny, inputs

# In the last block of an MM-DiT the text only answers: its queries are asked in vain.
UNASKED = re.compile(r"last_block\.(text|clip|t5)\.attention_in\.q(\.|_norm\.)")

each_backbone = pytest.mark.each("backbone")  # a `Tiny`, which builds one
KNOWN = {
    "dit": Tiny(DiT),
    "cross_dit": Tiny(CrossDiT),
    "uvit": Tiny(UViT, {"conv_blocks": 2}),
    "mmdit": Tiny(MMDiT, {"dual_attention": []}),
    "mmdit_x": Tiny(MMDiT, {"dual_attention": [0]}),
    "mmdit_three": Tiny(MMDiTThree, {"clip_length": 3}),
}
each_known = pytest.mark.parametrize("backbone", KNOWN.values(), ids=KNOWN)


def untouched(model: nn.Module) -> list[str]:
    """Parameters whose gradient is zero, though they should have one."""
    return [
        name
        for name, weight in model.named_parameters()
        if not weight.grad.any() and not UNASKED.match(name)
    ]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


# The fresh network


@each_backbone
def test_a_fresh_network_predicts_exactly_zero(backbone):
    for model in (backbone(), backbone.normed()):
        output = model(*inputs())
        assert output.shape == inputs()[0].shape
        assert not output.any()


@each_backbone
def test_text_may_come_from_another_device(backbone) -> None:
    model = backbone().to("meta")
    z_t, t, c_vec, c_ctxt = inputs()
    out = model(z_t.to("meta"), t.to("meta"), c_vec.double(), c_ctxt.bfloat16())
    assert (out.device.type, out.dtype) == ("meta", torch.float32)


@each_backbone
def test_a_fresh_network_learns(backbone):
    """All is zero at first, but not the gradient of the last layer; then it reaches all."""
    model = backbone.normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(*inputs()) - inputs()[0]).square().mean().backward()
        optimizer.step()
    assert untouched(model) == []


@each_backbone
def test_reset_parameters_recomputes_what_meta_left_empty(backbone):
    with torch.device("meta"):
        model = backbone.normed()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.reset_parameters()
    assert torch.equal(model.positions, backbone().positions)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not model(*inputs()).any()


@each_backbone
def test_a_description_gives_the_same_architecture(backbone):
    model = backbone.normed()
    twin = build(describe(model))
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (model, twin)]
    assert type(twin) is type(model)
    assert shapes[0] == shapes[1]


# What the network computes


@each_backbone
def test_every_parameter_matters(backbone, randomize):
    model = randomize(backbone.normed(), 0)
    model(*inputs()).square().sum().backward()
    assert untouched(model) == []


@each_backbone
def test_every_input_matters(backbone, randomize):
    model = randomize(backbone(), 0)
    whole = inputs()
    before = model(*whole)
    for i in range(4):
        moved = [part + 0.1 if i == j else part for j, part in enumerate(whole)]
        assert (model(*moved) - before).abs().max() > 1e-3


@each_backbone
def test_every_text_token_matters(backbone, randomize):
    model = randomize(backbone(), 0)
    z_t, t, c_vec, c_ctxt = inputs()
    before = model(z_t, t, c_vec, c_ctxt)
    for i in range(c_ctxt.shape[1]):
        other = c_ctxt.clone()
        other[:, i] += 1
        assert (model(z_t, t, c_vec, other) - before).abs().max() > 1e-3


@each_backbone
def test_samples_do_not_mix(backbone, randomize):
    model = randomize(backbone(), 0)
    whole = inputs(batch=3)
    together = model(*whole)
    for i in range(3):
        assert close(model(*(part[i : i + 1] for part in whole)), together[i : i + 1])


@each_known
def test_text_tokens_of_one_kind_have_no_order_of_their_own(backbone, randomize):
    """The network adds no positions to the text: the encoders have done so."""
    model = randomize(backbone(), 0)
    z_t, t, c_vec, c_ctxt = inputs()
    shuffled = c_ctxt[:, torch.tensor([2, 0, 1, 4, 3])]
    assert close(model(z_t, t, c_vec, shuffled), model(z_t, t, c_vec, c_ctxt))


@each_backbone
def test_image_tokens_have_places(backbone, randomize):
    """A picture turned upside down is another picture, not the same one turned."""
    model = randomize(backbone(), 0)
    z_t, *rest = inputs()
    assert not close(model(z_t.flip(-2), *rest).flip(-2), model(z_t, *rest))


@each_backbone
@pytest.mark.parametrize("size", [(1, 1), (6, 6), (2, 5)])
def test_one_model_serves_every_size_up_to_its_table(backbone, size, randomize):
    z_t, *rest = inputs(height=2 * size[0], width=2 * size[1])
    assert randomize(backbone(), 0)(z_t, *rest).shape == z_t.shape
    with pytest.raises(UserError, match="latent height 14 must be a multiple of patch_size 2"):
        backbone()(*inputs(height=14))


@each_backbone
def test_inputs_take_the_dtype_that_the_network_states(backbone, randomize):
    model = randomize(backbone.normed(), 0)
    expected = model(*inputs())
    output = model.to(torch.bfloat16)(*inputs())
    assert (output.dtype, model.compute_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (output.float() - expected).abs().max() <= 0.1 * expected.abs().max()


@each_backbone
def test_training_and_inference_agree(backbone, randomize):
    model = randomize(backbone.normed(), 0)
    trained = model(*inputs())
    with torch.no_grad():
        assert close(model(*inputs()), trained)


# Skipped blocks, compiled blocks


@each_known
@torch.no_grad()
def test_a_skipped_block_is_one_whose_gates_are_closed(backbone, randomize):
    model = randomize(backbone(), 0)
    before = model(*inputs())
    for i, block in enumerate(model.layers):
        skipped = model.skipping([i])(*inputs())
        opened = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        for module in block.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()
        assert close(skipped, model(*inputs()))
        assert not close(skipped, before)
        block.load_state_dict(opened)
    assert torch.equal(model(*inputs()), before)


@each_backbone
def test_skipping_shares_the_weights_and_names_absent_blocks(backbone):
    model = backbone()
    view = model.skipping([0, 2])
    assert view.layers[1] is model.layers[1]
    n = len(model.layers)
    assert len(view.layers) == n >= 3
    with pytest.raises(UserError, match=rf"layers \[{n}\] cannot be skipped: there are 0 to"):
        model.skipping([1, n])


@each_backbone
def test_compiling_takes_all_blocks_one_by_one(backbone):
    """Nothing is compiled before it is called."""
    model = backbone()
    model.compile()
    parts = [m for m in model.modules() if m._compiled_call_impl is not None]
    assert {*model.layers, model.output} <= {*parts}


@each_known
def test_next_to_nothing_is_left_uncompiled(backbone):
    model = backbone()
    model.compile()
    parts = [m for m in model.modules() if m._compiled_call_impl is not None]
    inside = {id(p) for part in parts for p in part.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in inside]
    assert {name.split(".")[0] for name in outside} <= {
        *("patch_embedding", "timestep_embedding", "pooled_embedding", "context_embedding"),
        *("t5_embedding", "conv_in", "norm_out", "conv_out"),
    }


# QK-norm


@each_known
@torch.no_grad()
def test_qk_norm_takes_the_scale_from_queries_and_keys(backbone, randomize):
    for qk_norm in (True, False):
        model = randomize(backbone(qk_norm=qk_norm), 0)
        before = model(*inputs())
        for module in model.modules():
            if isinstance(module, AttentionInput):
                for linear in (module.q, module.k):
                    linear.weight.mul_(3)
                    linear.bias.mul_(3)
        after = model(*inputs())
        change = (after - before).abs().max() / before.abs().max()
        assert change <= 1e-4 if qk_norm else change > 1e-2


@each_known
def test_adding_qk_norm_keeps_all_weights(backbone, randomize):
    model = randomize(backbone(), 0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    normed = with_qk_norm(model)
    after = normed.state_dict()

    inputs_of_attention = [m for m in normed.modules() if isinstance(m, AttentionInput)]
    assert all(isinstance(m.q_norm, RMSNorm) for m in inputs_of_attention)
    added = after.keys() - before.keys()
    assert len(added) == 2 * len(inputs_of_attention)
    assert all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in added)
    assert all(torch.equal(after[name], torch.ones(16)) for name in added)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert describe(normed) == {**describe(model), "qk_norm": True}

    assert normed.training
    assert not close(normed(*inputs()), model(*inputs()))
    normed(*inputs()).square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in normed.parameters())
    assert untouched(normed) == []
    torch.optim.SGD(normed.parameters(), lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_qk_norm_is_added_once_and_in_the_models_dtype():
    normed = with_qk_norm(Tiny(DiT)().to(torch.bfloat16).eval())
    assert {tensor.dtype for tensor in normed.parameters()} == {torch.bfloat16}
    assert not normed.training
    with pytest.raises(UserError, match="this DiT has QK-norm already"):
        with_qk_norm(normed)


# Mistakes


@each_known
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"depth": 0}, "depth=0 must be a whole number of at least 1"),
        ({"num_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
        ({"num_heads": 5}, "width 32 must be divisible by"),
        ({"width": 30}, "width 30 must be divisible by 4"),
        ({"widht": 32}, "has no argument 'widht'. Did you mean width"),
    ],
)
def test_impossible_sizes_are_named(backbone, mistake, message):
    with pytest.raises(UserError, match=message):
        backbone(**mistake)


def test_the_units_of_width_are_possible_widths():
    for cls in (DiT, UViT):
        for num_heads in (1, 2, 3, 5, 8):
            unit = cls.width_unit(num_heads)
            model = cls(**{**SIZES, "width": unit, "num_heads": num_heads})
            assert isinstance(model, nn.Module)
            assert unit % (2 * num_heads if cls is UViT else num_heads) == 0


# Arguments


def test_shared_arguments_are_those_of_the_base_class():
    arguments = dict(inspect.signature(PatchBackbone.__init__).parameters)
    del arguments["self"]
    assert {name: p.annotation for name, p in arguments.items()} == get_type_hints(Shared)
    required = {name for name, p in arguments.items() if p.default is p.empty}
    assert required == Shared.__required_keys__


@each_known
def test_a_backbone_takes_what_all_take_and_its_own(backbone):
    arguments = inspect.signature(backbone.cls).parameters
    assert arguments.keys() == {*get_type_hints(Shared), *backbone.own}
    assert {p.kind for p in arguments.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert describe(backbone()).keys() == {"class", *arguments}


def test_other_positions_keep_all_weights() -> None:
    model = Tiny(MMDiT)().to(torch.bfloat16)
    other = changed(model, position_size=24, position_grid=8)
    assert describe(other) == {**describe(model), "position_size": 24, "position_grid": 8}
    assert other.positions.dtype == torch.bfloat16 and other.compute_dtype == torch.bfloat16
    base = describe(model)["position_base"]
    table = position_table(other.positions.shape[-1], size=24, grid=8, base=base)
    assert torch.equal(other.positions, table.bfloat16())
    weights = model.state_dict()
    for name, weight in other.state_dict().items():
        assert name == "positions" or torch.equal(weight, weights[name])
    with pytest.raises(UserError, match="position_grid"):
        changed(model, position_grid=0)
