from collections import Counter

import pytest

from mmdit.alignment.prompts import (
    LONGEST_PROMPT,
    DataPrompts,
    Prompt,
    PromptFile,
    ScenePrompts,
    expect_shapes,
)
from mmdit.data.captions import TASKS, short_caption
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError


def kinds(prompt: Prompt) -> set[tuple[str, str]]:
    assert prompt.scene is not None
    return {(thing.colour, thing.shape) for thing in prompt.scene.objects}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(5)))
    return path


@pytest.fixture(params=["scenes", "data", "file"])
def prompts(request, file):
    make = {
        "scenes": lambda: ScenePrompts(data=Shapes()),
        "data": lambda: DataPrompts(data=Shapes()),
        "file": lambda: PromptFile(path=file),
    }
    return make[request.param]()


def test_a_prompt_depends_on_round_and_number_alone(prompts):
    some, more = prompts.draw(3, 4), prompts.draw(3, 7)
    assert more[:4] == some
    rounds = [tuple(prompt.text for prompt in prompts.draw(round, 7)) for round in range(5)]
    assert len(set(rounds)) == 5


def test_seeds_differ(file):
    for make in (
        lambda seed: ScenePrompts(data=Shapes(), seed=seed),
        lambda seed: DataPrompts(data=Shapes(), seed=seed),
        lambda seed: PromptFile(path=file, seed=seed),
    ):
        assert len({tuple(make(seed).draw(0, 8)) for seed in range(4)}) == 4


def test_scenes_have_the_shares_of_the_data():
    counts = Counter(prompt.task for prompt in ScenePrompts(data=Shapes()).draw(0, 4000))
    assert counts.keys() == set(TASKS)
    for task, share in zip(TASKS, (1, 1, 1, 1, 2, 2), strict=True):
        assert counts[task] / 4000 == pytest.approx(share / 8, abs=0.03)


def test_scenes_have_shares_of_their_own():
    prompts = ScenePrompts(data=Shapes(), task_weights={"position": 3, "counting": 1})
    counts = Counter(prompt.task for prompt in prompts.draw(0, 1000))
    assert counts["position"] / 1000 == pytest.approx(0.75, abs=0.06)
    assert counts["counting"] == 1000 - counts["position"]


@pytest.mark.parametrize("weights", [None, {"colour_attribution": 1.0, "position": 1.0}])
def test_nothing_held_out_is_asked_for(weights):
    data = Shapes(split="held_out")
    for prompt in ScenePrompts(data=data, task_weights=weights).draw(0, 500):
        shown = kinds(prompt)
        assert not shown & data.held_out_kinds
        assert frozenset(shown) not in data.held_out_pairs


def test_texts_are_short_or_the_samples_own():
    data = Shapes(rich_fraction=1.0)
    short, rich = (ScenePrompts(data=data, rich=rich).draw(0, 50) for rich in (False, True))
    assert [prompt.scene for prompt in short] == [prompt.scene for prompt in rich]
    assert all(prompt.text == short_caption(prompt.scene) for prompt in short)
    assert sum(a.text != b.text for a, b in zip(short, rich, strict=True)) > 40


def test_captions_of_data_are_those_of_training_samples():
    data = Shapes(split="validation", samples=30)
    own = Counter(data.view("train").caption(index) for index in range(30))
    drawn = Counter(prompt.text for prompt in DataPrompts(data=data).draw(0, 30))
    assert drawn == own
    assert Prompt("a cat").task is None


def test_a_file_repeats_a_line_only_after_all_others(file):
    drawn = [prompt.text for prompt in PromptFile(path=file).draw(2, 12)]
    for start in (0, 5):
        assert set(drawn[start : start + 5]) == {f"prompt {i}" for i in range(5)}
    assert drawn[:5] != drawn[5:10]


def test_a_file_may_come_from_elsewhere(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Kätzchen\r\na\u2028b".encode())
    assert {p.text for p in PromptFile(path=path).draw(0, 2)} == {"ein Kätzchen", "a\u2028b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"prompts\.txt is empty"),
        (b"\n \n", r"prompts\.txt is empty"),
        (b"a cat\n\na dog\n", r"prompts\.txt, line 2: is empty"),
        (b"a cat\n\xef\xbb\xbf \na dog", r"prompts\.txt, line 2: is empty"),
        (b"a cat\na d\xf6g\n", r"prompts\.txt, line 2: must be UTF-8"),
        (b"a" * (LONGEST_PROMPT + 1), r"line 1: has 2,001 characters"),
        (None, r"prompts\.txt cannot be read"),
    ],
)
def test_bad_files_name_their_line(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        PromptFile(path=path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScenePrompts(data=[1]), "prompts.data is a list, but only data=shapes has scenes"),
        (lambda: ScenePrompts(data=Shapes(), seed=-1), "prompts.seed"),
        (lambda: ScenePrompts(data=Shapes(), rich="yes"), "prompts.rich"),
        (lambda: ScenePrompts(data=Shapes(), task_weights={"posture": 1}), "must be one of single"),
        (lambda: ScenePrompts(data=Shapes(), task_weights={"position": 0}), "must not all be zero"),
        (lambda: ScenePrompts(data=Shapes(), task_weights=[1]), "task_weights"),
        (lambda: ScenePrompts(data=Shapes(grid=1, max_count=1, task_weights={"colours": 1}),
                              task_weights={"position": 1}), "impossible"),
        (lambda: PromptFile(path="/"), "cannot be read"),
        (lambda: PromptFile(path="a\0b"), "cannot be read"),
        (lambda: DataPrompts(data=Shapes(), seed=0.5), "prompts.seed"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_scenes_are_those_of_shapes():
    data = Shapes()
    assert expect_shapes("reward.data", data) is data
