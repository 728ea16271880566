import torch
from torch import nn

from mmdit.nn.norms import LayerNorm, RMSNorm


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rms_norm_divides_by_the_root_mean_square_and_multiplies_by_its_weight():
    norm = RMSNorm(64)
    x = 5 * randn(3, 64)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (64,), norm.weight, eps=1e-6))


def test_rms_norm_takes_its_statistics_in_float32_under_bfloat16():
    x = randn(50, 4096).bfloat16()
    norm = RMSNorm(4096).bfloat16()
    out = norm(x)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert out.dtype == torch.bfloat16
    # One rounding at the end, and none before: bfloat16 keeps eight bits.
    assert ((out.double() - exact) / exact).abs().max() < 2**-8


def test_rms_norm_does_not_overflow_in_float16():
    x = 1000 * randn(2, 64).half()  # its squares exceed the largest float16
    assert torch.isfinite(RMSNorm(64).half()(x)).all()


def test_layer_norm_has_no_parameters_and_gives_mean_zero_variance_one():
    norm = LayerNorm(64)
    assert list(norm.parameters()) == []
    out = norm(3 * randn(5, 64) + 2)
    torch.testing.assert_close(out.mean(-1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.var(-1, unbiased=False), torch.ones(5))


def test_epsilon_is_1e_6():
    """Inputs of standard deviation 1e-3 make eps as large as the variance."""
    x = randn(4, 4096)
    x = 1e-3 * (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)
    half = torch.full((4,), 0.5)
    for norm in (LayerNorm(4096), RMSNorm(4096)):
        torch.testing.assert_close(norm(x).square().mean(-1), half, rtol=1e-4, atol=0)
