"""What finetuning taught and what it cost: measured over steps, averaged over seeds."""

import json
import math
from pathlib import Path
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
from mmdit.study.forgetting import mean_of, read_study
from mmdit.study.forgetting_plots import over_steps, taught_against_lost

PROBE = {"_target_": "mmdit.study.WordAccuracy", "prompts_per_task": 50, "steps": 10}


def write_run(
    folder: Path, name: str, rows: dict[int, tuple[float, float, float]], **config: Any
) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    facts = {
        "seed": 0,
        "initial": "/weights",
        "initial_sha256": "ab",
        "probe": PROBE,
        "training": {"steps": 100},
        "variant": None,
        **config,
    }
    (run / "config.json").write_text(json.dumps(facts))
    lines = [{"step": 10, "loss": 0.5}]
    for step, values in rows.items():
        names = ("ema/accuracy_taught", "ema/accuracy_word", "ema/accuracy_old")
        lines.append({"step": step, **dict(zip(names, values, strict=True))})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return run


def test_runs_that_differ_in_their_seed_are_one_recipe(tmp_path) -> None:
    for seed, word in enumerate((0.3, 0.5)):
        rows = {50: (0.2, 0.1, 0.6), 100: (0.9, word, 0.5)}
        write_run(tmp_path, f"adapter=lora,seed={seed}", rows, seed=seed)
    write_run(tmp_path, "plain", {100: (1.0, 0.6, 0.4)}, variant="no replay")
    write_run(tmp_path, "stopped", {50: (0.9, 0.9, 0.9)})
    write_run(tmp_path, "other", {100: (0.9, 0.9, 0.9)}, probe=None)
    (write_run(tmp_path, "begun", {}) / "metrics.jsonl").unlink()
    torn = write_run(tmp_path, "training", {50: (0.1, 0.1, 0.1)}) / "metrics.jsonl"
    torn.write_text(torn.read_text() + '\n{"step": 60, "ema/accu')
    study = read_study(tmp_path)
    assert sorted(study.notes) == [
        "Ignored, not finished: begun.",
        "Ignored, not finished: stopped.",
        "Ignored, not finished: training.",
        "Ignored, without a probe: other.",
    ]
    best, second = study.recipes()
    assert (best.name, best.seeds) == ("no replay", [0])
    assert (second.name, second.seeds, second.steps) == ("adapter=lora", [0, 1], [50, 100])
    assert second.last("word").mean == pytest.approx(0.4)
    assert str(best.last("word")) == "0.60"
    table = as_markdown(study.recipes(), {"taught": 0.0, "word": 0.1, "old": 0.6}, study)
    assert "| no replay (seeds 0) | 1.00 |" in table and "| adapter=lora | 0.90 ± 0.00 |" in table
    for draw in (over_steps, taught_against_lost):
        drawn = draw(study.recipes(), {"taught": 0.0, "word": 0.1, "old": 0.6})
        assert drawn.startswith(b"\x89PNG")


def test_intervals_are_students() -> None:
    # Three values: 4.303 times the standard error.
    found = mean_of([0.4, 0.5, 0.6])
    assert found.mean == pytest.approx(0.5)
    assert found.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert math.isnan(mean_of([0.4]).half_width)
    assert mean_of([0.0, 1.0] * 20).half_width == pytest.approx(0.16, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_sha256": "cd"}, "initial_sha256 differs"),
        ({"probe": PROBE | {"steps": 5}}, "probe differs"),
        ({"variant": "b", "seed": 0}, "seed 0 of b is there twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, message) -> None:
    write_run(tmp_path, "b", {100: (1.0, 0.5, 0.5)})
    write_run(tmp_path, "c", {100: (1.0, 0.5, 0.5)}, **changes)
    with pytest.raises(UserError, match=message):
        read_study(tmp_path)


def test_folders_without_such_runs_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_study(tmp_path / "absent")
    with pytest.raises(UserError, match="no finished run in it measured a word"):
        read_study(tmp_path)
    write_run(tmp_path, "a", {100: (1.0, 0.5, 0.5)})
    (tmp_path / "a" / "metrics.jsonl").unlink()
    (tmp_path / "a" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is not readable"):
        read_study(tmp_path)


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
