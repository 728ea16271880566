"""A view of a network that evaluates all blocks only for some samples: laws of every backbone."""

import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.cached_velocity import Residuals
from mmdit.models.concat import with_extra_channels
from mmdit.models.controlnet import ControlledMMDiT, ControlNet
from mmdit.models.dit import DiT
from mmdit.models.mmdit import MMDiT
from tests.tiny import Tiny, inputs

each_backbone = pytest.mark.each("backbone")  # a `Tiny`, which builds one
SIZE = {"height": 6, "width": 4, "text_length": 5}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def moved(by: tuple[float, ...]) -> tuple[torch.Tensor, ...]:
    """The inputs of three samples, whose latents are shifted by so much."""
    z, *others = inputs(batch=3)
    return z + torch.tensor(by)[:, None, None, None], *others


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@each_backbone
def test_threshold_zero_is_the_whole_network_bit_for_bit(backbone, randomize):
    model = randomize(backbone(), 0)
    view = model.reusing(Residuals(0.0))
    for by in (0.0, 0.0, 0.1, 3.0):
        given = moved((by, 0.0, by))
        assert torch.equal(view(*given), model(*given))
        assert view.flops(**SIZE) == model.flops(**SIZE)


@each_backbone
def test_what_has_not_changed_costs_the_first_block(backbone, randomize):
    model = randomize(backbone(), 0)
    view = model.reusing(Residuals(0.5))
    seen = [0] * len(model.layers)
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, i=i: seen.__setitem__(i, seen[i] + 1))
    first, again = view(*inputs()), view(*inputs())
    assert close(again, first)
    assert seen == [2] + [1] * (len(seen) - 1)
    later = range(1, len(model.layers))
    assert view.flops(**SIZE) == model.skipping(later).flops(**SIZE) < model.flops(**SIZE)


@each_backbone
def test_each_sample_decides_for_itself(backbone, randomize):
    model = randomize(backbone(), 0)
    residuals = Residuals(0.05)
    view = model.reusing(residuals)
    before = view(*moved((0.0, 0.0, 0.0)))
    new = moved((0.0, 9.0, 0.0))
    found = view(*new)
    assert residuals.rows.tolist() == [1]
    assert close(found[1], model(*new)[1]) and close(found[::2], before[::2])
    third = view(*moved((9.0, 9.0, 0.0)))
    assert residuals.rows.tolist() == [0]
    assert close(third[1], found[1])  # from the evaluation just before, not from the first
    assert close(third[0], model(*moved((9.0, 9.0, 0.0)))[0])


@each_backbone
def test_the_weights_are_shared_and_the_network_is_as_it_was(backbone, randomize):
    model = randomize(backbone(), 0)
    before, blocks = model(*inputs()), model.layers
    view = model.reusing(Residuals(0.5))
    view(*inputs())
    assert {*map(id, view.parameters())} == {*map(id, model.parameters())}
    assert all(a is b for a, b in zip(model.layers, blocks, strict=True))
    assert torch.equal(model(*inputs()), before)


def test_what_is_reused_is_what_the_later_blocks_added(randomize):
    """Written out for an MM-DiT, at an input that differs a little."""
    model = randomize(Tiny(MMDiT)(), 0)
    view = model.reusing(Residuals(1.0))

    def around(z, t, c_vec, c_ctxt):
        """The image's tokens after the first block and after the last."""
        y = model.vector(t, c_vec)
        c, x = model.blocks[0](model.text_tokens(c_ctxt), model.image_tokens(z), y)
        first = x
        for block in model.blocks[1:]:
            c, x = block(c, x, y)
        return first, model.last_block(c, x, y), y

    old, new = moved((0.0, 0.0, 0.0)), moved((0.05, 0.1, -0.05))
    view(*old)
    found = view(*new)
    first, last, _ = around(*old)
    tokens, _, y = around(*new)
    assert close(found, model.prediction(tokens + (last - first), y, 6, 4))
    assert not close(found, model(*new))


@pytest.mark.parametrize("skipped", [[0], [2], [1]])
def test_blocks_that_are_skipped_stay_so(skipped, randomize):
    model = randomize(Tiny(MMDiT)(), 0)
    weaker, residuals = model.skipping(skipped), Residuals(0.5)
    view = weaker.reusing(residuals)
    assert torch.equal(view(*inputs()), weaker(*inputs()))
    assert view.flops(**SIZE) == weaker.flops(**SIZE)
    assert close(view(*inputs()), weaker(*inputs()))
    assert residuals.share == 0 and view.flops(**SIZE) < weaker.flops(**SIZE)
    # A network whose first block is evaluated alone can have blocks left out, too.
    assert close(
        model.reusing(Residuals(0.0)).skipping([1])(*inputs()), model.skipping([1])(*inputs())
    )


def test_a_network_that_reads_a_second_latent(randomize):
    model = randomize(with_extra_channels(Tiny(MMDiT)(), 2), 0)
    residuals, image = Residuals(0.05), torch.ones(3, 2, 6, 4)
    view = model.reusing(residuals)
    first = view(*inputs(3), image=image)
    assert torch.equal(first, model(*inputs(3), image=image))
    image[1] = 9.0
    found = view(*inputs(3), image=image)
    assert residuals.rows.tolist() == [1]
    assert close(found[1], model(*inputs(3), image=image)[1]) and close(found[0], first[0])


def test_half_precision_and_autocast(randomize):
    model = randomize(Tiny(MMDiT)(), 0)
    half = randomize(Tiny(MMDiT)(), 0).bfloat16()
    for network, cast in ((model, True), (half, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            residuals = Residuals(0.05)
            view = network.reusing(residuals)
            assert torch.equal(view(*inputs(3)), network(*inputs(3)))
            assert view(*moved((0.0, 9.0, 0.0))).isfinite().all()
            assert residuals.rows.tolist() == [1]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: Tiny(MMDiT)(depth=1), "needs a block after the first, but MMDiT has 1 of 1"),
        (lambda: Tiny(DiT)().skipping([0, 1]), "needs a block after the first, but DiT has 1 of 3"),
        (
            lambda: ControlledMMDiT(
                base=Tiny(MMDiT)(),
                control_net=ControlNet(
                    depth=3, width=32, num_heads=2, latent_channels=4, pooled_width=10
                ),
            ),
            "ControlledMMDiT has no first-block cache: .*TaylorCache",
        ),
    ],
)
def test_networks_without_later_blocks_are_refused(network, message):
    with pytest.raises(UserError, match=message):
        network().reusing(Residuals(0.1))
