import itertools

import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.flow.guidance import (
    ClassifierFreeGuidance,
    Guidance,
    GuidanceInterval,
    GuidanceRescale,
    GuidedPair,
    SkipLayerGuidance,
    ZeroUnconditional,
)
from mmdit.flow.schedule import Shift
from mmdit.flow.solvers import dpmpp_2m, euler, heun, midpoint

GENERATOR = torch.Generator().manual_seed(0)
POSITIVE = Condition(
    torch.randn(2, 3, generator=GENERATOR), torch.randn(2, 4, 5, generator=GENERATOR)
)
NEGATIVE = Condition(
    torch.randn(2, 3, generator=GENERATOR), torch.randn(2, 4, 5, generator=GENERATOR)
)
Z = torch.randn(2, 3, 4, 4, generator=GENERATOR)
TIME = 0.7
GRID = Shift().grid(10)


def velocity(z, t, condition):
    """Depends on every argument, sample by sample."""
    c_vec, c_ctxt, _ = condition
    assert len(z) == len(c_vec) == len(c_ctxt)
    return t * z + c_vec[:, :, None, None] + c_ctxt.mean(dim=(1, 2))[:, None, None, None]


def guided(scale, velocity=velocity):
    guide = ClassifierFreeGuidance(scale=scale)
    return guide(velocity, POSITIVE, NEGATIVE, GRID, 10)(Z, TIME)


def test_scale_one_is_the_conditional_velocity_and_computes_nothing_else():
    batches = []

    def counted(z, t, condition):
        batches.append(len(z))
        return velocity(z, t, condition)

    assert torch.equal(guided(1.0, counted), velocity(Z, TIME, POSITIVE))
    assert batches == [2]
    guided(2.0, counted)
    assert batches == [2, 4]


def test_scale_zero_is_the_unconditional_velocity():
    torch.testing.assert_close(guided(0.0), velocity(Z, TIME, NEGATIVE))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 4.5])
def test_guidance_is_linear_in_its_scale(scale):
    expected = guided(0.0) + scale * (guided(1.0) - guided(0.0))
    torch.testing.assert_close(guided(scale), expected)


def test_the_same_condition_on_both_sides_changes_nothing():
    guide = ClassifierFreeGuidance(scale=7.0)
    torch.testing.assert_close(
        guide(velocity, POSITIVE, POSITIVE, GRID, 10)(Z, TIME), velocity(Z, TIME, POSITIVE)
    )


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_guidance_is_computed_in_float32(scale):
    def half(z, t, condition):
        return velocity(z, t, condition).bfloat16()

    result = guided(scale, half)
    assert result.dtype == torch.float32
    cond, uncond = half(Z, TIME, POSITIVE).float(), half(Z, TIME, NEGATIVE).float()
    torch.testing.assert_close(result, uncond + scale * (cond - uncond))


class Layered:
    """A velocity that is weaker by a tenth for each block passed by, and counts its batches."""

    def __init__(self, *, weaker: float = 1.0) -> None:
        self.weaker = weaker
        self.batches: list[int] = []
        self.without: dict[tuple[int, ...], Layered] = {}

    def __call__(self, z, t, condition):
        self.batches.append(len(z))
        return self.weaker * velocity(z, t, condition)

    def skipping(self, layers):
        return self.without.setdefault(tuple(layers), Layered(weaker=1 - len(layers) / 10))


def skip_layer(network, grid=GRID, steps=10, scale=4.5, **arguments):
    plain = ClassifierFreeGuidance(scale=scale)
    guide = SkipLayerGuidance(**{"inner": plain, "start": 0.05, "end": 0.3, **arguments})
    return guide(network, POSITIVE, NEGATIVE, grid, steps)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_skip_layer_guidance_adds_its_term_inside_the_window_only(scale):
    network = Layered()
    v = skip_layer(network, scale=scale, skip_scale=2.5, layers=(3, 4))
    cond, uncond = (velocity(Z, 0.85, side) for side in (POSITIVE, NEGATIVE))
    plain = uncond + scale * (cond - uncond)
    torch.testing.assert_close(v(Z, 0.85), plain + 2.5 * (cond - 0.8 * cond))
    assert list(network.without) == [(3, 4)]
    assert network.batches == [2 if scale == 1.0 else 4]
    for outside in (1.0, 0.95, 0.3):
        cond, uncond = (velocity(Z, outside, side) for side in (POSITIVE, NEGATIVE))
        torch.testing.assert_close(v(Z, outside), uncond + scale * (cond - uncond))


