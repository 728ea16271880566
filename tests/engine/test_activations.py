"""What is recomputed or compiled leaves every gradient as it is."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdit.engine.activations import recompute
from mmdit.errors import UserError
from mmdit.models.backbone import Backbone
from mmdit.models.cross_dit import CrossDiT
from mmdit.models.dit import DiT
from mmdit.models.mmdit import MMDiT
from mmdit.models.uvit import UViT

SIZES = {"latent_channels": 4, "context_width": 12, "pooled_width": 10, "position_size": 16}
NETWORKS: dict[str, Callable[..., Backbone]] = {
    "mmdit": MMDiT,
    "dit": DiT,
    "cross_dit": CrossDiT,
    "uvit": UViT,
}


def network(name: str, randomize: Callable[[nn.Module, int], nn.Module]) -> Backbone:
    model = NETWORKS[name](depth=2, width=32, num_heads=2, position_grid=4, **SIZES)
    randomize(model, 0)
    return model


def inputs(height: int = 8, width: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, height, width, generator=generator)
    t = torch.rand(2, generator=generator)
    c_vec = torch.randn(2, 10, generator=generator)
    return z, t, c_vec, torch.randn(2, 5, 12, generator=generator)


def gradients(model: Backbone) -> dict[str, Tensor]:
    model.zero_grad()
    model(*inputs()).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}  # type: ignore[union-attr]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("activations", ["none", "selective", "full"])
def test_recomputing_leaves_gradients_and_names_equal(name, activations, randomize):
    model = network(name, randomize)
    plain, keys = gradients(model), list(model.state_dict())
    recompute(model, activations)
    assert list(model.state_dict()) == keys
    assert_equal(gradients(model), plain)


def test_the_more_is_recomputed_the_less_is_kept(randomize):
    def kept(activations: str) -> int:
        model = network("mmdit", randomize)
        recompute(model, activations)
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(*inputs(16, 16))
        total = sum(storages.values())
        del output
        return total

    assert kept("full") < 0.5 * kept("none")


def test_an_unknown_word_is_refused(randomize):
    with pytest.raises(UserError, match="activation_checkpointing='some' must be one of none"):
        recompute(network("dit", randomize), "some")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("none", "selective")]


@pytest.mark.slow
@pytest.mark.parametrize("activations", [*SLOW, "full"])
def test_compiling_leaves_gradients_equal(activations, randomize):
    model = network("mmdit", randomize)
    plain = gradients(model)
    recompute(model, activations)
    torch.compiler.reset()
    model.compile()
    assert_equal(gradients(model), plain)


@pytest.mark.slow
def test_five_resolutions_compile_each_kind_of_block_at_most_twice(randomize):
    """Once for the first, and once more for all others."""
    model = network("mmdit", randomize)
    graphs: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs[str(len(list(graph.graph.nodes)))] += 1
        return graph.forward

    torch.compiler.reset()
    model.compile(backend=count)
    for height, width in ((8, 8), (8, 12), (16, 4), (12, 12), (4, 20)):
        model(*inputs(height, width)).square().mean().backward()
    assert 3 <= sum(graphs.values()) <= 6  # joint blocks, the last block, the output
