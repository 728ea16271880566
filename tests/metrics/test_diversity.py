import pytest
import torch

from mmdit.errors import UserError
from mmdit.metrics.diversity import pixel_deviation


def test_pixel_deviation_is_within_groups_alone():
    images = torch.zeros(6, 2, 2, 3, dtype=torch.uint8)
    images[3:] = 200  # another prompt
    assert pixel_deviation(images, 3) == 0
    images[:3, 0, 0, 0] = torch.tensor([0, 30, 60], dtype=torch.uint8)  # one of 12 values
    assert pixel_deviation(images, 3) == pytest.approx(600**0.5 / 12 / 2)
    assert pixel_deviation(images[:3], 3) == pytest.approx(600**0.5 / 12)


@pytest.mark.parametrize("members", [0, 4, 7])
def test_images_that_cannot_be_grouped_are_rejected(members):
    with pytest.raises(UserError, match=f"6 images are not {members} images"):
        pixel_deviation(torch.zeros(6, 2, 2, 3, dtype=torch.uint8), members)
