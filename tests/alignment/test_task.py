"""The noise levels that post-training trains at."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmdit
from mmdit.alignment import DiffusionNFT
from mmdit.alignment.models import reference_of
from mmdit.alignment.task import AlignmentTask
from mmdit.engine.validation import Validation
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.precision import autocast


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published).requires_grad_(False)


def task(pipe: mmdit.Pipeline, levels: Any, steps: int | None = 4) -> AlignmentTask:
    collector: Any = SimpleNamespace(steps=steps, updates=1, guidance=1.0, evaluations=0)
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    return AlignmentTask(
        module=pipe,
        old=pipe,
        reference=reference_of(pipe),
        collector=collector,
        algorithm=DiffusionNFT(levels=levels),
        validation=Validation(image, ["a cat"], ["a cat"]),
        seed=0,
        batch_size=200,
        autocast=autocast(torch.device("cpu"), "fp32"),
    )


def test_levels_are_those_of_pretraining_or_of_the_sampler(pipe) -> None:
    numbers = list(range(200))
    drawn = task(pipe, "objective").example(3, numbers).draw
    generators = [generator_for(0, "alignment", 3, number) for number in numbers]
    expected = pipe.objective.draw(task(pipe, "objective").latent_shape, generators)
    assert torch.equal(drawn.t, expected.t)
    sampled = task(pipe, "sampler").example(3, numbers).draw
    assert torch.equal(sampled.epsilon, drawn.epsilon)
    levels, counts = sampled.t.unique(return_counts=True)
    steps = pipe.objective.path.time_at(pipe.objective.times(4)[:-1]).float()
    torch.testing.assert_close(levels, steps.sort().values)
    assert counts.min() > 25  # of about 50
    some = task(pipe, "sampler").example(3, numbers[7:9]).draw
    assert torch.equal(some.t, sampled.t[7:9])


def test_images_that_were_not_sampled_have_no_levels_of_a_sampler(pipe) -> None:
    with pytest.raises(UserError, match=r"choose algorithm\.levels=objective"):
        task(pipe, "sampler", steps=None)
    task(pipe, "objective", steps=None)
    with pytest.raises(UserError, match=r"algorithm\.levels"):
        DiffusionNFT(levels="all")  # type: ignore[arg-type]
