"""The probe of post-training: what it asks for, and what it makes of the images."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from mmdit.data.captions import TASKS, short_caption
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.flow.solvers import dpmpp_2m, euler, heun
from mmdit.pipeline import Samples
from mmdit.study import AlignmentProbe
from mmdit.study.alignment import different_captions

SMALL: dict[str, Any] = {
    "prompts_per_task": 2,
    "diversity_prompts": 4,
    "members": 8,
    "batch_size": 7,
    "steps": 3,
    "other_steps": 5,
}


class Drawing:
    """A model that draws a true scene of each prompt: as many different ones as its noise has.

    Args:
        data: whose scenes it knows.
        answers: number of different images for each prompt.
        wrong: whether an image is to be of another prompt.
    """

    def __init__(self, data: Shapes, answers: int, wrong: Any = lambda request: False) -> None:
        self.data, self.answers, self.wrong = data, answers, wrong
        self.requests = list[Any]()
        self.scenes = {
            short_caption(scene): scene
            for split in (["validation", "held_out"] if data.held_out_fraction else ["validation"])
            for view in [data.view(split)]
            for task in TASKS
            for i in range(8)
            for scene in [view.scene_for_task(task, i)]
        }

    def sample(self, request: Any) -> Samples:
        self.requests.append(request)
        images = [
            self.data.render(self.data.scene_like(self.scenes[prompt], seed % self.answers))
            for prompt, seed in zip(request.prompts, request.seeds, strict=True)
        ]
        if self.wrong(request):
            images = [np.full_like(image, 255) for image in images]
        return Samples(torch.from_numpy(np.stack(images)), request.seeds, 1.0)


@pytest.mark.parametrize("answers", [1, 10**6])
def test_a_model_of_true_scenes_is_right_and_as_diverse_as_its_answers(answers):
    data = Shapes()
    probe = AlignmentProbe(data=data, **SMALL)
    found = probe(Drawing(data, answers))  # type: ignore[arg-type]
    for name in ("accuracy", "accuracy_held_out", "accuracy_other_sampler", "accuracy_position"):
        assert found[name] == 1
    assert found["diversity_left_out"] == 0
    if answers == 1:
        assert found["diversity"] == found["pixel_deviation"] == 0
    else:
        assert found["diversity"] > 0.7 and found["pixel_deviation"] > 10
    assert found["diversity"] == (found["diversity_place"] + found["diversity_colour"]) / 2
    assert probe.higher_is_better < found.keys()


def test_prompts_and_noise_are_the_same_for_all_models_whatever_the_batch():
    data = Shapes()
    asked = []
    for batch_size in (5, 1000):
        model = Drawing(data, 1, lambda request: True)
        AlignmentProbe(data=data, **{**SMALL, "batch_size": batch_size})(model)  # type: ignore[arg-type]
        asked.append(
            [pair for r in model.requests for pair in zip(r.prompts, r.seeds, strict=True)]
        )
    assert asked[0] == asked[1]
    counts = Counter(asked[0])
    assert len(asked[0]) == 3 * 12 + 4 * 8
    assert {seed for _, seed in counts} == set(range(8))


def test_each_accuracy_is_that_of_its_own_images():
    data = Shapes()
    held = data.view("held_out")
    held_out = {
        short_caption(held.scene_for_task(task, i))
        for task in ("colours", "position", "colour_attribution")
        for i in range(2)
    }
    accuracies = {"accuracy", "accuracy_held_out", "accuracy_other_sampler"}
    for name, wrong in {
        "accuracy_other_sampler": lambda request: request.solver is heun,
        "accuracy_held_out": lambda request: bool(held_out & set(request.prompts)),
    }.items():
        model = Drawing(data, 1, wrong)
        probe = AlignmentProbe(data=data, **{**SMALL, "batch_size": 1, "other_solver": heun})
        found = probe(model)  # type: ignore[arg-type]
        assert all(found[other] == 1 for other in accuracies - {name})
        assert found[name] <= 0.5
    solvers = {(r.solver, r.steps, r.guidance.scale) for r in model.requests}
    assert solvers == {(euler, 3, 1.0), (heun, 5, 1.0)}


def test_what_cannot_be_measured_is_left_out():
    data = Shapes(held_out_fraction=0, task_weights={"colours": 1.0, "position": 1.0})
    probe = AlignmentProbe(data=data, **SMALL)
    found = probe(Drawing(data, 1))  # type: ignore[arg-type]
    assert "accuracy_held_out" not in found and "diversity_colour" not in found
    assert found["diversity"] == found["diversity_place"] == 0
    assert [name for name in found if name.removeprefix("accuracy_") in TASKS] == [
        "accuracy_colours", "accuracy_position",
    ]  # fmt: skip
    found = probe(Drawing(data, 1, lambda request: True))  # type: ignore[arg-type]
    assert found["accuracy"] == 0 and found["diversity_left_out"] == 4
    assert not any(np.isnan(value) for value in found.values()) and "diversity" not in found


def test_diversity_is_measured_of_different_captions_of_all_tasks():
    scenes = different_captions(Shapes(), TASKS, 24)
    assert len({short_caption(scene) for scene in scenes}) == 24
    assert min(Counter(scene.task for scene in scenes)[task] for task in TASKS) >= 3
    with pytest.raises(UserError, match=r"diversity_prompts=5 is more than the 3 short captions"):
        different_captions(Shapes(), ["single_object"], 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [1]}, "probe.data is a list"),
        ({"prompts_per_task": 0}, "probe.prompts_per_task=0"),
        ({"diversity_prompts": 0}, "probe.diversity_prompts=0"),
        ({"diversity_prompts": 10**4}, "probe.diversity_prompts=10000"),
        ({"members": 7}, "probe.members=7"),
        ({"steps": 0}, "probe.steps=0"),
        ({"other_steps": 10**6}, "probe.other_steps"),
        ({"other_solver": "heun"}, "probe.other_solver='heun'"),
        ({"guidance": "strong"}, "probe.guidance"),
        ({"batch_size": 0}, "probe.batch_size=0"),
        ({"seed": 2**64 - 10}, "probe.seed"),
    ],
)
def test_bad_probes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        AlignmentProbe(
            **{
                "data": Shapes(),
                **SMALL,
                "seed": 0,
                **changes,
                "members": changes.get("members", 24),
            }
        )


def test_the_default_asks_for_about_1500_images():
    probe = AlignmentProbe(data=Shapes())
    assert probe.other_solver is dpmpp_2m
    accuracy = len(probe.tasks) * probe.prompts_per_task
    assert 3 * accuracy + len(probe.measure.scenes) * probe.members == 1476
