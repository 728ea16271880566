import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from mmdit.nn.attention import QKV, attention

B, H, N, D = 2, 3, 5, 4
BIAS = torch.randn(1, H, N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "bias": {"bias": BIAS},
    "scale": {"scale": 1.0},
    "bias and scale": {"bias": BIAS, "scale": 0.3},
    "causal and scale": {"causal": True, "scale": 0.3},
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def qkv(requires_grad: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, B, N, H, D, generator=generator, dtype=torch.float64)
    return [part.clone().requires_grad_(requires_grad) for part in parts]


def fused(q, k, v, *, bias=None, causal=False, scale=None):
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return rearrange(out, "b h n d -> b n (h d)")


@each_case
def test_the_path_written_out_equals_the_fused_kernel_in_outputs_and_gradients(case):
    ours, theirs = qkv(True), qkv(True)
    out, expected = attention(*ours, **case), fused(*theirs, **case)
    torch.testing.assert_close(out, expected)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    gradients = torch.autograd.grad(out, ours, towards)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, theirs, towards))


@each_case
def test_inference_equals_training(case):
    torch.testing.assert_close(attention(*qkv(False), **case), attention(*qkv(True), **case))


def test_beyond_the_length_at_which_the_fused_kernel_takes_over_nothing_changes():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1025, 1, 4, generator=generator).unbind()
    torch.testing.assert_close(attention(q.requires_grad_(), k, v), attention(q.detach(), k, v))
    short = [part[:, :1024] for part in (q, k, v)]
    out = attention(*short)
    torch.testing.assert_close(out, fused(*short))


def test_the_bias_gets_its_gradient():
    bias, other = (BIAS.clone().requires_grad_() for _ in range(2))
    (gradient,) = torch.autograd.grad(attention(*qkv(True), bias=bias).square().sum(), bias)
    (expected,) = torch.autograd.grad(fused(*qkv(True), bias=other).square().sum(), other)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_equal_keys_average_the_values(requires_grad):
    q, k, v = qkv(requires_grad)
    out = attention(q, k[:, :1].expand(-1, N, -1, -1), v)
    average = rearrange(v.mean(dim=1, keepdim=True), "b n h d -> b n (h d)")
    torch.testing.assert_close(out, average.expand(-1, N, -1))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_causal_position_never_sees_what_follows(requires_grad):
    q, k, v = qkv(requires_grad)
    before = attention(q, k, v, causal=True)
    k, v = (torch.cat([part[:, :3], part[:, 3:] + 1], dim=1) for part in (k, v))
    after = attention(q, k, v, causal=True)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=0)
    assert (after[:, 3:] != before[:, 3:]).all()


def test_heads_are_neighbouring_columns():
    layer = QKV(8, 2)
    x = torch.randn(2, 3, 8)
    q, k, v = layer(x)
    assert q.shape == k.shape == v.shape == (2, 3, 2, 4)
    for heads, linear in ((q, layer.q), (k, layer.k), (v, layer.v)):
        assert torch.equal(heads[:, :, 1], linear(x)[..., 4:])


@pytest.mark.parametrize("keys", [77, 410, 512, 513])
@pytest.mark.parametrize("case", [*CASES, "bias of every head"])
def test_in_bfloat16_no_key_is_added_that_anyone_sees(keys, case):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, B, keys, H, D, generator=generator).unbind()
    options = dict(CASES.get(case, {}))
    if "bias" in case:
        heads = H if case == "bias of every head" else 1
        options["bias"] = torch.randn(1, heads, keys, keys, generator=generator)
    expected = fused(q, k, v + 1, **options)  # values far from the zeros of added keys
    half = {name: x.bfloat16() if name == "bias" else x for name, x in options.items()}
    out = attention(q.bfloat16(), k.bfloat16(), (v + 1).bfloat16(), **half)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)
