"""Messages name the program that was started."""

import sys

import pytest

from mmdit.programs import as_started, command


@pytest.mark.parametrize(
    ("started", "name", "processes", "expected"),
    [
        ("train.py", "train", None, "python train.py"),
        ("/a/b/eval/rank.py", "sample", None, "python sample.py"),
        ("train.py", "eval/rank", 2, "torchrun --nproc_per_node=2 eval/rank.py"),
        ("/usr/bin/mmdit-train", "train", None, "mmdit-train"),
        ("/usr/bin/mmdit-train", "eval/rank", None, "mmdit-eval rank"),
        ("/usr/bin/mmdit-eval rank", "sample", None, "mmdit-sample"),
        ("mmdit-train", "train", 2, "torchrun --nproc_per_node=2 --no-python mmdit-train"),
    ],
)
def test_a_program_is_called_as_it_was_started(
    monkeypatch: pytest.MonkeyPatch,
    started: str,
    name: str,
    processes: int | None,
    expected: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert command(name, processes=processes) == expected


def test_a_text_is_written_for_who_started_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "python train.py -m seed=0,1\ntorchrun --nproc_per_node=2 eval/memory.py measure=true"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert as_started(text) == text
    monkeypatch.setattr(sys, "argv", ["mmdit-train"])
    assert as_started(text) == (
        "mmdit-train -m seed=0,1\n"
        "torchrun --nproc_per_node=2 --no-python mmdit-eval memory measure=true"
    )
