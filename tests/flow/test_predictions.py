import pytest
import torch

from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity

PREDICTIONS = [Velocity()]
PATHS = [RectifiedFlow()]


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_the_target_reads_back_as_the_velocity_of_the_path(prediction, path):
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    output = prediction.target(path, x_0, epsilon, t)
    velocity = prediction.velocity(path, output, path.interpolate(x_0, epsilon, t), t)
    torch.testing.assert_close(velocity, path.velocity(x_0, epsilon, t))


def test_velocity_on_the_straight_path_points_from_data_to_noise():
    """Eq. 14."""
    x_0, epsilon = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    target = Velocity().target(RectifiedFlow(), x_0, epsilon, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(target, epsilon - x_0)
