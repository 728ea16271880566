import json

import pytest
import torch
from torch import nn

from mmdit.errors import UserError
from mmdit.metrics.flops import counted_flops
from mmdit.models.controlnet import (
    CONTROL_RANGES,
    ControlledMMDiT,
    ControlNet,
    ParallelControlNet,
    after_every_block,
    before_the_last_block,
    control_pixels,
)
from mmdit.models.mmdit import MMDiT
from mmdit.registry import build, describe
from tests import references

TINY = {
    "depth": 4,
    "width": 32,
    "num_heads": 2,
    "latent_channels": 4,
    "context_width": 12,
    "pooled_width": 10,
    "position_size": 6,
    "position_grid": 4,
    "position_base": 4,
}
TINY_CONTROL = {"depth": 2, "width": 32, "num_heads": 2, "latent_channels": 4}
PUBLIC = {"depth": 19, "width": 2432, "num_heads": 38}


def base_model() -> MMDiT:
    return MMDiT(**TINY)


def control_nets() -> list[ControlNet]:
    return [ControlNet(**TINY_CONTROL, pooled_width=10), ParallelControlNet(**TINY_CONTROL)]


each_kind = pytest.mark.parametrize("kind", [0, 1], ids=["chained", "parallel"])


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 4, 6, 4, generator=generator),
        torch.linspace(0.2, 0.9, batch),
        torch.randn(batch, 10, generator=generator),
        torch.randn(batch, 5, 12, generator=generator),
    )


def control_latent(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 6, 4, generator=torch.Generator().manual_seed(1))


def controlled(base: MMDiT, net: nn.Module, **arguments) -> ControlledMMDiT:
    return ControlledMMDiT(base=base, control_net=net, **arguments)


def controlled_inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    return (*inputs(batch), control_latent(batch))


# Size


def test_parameters_of_the_public_control_nets():
    with torch.device("meta"):
        net = ControlNet(**PUBLIC)
    assert sum(parameter.numel() for parameter in net.parameters()) == 2_153_518_976


@pytest.mark.parametrize("control_type", CONTROL_RANGES)
def test_every_key_of_the_public_files_has_its_place(load_original, control_type):
    manifest = references.table("manifests")[f"sd3.5_large_controlnet_{control_type}"]
    with torch.device("meta"):
        net = ControlNet(**PUBLIC, control_type=control_type)
        tensors = {key: torch.empty(shape) for key, (shape, _) in manifest.items()}
    del tensors["control_type"]
    load_original(net, tensors)


# What an untrained control net does


@each_kind
def test_an_untrained_control_net_changes_nothing(randomize, kind):
    base, net = randomize(base_model(), 0), control_nets()[kind]
    assert torch.equal(controlled(base, net)(*controlled_inputs()), base(*inputs()))


@each_kind
def test_an_untrained_control_net_learns(randomize, kind):
    net = control_nets()[kind]
    model = controlled(randomize(base_model(), 0), net)
    (model(*controlled_inputs()) - inputs()[0]).square().mean().backward()
    assert all(to_residual.weight.grad.any() for to_residual in net.to_residuals)


# What a trained one does


@each_kind
@torch.no_grad()
def test_every_input_matters(randomize, kind):
    base, net = randomize(base_model(), 0), randomize(control_nets()[kind], 1)
    z_t, t, c_vec, _ = inputs()
    whole = (z_t, t, c_vec, control_latent(2))
    before = net(base, *whole)
    assert [tuple(residual.shape) for residual in before] == [(2, 6, 32)] * 2
    for i in range(len(whole)):
        moved = net(base, *(part + 0.1 if i == j else part for j, part in enumerate(whole)))
        for old, new in zip(before, moved, strict=True):
            assert (new - old).abs().max() > 1e-3


@torch.no_grad()
def test_chained_blocks_follow_each_other_and_parallel_ones_do_not(randomize):
    base, whole = randomize(base_model(), 0), (*inputs()[:3], control_latent(2))
    for net, follows in zip(control_nets(), (True, False), strict=True):
        before = randomize(net, 1)(base, *whole)[1]
        net.blocks[0].mlp.fc2.bias.add_(1.0)
        assert torch.equal(net(base, *whole)[1], before) is not follows


@torch.no_grad()
def test_only_the_chained_kind_is_told_positions(randomize):
    base, whole = randomize(base_model(), 0), (*inputs()[:3], control_latent(2))
    nets = [randomize(net, 1) for net in control_nets()]
    before = [net(base, *whole)[0] for net in nets]
    base.positions.zero_()
    chained, parallel = (
        torch.equal(net(base, *whole)[0], old) for net, old in zip(nets, before, strict=True)
    )
    assert (chained, parallel) == (False, True)


