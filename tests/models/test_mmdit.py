import math
from pathlib import Path

import pytest
import torch
import yaml

from mmdit.errors import UserError
from mmdit.models.mmdit import JointBlock, LastJointBlock, MMDiT
from mmdit.nn.embeddings import centre_crop, position_table
from tests.references import cases

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
FILES = [
    file
    for file in sorted(CONFIGS.glob("*.yaml"))
    if yaml.safe_load(file.read_text())["_target_"] == "mmdit.models.MMDiT"
]
PAPER = sorted(CONFIGS.glob("d[0-9][0-9].yaml"))

TINY = {
    "depth": 3,
    "width": 32,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "latent_channels": 4,
    "context_width": 12,
    "pooled_width": 10,
    "position_size": 6,
    "position_grid": 4,
    "position_base": 4,
}


def arguments(file: Path) -> dict:
    return {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "_target_"}


def on_meta(file: Path) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(**arguments(file))


def parameters(model: MMDiT) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def inputs(batch: int = 2, rows: int = 3, columns: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 4, 2 * rows, 2 * columns, generator=generator),
        torch.linspace(0.2, 0.9, batch),
        torch.randn(batch, 10, generator=generator),
        torch.randn(batch, 5, 12, generator=generator),
    )


# Sizes


@pytest.mark.parametrize(
    ("name", "count"),
    [("d24", 2_028_328_000), ("sd35_medium", 2_243_171_520), ("d38", 8_056_627_520)],
)
def test_parameters_of_the_public_models(name, count):
    """SD3 Medium, SD3.5 Medium and Large; the stored position table is a buffer."""
    assert parameters(on_meta(CONFIGS / f"{name}.yaml")) == count


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_builds(file):
    model = on_meta(file)
    assert len(model.blocks) + 1 == arguments(file)["depth"]


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_the_papers_models_follow_from_their_depth(file):
    """Sec. 4: width 64 d, d heads of 64, MLP of four times the width, the 192 table."""
    depth = int(file.stem[1:])
    expected = {
        "depth": depth,
        "width": 64 * depth,
        "num_heads": depth,
        "mlp_ratio": 4.0,
        "patch_size": 2,
    }
    table = {"position_size": 192, "position_grid": 64, "position_base": 16}
    assert {**arguments(file), **expected, **table} == arguments(file)


def test_the_papers_sizes_are_about_what_it_says():
    about = {15: 0.45e9, 18: 0.8e9, 21: 1.2e9, 24: 2e9, 30: 4e9, 38: 8e9}
    assert {int(file.stem[1:]) for file in PAPER} == about.keys()
    for file in PAPER:
        assert parameters(on_meta(file)) == pytest.approx(about[int(file.stem[1:])], rel=0.2)


# The fresh network


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_fresh_network_predicts_exactly_zero(qk_norm):
    output = MMDiT(**TINY, qk_norm=qk_norm)(*inputs())
    assert output.shape == inputs()[0].shape
    assert not output.any()


def test_every_fresh_block_is_the_identity():
    model = MMDiT(**TINY)
    generator = torch.Generator().manual_seed(0)
    c, x = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 6, 32, generator=generator)
    y = torch.randn(2, 32, generator=generator)
    blocks = [*model.blocks, model.last_block]
    assert [type(block) for block in blocks] == [JointBlock, JointBlock, LastJointBlock]
    for block in model.blocks:
        out_c, out_x = block(c, x, y)
        assert torch.equal(out_c, c) and torch.equal(out_x, x)
    assert torch.equal(model.last_block(c, x, y), x)


def test_a_fresh_network_learns():
    """All is zero at first, but not the gradient of the output layer."""
    model = MMDiT(**TINY)
    (model(*inputs()) - inputs()[0]).square().mean().backward()
    assert model.output.linear.weight.grad.any()


