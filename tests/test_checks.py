import re

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdit.checks import expect_finite
from mmdit.cli.values import seed_of, whole
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError

CONFIG = OmegaConf.create({"seed": 0, "training": {"steps": 3}, "twice": "${training.steps}"})


def test_a_whole_number_is_given_by_its_full_name():
    assert whole(CONFIG, "seed", 0) == 0
    assert whole(CONFIG, "training.steps") == whole(CONFIG, "twice", 3) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "a.b=0 must be a whole number of at least 1"),
        (True, "a.b=True must be a whole number of at least 1"),
        (2.0, "a.b=2.0 must be a whole number of at least 1"),
        ("2", "a.b=2 must be a whole number of at least 1"),
        (None, "a.b=None must be a whole number of at least 1"),
        (2**63, f"a.b={2**63} must be a whole number from 1 to 2^63 - 1"),
    ],
)
def test_what_is_no_such_number_is_refused_by_name(value, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        whole(OmegaConf.create({"a": {"b": value}}), "a.b")


@pytest.mark.parametrize("value", [-1, 2**64, 0.5, "7", None, True])
def test_a_seed_is_refused_in_one_wording(value):
    said = f"^a.seed={value} must be a whole number from 0 to {re.escape('2^64 - 1')}$"
    with pytest.raises(UserError, match=said):
        seed_of(OmegaConf.create({"a": {"seed": value}}), "a.seed")
    with pytest.raises(UserError, match=said.replace("a.seed", "seed")):
        Shapes(split="train", seed=value)


def test_a_seed_may_have_64_bits_and_images_count_up_from_it():
    config = OmegaConf.create({"seed": 2**64 - 1})
    assert seed_of(config) == 2**64 - 1
    with pytest.raises(UserError, match=r"to 2\^64 - 2: seeds of 2 images are counted up"):
        seed_of(config, images=2)
    scenes = [Shapes(split="train", seed=seed)[0].image for seed in (2**64 - 1, 2**64 - 2)]
    assert (scenes[0] != scenes[1]).any()


def test_a_value_that_must_be_given_is_asked_for():
    with pytest.raises(MissingMandatoryValue):
        whole(OmegaConf.create({"a": "???"}), "a")


def test_tensors_without_values_are_not_looked_through():
    expect_finite("a stage", torch.empty(2, 3, device="meta"))
    with FakeTensorMode():
        expect_finite("a stage", torch.empty(2, 3))
