import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.data.captions import vocabulary
from mmdit.errors import UserError
from mmdit.metrics.features import in_batches, load_clip_features
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel, clip_pixels
from mmdit.runs.native import save_module
from mmdit.text.clip_pair import CLIPPair
from mmdit.text.conditioning import TextEncoder
from mmdit.text.tokenizers import CLIPWordTokenizer

PROMPTS = ["a photo of a red cat", "two blue cats", ""]


def pixels(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 40, 32, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def public(clip_files, tmp_path, randomize):
    """A folder as that of openai/clip-vit-large-patch14, tiny; and transformers' model of it."""
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={
            **common,
            "num_attention_heads": 2,
            "vocab_size": 520,
            "max_position_embeddings": 12,
            "bos_token_id": 518,
            "eos_token_id": 519,
        },
        vision_config={**common, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    peer = randomize(transformers.CLIPModel(config), 0)
    folder = tmp_path / "clip"
    peer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((clip_files / name).read_bytes())
    return folder, peer


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def test_features_match_transformers(public):
    transformers = pytest.importorskip("transformers")
    folder, peer = public
    pair = load_clip_features(folder)
    name = "CLIPImageProcessorPil"  # later versions', beside one made with torchvision
    processor = getattr(transformers, name, transformers.CLIPImageProcessor)(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    ids = pair.text.tokenize(PROMPTS)
    theirs = peer(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=processor(list(pixels().numpy()), return_tensors="pt").pixel_values,
    )
    images, texts = pair.image_features(pixels()), pair.text_features(PROMPTS)
    assert error(images, theirs.image_embeds) < 1e-5
    assert error(texts, theirs.text_embeds) < 1e-5
    assert error(images @ texts.T * pair.scale, theirs.logits_per_image) < 1e-5
    assert not pair.training


@torch.no_grad()
def test_embeddings_match_transformers_before_normalization(public):
    folder, peer = public
    pair = load_clip_features(folder / "model.safetensors", tokenizer=folder)
    values = clip_pixels(pixels(), 32)
    theirs = peer.visual_projection(peer.vision_model(pixel_values=values).pooler_output)
    assert error(pair.image_embeddings(pixels()), theirs) < 1e-5


def test_dtype_is_that_asked_for(public):
    pair = load_clip_features(public[0], dtype=torch.bfloat16)
    assert pair.text.model.projection.weight.dtype == torch.bfloat16
    assert pair.image.projection.weight.dtype == torch.bfloat16


def test_faults_of_public_folders_are_named(public):
    folder, _ = public
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        load_clip_features(folder)
    (folder / "merges.txt").unlink()
    config["vision_config"]["hidden_act"] = "quick_gelu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"merges.txt missing"):
        load_clip_features(folder)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("text_projection.weight", "must be a CLIPTextModel with a projection_width"),
        ("visual_projection.weight", "1 missing"),
    ],
)
def test_a_lost_projection_is_no_instrument(public, lost, message):
    path = public[0] / "model.safetensors"
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        load_clip_features(public[0])


@torch.no_grad()
def test_a_pair_of_ours_is_read_from_its_file(tmp_path, randomize):
    text = TextEncoder(
        tokenizer=CLIPWordTokenizer(words=vocabulary(), length=13, pad_with_end=True),
        model=CLIPTextModel(
            vocabulary_size=96, width=24, depth=2, num_heads=2, length=13, projection_width=8
        ),
    )
    image = CLIPImageModel(
        width=32, depth=2, num_heads=4, image_size=32, patch_size=8, projection_width=8
    )
    pair = randomize(CLIPPair(text=text, image=image), 0)
    save_module(tmp_path / "ema.safetensors", pair)
    again = load_clip_features(tmp_path / "ema.safetensors")
    assert torch.equal(again.image_features(pixels()), pair.image_features(pixels()))


def test_another_module_of_ours_is_refused(tmp_path):
    image = CLIPImageModel(width=8, depth=1, num_heads=1, image_size=8, patch_size=8)
    save_module(tmp_path / "x.safetensors", image)
    with pytest.raises(UserError, match="holds a CLIPImageModel, not a CLIPPair"):
        load_clip_features(tmp_path / "x.safetensors")


def test_batches_give_what_all_at_once_gives():
    linear = torch.nn.Linear(4, 3)
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    features = in_batches(linear, x, size=3)
    torch.testing.assert_close(features, linear(x))
    assert not features.requires_grad
    words = in_batches(lambda w: torch.tensor([[float(len(x))] for x in w]), ["a", "bb"], size=1)
    assert words.tolist() == [[1.0], [2.0]]
    with pytest.raises(UserError, match="0 items in batches of 64"):
        in_batches(linear, x[:0])
