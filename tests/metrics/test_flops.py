from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from yaml import safe_load

from mmdit.metrics.flops import counted_flops
from mmdit.models.backbone import Backbone
from mmdit.models.dit import DiT
from mmdit.models.uvit import UViT

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
SMALL: dict[str, Any] = {
    "width": 24,
    "num_heads": 3,
    "mlp_ratio": 2.5,
    "latent_channels": 5,
    "context_width": 12,
    "pooled_width": 10,
    "position_size": 6,
}


def on_meta(name: str, **changes: Any) -> Backbone:
    config = safe_load((CONFIGS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        return instantiate(config, **changes)


@pytest.mark.each("backbone")
@pytest.mark.parametrize("size", [(8, 8, 26), (2, 12, 14), (12, 10, 100)])
def test_closed_form_and_count_are_the_same(backbone, size):
    at = dict(zip(("height", "width", "text_length"), size, strict=True))
    normed = backbone.normed()
    assert normed.flops(**at) == counted_flops(normed, **at)
    network = backbone()
    assert network.flops(**at) == counted_flops(network, **at)
    view = network.skipping([0, 2])
    assert view.flops(**at) == counted_flops(view, **at) < network.flops(**at)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d24", "sd35_medium"])
def test_closed_form_and_count_are_the_same_for_a_megapixel(name):
    network = on_meta(name)
    at = {"height": 128, "width": 128, "text_length": 154}
    assert network.flops(**at) == counted_flops(network, **at)


def test_a_transformer_block_costs_what_pencil_and_paper_say():
    """A second block adds modulation, four products and an MLP for 12 + 7 tokens, and attention."""
    at = {"height": 6, "width": 8, "text_length": 7}
    one, two = (counted_flops(DiT(**SMALL, depth=depth), **at) for depth in (1, 2))
    d, hidden, n = 24, 60, 12 + 7
    assert two - one == 2 * (d * 6 * d + n * (4 * d * d + 2 * d * hidden) + 2 * n * n * d)


def test_a_convolution_block_costs_what_pencil_and_paper_say():
    """Two more residual blocks: one of 12 channels, one of 24 to 12, with its shortcut."""
    at = {"height": 6, "width": 8, "text_length": 7}
    one, two = (counted_flops(UViT(**SMALL, depth=1, conv_blocks=k), **at) for k in (1, 2))
    down = 9 * 12 * 12 + 9 * 12 * 12
    up = 9 * 24 * 12 + 9 * 12 * 12 + 24 * 12
    assert two - one == 2 * (2 * 24 * 3 * 12 + 6 * 8 * (down + up))


def test_the_count_is_linear_in_the_batch_and_leaves_the_network_as_it_is():
    network = DiT(**SMALL, depth=1)
    at = {"height": 4, "width": 4, "text_length": 3}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert counted_flops(network, **at, batch=3) == 3 * counted_flops(network, **at)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
