"""What others derive from a single file, and what is said where they would derive wrongly."""

import copy

import pytest
import torch

import mmdit
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.formats import FORMATS
from mmdit.checkpoints.readers import FIXED, MMDIT, REMARK, misread, only_in_comfyui, remark
from mmdit.flow.predictions import Epsilon
from mmdit.flow.schedule import Shift
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder

CLASSES = {
    "autoencoder": Autoencoder,
    "clip_l": CLIPTextModel,
    "clip_g": CLIPTextModel,
    "t5": T5Encoder,
    "controlnet": ControlNet,
}


def transformer(**changes: object) -> MMDiT:
    """Of the rule of the published sizes, small; on meta, for its description."""
    with torch.device("meta"):
        return MMDiT(**{"depth": 2, "width": 128, "num_heads": 2, "position_size": 8} | changes)


@pytest.mark.parametrize("kind", FIXED)
def test_a_model_of_the_published_sizes_is_read_by_all(kind):
    sizes = {"depth": 1, **FIXED[kind]} if kind == "controlnet" else FIXED[kind]
    with torch.device("meta"):
        assert remark({kind: CLASSES[kind](**sizes)}) is None
        for name, value in FIXED[kind].items():
            other = {"multipliers": [1, 2, 4], "activation": "gelu"}.get(name)
            if name == "activation" and value == "gelu":
                other = "quick_gelu"
            if value is None:
                other = 5
            if name in ("num_heads", "patch_size"):
                other = 1
            changed = CLASSES[kind](**{**sizes, name: other or 2 * value})
            (told,) = misread({kind: changed})
            assert name in told


def test_the_transformer_is_read_where_comfyui_derives_its_sizes():
    assert misread({"mmdit": transformer()}) == []
    told = remark({"mmdit": transformer()})
    assert told and told.startswith("ComfyUI and this project read this file, diffusers does not")
    published = {"depth": 24, "width": 1536, "num_heads": 24}
    for more in (
        {"position_size": 192},
        {"position_size": 384, "qk_norm": True, "dual_attention": range(13)},
    ):
        assert remark({"mmdit": transformer(**published, **more)}) is None
    assert only_in_comfyui({"mmdit": transformer(**published, position_size=64)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"depth": 3}, "depth 3 for 2"),
        ({"num_heads": 4}, "num_heads 4 for 2"),
        ({"width": 96, "num_heads": 1}, "width 96 for 64, depth 2 for 1"),
        *(({name: 2 * value}, f"{name} {2 * value} for {value}") for name, value in MMDIT.items()),
    ],
)
def test_what_comfyui_takes_for_something_else_is_named(changes, told):
    (clause,) = misread({"mmdit": transformer(**changes)})
    assert told in clause


def test_every_kind_that_others_read_from_a_single_file_has_its_rule():
    assert {f.kind for f in FORMATS if f.layout == "original"} == {*FIXED, "mmdit"}


def test_a_warning_and_the_header_say_who_reads_a_file(tiny, tmp_path, caplog):
    path = mmdit.save_single_file(tiny("mmdit"), tmp_path / "x.safetensors")  # wide as the rule
    for told in (caplog.text, open_file(path).metadata[REMARK]):
        assert "context_width 12 for 4096, pooled_width 10 for 2048" in told
        assert "This project reads its models as they are" in told
    assert str(path) in caplog.text
    assert mmdit.load_mmdit(path).context_width == 12


def test_what_a_file_has_no_place_for_is_said(tiny_published, tmp_path, caplog):
    pipe = mmdit.load_pipeline(tiny_published, t5_length=20)
    path = mmdit.save_single_file(pipe, tmp_path / "x.safetensors")
    assert "has no place" not in open_file(path).metadata[REMARK]
    pipe.objective = copy.copy(pipe.objective)
    pipe.objective.prediction, pipe.objective.shift = Epsilon(), Shift(alpha=2.0)
    pipe.text.empty_prompt = "zeros"
    path = mmdit.save_single_file(pipe, tmp_path / "x.safetensors")
    for told in ("RectifiedFlow with Epsilon", "shifted by 2,", "empty prompt is all zeros"):
        assert told in caplog.text and told in open_file(path).metadata[REMARK]
    caplog.clear()
    mmdit.save_diffusers(pipe, tmp_path / "folder")
    assert "RectifiedFlow with Epsilon" in caplog.text and "shifted" not in caplog.text
