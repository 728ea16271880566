"""What is told of speed and memory has the unit it is told in."""

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from mmdit.engine.meter import memory


@pytest.mark.parametrize(("platform", "told"), [("linux", 3 * 2**20), ("darwin", 3 * 2**30)])
def test_memory_is_in_bytes_on_every_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, told: int
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=told))
    assert memory(torch.device("cpu")) == 3 * 2**30
