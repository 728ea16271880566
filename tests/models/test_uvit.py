import pytest
import torch
from torch import Tensor, nn

from mmdit.errors import UserError
from mmdit.models.uvit import ConvolutionBlock, UViT

TINY = {
    "depth": 2,
    "width": 32,
    "num_heads": 2,
    "latent_channels": 4,
    "context_width": 12,
    "pooled_width": 10,
    "position_size": 8,
}


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def inputs(side: int = 8) -> tuple[Tensor, ...]:
    t = torch.tensor([0.3, 0.8])
    return maps(2, 4, side, side), t, maps(2, 10), maps(2, 5, 12)


def test_a_fresh_block_is_the_identity():
    block = UViT(**TINY).down[0]
    h = maps(2, 16, 6, 4)
    assert torch.equal(block(h, maps(2, 32)), h)


def test_a_block_is_steered_by_y(randomize):
    block = randomize(ConvolutionBlock(32, 16, 32, 2), 0)
    h, y = maps(1, 32, 9, 9), maps(1, 32)
    assert block(h, y).shape == (1, 16, 9, 9)
    assert (block(h, y + 1) - block(h, y)).abs().max() > 1e-3


def test_a_block_sees_two_pixels_around(randomize):
    """And beyond them nothing but the statistics of GroupNorm, which are left out here."""
    block = randomize(ConvolutionBlock(32, 16, 32, 2), 0)
    block.norm1 = block.norm2 = nn.Identity()
    h, y = maps(1, 32, 9, 9), maps(1, 32)
    moved = torch.cat([h[..., :8], h[..., 8:] + 1], dim=-1)
    changed = (block(moved, y) - block(h, y)).abs().amax(dim=(0, 1, 2)) > 1e-4
    assert changed.tolist() == 6 * [False] + 3 * [True]


def test_the_skip_connections_are_a_stack(randomize):
    """The first feature maps reach the last block, the last the first."""
    model = randomize(UViT(**TINY, conv_blocks=2), 0)
    seen: dict[str, Tensor] = {}
    for name in ("down.0", "down.1", "up.0", "up.1"):
        model.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: out, f"into {name}": given[0]})
        )
    model(*inputs())
    assert torch.equal(seen["into up.0"][:, 16:], seen["down.1"])
    assert torch.equal(seen["into up.1"][:, 16:], seen["down.0"])
    assert torch.equal(seen["into up.1"][:, :16], seen["up.0"])


@torch.no_grad()
def test_without_its_transformer_it_is_convolutions_of_what_is_near(randomize):
    """Text and far pixels are seen by the tokens alone, but for the statistics of GroupNorm."""
    model = randomize(UViT(**TINY), 0)
    z_t, t, c_vec, c_ctxt = inputs()
    nn.init.zeros_(model.output.linear.weight)
    nn.init.zeros_(model.output.linear.bias)
    before = model(z_t, t, c_vec, c_ctxt)
    assert torch.equal(model(z_t, t, c_vec, c_ctxt + 1), before)
    assert not torch.equal(model(z_t, t + 0.1, c_vec, c_ctxt), before)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_sides_shrink_by_the_patch(randomize, patch_size):
    model = randomize(UViT(**TINY, patch_size=patch_size), 0)
    seen = []
    model.blocks[0].register_forward_hook(lambda _, given, out: seen.append(given[0].shape))
    assert model(*inputs()).shape == (2, 4, 8, 8)
    assert seen == [(2, 5 + (8 // patch_size) ** 2, 32)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 36, "num_heads": 12}, r"width 36 must be divisible by 24: its convolution"),
        (
            {"width": 36, "num_heads": 4},
            r"width 36 must be divisible by 8: .* 4 groups, as num_heads",
        ),
        ({"num_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
        ({"conv_blocks": 0}, "conv_blocks=0 must be a whole number of at least 1"),
    ],
)
def test_channels_that_do_not_split_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        UViT(**{**TINY, **sizes})
