import pytest
import torch

from mmdit.flow.objective import Draw, Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import CosMap, LogitNormal, Mode, Uniform
from mmdit.keys import generator_for

B = 4
SHAPE = (B, B, B)  # every side equals the batch: a loss that broadcast over another axis would run
X_0 = torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(0))
TEXT = (torch.zeros(B, 3), torch.zeros(B, 5, 6))


def objective(timesteps=None, alpha=1.0) -> Objective:
    return Objective(
        path=RectifiedFlow(),
        timesteps=timesteps or LogitNormal(),
        prediction=Velocity(),
        shift=Shift(alpha=alpha),
    )


def generators(*indices: int) -> list[torch.Generator]:
    return [generator_for(0, "noise", index) for index in indices]


def halving(z_t, t, c_vec, c_ctxt):
    return z_t / 2


def test_a_perfect_model_has_no_loss():
    def perfect(z_t, t, c_vec, c_ctxt):
        return (z_t - X_0) / t[:, None, None, None]

    loss = objective()(perfect, X_0, *TEXT, objective().draw(SHAPE, generators(0, 1, 2, 3)))
    assert loss.shape == (B,)
    assert loss.max() < 1e-10


def test_a_model_that_predicts_zero_has_the_mean_square_of_the_target():
    draw = objective().draw(SHAPE, generators(0, 1, 2, 3))
    loss = objective()(lambda z_t, *_: torch.zeros_like(z_t), X_0, *TEXT, draw)
    torch.testing.assert_close(loss, (draw.epsilon - X_0).square().mean(dim=(1, 2, 3)))


def test_the_model_is_called_with_the_noised_latent_its_time_and_its_text():
    called = []
    draw = Draw(torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.randn(B, *SHAPE))
    text = (torch.randn(B, 3), torch.randn(B, 5, 6))

    def model(*arguments):
        called.append(arguments)
        return arguments[0]

    objective()(model, X_0, *text, draw)
    ((z_t, t, c_vec, c_ctxt),) = called
    assert t is draw.t and c_vec is text[0] and c_ctxt is text[1]
    for i in range(B):
        torch.testing.assert_close(z_t[i], (1 - t[i]) * X_0[i] + t[i] * draw.epsilon[i])


def test_what_a_sample_draws_does_not_depend_on_its_batch():
    together = objective().draw(SHAPE, generators(0, 1, 2, 3))
    reordered = objective().draw(SHAPE, generators(3, 1))
    for mine, theirs in ((3, 0), (1, 1)):
        assert together.t[mine] == reordered.t[theirs]
        assert torch.equal(together.epsilon[mine], reordered.epsilon[theirs])
    assert together.t.unique().numel() == B


def test_the_loss_of_a_sample_does_not_depend_on_the_others():
    draw = objective().draw(SHAPE, generators(0, 1, 2, 3))
    before = objective()(halving, X_0, *TEXT, draw)
    others = X_0.clone()
    others[1:] += 3.0
    after = objective()(halving, others, *TEXT, draw)
    assert after[0] == before[0]
    assert (after[1:] != before[1:]).all()


def test_training_draws_pass_through_the_shift_of_the_sampler():
    plain = objective(alpha=1.0).draw(SHAPE, generators(0, 1, 2, 3))
    shifted = objective(alpha=3.0).draw(SHAPE, generators(0, 1, 2, 3))
    torch.testing.assert_close(shifted.t, Shift(alpha=3.0)(plain.t))
    assert torch.equal(shifted.epsilon, plain.epsilon)


def test_the_draw_is_noise_of_unit_variance_and_float32():
    draw = objective().draw((16, 16, 16), generators(*range(B)))
    assert draw.t.dtype == draw.epsilon.dtype == torch.float32
    assert draw.epsilon.mean().item() == pytest.approx(0.0, abs=0.04)
    assert draw.epsilon.std().item() == pytest.approx(1.0, abs=0.03)


def test_the_loss_is_taken_in_float32_whatever_the_model_computes_in():
    draw = objective().draw(SHAPE, generators(0, 1, 2, 3))
    loss = objective()(lambda z_t, *_: z_t.bfloat16(), X_0, *TEXT, draw)
    z_t = RectifiedFlow().interpolate(X_0, draw.epsilon, draw.t).bfloat16().float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (z_t - draw.epsilon + X_0).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    "density", [LogitNormal(m=1.0, s=1.0), LogitNormal(m=-0.5, s=0.6), Mode(s=1.29), CosMap()]
)
def test_sampling_from_the_density_equals_weighting_uniform_times_by_it(density):
    """Sec. 3.1: pi(t) is a sampling density; the two forms of the loss agree in expectation."""
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.zeros(n, 1, 1, 1)
    epsilon = torch.randn(n, 1, 1, 1, generator=generator)
    text = (torch.zeros(n, 1), torch.zeros(n, 1, 1))

    def model(z_t, t, c_vec, c_ctxt):  # leaves the error (1 - t) epsilon
        return z_t

    sampled_t = density.sample(n, generator)
    sampled = objective(density)(model, x_0, *text, Draw(sampled_t, epsilon))
    uniform_t = Uniform().sample(n, generator)
    uniform = objective()(model, x_0, *text, Draw(uniform_t, epsilon))
    weighted = density.pdf(uniform_t) * uniform
    spread = (sampled.var() / n + weighted.var() / n).sqrt().item()
    assert sampled.mean().item() == pytest.approx(weighted.mean().item(), abs=4 * spread)
    assert abs(sampled.mean().item() - uniform.mean().item()) > 8 * spread  # so the test can fail
