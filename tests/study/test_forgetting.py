"""What finetuning taught and what it cost: measured over steps, averaged over seeds."""

from typing import Any

import pytest
import torch

import mmdit.study.word
from mmdit.cli.eval.forgetting import as_markdown
from mmdit.data.captions import TASKS
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.pipeline import Samples
from mmdit.study import WordAccuracy
from mmdit.study.curves import read_study
from mmdit.study.forgetting_plots import over_steps, taught_against_lost
from mmdit.study.word import FORGETTING
from tests.curves_for_tests import write_run

PROBE = {"_target_": "mmdit.study.WordAccuracy", "prompts_per_task": 50, "steps": 10}


def row(*values: float) -> dict[str, float]:
    names = ("ema/accuracy_taught", "ema/accuracy_word", "ema/accuracy_old")
    return dict(zip(names, values, strict=True))


def test_recipes_are_sorted_by_the_word_and_shown_with_what_they_lost(tmp_path) -> None:
    for seed, word in enumerate((0.3, 0.5)):
        rows = {50: row(0.2, 0.1, 0.6), 100: row(0.9, word, 0.5)}
        write_run(tmp_path, f"adapter=lora,seed={seed}", rows, seed=seed, probe=PROBE)
    write_run(tmp_path, "plain", {100: row(1.0, 0.6, 0.4)}, variant="no replay", probe=PROBE)
    study = read_study(tmp_path, FORGETTING)
    best, second = study.recipes()
    assert (best.name, best.seeds) == ("no replay", [0])
    assert (second.name, second.seeds, second.steps) == ("adapter=lora", [0, 1], [50, 100])
    assert second.last("word").mean == pytest.approx(0.4)
    assert str(best.last("word")) == "0.60"
    base = {"taught": 0.0, "word": 0.1, "old": 0.6}
    table = as_markdown(study.recipes(), base, study)
    assert "| no replay (seeds 0) | 1.00 | 0.60 | 0.40 | 0.20 |" in table
    assert "| adapter=lora | 0.90 ± 0.00 |" in table
    for draw in (over_steps, taught_against_lost):
        assert draw(study.recipes(), base).startswith(b"\x89PNG")


class White:
    """A model that leaves all images white."""

    def __init__(self) -> None:
        self.asked = list[str]()

    def sample(self, request: Any) -> Samples:
        self.asked += request.prompts
        images = torch.full((len(request.prompts), 32, 32, 3), 255, dtype=torch.uint8)
        return Samples(images, request.seeds, 1.0)


def test_accuracies_are_those_of_the_prompts_with_and_without_the_word(monkeypatch) -> None:
    def judged(data: Shapes, scenes: Any, images: Any) -> list[bool]:
        # As if old scenes were right, and of the others those of the phrase and of counting.
        new = data.containing == "star"
        return [not new or scene.task in ("colours", "counting") for scene in scenes]

    monkeypatch.setattr(mmdit.study.word, "judge", judged)
    model = White()
    probe = WordAccuracy(data=Shapes(), word="star", prompts_per_task=3, steps=1, batch_size=7)
    found = probe(model)  # type: ignore[arg-type]
    assert found["accuracy_old"] == 1 and found["accuracy_taught"] == 1
    assert found["accuracy_word"] == pytest.approx(1 / 5)
    assert len(model.asked) == 2 * 3 * len(TASKS)
    assert not any("star" in prompt for prompt in model.asked[: 3 * len(TASKS)])
    assert all("star" in prompt for prompt in model.asked[3 * len(TASKS) :])
    assert probe.higher_is_better < found.keys()


@pytest.mark.parametrize("changes", [{"steps": 0}, {"prompts_per_task": 0}, {"batch_size": 0}])
def test_bad_probes_are_refused(changes) -> None:
    with pytest.raises(UserError, match=rf"probe\.{next(iter(changes))}=0"):
        WordAccuracy(data=Shapes(), word="star", **changes)
