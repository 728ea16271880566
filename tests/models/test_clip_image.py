import pytest
import torch

from mmdit.errors import UserError
from mmdit.models.clip_image import CLIPImageModel, clip_pixels

TINY = {
    "width": 32,
    "depth": 3,
    "num_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "projection_width": 24,
}


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def pictures(batch: int, height: int, width: int) -> torch.Tensor:
    """uint8 (b, h, w, 3): smooth colours with some noise."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(batch, 3, 4, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = smooth + 0.2 * torch.rand(batch, 3, height, width, generator=generator)
    return (noisy / 1.2 * 255).to(torch.uint8).permute(0, 2, 3, 1)


def test_parameters_of_the_public_tower():
    with torch.device("meta"):
        model = CLIPImageModel()
    assert sum(parameter.numel() for parameter in model.parameters()) == 303_966_208


@torch.no_grad()
def test_every_patch_and_its_place_matter(randomize):
    model = randomize(CLIPImageModel(**TINY), 0)
    before = model(images(1))
    assert before.shape == (1, 24)
    for row in range(3):
        for column in range(3):
            moved = images(1)
            moved[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.5
            assert (model(moved) - before).abs().max() > 1e-3
    assert (model(images(1).transpose(-1, -2).contiguous()) - before).abs().max() > 1e-3


@torch.no_grad()
def test_patches_see_what_follows_them(randomize):
    """Unlike in the text tower."""
    model = randomize(CLIPImageModel(**TINY), 0)
    seen = []
    model.layers[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    moved = images(1)
    moved[..., -4:, -4:] += 1
    model(images(1)), model(moved)
    before, after = seen
    assert ((after - before).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_pictures_do_not_mix(randomize):
    model = randomize(CLIPImageModel(**TINY), 0)
    together = model(images(3))
    for i in range(3):
        torch.testing.assert_close(
            model(images(3)[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-5
        )


def test_reset_parameters_fills_what_meta_left_empty():
    with torch.device("meta"):
        model = CLIPImageModel(**TINY)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"num_heads": 5}, "width 32 must be divisible by num_heads 5"),
        ({"num_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
        ({"patch_size": 0}, "patch_size=0 must be a whole number of at least 1"),
        ({"patch_size": 5}, "image_size 12 must be divisible by patch_size 5"),
    ],
)
def test_impossible_arguments_are_named(mistake, message):
    with pytest.raises(UserError, match=message):
        CLIPImageModel(**{**TINY, **mistake})


def test_images_of_another_size_are_named():
    with pytest.raises(UserError, match=r"images \(1, 3, 12, 16\) must be \(b, 3, 12, 12\)"):
        CLIPImageModel(**TINY)(torch.zeros(1, 3, 12, 16))


# Parity


def test_the_public_tower_is_as_large_as_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    with torch.device("meta"):
        peer, model = transformers.CLIPVisionModelWithProjection(config), CLIPImageModel()
    ours, theirs = (
        sum(parameter.numel() for parameter in each.parameters()) for each in (model, peer)
    )
    assert ours == theirs


@torch.no_grad()
def test_tower_matches_transformers(load_diffusers, randomize):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    peer = transformers.CLIPVisionModelWithProjection(config)
    randomize(peer, 0)
    model = CLIPImageModel(**TINY)
    load_diffusers(model, peer.state_dict())
    theirs = peer(images()).image_embeds
    assert ((model(images()) - theirs).norm() / theirs.norm()).item() < 1e-5


@pytest.mark.parametrize(
    "size", [(224, 224), (224, 300), (97, 64), (500, 333), (333, 501), (256, 224), (64, 64)]
)
def test_pixels_match_transformers(size):
    transformers = pytest.importorskip("transformers")
    name = "CLIPImageProcessorPil"  # later versions', beside one made with torchvision
    processor = getattr(transformers, name, transformers.CLIPImageProcessor)()
    batch = pictures(2, *size)
    theirs = processor(list(batch.numpy()), return_tensors="pt").pixel_values
    ours = clip_pixels(batch)
    assert ours.shape == (2, 3, 224, 224)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_pixels_are_normalized():
    """A grey picture becomes (v - mean) / std of each channel, whatever its size."""
    grey = clip_pixels(torch.full((1, 30, 50, 3), 128, dtype=torch.uint8), size=16)
    assert grey.shape == (1, 3, 16, 16)
    red = (128 / 255 - 0.48145466) / 0.26862954
    torch.testing.assert_close(grey[0, 0], torch.full((16, 16), red))
