import numpy as np
import pytest

from mmdit.data.order import BucketedOrder, ShuffledOrder


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
    with pytest.raises(ValueError, match="size=0 must be a whole number of at least 1"):
        ShuffledOrder(size=0, seed=0)


# Batches of one group each

SIZES = (23, 8, 2, 0, 40)  # of the groups; one is empty, one smaller than a batch
GROUP_OF = np.random.default_rng(0).permutation(np.repeat(range(len(SIZES)), SIZES))
BATCH = 4


def bucketed(seed: int = 0, batch_size: int = BATCH) -> BucketedOrder:
    return BucketedOrder(group_of=GROUP_OF, groups="abcde", batch_size=batch_size, seed=seed)


def test_each_batch_is_of_one_group():
    order = bucketed()
    for batch in range(100):
        groups = {"abcde"[GROUP_OF[i]] for i in order(batch * BATCH, BATCH)}
        assert groups == {order.group(batch)}


def test_no_group_is_ahead_or_behind_by_a_batch():
    order, epochs = bucketed(), 12
    batches = sum(epochs * size // BATCH for size in SIZES)
    counts = np.bincount(order(0, batches * BATCH), minlength=len(GROUP_OF))
    for group, size in enumerate(SIZES):
        seen = counts[group == GROUP_OF]
        assert size * epochs - BATCH < seen.sum() <= size * epochs
        assert size == 0 or seen.max() - seen.min() <= 1  # within a group all come equally often


def test_a_sample_comes_once_a_pass_when_groups_fill_their_batches():
    order = BucketedOrder(group_of=[0] * 8 + [1] * 12, groups="ab", batch_size=4, seed=1)
    epochs = [order(start, 20) for start in range(0, 100, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_split_of_a_batch_is_the_same_batch(processes, accumulation):
    share = 8 // processes // accumulation
    whole = bucketed(batch_size=8)
    for step in (0, 3, 17, 90):
        ranks = [bucketed(batch_size=8) for _ in range(processes)]  # each knows only its part
        parts = [
            rank(step * 8 + (micro * processes + number) * share, share)
            for micro in range(accumulation)
            for number, rank in enumerate(ranks)
        ]
        assert [i for part in parts for i in part] == whole(step * 8, 8)


def test_bucketed_order_is_a_pure_function_of_position():
    whole = bucketed(seed=3)(0, 600)
    resumed = bucketed(seed=3)
    for start, count in ((333, 70), (0, 5), (120, 210), (2, 9), (599, 1)):
        assert resumed(start, count) == whole[start : start + count]
    assert bucketed(seed=4)(0, 600) != whole


def test_groups_come_mixed():
    groups = [bucketed().group(batch) for batch in range(16)]
    assert groups != sorted(groups) and len(set(groups)) >= 3


def test_a_data_set_smaller_than_a_batch_repeats():
    order = BucketedOrder(group_of=[0, 0, 0], groups="a", batch_size=8, seed=0)
    counts = np.bincount(order(0, 8 * 3))
    assert list(counts) == [8, 8, 8]


def test_another_group_changes_no_samples_of_a_group():
    alone = BucketedOrder(group_of=[0] * 9, groups="ab", batch_size=3, seed=5)
    both = BucketedOrder(group_of=[0] * 9 + [1] * 9, groups="ab", batch_size=3, seed=5)
    mine = [both(b * 3, 3) for b in range(30) if both.group(b) == "a"]
    of_alone = [alone(b * 3, 3) for b in range(len(mine))]
    assert {tuple(batch) for batch in mine} == {tuple(batch) for batch in of_alone}


def test_bad_bucketed_orders_are_refused():
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        bucketed(batch_size=0)
    with pytest.raises(ValueError, match="size=0 must be a whole number of at least 1"):
        BucketedOrder(group_of=[], groups="a", batch_size=1, seed=0)
