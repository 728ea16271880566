import pytest
import torch

from mmdit.errors import UserError
from mmdit.models.preview import RGB_OF_CHANNELS, latent_preview


def test_the_preview_is_that_of_the_reference(golden):
    case = golden("latent_format")
    x, factors = case.inputs["x"], torch.tensor(RGB_OF_CHANNELS)
    case.check("preview_factors", factors)
    case.check("preview_float", torch.einsum("c h w, c r -> h w r", x[0], factors))
    expected = case.outputs["preview_u8"].int()
    assert (latent_preview(x)[0].int() - expected).abs().max() <= case.config["tolerance"]["u8"]


def test_each_picture_is_previewed_alone_and_grey_is_the_middle():
    latents = torch.randn(3, 16, 2, 4, generator=torch.Generator().manual_seed(0))
    together = latent_preview(latents)
    assert together.shape == (3, 2, 4, 3) and together.dtype == torch.uint8
    for i in range(3):
        assert torch.equal(latent_preview(latents[i : i + 1])[0], together[i])
    assert (latent_preview(torch.zeros(1, 16, 1, 1)) == 127).all()


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (16, 8, 8)])
def test_latents_of_another_autoencoder_are_refused(shape):
    with pytest.raises(UserError, match=r"must be \(b, 16, h, w\)"):
        latent_preview(torch.zeros(shape))