@pytest.mark.parametrize(
    ("solver", "skipped"),
    # Steps 1 and 2 are inside: 0.5 and 3 are not whole, or not strictly less.
    [(euler, 2), (midpoint, 4), (heun, 4), (dpmpp_2m, 2)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_solver_asks_for_the_skipped_network_inside_the_window_only(solver, skipped):
    network = Layered()
    solver(skip_layer(network), Z, GRID)
    assert len(network.skipping((7, 8, 9)).batches) == skipped


def test_the_window_counts_the_steps_that_are_left_against_all_steps():
    """Half a grid of 20: steps 10 to 19 are left, of which the window has 2 to 5."""
    network = Layered()
    grid = Shift().grid(20)[10:]
    v = skip_layer(network, grid, 20)
    times = grid[:-1].tolist()
    for t in times:
        v(Z, t)
    assert len(network.skipping((7, 8, 9)).batches) == 4
    network.skipping((7, 8, 9)).batches.clear()
    v(Z, times[1])
    assert network.skipping((7, 8, 9)).batches == []
    v(Z, times[2])
    assert network.skipping((7, 8, 9)).batches == [2]


def test_an_empty_window_is_classifier_free_guidance():
    for grid in (GRID, GRID[-1:]):
        guided = skip_layer(Layered(), grid, scale=3.0, start=0.2, end=0.2)
        expected = ClassifierFreeGuidance(scale=3.0)(velocity, POSITIVE, NEGATIVE, grid, 10)
        torch.testing.assert_close(guided(Z, 0.8), expected(Z, 0.8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ()}, "must be a list"),
        ({"layers": 7}, "layers=7 must be a list"),
        ({"start": 0.5, "end": 0.2}, "start 0.5 and end 0.2"),
        ({"end": 20.0}, "fractions"),
    ],
)
def test_impossible_windows_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SkipLayerGuidance(inner=ClassifierFreeGuidance(), **arguments)


def at(guide, network, t, z=Z):
    return guide(network, POSITIVE, NEGATIVE, GRID, 10)(z, t)


def cfg(scale=3.0):
    return ClassifierFreeGuidance(scale=scale)


@pytest.mark.parametrize("t", [0.2, 0.21, 0.5, 0.9, 0.91, 1.0])
def test_an_interval_guides_inside_it_and_asks_for_the_prompt_alone_outside(t):
    network = Layered()
    v = at(GuidanceInterval(inner=cfg(), low=0.2, high=0.9), network, t)
    inside = 0.2 < t <= 0.9
    expected = at(cfg(3.0 if inside else 1.0), Layered(), t)
    assert torch.equal(v, expected)
    assert network.batches == [4 if inside else 2]


def test_the_whole_interval_is_the_inner_guidance():
    guide = GuidanceInterval(inner=cfg(), low=0.0, high=1.0)
    for t in GRID[:-1].tolist():
        assert torch.equal(at(guide, Layered(), t), at(cfg(), Layered(), t))


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.9, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_impossible_intervals_are_refused(low, high):
    with pytest.raises(UserError, match=f"GuidanceInterval: low {low} and high {high}"):
        GuidanceInterval(inner=cfg(), low=low, high=high)


def spread_of_data(v, t=TIME):
    return (Z - t * v).flatten(1).std(1)


@pytest.mark.parametrize("scale", [0.0, 3.0, 15.0])
def test_the_whole_rescale_gives_the_data_the_spread_of_the_conditional_one(scale):
    wanted = spread_of_data(uneven(Z, TIME, POSITIVE))
    before = spread_of_data(at(cfg(scale), uneven, TIME))
    assert ((before - wanted).abs() > 0.01 * wanted).all()
    after = spread_of_data(at(GuidanceRescale(inner=cfg(scale), phi=1.0), uneven, TIME))
    torch.testing.assert_close(after, wanted)


def uneven(z, t, condition):
    """As `velocity`, and the condition also changes the spread."""
    return velocity(z, t, condition) * (1 + condition.c_vec[:, :1, None, None])


