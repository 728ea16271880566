import re

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from configs.checks import whole
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
        (2**63, f"a.b={2**63} must be a whole number below 2^63"),
    ],
)
def test_what_is_no_such_number_is_refused_by_name(value, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        whole(OmegaConf.create({"a": {"b": value}}), "a.b")


def test_a_value_that_must_be_given_is_asked_for():
    with pytest.raises(MissingMandatoryValue):
        whole(OmegaConf.create({"a": "???"}), "a")