@torch.no_grad()
def test_the_parallel_kind_reads_the_base_models_embedding_of_the_pooled_text(randomize):
    base, net = randomize(base_model(), 0), randomize(ParallelControlNet(**TINY_CONTROL), 1)
    z_t, t, c_vec, _ = inputs()
    whole = net(base, z_t, t, c_vec, control_latent(2))
    base.pooled_embedding.fc2.bias.add_(0.5)
    net.pooled_embedding.fc1.bias.sub_(0.5 * net.pooled_embedding.fc1.weight.sum(dim=1))
    again = net(base, z_t, t, c_vec, control_latent(2))
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-5)
    base.patch_embedding.proj.bias.add_(1.0)  # it embeds the latent by itself
    for old, new in zip(again, net(base, z_t, t, c_vec, control_latent(2)), strict=True):
        assert torch.equal(new, old)


@each_kind
@torch.no_grad()
def test_each_sample_follows_its_own_control(randomize, kind):
    base, net = randomize(base_model(), 0), randomize(control_nets()[kind], 1)
    model, both = controlled(base, net), controlled_inputs()
    whole = model(*both)
    for i in range(2):
        alone = model(*(part[i : i + 1] for part in both))
        torch.testing.assert_close(whole[i], alone[0], rtol=0, atol=1e-5)
    swapped = model(*both[:4], both[4].flip(0))
    assert (swapped - whole).flatten(1).abs().amax(1).min() > 1e-2


@torch.no_grad()
def test_strength_scales_the_residuals(randomize):
    base, net = randomize(base_model(), 0), randomize(control_nets()[0], 1)
    plain = base(*inputs())
    assert torch.equal(controlled(base, net, strength=0.0)(*controlled_inputs()), plain)
    half = controlled(base, net, strength=0.5)(*controlled_inputs())
    for to_residual in net.to_residuals:
        to_residual.weight.mul_(0.5)
        to_residual.bias.mul_(0.5)
    torch.testing.assert_close(half, controlled(base, net)(*controlled_inputs()), rtol=0, atol=1e-5)
    assert (half - plain).abs().max() > 1e-2


@torch.no_grad()
def test_the_weaker_network_of_skip_layer_guidance_is_not_controlled(randomize):
    base, net = randomize(base_model(), 0), randomize(control_nets()[0], 1)
    model = controlled(base, net)
    skipped = model.skipping([1])
    assert torch.equal(skipped(*controlled_inputs()), base.skipping([1])(*inputs()))
    assert not torch.equal(model(*controlled_inputs()), base(*inputs()))  # it still is
    with pytest.raises(UserError, match=r"layers \[4\] cannot be skipped: there are 0 to 3"):
        model.skipping([4])


@each_kind
def test_a_control_net_is_rebuilt_from_its_description(kind):
    net = control_nets()[kind]
    again = build({**describe(net), "control_type": "depth"})
    assert type(again) is type(net)
    assert again.control_type == "depth"
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }


# A backbone like any other


@each_kind
def test_it_is_rebuilt_from_its_description(randomize, kind):
    model = controlled(base_model(), control_nets()[kind], strength=0.5)
    randomize(model, 0)
    again = build(json.loads(json.dumps(describe(model))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*controlled_inputs()), model(*controlled_inputs()))


@each_kind
@pytest.mark.parametrize("size", [(4, 6, 5), (12, 8, 40)])
def test_its_operations_in_closed_form(kind, size):
    model = controlled(base_model(), control_nets()[kind])
    at = dict(zip(("height", "width", "text_length"), size, strict=True))
    base = model.base.flops(**at)
    assert model.flops(**at) == counted_flops(model, **at) > base
    assert model.skipping([]).flops(**at) == counted_flops(model.skipping([]), **at) == base


def test_it_is_compiled_block_by_block():
    model = controlled(base_model(), control_nets()[0])
    model.compile(backend="eager")
    blocks = [*model.layers, *model.control_net.blocks]
    assert len(blocks) == 6
    assert all(block._compiled_call_impl is not None for block in blocks)


# Placement


def placed(placement, n: int, depth: int) -> list[float]:
    return [each.item() for each in placement([torch.tensor(1.0 + i) for i in range(n)], depth)]


