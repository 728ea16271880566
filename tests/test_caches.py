"""Sampling with caches: what is saved, counted, and never passed on."""

from collections import Counter
from functools import partial

import pytest
import torch

from mmdit.errors import NotFinite, UserError
from mmdit.flow.caches import SOLVERS, FirstBlockCache, TaylorCache
from mmdit.flow.guidance import (
    ClassifierFreeGuidance,
    GuidanceInterval,
    GuidanceRescale,
    SkipLayerGuidance,
    ZeroUnconditional,
)
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.solvers import euler_ancestral, heun, midpoint, stochastic
from mmdit.flow.timesteps import LogitNormal
from mmdit.flow.transitions import FlowSDE
from mmdit.flow.watch import Watch
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.controlnet import ControlledMMDiT, ControlNet
from mmdit.models.interval import with_intervals
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline import Pipeline
from mmdit.request import Request
from tests.test_pipeline import Letters

CFG = ClassifierFreeGuidance(scale=2.0)
SKIP = partial(SkipLayerGuidance, layers=(1,), start=0.0, end=0.6)
GUIDANCES = {
    "none": ClassifierFreeGuidance(scale=1.0),
    "cfg": CFG,
    "interval": GuidanceInterval(inner=CFG, low=0.3, high=0.9),
    "skip": SKIP(inner=CFG),
    "rescale": GuidanceRescale(inner=CFG),
    "zeros": ZeroUnconditional(inner=CFG),
    "all": GuidanceRescale(
        inner=GuidanceInterval(inner=SKIP(inner=ZeroUnconditional(inner=CFG)), low=0.3, high=0.9)
    ),
}
each_guidance = pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
CACHES = {
    "first block": FirstBlockCache(threshold=0.3),
    "first block, limited": FirstBlockCache(threshold=1.0, max_consecutive=2, warmup_steps=2),
    "taylor": TaylorCache(interval=2, order=1),
}
each_cache = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)


@pytest.fixture
def pipe(randomize):
    """A pipeline that samples 8 x 8 images in ten steps."""
    sizes = {"latent_channels": 4, "context_width": 6, "pooled_width": 5}
    places = {"position_size": 4, "position_grid": 2, "position_base": 2}
    pipe = Pipeline(
        mmdit=MMDiT(depth=4, width=16, num_heads=2, **sizes, **places),
        text=Letters(),
        autoencoder=Autoencoder(latent_channels=4, width=32, multipliers=(1, 1), blocks=0),
        objective=Objective(
            path=RectifiedFlow(), timesteps=LogitNormal(), prediction=Velocity(), shift=Shift()
        ),
        image_size=8,
        steps=10,
        guidance=2.0,
    )
    randomize(pipe, 0)
    with torch.no_grad():  # so that the velocity changes smoothly in time, as a trained one does
        pipe.mmdit.timestep_embedding.fc2.weight.mul_(0.1)
    return pipe


def denoised(pipe, prompts=("a", "bb"), seeds=(0, 1), *, guidance=CFG, **options):
    """Latents and evaluations."""
    times = pipe.objective.times(pipe.steps)
    positive = pipe.encode(list(prompts))
    negative = pipe.encode([""] * len(prompts)) if guidance.reads_negative else None
    z = pipe.noise(seeds, 8, 8)
    return pipe.denoise(z, times, positive, negative, guidance=guidance, **options)


@each_guidance
def test_caches_that_save_nothing_are_full_sampling_bit_for_bit(pipe, guidance):
    for solver in SOLVERS if guidance is GUIDANCES["all"] else SOLVERS[:1]:
        full = denoised(pipe, guidance=guidance, solver=solver)
        for exact in (FirstBlockCache(threshold=0.0), TaylorCache(interval=1)):
            found = denoised(pipe, guidance=guidance, solver=solver, cache=exact)
            assert torch.equal(found.latents, full.latents)
            assert found.function_evaluations == full.function_evaluations


@each_guidance
@each_cache
def test_evaluations_are_counted_by_operations(pipe, guidance, cache):
    """What every block has computed, seen from outside."""
    computed, layers = Counter(), pipe.mmdit.layers
    for i, block in enumerate(layers):
        block.register_forward_hook(
            lambda module, given, _, i=i: computed.update({i: len(given[0])})
        )
    pipe.mmdit.output.register_forward_hook(
        lambda module, given, _: computed.update({"around": len(given[0])})
    )
    full = denoised(pipe, guidance=guidance)
    computed.clear()
    found = denoised(pipe, guidance=guidance, cache=cache)
    size = {"height": 4, "width": 4, "text_length": 4}
    of_blocks = [block.flops(4, 4) for block in layers]
    whole = pipe.mmdit.flops(**size)
    operations = sum(computed[i] * flops for i, flops in enumerate(of_blocks))
    operations += computed["around"] * (whole - sum(of_blocks))
    assert found.function_evaluations == pytest.approx(operations / whole / 2)
    assert found.function_evaluations < full.function_evaluations
    apart = (found.latents - full.latents).abs().max()
    assert 0 < apart < full.latents.abs().max()


def test_a_network_without_blocks_counts_as_its_share(pipe):
    size = {"height": 4, "width": 4, "text_length": 4}
    share = pipe.mmdit.skipping([1]).flops(**size) / pipe.mmdit.flops(**size)
    assert 0.7 < share < 0.8
    found = denoised(pipe, guidance=SKIP(inner=CFG))  # in steps 1 to 5
    assert found.function_evaluations == pytest.approx(20 + 5 * share)