def test_rescale_mixes_by_phi_and_not_at_all_at_zero():
    none, half, whole = (
        at(GuidanceRescale(inner=cfg(), phi=phi), uneven, TIME) for phi in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(none, at(cfg(), uneven, TIME))
    torch.testing.assert_close(half, (none + whole) / 2)


def test_rescale_changes_nothing_without_guidance():
    rescaled = at(GuidanceRescale(inner=cfg(1.0), phi=1.0), uneven, TIME)
    torch.testing.assert_close(rescaled, uneven(Z, TIME, POSITIVE))


def test_rescale_treats_each_image_alone():
    guide = GuidanceRescale(inner=cfg(), phi=0.7)
    together = at(guide, uneven, TIME)
    for i in range(2):
        pair = (side.map(lambda part, i=i: part[i : i + 1]) for side in (POSITIVE, NEGATIVE))
        alone = guide(uneven, *pair, GRID, 10)(Z[i : i + 1], TIME)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_rescale_leaves_data_without_spread_as_it_is():
    def to_zero(z, t, condition):  # predicts x_0 = 0 everywhere
        return z / t

    v = at(GuidanceRescale(inner=cfg(), phi=1.0), to_zero, 0.5)
    torch.testing.assert_close(v, Z / 0.5)


@pytest.mark.parametrize("phi", [-0.1, 1.1])
def test_impossible_rescales_are_refused(phi):
    with pytest.raises(UserError, match=rf"GuidanceRescale: phi {phi} must lie in \[0, 1\]"):
        GuidanceRescale(inner=cfg(), phi=phi)


def test_zero_unconditional_guides_away_from_zeros_whatever_the_negative_prompt():
    zeros = NEGATIVE.map(torch.zeros_like)
    expected = cfg()(velocity, POSITIVE, zeros, GRID, 10)(Z, TIME)
    assert torch.equal(at(ZeroUnconditional(inner=cfg()), velocity, TIME), expected)
    assert not torch.allclose(at(cfg(), velocity, TIME), expected)


WRAPPERS = {
    "interval": lambda inner: GuidanceInterval(inner=inner, low=0.2, high=0.9),
    "rescale": lambda inner: GuidanceRescale(inner=inner, phi=0.7),
    "zero": lambda inner: ZeroUnconditional(inner=inner),
    "skip": lambda inner: SkipLayerGuidance(inner=inner, layers=(3,), start=0.05, end=0.9),
}


@pytest.mark.parametrize("order", list(itertools.permutations(WRAPPERS)), ids="-".join)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_wrappers_compose_in_any_order_and_compute_nothing_twice(order, scale):
    guide = cfg(scale)
    for name in order:
        guide = WRAPPERS[name](guide)
    network = Layered()
    guided = guide(network, POSITIVE, NEGATIVE, GRID, 10)
    weaker = network.skipping((3,))
    # Inside the interval and outside of it, each new latent at a new time.
    for i, (t, inside) in enumerate([(0.6, True), (0.85, True), (0.15, False), (0.6, True)]):
        assert guided(Z + i, t).shape == Z.shape
        assert network.batches == [4 if inside and scale != 1.0 else 2]
        assert len(weaker.batches) <= 1 and set(weaker.batches) <= {2}
        # The prompt's half is known and not computed again: `skip` adds its own network only.
        if inside:
            assert weaker.batches == [2]
        network.batches.clear()
        weaker.batches.clear()


def test_composition_is_that_of_the_formulas():
    """Rescaled, in an interval, away from zeros: each step written out."""
    guide = GuidanceRescale(
        inner=GuidanceInterval(inner=ZeroUnconditional(inner=cfg()), low=0.2, high=0.9), phi=1.0
    )
    zeros = NEGATIVE.map(torch.zeros_like)
    cond, uncond = uneven(Z, TIME, POSITIVE), uneven(Z, TIME, zeros)
    x_0 = Z - TIME * (uncond + 3.0 * (cond - uncond))
    wanted = (Z - TIME * cond).flatten(1).std(1) / x_0.flatten(1).std(1)
    expected = (Z - wanted[:, None, None, None] * x_0) / TIME
    torch.testing.assert_close(at(guide, uneven, TIME), expected)
    torch.testing.assert_close(at(guide, uneven, 0.95), uneven(Z, 0.95, POSITIVE))


# Laws of every guidance


each_guidance = pytest.mark.each("guidance")


class Counted(Layered):
    """Remembers at which points, of which samples and without which blocks it was asked."""

    def __init__(self, velocity=velocity, layers=(), asked=None) -> None:
        self.velocity, self.layers = velocity, layers
        self.asked = [] if asked is None else asked

    def __call__(self, z, t, condition):
        self.asked += [
            (self.layers, t, *map(hash_of, row))
            for row in zip(z, condition.c_vec, condition.c_ctxt, strict=True)
        ]
        return (1 - len(self.layers) / 10) * self.velocity(z, t, condition)

    def skipping(self, layers):
        return Counted(self.velocity, tuple(layers), self.asked)


def hash_of(tensor):
    return tensor.numpy().tobytes()


@each_guidance
def test_where_the_condition_changes_nothing_guidance_does_not(guidance):
    class Deaf:
        def __call__(self, z, t, condition):
            return torch.sin(3 * z) + t

        def skipping(self, layers):
            return self

    guided = guidance(Deaf(), POSITIVE, NEGATIVE, GRID, 10)
    for t in GRID[:-1].tolist():
        torch.testing.assert_close(guided(Z, t), torch.sin(3 * Z) + t, rtol=1e-4, atol=1e-5)


@each_guidance
def test_guidance_treats_each_image_alone_and_asks_nothing_twice(guidance):
    network = Counted(uneven)
    together = guidance(network, POSITIVE, NEGATIVE, GRID, 10)
    for t in (0.95, 0.85, 0.5, 0.1):
        both = together(Z, t)
        assert both.shape == Z.shape and both.isfinite().all()
        assert len(network.asked) == len(set(network.asked))
        network.asked.clear()
        for i in range(2):
            pair = [side.map(lambda part, i=i: part[i : i + 1]) for side in (POSITIVE, NEGATIVE)]
            alone = guidance(Counted(uneven), *pair, GRID, 10)(Z[i : i + 1], t)
            torch.testing.assert_close(alone, both[i : i + 1])


@each_guidance
def test_every_guidance_follows_the_prompt_and_computes_in_float32(guidance):
    def half(z, t, condition):
        return uneven(z, t, condition).bfloat16()

    guided = guidance(Counted(half), POSITIVE, NEGATIVE, GRID, 10)
    other = guidance(Counted(half), NEGATIVE, NEGATIVE, GRID, 10)
    for t in (0.95, 0.85, 0.5, 0.1):
        assert guided(Z, t).dtype == torch.float32
        assert (guided(Z, t) - other(Z, t)).abs().max() > 0.01


@each_guidance
def test_every_guidance_is_a_function_of_the_point_alone(guidance):
    guided = guidance(Counted(uneven), POSITIVE, NEGATIVE, GRID, 10)
    first = [guided(Z, t) for t in (0.95, 0.5, 0.1)]
    again = [guided(Z, t) for t in (0.1, 0.5, 0.95)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


def test_what_is_remembered_of_a_point_serves_no_other():
    network = Layered()
    pair = GuidedPair(network, POSITIVE, NEGATIVE)
    for z, t in ((Z, 0.5), (Z, 0.4), (Z.clone(), 0.4), (Z + 1, 0.4)):
        assert torch.equal(pair.conditional(z, t), velocity(z, t, POSITIVE))
        assert torch.equal(pair.against(POSITIVE).conditional(z, t), velocity(z, t, POSITIVE))
    assert network.batches == [2, 2, 2, 2]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_are_finite(scale):
    with pytest.raises(UserError, match=f"ClassifierFreeGuidance: scale={scale} must be a finite"):
        ClassifierFreeGuidance(scale=scale)
    with pytest.raises(UserError, match=f"SkipLayerGuidance: skip_scale={scale} must be a finite"):
        SkipLayerGuidance(inner=ClassifierFreeGuidance(), skip_scale=scale)


def kinds(cls: type = Guidance) -> list[type]:
    """Every guidance there is."""
    return [*cls.__subclasses__(), *(kind for own in cls.__subclasses__() for kind in kinds(own))]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_the_negative_prompt_matters_exactly_where_it_is_said_to_be_read(kind, scale):
    plain = ClassifierFreeGuidance(scale=scale)
    guide = plain if kind is ClassifierFreeGuidance else kind(inner=plain)
    network = Layered()

    def velocities(negative):
        velocity = guide(network, POSITIVE, negative, GRID, 10)
        return torch.stack([velocity(Z, t) for t in GRID[:-1].tolist()])

    if guide.reads_negative:
        assert not torch.equal(velocities(NEGATIVE), velocities(POSITIVE))
    else:
        assert torch.equal(velocities(NEGATIVE), velocities(None))


# What else conditions the network


class Controlled(Layered):
    """Adds the control that it is shown, whose rows have to be those of the batch."""

    def __call__(self, z, t, condition):
        assert len(condition.extra["control"]) == len(z)
        return super().__call__(z, t, condition) + condition.extra["control"]

    def skipping(self, layers):
        return Controlled(weaker=1 - len(layers) / 10)


@pytest.mark.parametrize(
    "guidance",
    [
        ClassifierFreeGuidance(scale=1.0),
        ClassifierFreeGuidance(scale=3.0),
        ZeroUnconditional(inner=ClassifierFreeGuidance(scale=3.0)),
        GuidanceInterval(inner=ClassifierFreeGuidance(scale=3.0)),
        SkipLayerGuidance(inner=ClassifierFreeGuidance(scale=3.0), start=0.0, end=1.0),
    ],
    ids=lambda guidance: type(guidance).__name__,
)
def test_control_is_the_same_on_both_sides_of_guidance(guidance):
    """A control that is added to both conditions is there once in what is guided."""
    extra = {"control": torch.randn(Z.shape, generator=torch.Generator().manual_seed(1))}
    pair = [side._replace(extra=extra) for side in (POSITIVE, NEGATIVE)]
    plain = guidance(Layered(), POSITIVE, NEGATIVE, GRID, 10)(Z, 0.85)
    found = guidance(Controlled(), *pair, GRID, 10)(Z, 0.85)
    torch.testing.assert_close(found, plain + extra["control"])