def test_reset_parameters_recomputes_what_meta_left_empty():
    with torch.device("meta"):
        model = MMDiT(**TINY)
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert torch.equal(model.positions, position_table(32, size=6, grid=4, base=4))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    for name in ("timestep_embedding", "pooled_embedding"):
        assert getattr(model, name).fc2.weight.std().item() == pytest.approx(0.02, rel=0.2)
    bound = math.sqrt(6 / (32 + 96))  # Xavier, uniform
    weight = model.blocks[0].text.attention_in.q.weight
    assert 0.95 * bound < weight.abs().max() <= bound


# What the network computes


def test_every_input_matters(randomize):
    model = randomize(MMDiT(**TINY), 0)
    whole = inputs()
    before = model(*whole)
    for i in range(4):
        moved = [part + 0.1 if i == j else part for j, part in enumerate(whole)]
        assert (model(*moved) - before).abs().max() > 1e-3


def test_samples_do_not_mix(randomize):
    model = randomize(MMDiT(**TINY), 0)
    together = model(*inputs(batch=3))
    for i in range(3):
        alone = model(*(part[i : i + 1] for part in inputs(batch=3)))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_text_tokens_have_no_order_of_their_own(randomize):
    """The network adds no positions to the text: the encoders have done so."""
    model = randomize(MMDiT(**TINY), 0)
    z_t, t, c_vec, c_ctxt = inputs()
    shuffled = c_ctxt[:, torch.tensor([3, 0, 4, 2, 1])]
    torch.testing.assert_close(
        model(z_t, t, c_vec, shuffled), model(z_t, t, c_vec, c_ctxt), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("size", [(1, 1), (6, 6), (2, 5)])
def test_one_model_serves_every_size_up_to_its_table(randomize, size):
    rows, columns = size
    z_t, *rest = inputs(rows=rows, columns=columns)
    assert randomize(MMDiT(**TINY), 0)(z_t, *rest).shape == (2, 4, 2 * rows, 2 * columns)


def test_training_and_inference_agree(randomize):
    model = randomize(MMDiT(**TINY, qk_norm=True), 0)
    trained = model(*inputs())
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), trained, rtol=0, atol=1e-5)


def test_the_position_table_is_saved_with_the_model():
    assert MMDiT(**TINY).state_dict()["positions"].shape == (6, 6, 32)


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"depth": 0}, "depth=0 must be a whole number of at least 1"),
        ({"num_heads": 5}, "width 32 must be divisible by num_heads 5"),
        (
            {"dual_attention": [2]},
            "dual_attention \\[2\\] must name blocks before the last, from 0",
        ),
        ({"num_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
        ({"width": 0}, "width=0 must be a whole number of at least 1"),
        ({"patch_size": 0}, "patch_size=0 must be a whole number of at least 1"),
        ({"position_size": -1}, "position_size=-1 must be a whole number of at least 1"),
        ({"position_grid": 0}, "position_grid=0 must be a whole number of at least 1"),
        ({"mlp_ratio": -1.0}, "mlp_ratio=-1.0 must be a number above 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan must be a number above 0"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio=inf must be a number above 0"),
        ({"width": 30, "num_heads": 2}, "width 30 must be divisible by 4"),
    ],
)
def test_impossible_sizes_are_named(mistake, message):
    with pytest.raises(UserError, match=message):
        MMDiT(**{**TINY, **mistake})


@pytest.mark.parametrize(
    ("size", "message"),
    [((5, 4), "latent height 5"), ((4, 14), "latent width 14"), ((0, 4), "latent height 0")],
)
def test_a_latent_that_does_not_fit_the_table_is_named(size, message):
    with pytest.raises(UserError, match=f"{message} must be a multiple of patch_size 2, from 2 to"):
        MMDiT(**TINY).grid(*size)


# Parity


def of_case(case) -> MMDiT:
    theirs = case.config["model"]
    return MMDiT(
        depth=theirs["depth"],
        width=theirs["hidden_size"],
        num_heads=theirs["num_heads"],
        context_width=theirs["context_dim"],
        pooled_width=theirs["pooled_dim"],
        qk_norm=theirs["qk_norm"] == "rms",
        dual_attention=theirs["dual_attention_layers"],
        position_size=theirs["pos_embed_max_size"],
    )


PLAIN = cases("mmdit_plain", "mmdit_plain_deep", "mmdit_qknorm")
DUAL = cases("mmditx", "mmditx_deep", "mmdit_eps")


@pytest.mark.parametrize("name", PLAIN + DUAL)
@torch.no_grad()
def test_every_stage_matches_the_reference(golden, load_original, name):
    case = golden(name)
    model = of_case(case)
    load_original(model, case.weights)
    stages = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *call, i=i: stages.update({i: call[-1]}))
    model.last_block.register_forward_hook(lambda *call: stages.update(last=call[-1]))

    z_t, t = case.inputs["x"], case.inputs["sigma"]
    c_vec, c_ctxt = case.inputs["y"], case.inputs["context"]
    v = model(z_t, t, c_vec, c_ctxt)

    case.check("t_emb", model.timestep_embedding(t, model.cast))
    case.check("y_emb", model.pooled_embedding(c_vec))
    case.check("context_embed", model.context_embedding(c_ctxt))
    positions = centre_crop(model.positions, *model.grid(*z_t.shape[-2:]))
    case.check("x_embed", model.patch_embedding(z_t) + positions)
    for i in range(len(model.blocks)):
        case.check(f"block{i}.context", stages[i][0])
        case.check(f"block{i}.x", stages[i][1])
    case.check(f"block{len(model.blocks)}.x", stages["last"])
    case.check("v", v)


