"""Whatever conditions a network goes through indexing, moving and joining together."""

import copy

import pytest
import torch

from mmdit.errors import UserError
from mmdit.flow.condition import Condition, concatenate


def condition(start: int, b: int = 2, **extra: torch.Tensor) -> Condition:
    draw = torch.Generator().manual_seed(start)
    text = torch.randn(b, 3, generator=draw), torch.randn(b, 5, 4, generator=draw)
    return Condition(*text, extra)


def test_map_reaches_every_tensor():
    whole = condition(0, control=torch.arange(8.0).reshape(2, 1, 2, 2), mask=torch.ones(2, 1))
    last = whole.map(lambda part: part[1:])
    assert [part.shape[0] for part in (last.c_vec, last.c_ctxt, *last.extra.values())] == [1] * 4
    assert torch.equal(last.extra["control"], whole.extra["control"][1:])
    wide = whole.map(lambda part: part.to(torch.float64))
    assert {part.dtype for part in (wide.c_vec, *wide.extra.values())} == {torch.float64}
    assert whole.extra["mask"].dtype == torch.float32


def test_conditions_are_joined_in_their_order():
    first, second = condition(0, mask=torch.zeros(2, 1)), condition(1, b=1, mask=torch.ones(1, 1))
    both = concatenate([first, second])
    assert torch.equal(both.c_vec[2:], second.c_vec) and torch.equal(both.c_ctxt[:2], first.c_ctxt)
    assert both.extra["mask"].flatten().tolist() == [0, 0, 1]
    assert concatenate([condition(0), condition(1)]).extra == {}


def test_conditions_of_different_kinds_are_not_concatenated():
    message = r"cannot be concatenated; they have \[\['mask'\], \[\]\]: give each of them all"
    with pytest.raises(UserError, match=message):
        concatenate([condition(0, mask=torch.zeros(2, 1)), condition(1)])


def test_a_condition_without_more_than_text_is_copied():
    again = copy.deepcopy(condition(0))
    assert torch.equal(again.c_vec, condition(0).c_vec) and again.extra == {}
