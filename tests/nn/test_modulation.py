import torch
from torch import nn

from mmdit.nn.modulation import Modulation, modulate


def test_a_fresh_modulation_is_zero_for_every_input():
    modulation = Modulation(8, 6)
    modulation.reset_parameters()
    parts = modulation(torch.randn(3, 8))
    assert len(parts) == 6
    assert all(part.shape == (3, 1, 8) and not part.any() for part in parts)


def test_modulation_is_linear_in_silu_and_parts_are_consecutive_rows():
    modulation = Modulation(4, 3)
    y = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    stacked = torch.cat(modulation(y), dim=-1)[:, 0]
    torch.testing.assert_close(stacked, modulation.linear(nn.functional.silu(y)))


def test_modulate_scales_around_one_then_shifts():
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, 1, 4)
    assert torch.equal(modulate(x, nothing, nothing), x)
    shift, scale = torch.full((2, 1, 4), 3.0), torch.full((2, 1, 4), 0.5)
    torch.testing.assert_close(modulate(x, shift, scale), 1.5 * x + 3.0)


def test_each_sample_is_modulated_by_its_own_vector():
    x = torch.ones(2, 2, 2)  # equal sides
    scale = torch.tensor([1.0, 2.0])[:, None, None].expand(2, 1, 2)
    out = modulate(x, torch.zeros_like(scale), scale)
    assert out[0].eq(2.0).all() and out[1].eq(3.0).all()
