import pytest
import torch

from mmdit.flow.guidance import ClassifierFreeGuidance, Condition

GENERATOR = torch.Generator().manual_seed(0)
POSITIVE = Condition(
    torch.randn(2, 3, generator=GENERATOR), torch.randn(2, 4, 5, generator=GENERATOR)
)
NEGATIVE = Condition(
    torch.randn(2, 3, generator=GENERATOR), torch.randn(2, 4, 5, generator=GENERATOR)
)
Z = torch.randn(2, 3, 4, 4, generator=GENERATOR)
TIME = 0.7


def velocity(z, t, condition):
    """Depends on every argument, sample by sample."""
    c_vec, c_ctxt = condition
    assert len(z) == len(c_vec) == len(c_ctxt)
    return t * z + c_vec[:, :, None, None] + c_ctxt.mean(dim=(1, 2))[:, None, None, None]


def guided(scale, velocity=velocity):
    return ClassifierFreeGuidance(scale=scale)(velocity, POSITIVE, NEGATIVE)(Z, TIME)


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
        guide(velocity, POSITIVE, POSITIVE)(Z, TIME), velocity(Z, TIME, POSITIVE)
    )


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_guidance_is_computed_in_float32(scale):
    def half(z, t, condition):
        return velocity(z, t, condition).bfloat16()

    result = guided(scale, half)
    assert result.dtype == torch.float32
    cond, uncond = half(Z, TIME, POSITIVE).float(), half(Z, TIME, NEGATIVE).float()
    torch.testing.assert_close(result, uncond + scale * (cond - uncond))
