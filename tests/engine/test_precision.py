"""Where and how precisely is computed is what the config says, or it is refused."""

import pytest

from mmdit.engine.precision import chosen_device
from mmdit.errors import UserError


@pytest.mark.parametrize("name", [None, 1.5, [1], True, "x", "meta"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(UserError, match=r"^device="):
        chosen_device(name)
