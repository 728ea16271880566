"""An MM-DiT that reads the end of an interval, and how a pipeline tells it."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit.checkpoints.public import kind_of
from mmdit.errors import UserError
from mmdit.flow.guidance import ClassifierFreeGuidance
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.solvers import euler, heun
from mmdit.flow.timesteps import LogitNormal
from mmdit.metrics.flops import counted_flops
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.concat import with_extra_channels
from mmdit.models.dit import DiT
from mmdit.models.interval import IntervalMMDiT, with_intervals
from mmdit.models.mmdit import MMDiT
from mmdit.nn import embeddings
from mmdit.pipeline import Pipeline
from mmdit.registry import build, describe
from tests.test_pipeline import Letters
from tests.tiny import Tiny, inputs


@pytest.mark.parametrize("own", [{}, {"dual_attention": [0]}, {"qk_norm": True}])
def test_a_new_embedding_changes_no_bit_whatever_the_end(own, randomize) -> None:
    model = randomize(Tiny(MMDiT)(**own), 0)
    student = with_intervals(model)
    z_t, t, *text = inputs()
    for r in (None, t, 0.3 * t, torch.zeros_like(t)):
        assert torch.equal(student(z_t, t, *text, r=r), model(z_t, t, *text))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(student(z_t, t, *text, r=r), model(z_t, t, *text))


def test_the_end_matters_once_it_is_trained(randomize) -> None:
    student = randomize(with_intervals(Tiny(MMDiT)()), 0)
    z_t, t, *text = inputs()
    whole, at_once = student(z_t, t, *text, r=0 * t), student(z_t, t, *text, r=t)
    assert (whole - at_once).abs().max() > 1e-3
    assert torch.equal(at_once, student(z_t, t, *text))


def test_the_new_embedding_learns(randomize) -> None:
    model = with_intervals(randomize(Tiny(MMDiT)(), 0))
    z_t, t, *text = inputs()
    model(z_t, t, *text, r=0.5 * t).square().sum().backward()
    assert model.interval_embedding.fc2.weight.grad.any()


def test_it_is_described_counted_and_keeps_its_dtype() -> None:
    model = with_intervals(Tiny(MMDiT)(dual_attention=[1]).bfloat16())
    assert model.compute_dtype == torch.bfloat16 and model.reads == set()
    again = build(describe(model))
    assert isinstance(again, IntervalMMDiT)
    again.load_state_dict(model.state_dict())
    size = {"height": 8, "width": 4, "text_length": 5}
    assert again.flops(**size) == counted_flops(again, **size)
    with pytest.raises(UserError, match="no public format"):
        kind_of(model)


def test_a_student_is_copied_as_it_is(randomize) -> None:
    student = randomize(with_intervals(Tiny(MMDiT)()), 0)
    z_t, t, *text = inputs()
    copied = with_intervals(student)
    assert torch.equal(copied(z_t, t, *text, r=0 * t), student(z_t, t, *text, r=0 * t))


def test_other_networks_are_refused() -> None:
    for network in (Tiny(DiT)(), with_extra_channels(Tiny(MMDiT)(), 2)):
        with pytest.raises(UserError, match=f"not a {type(network).__name__}"):
            with_intervals(network)


def double_sinusoid(t: torch.Tensor) -> torch.Tensor:
    """`sinusoid` in the precision of t."""
    frequency = torch.exp(-torch.arange(128, dtype=t.dtype) * (torch.tensor(1e4).log() / 128))
    angle = 1000.0 * t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


@pytest.mark.parametrize(("exact", "step", "error"), [(True, 1e-7, 1e-6), (False, 5e-5, 2e-2)])
def test_forward_derivatives_equal_central_differences(
    exact: bool, step: float, error: float, randomize, monkeypatch
) -> None:
    """Along (v, 0, 1); with the sinusoid as it is, in float32, differences are coarse."""
    if exact:
        monkeypatch.setattr(embeddings, "sinusoid", double_sinusoid)
    model = randomize(with_intervals(Tiny(MMDiT)(qk_norm=True)), 0).double()
    z, t, *text = (part.double() for part in inputs())
    r, v = 0.4 * t, torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))

    def u(z: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(z, t, *text, r=r)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(u, (z, r, t), (v, 0 * r, torch.ones_like(t)))
        difference = (u(z + step * v, r, t + step) - u(z - step * v, r, t - step)) / (2 * step)
    assert (derivative - difference).abs().max() < error * difference.abs().max()


@pytest.fixture
def student(randomize) -> Pipeline:
    sizes = {"latent_channels": 4, "context_width": 6, "pooled_width": 5}
    pipe = Pipeline(
        mmdit=with_intervals(Tiny(MMDiT)(**sizes)),
        text=Letters(),
        autoencoder=Autoencoder(latent_channels=4, width=32, multipliers=(1, 1), blocks=0),
        objective=Objective(
            path=RectifiedFlow(),
            timesteps=LogitNormal(),
            prediction=Velocity(),
            shift=Shift(alpha=3.0),
        ),
        image_size=8,
        steps=2,
        guidance=1.0,
    )
    return randomize(pipe, 0)


def test_eulers_steps_take_averages_over_themselves(student: Pipeline) -> None:
    times = student.objective.times(2)
    z = student.noise([0, 1], 8, 8)
    condition = student.encode(["a", "b"])
    latents, evaluations = student.denoise(
        z, times, condition, guidance=ClassifierFreeGuidance(scale=1.0), solver=euler
    )
    with torch.no_grad():
        for t, r in ((times[0], times[1]), (times[1], times[2])):
            ends = {"t": t.float().expand(2), "r": r.float().expand(2)}
            z = z + (r - t) * student.mmdit(z, c_vec=condition[0], c_ctxt=condition[1], **ends)
    torch.testing.assert_close(latents, z.float(), rtol=1e-4, atol=1e-4)
    assert evaluations == 2


def test_other_solvers_and_points_take_the_velocity(student: Pipeline) -> None:
    seen = []
    student.mmdit.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(named.get("r")), with_kwargs=True
    )
    student("a", solver=heun)
    assert seen == [None] * 3
    student("a", guidance=3.0, height=12, width=8)
    assert [len(r) for r in seen[3:]] == [2, 2]
    assert [r[0].item() for r in seen[3:]] == student.objective.times(2)[1:].float().tolist()
