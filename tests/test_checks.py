import math
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdit.checks import (
    expect_finite,
    flag,
    listed,
    mapping,
    number,
    one_of,
    seed_number,
    text,
    whole_number,
)
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "a.b=0 must be a whole number of at least 1"),
        (True, "a.b=True must be a whole number of at least 1"),
        (2.0, "a.b=2.0 must be a whole number of at least 1"),
        ("2", "a.b='2' must be a whole number of at least 1"),
        (None, "a.b=None must be a whole number of at least 1"),
        (2**63, f"a.b={2**63} must be a whole number from 1 to 2^63 - 1"),
    ],
)
def test_what_is_not_such_a_whole_number_is_refused_by_name(value, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        whole_number("a.b", value)


def test_whole_numbers_of_numpy_are_some():
    assert whole_number("n", np.int64(3)) == 3 and type(whole_number("n", np.int64(3))) is int


@pytest.mark.parametrize(
    ("bounds", "accepted", "refused", "told"),
    [
        ({}, -2, math.inf, ""),
        ({}, np.float32(0.5), "1", ""),
        ({"above": 0}, 1e-9, 0, " above 0"),
        ({"least": 0}, 0, -1e-9, " of at least 0"),
        ({"least": 0, "below": 1}, 0, 1, " of at least 0 and below 1"),
        ({"least": 0, "most": 1}, 1, 1.5, " of at least 0 and at most 1"),
        ({"least": 0}, 0, True, " of at least 0"),
        ({"least": 0}, 0, math.nan, " of at least 0"),
    ],
)
def test_a_number_lies_within_its_bounds(bounds, accepted, refused, told):
    assert number("lr", accepted, **bounds) == accepted
    with pytest.raises(UserError) as caught:
        number("lr", refused, **bounds)
    assert str(caught.value) == f"lr={refused!r} must be a finite number{told}"


@pytest.mark.parametrize(
    ("check", "accepted", "refused", "told"),
    [
        (flag, False, 0, "must be true or false"),
        (text, "", None, "must be a text"),
        (listed, (1,), "red", "must be a list"),
        (mapping, {}, [], "must give a value to each name"),
    ],
)
def test_each_kind_has_one_wording(check, accepted, refused, told):
    check("field", accepted)
    with pytest.raises(UserError, match=f"^field={re.escape(repr(refused))} {told}$"):
        check("field", refused)


def test_one_of_several_names_is_suggested():
    one_of("split", "train", ["train", "validation"])
    with pytest.raises(
        UserError, match=r"^split='trian' must .*validation\. Did you mean train\?$"
    ):
        one_of("split", "trian", ["train", "validation"])
    with pytest.raises(UserError, match=r"^split='x' must be one of train, validation$"):
        one_of("split", "x", ["train", "validation"])


@pytest.mark.parametrize("value", [-1, 2**64, 0.5, "7", None, True])
def test_a_seed_is_refused_in_one_wording(value):
    told = f"^a.seed={value!r} must be a whole number from 0 to {re.escape('2^64 - 1')}$"
    with pytest.raises(UserError, match=told):
        seed_number("a.seed", value)
    with pytest.raises(UserError, match=told.replace("a.seed", "seed")):
        Shapes(split="train", seed=value)


def test_a_seed_may_have_64_bits_and_images_count_up_from_it():
    assert seed_number("seed", 2**64 - 1) == 2**64 - 1
    with pytest.raises(UserError, match=r"to 2\^64 - 2: seeds of 2 images are counted up"):
        seed_number("seed", 2**64 - 1, images=2)
    scenes = [Shapes(split="train", seed=seed)[0].image for seed in (2**64 - 1, 2**64 - 2)]
    assert (scenes[0] != scenes[1]).any()


def test_tensors_without_values_are_not_looked_through():
    expect_finite("a stage", torch.empty(2, 3, device="meta"))
    with FakeTensorMode():
        expect_finite("a stage", torch.empty(2, 3))
