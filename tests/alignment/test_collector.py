"""Rounds of post-training: what is collected, and how it is trained on."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmdit
from mmdit.alignment import BestOfN, Collector, DiffusionNFT, ODESampler, SDESampler
from mmdit.alignment.models import reference_of
from mmdit.alignment.prompts import Prompt
from mmdit.alignment.task import AlignmentTask
from mmdit.engine.ema import Following
from mmdit.engine.rounds import begins, check_rounds
from mmdit.engine.settings import Settings
from mmdit.engine.validation import Validation
from mmdit.errors import UserError
from mmdit.flow.solvers import euler
from mmdit.flow.transitions import FlowSDE
from mmdit.precision import autocast
from mmdit.processes import Processes


class Numbered:
    """Prompts that name their round and number."""

    def draw(self, round: int, count: int) -> list[Prompt]:
        return [Prompt(f"{number} of {round}") for number in range(count)]


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that differs between all images."""
    return images.double().flatten(1).mean(1)


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published).requires_grad_(False)


def collector_of(**changes) -> Collector:
    given = {
        "prompts": Numbered(),
        "reward": brightness,
        "sampler": ODESampler(solver=euler, steps=2),
        "groups": 2,
        "members": 3,
        "batch_size": 6,
        "autocast": autocast(torch.device("cpu"), "fp32"),
        "processes": Processes(),
    }
    return Collector(**{**given, **changes})


def test_a_round_is_a_function_of_weights_seed_and_number(pipe) -> None:
    first, again, other, reseeded = (collector_of() for _ in range(4))
    reseeded.seed = 1
    told = first(3, pipe)
    again(7, pipe)  # what came before does not matter
    assert again(3, pipe) == told
    other(4, pipe)
    reseeded(3, pipe)
    assert torch.equal(first.rollouts.x_0, again.rollouts.x_0)
    assert not torch.equal(first.rollouts.x_0, other.rollouts.x_0)
    assert not torch.equal(first.rollouts.x_0, reseeded.rollouts.x_0)
    assert [p.text for p in first.rollouts.prompts] == ["0 of 3", "1 of 3"]
    assert told["reward"] == pytest.approx(first.rollouts.rewards.mean().item())
    assert told["groups_without_signal"] == 0


@pytest.mark.parametrize(
    "sampler", [ODESampler(solver=euler, steps=2), SDESampler(transition=FlowSDE(), steps=3)]
)
def test_the_batch_size_changes_no_image(pipe, sampler) -> None:
    whole, parts = collector_of(sampler=sampler), collector_of(sampler=sampler, batch_size=4)
    whole(0, pipe)
    parts(0, pipe)
    assert torch.allclose(whole.rollouts.x_0, parts.rollouts.x_0, atol=1e-4)
    assert torch.allclose(whole.rollouts.rewards, parts.rollouts.rewards, atol=0.1)
    if whole.rollouts.trajectory is not None:
        made, other = whole.rollouts.trajectory, parts.rollouts.trajectory
        assert other is not None and made.z.shape == (6, 3, *whole.rollouts.x_0.shape[1:])
        assert torch.allclose(made.z, other.z, atol=1e-4)
        assert torch.allclose(made.log_prob, other.log_prob, atol=1e-5)


class OneOf(Processes):
    """One of several processes, which hears from the others what they have gathered."""

    def __init__(self, rank: int, world_size: int, heard: list) -> None:
        super().__init__(rank, world_size)
        self.heard = heard

    def gather(self, value):
        self.heard.append(value)
        return self.heard if len(self.heard) == self.world_size else [value] * self.world_size


def test_processes_share_the_prompts_and_hold_all_images(pipe) -> None:
    alone, heard = collector_of(), list[object]()
    alone(0, pipe)
    for rank in range(2):
        shared = collector_of(processes=OneOf(rank, 2, heard))
        shared(0, pipe)
    assert torch.allclose(shared.rollouts.x_0, alone.rollouts.x_0, atol=1e-4)
    assert torch.allclose(shared.rollouts.rewards, alone.rollouts.rewards, atol=0.1)


