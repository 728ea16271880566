"""What a step sees depends on its number alone."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mmdit.data.order import ShuffledOrder
from mmdit.engine.loader import Loader, Part
from mmdit.errors import UserError
from mmdit.processes import Processes


def example(step: int, indices: Sequence[int]) -> torch.Tensor:
    return torch.tensor([100 * step + index for index in indices])


def loader(make: Callable[[int, Sequence[int]], object] = example, **options: int) -> Loader:
    given = {"batch_size": 8, "processes": Processes(), **options}
    return Loader(make, ShuffledOrder(size=10, seed=3), **given)  # type: ignore[arg-type]


def indices(parts: Sequence[Part]) -> list[int]:
    return [index for part in parts for index in part.indices]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("world_size", "accumulation"), [(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (4, 1), (4, 2)]
)
def test_a_step_sees_the_same_samples_however_they_are_shared(workers, accumulation, world_size):
    plain = [indices(parts) for parts in loader()(0, 5)]
    shared: list[list[int]] = [[] for _ in range(5)]
    for rank in range(world_size):
        whole = Processes(rank, world_size)
        steps = loader(processes=whole, accumulation=accumulation, workers=workers)(0, 5)  # type: ignore[arg-type]
        for step, parts in enumerate(steps):
            assert len(parts) == accumulation and {part.step for part in parts} == {step}
            for part in parts:
                assert part.example.tolist() == [100 * step + index for index in part.indices]
            shared[step] += indices(parts)
    assert [sorted(step) for step in shared] == [sorted(step) for step in plain]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_sees_what_an_unbroken_run_sees(workers):
    whole = [indices(parts) for parts in loader()(0, 9)]
    assert [indices(parts) for parts in loader(workers=workers)(4, 9)] == whole[4:]


@pytest.mark.parametrize(("world_size", "accumulation"), [(3, 1), (1, 3), (4, 4)])
def test_a_batch_that_cannot_be_shared_is_refused(world_size, accumulation):
    with pytest.raises(UserError, match="batch_size 8 must be divisible by"):
        loader(processes=Processes(0, world_size), accumulation=accumulation)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path: Path):
    def fragile(step: int, indices: Sequence[int]) -> torch.Tensor:
        mark = tmp_path / "killed"
        if step == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return example(step, indices)

    found = list(loader(fragile, workers=2, accumulation=2)(0, 6))
    assert (tmp_path / "killed").exists()
    assert [indices(parts) for parts in found] == [indices(parts) for parts in loader()(0, 6)]
    for parts in found:
        for part in parts:
            assert torch.equal(part.example, example(part.step, part.indices))


def test_workers_that_keep_dying_end_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Loader, "DEATHS", 1)  # each is noticed after five seconds

    def deadly(step: int, indices: Sequence[int]) -> torch.Tensor:
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return example(step, indices)

    with pytest.raises(
        UserError, match=r"1 loader workers died in a row before step [012]\D.*workers=0"
    ):
        list(loader(deadly, workers=1)(0, 6))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_data_is_told_without_a_traceback(workers):
    def wrong(step: int, indices: Sequence[int]) -> torch.Tensor:
        raise UserError("photo.jpg has changed")

    with pytest.raises(UserError, match=r"\Aphoto.jpg has changed\Z"):
        list(loader(wrong, workers=workers)(0, 6))


def test_waiting_is_counted():
    data = loader(workers=1)
    list(data(0, 3))
    assert data.waited > 0