@pytest.mark.parametrize(
    ("guidance", "evaluations"),
    [
        (GUIDANCES["none"], 6),  # of steps 0, 1, 3, 5, 7, 9
        (CFG, 12),
        # Alone in steps 0, 1 and 7, 8; both in 2, 3 and 5: 0.3 < t <= 0.85 is steps 2 to 6.
        (GuidanceInterval(inner=CFG, low=0.35, high=0.85), 4 + 2 * 3),
    ],
)
def test_forecasts_cost_nothing(pipe, guidance, evaluations):
    found = denoised(pipe, guidance=guidance, cache=TaylorCache(interval=2, order=1))
    assert found.function_evaluations == evaluations


@each_cache
@pytest.mark.parametrize("guidance", [CFG, GUIDANCES["all"]], ids=["cfg", "all"])
def test_nothing_passes_from_one_call_to_the_next(pipe, cache, guidance):
    first = denoised(pipe, guidance=guidance, cache=cache)
    denoised(pipe, ("ccc", "d"), (7, 8), guidance=guidance, cache=cache)
    again = denoised(pipe, guidance=guidance, cache=cache)
    assert torch.equal(again.latents, first.latents)
    assert again.function_evaluations == first.function_evaluations


@each_cache
def test_an_image_does_not_depend_on_others_of_its_batch(pipe, cache):
    prompts, seeds = ("a", "bb", "abc", "e"), (0, 1, 2, 3)
    together = denoised(pipe, prompts, seeds, cache=cache)
    alone = [denoised(pipe, (p,), (s,), cache=cache) for p, s in zip(prompts, seeds, strict=True)]
    torch.testing.assert_close(
        together.latents, torch.cat([one.latents for one in alone]), atol=1e-4, rtol=1e-4
    )
    mean = sum(one.function_evaluations for one in alone) / 4
    assert together.function_evaluations == pytest.approx(mean)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_both_halves_of_an_image_decide_together(pipe, count):
    seen = []
    pipe.mmdit.layers[1].register_forward_hook(lambda block, given, _: seen.append(len(given[0])))
    prompts = ("a", "bb", "abc")[:count]
    denoised(pipe, prompts, range(count), cache=CACHES["first block"])
    assert seen[0] == 2 * count and sum(seen) < 10 * 2 * count
    assert all(size % 2 == 0 for size in seen)


def test_higher_thresholds_save_more(pipe):
    counts = [
        denoised(pipe, cache=FirstBlockCache(threshold=threshold)).function_evaluations
        for threshold in (0.0, 0.1, 0.3, 1.0)
    ]
    assert counts[0] == 20
    assert counts == sorted(counts, reverse=True) and counts[-1] < 15


def test_images_take_a_cache_and_start_from_an_image(pipe):
    image = torch.full((8, 8, 3), 99, dtype=torch.uint8)
    options = {"image": image, "strength": 0.5, "num_images": 2}
    cache = FirstBlockCache(threshold=1.0, warmup_steps=2)
    full = pipe.sample(Request("a", **options))
    found = pipe.sample(Request("a", cache=cache, **options))
    assert full.function_evaluations == 10
    assert 4 < found.function_evaluations < 10  # the warm-up is that of the steps taken
    assert torch.equal(pipe("a", cache=FirstBlockCache(threshold=0.0), **options), full.images)


def test_progress_sees_every_step(pipe):
    seen = []
    denoised(pipe, cache=TaylorCache(interval=5), progress=lambda i, t, z: seen.append(i))
    assert seen == list(range(10))


def test_a_control_image_and_a_forecast(pipe, randomize):
    net = ControlNet(depth=4, width=16, num_heads=2, latent_channels=4, pooled_width=5)
    pipe.mmdit = ControlledMMDiT(base=pipe.mmdit, control_net=randomize(net, 1))
    options = {"control": torch.full((8, 8, 3), 99, dtype=torch.uint8)}
    found = pipe.sample(Request("a", cache=TaylorCache(interval=2), **options))
    assert found.function_evaluations == 12
    with pytest.raises(UserError, match="ControlledMMDiT has no first-block cache"):
        pipe("a", cache=FirstBlockCache(), **options)


@each_cache
@pytest.mark.parametrize(
    "solver", [heun, midpoint, euler_ancestral, partial(stochastic, transition=FlowSDE())]
)
def test_solvers_of_other_steps_are_refused_before_the_text_is_encoded(
    pipe, cache, solver, monkeypatch
):
    monkeypatch.setattr(Pipeline, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(UserError, match="does not work with a cache"):
        pipe("a", cache=cache, solver=solver)


def test_denoise_refuses_them_too(pipe):
    with pytest.raises(UserError, match="solver=heun does not work with a cache"):
        denoised(pipe, cache=TaylorCache(), solver=heun)


@each_cache
def test_students_of_few_steps_are_refused(pipe, cache, monkeypatch):
    pipe.mmdit = with_intervals(pipe.mmdit)
    with pytest.raises(UserError, match="IntervalMMDiT, which predicts average velocities"):
        denoised(pipe, cache=cache)
    monkeypatch.setattr(Pipeline, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(UserError, match="sample without a cache"):
        pipe("a", cache=cache)


@pytest.mark.parametrize("cache", ["first_block", 0.1, FirstBlockCache, True])
def test_what_is_no_cache_is_refused(pipe, cache):
    with pytest.raises(UserError, match=r"must be an object of mmdit\.flow\.caches"):
        pipe("a", cache=cache)


def test_latents_that_explode_blame_the_cache_where_there_is_one():
    bad = torch.full((1, 4, 4, 4), 1e30)
    for cached, blamed in ((True, "the cache, guidance or the solver"), (False, "guidance or the")):
        with pytest.raises(NotFinite, match=f"because of {blamed}"):
            Watch(3, cached=cached).step(1, 0.5, bad)
