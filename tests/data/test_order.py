import pytest

from mmdit.data.order import ShuffledOrder


def test_each_epoch_is_a_permutation_of_its_own():
    order = ShuffledOrder(size=50, seed=0)
    epochs = [order(start, 50) for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(50))


def test_order_is_a_pure_function_of_position():
    whole = ShuffledOrder(size=7, seed=3)(0, 40)
    resumed = ShuffledOrder(size=7, seed=3)
    for start, count in ((33, 7), (0, 5), (12, 21), (5, 7)):  # any batches, in any order
        assert resumed(start, count) == whole[start : start + count]


def test_a_batch_runs_on_across_epochs():
    order = ShuffledOrder(size=3, seed=0)
    assert order(0, 7) == order(0, 3) + order(3, 3) + order(6, 1)


def test_seeds_differ():
    assert ShuffledOrder(size=50, seed=0)(0, 50) != ShuffledOrder(size=50, seed=1)(0, 50)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="size 0 must be at least 1"):
        ShuffledOrder(size=0, seed=0)