@torch.no_grad()
def test_every_size_of_latent_matches_the_reference(golden, load_original):
    case = golden("mmdit_shapes")
    model = of_case(case)
    load_original(model, case.weights)
    rest = [case.inputs[name] for name in ("sigma", "y", "context")]
    latents = [name for name in case.inputs if name.startswith("x_")]
    assert len(latents) == 6
    for name in latents:
        z_t = case.inputs[name]
        # The reference floors odd sides where we refuse them: its last row and column are unread.
        height, width = (side - side % 2 for side in z_t.shape[-2:])
        positions = centre_crop(model.positions, *model.grid(height, width))
        case.check(name.replace("x", "pos"), positions[None])
        case.check(name.replace("x", "v"), model(z_t[..., :height, :width], *rest))


@torch.no_grad()
def test_skipped_blocks_match_the_reference(golden, load_original):
    case = golden("mmdit_skip_layers")
    model = of_case(case)
    load_original(model, case.weights)
    inputs = [case.inputs[name] for name in ("x", "sigma", "y", "context")]
    for layers in case.config["call"]["skip_lists"]:
        name = "_".join(map(str, layers)) or "none"
        case.check(f"v_skip_{name}", model.skipping(layers)(*inputs))


def test_skipping_shares_the_weights_and_leaves_the_network_as_it_was(randomize):
    model = randomize(MMDiT(**TINY), 0)
    before = model(*inputs())
    view = model.skipping([1])
    assert not torch.equal(view(*inputs()), before)
    assert torch.equal(model(*inputs()), before)
    assert view.blocks[0] is model.blocks[0]
    with pytest.raises(UserError, match=r"layers \[3\] cannot be skipped: there are 0 to 2"):
        model.skipping([1, 3])


@pytest.mark.parametrize(("qk_norm", "dual"), [(False, ()), (True, ()), (True, (0, 1))])
@torch.no_grad()
def test_network_matches_diffusers(load_diffusers, randomize, qk_norm, dual):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        pos_embed_max_size=6,
        qk_norm="rms_norm" if qk_norm else None,
        dual_attention_layers=dual,
    )
    randomize(peer, 0)
    model = MMDiT(**{**TINY, "mlp_ratio": 4.0}, qk_norm=qk_norm, dual_attention=dual)
    load_diffusers(model, peer.state_dict())
    z_t, t, c_vec, c_ctxt = inputs()
    theirs = peer(
        hidden_states=z_t,
        timestep=1000 * t,
        pooled_projections=c_vec,
        encoder_hidden_states=c_ctxt,
    ).sample
    difference = (model(z_t, t, c_vec, c_ctxt) - theirs).abs().max()
    assert difference <= 1e-5 * theirs.abs().max()
