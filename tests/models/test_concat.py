"""An MM-DiT that reads a second latent."""

import pytest
import torch

from mmdit.checkpoints.public import kind_of
from mmdit.errors import UserError
from mmdit.metrics.flops import counted_flops
from mmdit.models.concat import ConcatMMDiT, with_extra_channels
from mmdit.models.dit import DiT
from mmdit.models.mmdit import MMDiT
from mmdit.registry import build, describe
from tests.tiny import Tiny, inputs


def test_new_channels_change_nothing_until_they_are_trained(randomize) -> None:
    model = Tiny(MMDiT)()
    randomize(model, 0)
    wider = with_extra_channels(model, 3)
    z_t = inputs()[0]
    image = torch.randn(len(z_t), 3, *z_t.shape[2:])
    torch.testing.assert_close(wider(*inputs(), image=image), model(*inputs()))
    wider(*inputs(), image=image).square().sum().backward()
    before = model.patch_embedding.proj.weight.shape[1]
    assert wider.patch_embedding.proj.weight.grad[:, before:].abs().amax(0).min() > 0


def test_the_second_latent_matters(randomize) -> None:
    model = with_extra_channels(Tiny(MMDiT)(), 3)
    randomize(model, 0)
    z_t = inputs()[0]
    images = torch.randn(2, len(z_t), 3, *z_t.shape[2:])
    outputs = [model(*inputs(), image=image) for image in images]
    assert outputs[0].shape == z_t.shape
    assert not torch.allclose(*outputs)


def test_it_is_described_and_keeps_its_dtype() -> None:
    wider = with_extra_channels(Tiny(MMDiT)().bfloat16(), 2)
    assert wider.compute_dtype == torch.bfloat16 and wider.reads == {"image"}
    again = build(describe(wider))
    assert isinstance(again, ConcatMMDiT) and again.extra_channels == 2
    again.load_state_dict(wider.state_dict())


def test_its_operations_are_counted() -> None:
    model = Tiny(MMDiT)()
    channels = model.latent_channels  # the counter gives it a second latent like the first
    wider = with_extra_channels(model, channels)
    size = {"height": 8, "width": 4, "text_length": 5}
    assert wider.flops(**size) == counted_flops(wider, **size)


@pytest.mark.parametrize("count", [0, -1])
def test_counts_must_be_positive(count: int) -> None:
    with pytest.raises(UserError, match="extra_channels"):
        with_extra_channels(Tiny(MMDiT)(), count)


def test_other_networks_are_refused() -> None:
    with pytest.raises(UserError, match="not a DiT"):
        with_extra_channels(Tiny(DiT)(), 2)
    wider = with_extra_channels(Tiny(MMDiT)(), 2)
    with pytest.raises(UserError, match="not a ConcatMMDiT"):
        with_extra_channels(wider, 2)
    with pytest.raises(UserError, match="no public format"):
        kind_of(wider)
