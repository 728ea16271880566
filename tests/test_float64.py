"""A float64 model computes in float64 throughout: nothing on the way is rounded to fewer digits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import mmdit
from mmdit.flow.condition import Condition
from mmdit.flow.grids import KarrasGrid
from mmdit.flow.guidance import (
    ClassifierFreeGuidance,
    GuidanceInterval,
    GuidanceRescale,
    SkipLayerGuidance,
    ZeroUnconditional,
)
from mmdit.flow.objective import Draw, Objective
from mmdit.flow.paths import EDM, Cosine, LDMLinear, RectifiedFlow
from mmdit.flow.predictions import Epsilon as EpsilonPrediction
from mmdit.flow.predictions import FPrediction, V, Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import Uniform
from mmdit.metrics.path_length import MeasuredGuidance
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.controlnet import ControlledMMDiT, ControlNet, ParallelControlNet, control_pixels
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.nn import embeddings
from mmdit.nn.attention import attention
from mmdit.nn.embeddings import sinusoid
from mmdit.pipeline import Pipeline, from_pixels
from tests.tiny import SIZES

GUIDANCES = (
    ClassifierFreeGuidance(scale=1.0),
    ClassifierFreeGuidance(scale=3.0),
    GuidanceInterval(inner=ClassifierFreeGuidance(scale=3.0)),
    GuidanceRescale(inner=ClassifierFreeGuidance(scale=3.0)),
    SkipLayerGuidance(inner=ClassifierFreeGuidance(scale=3.0), layers=[1], end=1.0),
    ZeroUnconditional(inner=ClassifierFreeGuidance(scale=3.0)),
    MeasuredGuidance(inner=ClassifierFreeGuidance(scale=3.0)),
)


class Rounding(TorchDispatchMode):
    """Notes each operation in which float64 meets a narrower float, on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        dtypes = {x.dtype for x in tensors if x.dtype.is_floating_point and x.numel()}
        if torch.float64 in dtypes and len(dtypes) > 1:
            self.found.append(str(func))
        return out


