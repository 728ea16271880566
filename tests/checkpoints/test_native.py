import pytest
import torch
from safetensors.torch import save_file

from mmdit.checkpoints.native import load_module, load_tensors, save_tensors
from mmdit.errors import UserError


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "ours.safetensors"
    save_tensors(path, {"a": torch.arange(3)}, {"facts": {"step": 2, "names": ["b"]}})
    tensors, header = load_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert header == {"facts": {"step": 2, "names": ["b"]}}


@pytest.mark.parametrize(
    "header", [{"format": "pt"}, {"description": "an SD3 model"}, {"a": "[" * 100_000}, None]
)
def test_a_file_of_another_project_is_told_from_ours(tmp_path, header):
    path = tmp_path / "public.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(
        UserError, match=r"public\.safetensors was not written by this project: its "
    ):
        load_module(path)
