"""CLIP-L's text projection: applied in a folder and a whole CLIP, never in a single file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmdit
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.folders import write_model
from mmdit.checkpoints.hashes import HASH
from mmdit.checkpoints.public import ENTRY, find
from mmdit.checkpoints.readers import REMARK
from mmdit.errors import UserError
from mmdit.loading import open_source
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel

IDS = torch.tensor([[1, 5, 98, 98]])
KEY = "text_projection.weight"
LEFT_BY_OTHERS = {
    "zeros": torch.zeros(32, 32),
    "not initialised": torch.full((32, 32), float("nan")),
    "drawn": torch.randn(32, 32, generator=torch.Generator().manual_seed(0)),
    "not square": torch.ones(24, 32),
    "in 8 bits": torch.ones(32, 32).to(torch.float8_e4m3fn),
}


def plus(path: Path, **tensors: Tensor) -> Path:
    """The file with other tensors beside its own, and the same header."""
    metadata = {k: v for k, v in open_file(path).metadata.items() if k != HASH}
    whole = {key: value.clone() for key, value in load_file(path).items()}
    save_file({**whole, **tensors}, path, metadata)
    return path


def pooled(model: CLIPTextModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).pooled


@pytest.mark.parametrize("left", LEFT_BY_OTHERS)
def test_a_projection_in_a_file_of_its_own_is_left_out_by_name(tiny, tmp_path, caplog, left):
    clip = tiny("clip_l")
    path = mmdit.save_single_file(clip, tmp_path / "clip_l.safetensors")
    plus(path, **{KEY: LEFT_BY_OTHERS[left]})
    with caplog.at_level("INFO", logger="mmdit.checkpoints"):
        torch.testing.assert_close(pooled(mmdit.load_clip(path)), pooled(clip))
    assert f"ignoring unused tensors: {KEY}" in caplog.text
    assert mmdit.load_clip(path, verify=True, dtype=torch.bfloat16).pooled_width == 32


@pytest.mark.parametrize("left", ["zeros", "not initialised"])
def test_a_projection_in_a_whole_single_file_is_left_out(tiny_published, tmp_path, left):
    """As ComfyUI writes it, with its scalars beside."""
    pipe = mmdit.load_pipeline(tiny_published, t5_length=20)
    path = mmdit.save_single_file(pipe, tmp_path / "whole.safetensors")
    projection = LEFT_BY_OTHERS[left][:16, :16].contiguous()
    place = "text_encoders.clip_l."
    plus(
        path,
        **{f"{place}transformer.{KEY}": projection, f"{place}logit_scale": torch.ones(())},
    )
    again = mmdit.load_pipeline(path, t5_length=20, tokenizers=tiny_published)
    before, after = (p.text.encode(["a red cat"]).c_vec for p in (pipe, again))
    torch.testing.assert_close(after, before)


def test_the_projection_of_a_folder_is_applied_and_remarked_on(tiny_published, tmp_path, caplog):
    pipe = mmdit.load_pipeline(tiny_published, t5_length=20)
    folder = mmdit.save_diffusers(pipe, tmp_path / "folder")
    plus(folder / "text_encoder" / "model.safetensors", **{KEY: 2 * torch.eye(16)})
    again = mmdit.load_pipeline(folder, t5_length=20)
    before, after = (p.text.encode(["a red cat"]).c_vec for p in (pipe, again))
    torch.testing.assert_close(after[:, :16], 2 * before[:, :16])
    torch.testing.assert_close(after[:, 16:], before[:, 16:])
    assert "CLIP-L's pooled vector passes through a projection" in caplog.text


def test_a_projection_that_is_applied_survives_a_single_file_of_ours(tiny, tmp_path, caplog):
    """Others would leave it out, which the warning and the header say."""
    write_model(tiny("clip_l"), tmp_path / "clip")
    plus(tmp_path / "clip" / "model.safetensors", **{KEY: 2 * torch.eye(32)})
    clip = mmdit.load_clip(tmp_path / "clip")
    path = mmdit.save_single_file(clip, tmp_path / "one.safetensors")
    for told in (caplog.text, open_file(path).metadata[REMARK]):
        assert "projection_width 32 for None" in told
    torch.testing.assert_close(pooled(mmdit.load_clip(path)), pooled(clip))
    # Without our description nobody can tell this file's projection from one that nothing filled.
    (own,) = json.loads(open_file(path).metadata[ENTRY]).values()
    told = {"clip_l": {k: own[k] for k in ("activation", "num_heads")}}
    save_file(load_file(path), path, {ENTRY: json.dumps(told)})
    torch.testing.assert_close(2 * pooled(mmdit.load_clip(path)), pooled(clip))


@pytest.mark.parametrize("config", [True, False])
def test_a_whole_clip_is_projected(tiny, tmp_path, config):
    text, image = tiny("clip_l"), tiny("clip_image")
    write_model(text, tmp_path / "text")
    write_model(image, tmp_path / "image")
    both = load_file(tmp_path / "text" / "model.safetensors")
    both |= {KEY: 3 * torch.eye(32), "logit_scale": torch.ones(())}
    both |= load_file(tmp_path / "image" / "model.safetensors")
    told = {"clip_l": {"activation": "quick_gelu", "num_heads": 2}, "clip_image": {"num_heads": 2}}
    file = tmp_path / ("model.safetensors" if config else "whole.safetensors")
    save_file(both, file, {ENTRY: json.dumps(told)})
    if config:
        halves = {"text_config": {"num_attention_heads": 2}, "vision_config": {}}
        (tmp_path / "config.json").write_text(json.dumps(halves))
    torch.testing.assert_close(pooled(mmdit.load_clip(file)), 3 * pooled(text))
    assert isinstance(mmdit.load_clip_image(file), CLIPImageModel)


@pytest.mark.parametrize(
    ("width", "expected"), [(768, ["clip_l"]), (1280, ["clip_g"]), (32, ["clip_l", "clip_g"])]
)
def test_a_tower_in_a_file_of_its_own_is_the_one_of_its_width(tmp_path, width, expected):
    """CLIP-G's projection is applied, so that it may not be taken for CLIP-L."""
    path = tmp_path / "x.safetensors"
    tensors = {
        "text_model.embeddings.token_embedding.weight": torch.zeros(99, width).half(),
        "text_model.encoder.layers.0.layer_norm1.weight": torch.zeros(width).half(),
    }
    save_file(tensors, path)
    assert [kind for kind in ("clip_l", "clip_g") if find(open_file(path), kind)] == expected
    assert open_source(path, ["clip_l", "clip_g"]).only_clip() == expected[0]
    save_file(tensors, path, {ENTRY: json.dumps({"clip_l": {"activation": "quick_gelu"}})})
    assert find(open_file(path), "clip_l")


def test_a_tower_of_ours_alone_is_the_one_that_its_header_names(tiny, tmp_path):
    path = mmdit.save_single_file(tiny("clip_g"), tmp_path / "x.safetensors")
    assert mmdit.load_clip(path).pooled_width == 24


def test_the_other_tower_is_named(tmp_path):
    large = CLIPTextModel(vocabulary_size=4, width=1280, depth=2, num_heads=20, activation="gelu")
    path = mmdit.save_single_file(large, tmp_path / "x.safetensors")
    save_file(load_file(path), path)
    with pytest.raises(UserError, match=r"no CLIP-L text tower; .*the other of.*which='clip_g'"):
        mmdit.load_clip(path, "clip_l")
    assert mmdit.load_clip(path).width == 1280