def test_a_constant_reward_is_refused_at_once_but_not_later(pipe) -> None:
    collector = collector_of(reward=lambda images, prompts: torch.ones(len(images)))
    with pytest.raises(UserError, match="all 6 images of the first round are given 1"):
        collector(0, pipe)
    assert collector(1, pipe)["groups_without_signal"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": 1}, "collector.members=1 must be a whole number of at least 2"),
        ({"groups": 0}, "collector.groups"),
        ({"updates": 0}, "collector.updates"),
        ({"groups": 3, "processes": Processes(0, 2)}, "multiple of the number of processes"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        collector_of(**changes)


def test_only_whole_rounds_are_saved() -> None:
    collector = collector_of(updates=2)
    settings = Settings(
        steps=4, batch_size=2, clip=1.0, log_every=1, evaluate_every=2, save_every=2, keep=1
    )
    check_rounds(collector, settings)
    assert [begins(collector, step) for step in range(4)] == [True, False, True, False]
    for name in ("steps", "evaluate_every", "save_every"):
        with pytest.raises(UserError, match=f"training.{name}=3 must be a multiple"):
            check_rounds(collector, settings._replace(**{name: 3}))


def test_the_old_policy_follows_ever_more_slowly() -> None:
    profile = Following(rate=0.02, most=0.5, every=2)
    assert [profile.decay(step) for step in (2, 4, 20, 1000)] == [0.02, 0.04, 0.2, 0.5]
    newest = Following(rate=0.0, most=0.0, every=1)
    assert newest.decay(10) == 0


def task_of(pipe: mmdit.Pipeline, collector: Collector, **changes) -> AlignmentTask:
    side = pipe.image_size
    precision = autocast(torch.device("cpu"), "fp32")
    images = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    given = {
        "module": pipe,
        "old": copy.deepcopy(pipe),
        "reference": reference_of(pipe),
        "collector": collector,
        "algorithm": DiffusionNFT(),
        "validation": Validation(images, ["a dog"], ["a dog"]),
        "seed": 0,
        "batch_size": 4,
        "autocast": precision,
    }
    return AlignmentTask(**{**given, **changes})


def test_a_round_trains_on_each_image_in_turn(pipe) -> None:
    collector = collector_of(updates=3)
    task = task_of(pipe, collector)
    collector(1, pipe)
    seen = []
    for step in range(3, 6):  # the steps of round 1
        indices = task.order(batch_size=4, seed=0)(4 * step, 4)
        whole = task.chosen(task.example(step, indices))
        halves = [task.chosen(task.example(step, indices[at : at + 2])) for at in (0, 2)]
        assert torch.equal(whole, torch.cat(halves))
        seen += whole.flatten().tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)) != seen[:6]
    collector(2, pipe)
    later = task.chosen(task.example(6, task.order(batch_size=4, seed=0)(24, 4)))
    assert later.flatten().tolist() != seen[:4]


def test_a_round_without_differences_moves_nothing(pipe) -> None:
    """Also for an algorithm that finds nothing to train on."""
    pipe.mmdit.requires_grad_(True)
    collector = collector_of(reward=lambda images, prompts: torch.ones(len(images)))
    collector(1, pipe)
    task = task_of(pipe, collector, algorithm=BestOfN())
    losses = task.loss(task.example(2, [8, 9]))
    losses.sum().backward()
    assert losses.tolist() == [0, 0]
    found = [w.grad for w in pipe.mmdit.parameters() if w.grad is not None]
    assert found and all((gradient == 0).all() for gradient in found)


def test_what_the_losses_say_is_a_mean_of_the_last_step(pipe) -> None:
    pipe.mmdit.requires_grad_(True)
    collector = collector_of()
    task = task_of(pipe, collector)
    collector(0, pipe)
    for indices in ([0, 1], [2, 3]):
        task.loss(task.example(0, indices))
    told = task.figures()
    assert told["distance_to_reference"] == told["distance_to_old"] == 0
    assert told["reference_norm_ratio"] == 1
    assert task.figures() == {}