def test_placement_in_the_public_model():
    """Residual 18 of 19 is applied twice in the reference and once in diffusers."""
    twice = [1.0 + i // 2 for i in range(38)]
    assert placed(after_every_block, 19, 38) == twice
    assert placed(before_the_last_block, 19, 38) == [*twice[:-1], 0.0]


def test_placement_of_a_number_that_does_not_divide():
    assert placed(before_the_last_block, 4, 6) == [1, 1, 2, 3, 3, 0]
    # 9 * 14 // 18 is 7, the eighth residual; but 18 / 14 was rounded up before.
    assert placed(before_the_last_block, 14, 18)[9] == 7
    with pytest.raises(UserError, match=r"4 residuals .* shared out evenly among 6 blocks"):
        placed(after_every_block, 4, 6)


@pytest.mark.parametrize("placement", [after_every_block, before_the_last_block])
def test_more_residuals_than_blocks(placement):
    with pytest.raises(UserError, match=r"3 residuals of the control net .* 2 blocks"):
        placed(placement, 3, 2)


# The control image


def test_control_pixels():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 2, 4, 3)
    for control_type in ("blur", "depth"):
        image = control_pixels(pixels, control_type)
        assert image.shape == (1, 3, 2, 4)
        torch.testing.assert_close(image[0, :, 1, 1], torch.tensor([-1.0, -0.6, 1.0]))
    canny = control_pixels(pixels, "canny")
    torch.testing.assert_close(canny[0, :, 1, 1], torch.tensor([0.5, 26.0, 128.0]))


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"depth": 0}, "depth=0 must be a whole number of at least 1"),
        ({"num_heads": 5}, "width 32 must be divisible by num_heads 5"),
        ({"control_type": "pose"}, "control_type='pose' must be one of blur, canny, depth"),
    ],
)
def test_impossible_arguments_are_named(mistake, message):
    with pytest.raises(UserError, match=message):
        ControlNet(**{**TINY_CONTROL, **mistake})


def test_an_unknown_control_type_is_named():
    with pytest.raises(UserError, match="control_type='pose' must be one of blur, canny, depth"):
        control_pixels(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), "pose")


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ((), "control latent is missing, but must have the shape of the latent"),
        ((torch.zeros(2, 4, 4, 4),), r"is \(2, 4, 4, 4\), but must .*, \(2, 4, 6, 4\)"),
        ((torch.zeros(1, 4, 6, 4),), r"is \(1, 4, 6, 4\), .* one for each sample"),
    ],
)
def test_a_control_latent_that_does_not_fit_is_named(control, message):
    model = controlled(base_model(), control_nets()[0])
    with pytest.raises(UserError, match=message):
        model(*inputs(), *control)


@each_kind
def test_a_latent_that_does_not_split_into_patches_is_named(kind):
    z_t, *rest = inputs()
    model, odd = controlled(base_model(), control_nets()[kind]), z_t[..., :5, :]
    with pytest.raises(UserError, match="latent height 5 must be a multiple of patch_size 2"):
        model(odd, *rest, odd)


def test_networks_that_do_not_fit_each_other_are_named():
    wide = ControlNet(**{**TINY_CONTROL, "width": 64})
    with pytest.raises(UserError, match="control net has width 64, the model 32"):
        controlled(base_model(), wide)
    with pytest.raises(UserError, match=r"computes in torch.float32, the model in torch.bfloat16"):
        controlled(base_model().bfloat16(), control_nets()[0])


@each_kind
@torch.no_grad()
def test_half_precision(randomize, kind):
    base, net = randomize(base_model(), 0), randomize(control_nets()[kind], 1)
    whole = controlled(base, net)(*controlled_inputs())
    half = controlled(base.bfloat16(), net.bfloat16())(*controlled_inputs())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=0, atol=0.1)


# Parity


class Given(nn.Module):
    """Stands for a control net whose residuals are known."""

    def __init__(self, residuals: torch.Tensor, base: MMDiT) -> None:
        super().__init__()
        self._description = describe(base)  # it reads what the model reads
        self.residuals, self.width = residuals, residuals.shape[-1]
        self.compute_dtype = residuals.dtype

    def forward(self, *_) -> list[torch.Tensor]:
        return list(self.residuals)


def base_of_case(case) -> MMDiT:
    theirs = case.config["model"]
    return MMDiT(
        depth=theirs["depth"],
        width=theirs["hidden_size"],
        num_heads=theirs["num_heads"],
        context_width=theirs["context_dim"],
        pooled_width=theirs["pooled_dim"],
        qk_norm=theirs["qk_norm"] == "rms",
        position_size=theirs["pos_embed_max_size"],
    )


