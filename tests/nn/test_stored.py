"""Weights that are stored in 16 bits and multiplied in float32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdit.models.t5 import T5Encoder
from mmdit.nn.stored import StoredLinear, compute_in_float32, linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_those_of_the_weights_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 3), (5,)))
    x = torch.randn(2, 4, 3, requires_grad=True)
    y = linear(x, weight, bias)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    expected = F.linear(x, weight.float(), bias.float())
    (own,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(gradient, own)


def test_no_copy_of_a_weight_waits_for_the_backward_pass() -> None:
    kept: list[torch.Tensor] = []
    weight = torch.randn(8, 8).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear(torch.randn(2, 8, requires_grad=True), weight, None)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]


def test_a_network_computes_in_float32_and_stays_stored() -> None:
    torch.manual_seed(0)
    size = {"vocabulary_size": 50, "width": 32, "depth": 2, "num_heads": 4, "head_width": 8}
    model = T5Encoder(**size, hidden=64).bfloat16().requires_grad_(False)
    wide, before = copy.deepcopy(model).float(), model.state_dict()
    compute_in_float32(model)
    ids = torch.randint(0, 50, (2, 9))
    assert torch.equal(model(ids), wide(ids))
    assert model.compute_dtype == torch.float32
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert {type(layer) for layer in layers} == {StoredLinear}
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].float(), before[key].float()) for key in before)


def test_what_is_trained_is_no_longer_stored() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    model[0].requires_grad_(False)
    compute_in_float32(model)
    assert type(model[0]) is StoredLinear and type(model[1]) is nn.Linear
    assert [layer.weight.dtype for layer in model] == [torch.bfloat16, torch.float32]
    model(torch.randn(1, 2)).sum().backward()
    assert model[1].weight.grad is not None and model[0].weight.grad is None
