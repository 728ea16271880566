import math

import pytest
import torch

from mmdit.data.captions import vocabulary
from mmdit.errors import UserError
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel, clip_pixels
from mmdit.models.t5 import T5Encoder
from mmdit.runs.checkpoint import read_weights
from mmdit.runs.native import save_module
from mmdit.text.clip_pair import CLIPPair, PlacedImageModel
from mmdit.text.conditioning import TextEncoder
from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer

PROMPTS = ["a red circle", "two blue squares", "a cyan triangle above a red circle"]


def text_tower(projection_width: int | None = 24) -> TextEncoder:
    return TextEncoder(
        tokenizer=CLIPWordTokenizer(words=vocabulary(), length=13, pad_with_end=True),
        model=CLIPTextModel(
            vocabulary_size=96,
            width=24,
            depth=2,
            num_heads=2,
            length=13,
            projection_width=projection_width,
        ),
    )


def image_tower() -> CLIPImageModel:
    return CLIPImageModel(
        width=32, depth=2, num_heads=4, image_size=32, patch_size=8, projection_width=24
    )


@pytest.fixture
def pair(randomize):
    return randomize(CLIPPair(text=text_tower(), image=image_tower()), 0)


def pixels(count: int = 3, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_features_have_length_one_and_one_width(pair):
    for features in (pair.image_features(pixels()), pair.text_features(PROMPTS)):
        assert features.shape == (3, pair.width) and features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_embeddings_are_the_towers_own_and_point_as_the_features_do(pair):
    embeddings = pair.image_embeddings(pixels())
    torch.testing.assert_close(embeddings, pair.image(clip_pixels(pixels(), 32)))
    features = pair.image_features(pixels())
    torch.testing.assert_close(embeddings, embeddings.norm(dim=1, keepdim=True) * features)


@torch.no_grad()
def test_features_do_not_depend_on_the_batch(pair):
    images, texts = pair.image_features(pixels()), pair.text_features(PROMPTS)
    for i in range(3):
        alone = pair.image_features(pixels()[i : i + 1]), pair.text_features(PROMPTS[i : i + 1])
        torch.testing.assert_close(alone[0], images[i : i + 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone[1], texts[i : i + 1], rtol=0, atol=1e-6)
    assert (images[0] - images[1]).norm() > 1e-2 and (texts[0] - texts[1]).norm() > 1e-2


@torch.no_grad()
def test_images_of_any_size_are_read(pair):
    flat = torch.full((1, 50, 70, 3), 90, dtype=torch.uint8)
    torch.testing.assert_close(pair.image_features(flat), pair.image_features(flat[:, :32, :32]))


@torch.no_grad()
def test_features_follow_the_dtype_of_the_weights(pair):
    before = pair.image_features(pixels()), pair.text_features(PROMPTS)
    pair.bfloat16()
    after = pair.image_features(pixels()), pair.text_features(PROMPTS)
    for a, b in zip(before, after, strict=True):
        assert b.dtype == torch.float32
        assert (a * b).sum(1).min() > 0.99


def test_scale_starts_at_a_temperature_of_7_percent_and_ends_at_1_percent():
    pair = CLIPPair(text=text_tower(), image=image_tower())
    assert pair.scale.item() == pytest.approx(1 / 0.07)
    torch.nn.init.constant_(pair.logit_scale, math.log(300))
    assert pair.scale.item() == 100


@torch.no_grad()
def test_a_saved_pair_gives_the_same_features(pair, tmp_path):
    save_module(tmp_path / "pair.safetensors", pair)
    again = read_weights(tmp_path / "pair.safetensors").module()
    assert torch.equal(again.text_features(PROMPTS), pair.text_features(PROMPTS))
    assert torch.equal(again.image_features(pixels()), pair.image_features(pixels()))


def test_a_text_tower_without_projection_is_refused():
    with pytest.raises(UserError, match="CLIPTextModel with a projection_width"):
        CLIPPair(text=text_tower(None), image=image_tower())
    t5 = TextEncoder(
        tokenizer=T5WordTokenizer(words=vocabulary(), length=13),
        model=T5Encoder(
            vocabulary_size=96, width=24, depth=1, num_heads=2, head_width=8, hidden=32
        ),
    )
    with pytest.raises(UserError, match="a T5Encoder, must be a CLIPTextModel"):
        CLIPPair(text=t5, image=image_tower())


def test_towers_of_different_spaces_are_refused():
    with pytest.raises(UserError, match=r"projection_width 16 of the text tower.*image tower, 24"):
        CLIPPair(text=text_tower(16), image=image_tower())


def test_places_of_the_toy_tower_start_as_strong_as_patches():
    sizes = {"width": 64, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    placed, plain = PlacedImageModel(**sizes), CLIPImageModel(**sizes)
    patches = placed.patch_embedding(clip_pixels(pixels(), 32)).std()
    assert placed.position_embedding.std() > patches > plain.position_embedding.std()


@torch.no_grad()
def test_the_toy_tower_differs_by_its_start_alone(tmp_path):
    sizes = {"width": 16, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
    placed, plain = PlacedImageModel(**sizes), CLIPImageModel(**sizes)
    plain.load_state_dict(placed.state_dict())
    images = clip_pixels(pixels(), 32)
    assert torch.equal(placed(images), plain(images))
    save_module(tmp_path / "tower.safetensors", placed)
    assert type(read_weights(tmp_path / "tower.safetensors").module()) is PlacedImageModel