@torch.no_grad()
def test_both_placements_match_the_reference_and_diffusers(golden, load_original):
    case = golden("mmdit_controlnet_residuals")
    base = base_of_case(case)
    load_original(base, case.weights)
    whole = [case.inputs[name] for name in ("x", "sigma", "y", "context")]
    for n in case.config["call"]["n_residuals"]:
        net = Given(case.inputs[f"residuals_{n}"], base)
        case.check(f"v_{n}", controlled(base, net)(*whole, whole[0]))
        model = controlled(base, net, placement="before_the_last_block")
        case.check(f"v_diffusers_{n}", model(*whole, whole[0]))


@torch.no_grad()
def test_control_net_matches_the_reference(golden, load_original):
    case = golden("mmdit_controlnet_8b")
    theirs = case.config["control"]
    base = base_of_case(case)
    load_original(base, case.weights)
    net = ControlNet(
        depth=theirs["num_layers"],
        width=theirs["hidden_size"],
        num_heads=theirs["num_heads"],
        pooled_width=theirs["pooled_dim"],
        control_type=list(CONTROL_RANGES)[theirs["control_type"]],
    )
    tensors = dict(case.control_weights)
    assert tensors.pop("control_type").item() == theirs["control_type"]
    load_original(net, tensors)

    whole = z_t, t, c_vec, _ = [case.inputs[name] for name in ("x", "sigma", "y", "context")]
    control = case.inputs["control_latent"].expand_as(z_t)
    residuals = net(base, z_t, t, c_vec, control)
    for i, residual in enumerate(residuals):
        case.check(f"residual_{i}", residual)
    v = controlled(base, net)(*whole, control)
    case.check("v", v)
    case.check("denoised", z_t - t.view(-1, 1, 1, 1) * v)


@torch.no_grad()
def test_control_net_and_controlled_velocity_match_diffusers(load_diffusers, randomize):
    diffusers = pytest.importorskip("diffusers")
    shared = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 6,
    }
    text = {"joint_attention_dim": 12, "caption_projection_dim": 32}
    peer_base = diffusers.SD3Transformer2DModel(**shared, **text, num_layers=4)
    peer = diffusers.SD3ControlNetModel(
        **shared, joint_attention_dim=None, use_pos_embed=False, num_layers=3
    )
    randomize(peer_base, 0)
    randomize(peer, 1)
    base, net = base_model(), ControlNet(**{**TINY_CONTROL, "depth": 3}, pooled_width=10)
    load_diffusers(base, peer_base.state_dict())
    load_diffusers(net, peer.state_dict())
    z_t, t, c_vec, c_ctxt = inputs()

    rest = {"timestep": 1000 * t, "pooled_projections": c_vec}
    theirs = peer(
        hidden_states=peer_base.pos_embed(z_t), controlnet_cond=control_latent(2), **rest
    ).controlnet_block_samples
    for ours, residual in zip(net(base, *inputs()[:3], control_latent(2)), theirs, strict=True):
        assert relative_error(ours, residual) < 1e-5

    velocity = peer_base(
        hidden_states=z_t,
        encoder_hidden_states=c_ctxt,
        block_controlnet_hidden_states=theirs,
        **rest,
    ).sample
    ours = controlled(base, net, placement="before_the_last_block")(*controlled_inputs())
    assert relative_error(ours, velocity) < 1e-5


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"pooled_width": 9}, "the control net has pooled_width 9, the model"),
        ({"latent_channels": 8}, "the control net has latent_channels 8, the model"),
        ({"patch_size": 1}, "the control net has patch_size 1, the model"),
    ],
)
def test_a_control_net_of_another_model_is_refused(other, message):
    sizes = {"width": 16, "num_heads": 2, "latent_channels": 4, "pooled_width": 5}
    base = MMDiT(**sizes, depth=2, context_width=6, position_size=4)
    controlled(base, ControlNet(**sizes, depth=1))
    with pytest.raises(UserError, match=message):
        net = ControlNet(**{**sizes, **other}, depth=1)
        controlled(base, net)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"strength=.* must be a finite number"):
            controlled(base, ControlNet(**sizes, depth=1), strength=strength)
    with pytest.raises(UserError, match=r"placement='last' must be one of after_every_block, bef"):
        controlled(base, ControlNet(**sizes, depth=1), placement="last")
