"""Where and how precisely is computed is what the config says, or it is refused."""

import pytest
import torch

import mmdit
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.metrics.features import load_clip_features


@pytest.mark.parametrize("name", [None, 1.5, [1], True, "x", "", "meta", "hpu", "xla"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(UserError, match=r"^device="):
        available(name)


@pytest.mark.parametrize("name", ["cuda:7", "mps", "nonsense"])
def test_a_device_that_is_not_here_is_refused_in_one_line_before_anything_is_read(name):
    said = rf"^device={name} is not available here: use device=cpu or auto \(torch .*CUDA device"
    for load in (mmdit.load_pipeline, load_clip_features):
        with pytest.raises(UserError, match=said) as told:
            load("nowhere", device=name)
        assert len(str(told.value).splitlines()) == 1


def test_a_pipeline_may_be_put_where_there_is_most_power(tiny_published):
    pipe = mmdit.load_pipeline(tiny_published, device="auto")
    assert pipe.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
