"""Whole trajectories against the reference and diffusers, with a denoiser in closed form."""

import pytest
import torch

from mmdit.flow import solvers
from mmdit.flow.condition import Condition
from mmdit.flow.grids import UniformGrid
from mmdit.flow.guidance import ClassifierFreeGuidance, SkipLayerGuidance
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.schedule import PublishedShift


class GaussianVelocity:
    """The exact velocity where the data of a condition is a Gaussian around `mean` of it."""

    def __init__(self, mean: float = 1.0, deviation: float = 0.5) -> None:
        self.mean, self.deviation = mean, deviation

    def __call__(self, z, t, condition):
        c_vec, c_ctxt, _ = condition
        m = c_vec[:, : z.shape[1]] + 0.1 * c_ctxt.mean(dim=(1, 2))[:, None]
        m = self.mean * m[:, :, None, None]
        variance = self.deviation**2
        gain = variance * (1 - t) / (variance * (1 - t) ** 2 + t**2)
        return (z - (m + gain * (z - (1 - t) * m))) / t

    def skipping(self, layers):
        assert list(layers) == [7, 8, 9]
        return GaussianVelocity(0.6, 0.9)


def guidance_of(run):
    plain = ClassifierFreeGuidance(scale=run["cfg"])
    if "slg" in run:
        slg = {**run["slg"]}
        return SkipLayerGuidance(inner=plain, skip_scale=slg.pop("scale"), **slg)
    return plain


def test_samplers_follow_the_reference_step_by_step(golden):
    case = golden("samplers")
    inputs = case.inputs
    positive, negative = (
        Condition(inputs[f"y_{side}"], inputs[f"ctx_{side}"]) for side in ("cond", "uncond")
    )
    for name, run in case.config["runs"].items():
        steps = run["steps"]
        grid = PublishedShift(alpha=run["shift"]).grid(steps)
        v = guidance_of(run)(GaussianVelocity(), positive, negative, grid, steps)
        states, denoised = [], []

        def watched(z, t, v=v, states=states, denoised=denoised):
            states.append(z)
            denoised.append(z - t * v(z, t))
            return v(z, t)

        states.append(getattr(solvers, run["sampler"])(watched, inputs["noise"], grid))
        case.check(f"{name}.sigmas", grid.float())
        case.check(f"{name}.x", torch.stack(states))
        case.check(f"{name}.denoised", torch.stack(denoised))


def test_images_start_half_way_as_in_the_reference(golden):
    case = golden("img2img")
    y, ctx, noise, latent = (case.inputs[key] for key in ("y", "ctx", "noise", "latent"))
    for row in case.config["table"]:
        steps = row["steps"]
        shift = PublishedShift(alpha=row["shift"])
        path = RectifiedFlow()
        grid = UniformGrid().remaining(steps, shift, path, strength=row["denoise"])
        case.check(f"{row['key']}.sigmas", grid.float())
        z = path.interpolate(latent, noise, grid[:1].float())
        case.check(f"{row['key']}.x_init", z)
        guide = ClassifierFreeGuidance(scale=2.0)
        v = guide(GaussianVelocity(), Condition(y, ctx), Condition(-y, -ctx), grid, steps)
        case.check(f"{row['key']}.euler", solvers.euler(v, z, grid))


def test_euler_with_guidance_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(8)
    generator = torch.Generator().manual_seed(0)
    positive, negative = (
        Condition(torch.randn(2, 4, generator=generator), torch.randn(2, 3, 5, generator=generator))
        for _ in range(2)
    )
    noise = torch.randn(2, 4, 3, 5, generator=generator)
    velocity, grid = GaussianVelocity(), PublishedShift(alpha=3.0).grid(8)
    guided = ClassifierFreeGuidance(scale=4.5)(velocity, positive, negative, grid, 8)

    z = noise
    for timestep in theirs.timesteps:
        t = timestep.item() / 1000
        uncond, cond = (velocity(z, t, side) for side in (negative, positive))
        z = theirs.step(uncond + 4.5 * (cond - uncond), timestep, z).prev_sample
    torch.testing.assert_close(solvers.euler(guided, noise, grid), z, rtol=0, atol=2e-5)
