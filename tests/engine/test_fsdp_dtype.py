"""Under FSDP weights are gathered in the dtype of the forward pass, and networks state it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmdit.engine.parallel import FSDP
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from tests.tiny import Tiny, inputs


@pytest.fixture
def one_process():
    """A process group of one process, which needs no launcher."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("one_process")
def test_networks_compute_in_the_dtype_of_the_gathered_weights(dtype, mmdit_and_clip):
    module, average = mmdit_and_clip, copy.deepcopy(mmdit_and_clip)
    FSDP().place(module, average, device=torch.device("cpu"), dtype=dtype)
    assert module["mmdit"].compute_dtype == average["clip"].compute_dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        velocity = module["mmdit"](*inputs())
        hidden = module["clip"](torch.tensor([[3, 7, 15, 15]])).hidden
    assert hidden.dtype == velocity.dtype == dtype
    (velocity.float().sum() + hidden.float().sum()).backward()
    assert {weight.grad.dtype for weight in module["mmdit"].output.parameters()} == {torch.float32}


@pytest.fixture
def mmdit_and_clip(randomize):
    clip = CLIPTextModel(vocabulary_size=16, width=16, depth=2, num_heads=2, length=4)
    return randomize(nn.ModuleDict({"mmdit": Tiny(MMDiT)(), "clip": clip}), 0)