@pytest.fixture(autouse=True)
def sinusoid_apart(monkeypatch):
    """The sinusoid of the timestep is float32 by definition: the one thing that is left out."""

    def apart(t: Tensor) -> Tensor:
        with _disable_current_modes():
            return sinusoid(t).to(t.dtype)

    monkeypatch.setattr(embeddings, "sinusoid", apart)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unrounded(module: nn.Module, call: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """What `call` makes of float64 tensors, with the float32 module's answer beside it."""
    with torch.no_grad():
        coarse = call(*(x.float() for x in given))
        module.double()
        with Rounding() as rounding:
            fine = call(*given)
    assert rounding.found == []
    assert fine.dtype == torch.float64
    assert 0 < (fine - coarse).abs().max() < 1e-4 * fine.abs().max()
    return fine


@pytest.mark.each("backbone")
def test_every_backbone(backbone, randomize):
    network = randomize(backbone.normed(), 0)
    given = draw(2, 4, 4, 8), draw(2).sigmoid(), draw(2, 10), draw(2, 5, 12)
    unrounded(network, network, *given)


@pytest.mark.parametrize("kind", [ControlNet, ParallelControlNet])
def test_control_nets(kind, randomize):
    base = randomize(MMDiT(**SIZES), 0)
    own = {} if kind is ParallelControlNet else {"pooled_width": 10}
    net = randomize(kind(depth=3, width=32, num_heads=2, latent_channels=4, **own), 1)
    parts = nn.ModuleList([base, net])

    def call(z: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor, control: Tensor) -> Tensor:
        controlled = ControlledMMDiT(base=base, control_net=net)
        return controlled(z, t, c_vec, c_ctxt, control)

    given = draw(2, 4, 4, 8), draw(2).sigmoid(), draw(2, 10), draw(2, 5, 12), draw(2, 4, 4, 8)
    unrounded(parts, call, *given)


@pytest.fixture
def autoencoder(randomize):
    return randomize(Autoencoder(latent_channels=4, width=32, multipliers=(1, 2), blocks=1), 0)


def test_the_autoencoder(autoencoder):
    unrounded(autoencoder, autoencoder.encode, draw(1, 3, 8, 8))
    noisy = lambda x: autoencoder.encode(x, torch.Generator().manual_seed(0))  # noqa: E731
    with torch.no_grad():
        assert noisy(draw(1, 3, 8, 8)).dtype == torch.float64
    unrounded(autoencoder.float(), autoencoder.decode, draw(1, 4, 4, 4))


def test_scale_and_shift_are_the_published_numbers_to_the_last_digit(autoencoder, tiny_published):
    x = draw(1, 3, 8, 8)
    loaded = mmdit.load_autoencoder(tiny_published, dtype=torch.float64)
    for module in (autoencoder.double(), loaded, autoencoder.bfloat16().double()):
        assert (module.scale.item(), module.shift.item()) == (1.5305, 0.0609)
        with torch.no_grad():
            expected = (module.posterior(x).mean - 0.0609) * 1.5305
            torch.testing.assert_close(module.encode(x), expected, rtol=1e-14, atol=1e-14)
    assert autoencoder.bfloat16().scale.dtype == torch.float32


def test_a_measured_scale_is_kept_when_the_autoencoder_becomes_float64(autoencoder):
    autoencoder.normalize(torch.tensor(0.25), torch.tensor(0.3))
    measured = autoencoder.scale.clone()
    assert autoencoder.double().scale == measured.double()


def test_a_narrow_latent_is_decoded_by_a_float64_autoencoder_in_float64(autoencoder):
    latent = draw(1, 4, 4, 4).float()
    with torch.no_grad():
        autoencoder.double()
        expected = autoencoder.decode(latent.double())
        torch.testing.assert_close(autoencoder.decode(latent), expected, rtol=0, atol=0)


def test_text_encoders():
    torch.manual_seed(0)
    ids = torch.tensor([[3, 1, 4, 7, 7], [2, 6, 7, 7, 7]])
    clip = CLIPTextModel(vocabulary_size=8, width=16, depth=3, num_heads=2, projection_width=6)
    t5 = T5Encoder(vocabulary_size=8, width=16, depth=2, num_heads=2, head_width=8, hidden=24)
    for module in (clip, t5):
        with torch.no_grad(), Rounding() as rounding:
            parts = tree_leaves(module.double()(ids))
        assert {part.dtype for part in parts} == {torch.float64}
        assert [name for name in rounding.found if "_to_copy" not in name] == []
        with torch.no_grad(), Rounding() as rounding:
            module(ids)
        assert rounding.found == []


def test_pixels_and_attention():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    exact = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(16, 16)
    assert torch.equal(from_pixels(pixels, torch.float64)[0, 0], exact)
    exact = (torch.arange(256, dtype=torch.float64) / 255 * 127.5 + 0.5).reshape(16, 16)
    assert torch.equal(control_pixels(pixels, "canny", torch.float64)[0, 0], exact)
    q, k, v = draw(3, 2, 37, 2, 8)
    assert attention(q, k, v).dtype == torch.float64


def formulations() -> Iterator[Objective]:
    for path, prediction in (
        *((RectifiedFlow(), Velocity()), (Cosine(), V()), (LDMLinear(), EpsilonPrediction())),
        (EDM(), FPrediction()),
    ):
        yield Objective(
            path=path, timesteps=Uniform(), prediction=prediction, shift=Shift(alpha=3.0)
        )


@pytest.mark.parametrize("objective", [*formulations()], ids=lambda o: type(o.path).__name__)
def test_losses_and_velocities_of_every_formulation(objective, randomize):
    network = randomize(MMDiT(**SIZES), 0)
    condition = Condition(draw(2, 10), draw(2, 5, 12))
    z, chance = draw(2, 4, 4, 8), objective.draw((4, 4, 8), [torch.Generator()] * 2)

    def loss(x_0: Tensor, c_vec: Tensor, c_ctxt: Tensor, *chance: Tensor) -> Tensor:
        return objective(network, x_0, Condition(c_vec, c_ctxt), Draw(*chance))

    def velocity(z: Tensor, *condition: Tensor) -> Tensor:
        return objective.velocity(network, z, 0.3, Condition(*condition))

    unrounded(network, loss, z, *condition[:2], *(part.double() for part in chance))
    unrounded(network.float(), velocity, z, *condition[:2])
    narrow = network.double() and objective.velocity(network, z.float(), 0.3, condition)
    assert narrow.dtype == torch.float64  # what the network says is kept


@pytest.fixture
def pipe(tiny_published) -> Pipeline:
    return mmdit.load_pipeline(tiny_published, dtype=torch.float64)


def sampled(pipe: Pipeline, **options: Any) -> tuple[Tensor, list[str]]:
    """The last latents, and where float64 met less on the way to them and to their image."""
    latents: list[Tensor] = []
    noise = pipe.noise([7], 16, 16)
    pipe.noise = lambda *_: noise  # drawn in float32, whatever the precision
    keep = lambda i, t, z: latents.append(z)  # noqa: E731
    with Rounding() as rounding:
        image = pipe("a red cat", steps=3, progress=keep, **options)
    assert image.dtype == torch.uint8 and noise.dtype == torch.float64
    return latents[-1], rounding.found


@pytest.mark.each("solver")
def test_a_pipeline_with_every_solver(pipe, solver):
    z, found = sampled(pipe, height=16, width=16, solver=solver, guidance=3.0)
    assert z.dtype == torch.float64
    # Fresh noise is drawn in float32, keyed by what float32 shows of the start.
    assert {*found} <= {"aten._to_copy.default"}


@pytest.mark.each("guidance")
def test_every_guidance(guidance):
    class Network:
        def __call__(self, z: Tensor, t: float, condition: Condition) -> Tensor:
            return torch.sin(z + t) * condition.c_vec.mean(1)[:, None, None, None]

        def skipping(self, layers: object) -> "Network":
            return self

    sides = [Condition(draw(2, 10, seed=i), draw(2, 5, 12, seed=i)) for i in (1, 2)]
    guided = guidance(Network(), *sides, Shift().grid(10), 10)
    for t in (0.95, 0.85, 0.5, 0.1):
        with Rounding() as rounding:
            assert guided(draw(2, 4, 4, 4), t).dtype == torch.float64
        assert rounding.found == []


@pytest.mark.parametrize("guidance", GUIDANCES, ids=lambda g: type(g).__name__)
def test_a_pipeline_with_every_guidance(pipe, guidance):
    z, found = sampled(pipe, height=16, width=16, guidance=guidance, grid=KarrasGrid())
    assert (z.dtype, found) == (torch.float64, [])


def test_a_pipeline_that_starts_from_an_image(pipe):
    image = torch.arange(16 * 16 * 3).reshape(16, 16, 3).to(torch.uint8)
    z, found = sampled(pipe, image=image, strength=0.7)
    assert (z.dtype, found) == (torch.float64, [])


def test_noise_is_that_of_float32(pipe, tiny_published):
    coarse = mmdit.load_pipeline(tiny_published)
    assert torch.equal(coarse.noise([3, 4], 16, 16).double(), pipe.noise([3, 4], 16, 16))
