import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from mmdit.alignment import (
    CLIPReward,
    CompositionalReward,
    FunctionReward,
    ScenePrompts,
    SpellingReward,
    WeightedSum,
)
from mmdit.alignment.prompts import Prompt
from mmdit.alignment.rewards import checked, columns, credit
from mmdit.alignment.spelling import edit_distance, likeness, quoted
from mmdit.cli.targets import check_targets
from mmdit.data.captions import TASKS, Scene, short_caption
from mmdit.data.drawing import Object, draw
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.metrics.compositional import judge

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = Shapes()
IMAGES = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
TEXTS = [Prompt("a cat"), Prompt("a dog"), Prompt("a dog")]


def thing(colour: str, shape: str, x: float, y: float) -> Object:
    return Object(shape, colour, "medium", x, y, 0.18)


def scene(task: str, *things: Object, relation: str | None = None) -> Scene:
    return Scene(task, things, relation, "white")


def drawn(*things: Object) -> torch.Tensor:
    return torch.from_numpy(draw(things, "white", 64))[None]


def reward_of(asked: Scene, *things: Object, partial: bool = True) -> float:
    reward = CompositionalReward(data=DATA, partial=partial)
    return checked(reward, drawn(*things), [Prompt(short_caption(asked), asked)]).item()


RED = thing("red", "circle", 0.25, 0.25)
BLUE = thing("blue", "square", 0.25, 0.75)
LOW_RED, HIGH_BLUE = RED._replace(y=0.75), BLUE._replace(y=0.25)
SIDE = thing("green", "triangle", 0.75, 0.5)
ABOVE = scene("position", RED, BLUE, relation="above")
PAIR = scene("colour_attribution", RED, BLUE)
THREE = scene("counting", RED, RED._replace(y=0.75), RED._replace(x=0.75))


@pytest.mark.parametrize(
    ("asked", "shown", "parts"),
    [
        (ABOVE, [RED, BLUE], [1, 1, 1, 1]),  # number, shapes, colours, relation
        (ABOVE, [LOW_RED, HIGH_BLUE], [1, 1, 1, 0]),
        (ABOVE, [RED._replace(colour="cyan"), BLUE], [1, 1, 1 / 2, 0]),
        (ABOVE, [RED], [1 / 2, 1 / 2, 1 / 2, 0]),
        (ABOVE, [RED, BLUE, SIDE], [1 / 2, 2 / 3, 2 / 3, 1]),
        (ABOVE, [], [0, 0, 0, 0]),
        (PAIR, [LOW_RED, HIGH_BLUE], [1, 1, 1]),
        (PAIR, [RED._replace(colour="blue"), BLUE._replace(colour="red")], [1, 1, 0]),
        (PAIR, [RED, SIDE], [1, 1 / 2, 1 / 2]),
        (THREE, [RED, LOW_RED], [2 / 3, 2 / 3]),
        (THREE, [RED, LOW_RED, SIDE], [1, 2 / 3]),
        (THREE, [RED, LOW_RED, RED._replace(colour="cyan", x=0.75)], [1, 1]),
        (scene("single_object", RED), [BLUE], [1, 0]),
        (scene("single_object", RED), [RED, BLUE, SIDE], [0, 1 / 3]),
        (scene("colours", RED), [RED._replace(colour="cyan")], [1, 1, 0]),
    ],
)
def test_partial_credit_is_the_mean_of_what_is_asked_for(asked, shown, parts):
    assert reward_of(asked, *shown) == pytest.approx(sum(parts) / len(parts))
    assert reward_of(asked, *shown, partial=False) == (set(parts) == {1})


def test_whole_credit_is_the_judges_and_partial_is_whole_exactly_there():
    prompts = ScenePrompts(data=DATA).draw(0, 24)
    others = ScenePrompts(data=DATA, seed=1).draw(0, 24)
    shown = torch.from_numpy(np.stack([DATA.render(p.scene) for p in [*prompts, *others]]))
    asked = [*prompts, *prompts]
    right = judge(DATA, [prompt.scene for prompt in asked], shown)
    whole, partial = (
        checked(CompositionalReward(data=DATA, partial=partial), shown, asked).tolist()
        for partial in (False, True)
    )
    assert whole == right and 24 <= sum(whole) < 40
    assert [reward == 1 for reward in partial] == right
    assert all(0 <= reward <= 1 for reward in partial)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_detected_is_worth_nothing(task):
    assert credit(DATA.scene_for_task(task, 0), []) == 0


def test_a_prompt_without_a_scene_cannot_be_judged():
    with pytest.raises(UserError, match="'a cat' has none: use prompt_source=scenes"):
        checked(CompositionalReward(data=DATA), IMAGES, TEXTS)


# --- CLIP ---


@pytest.fixture(scope="module")
def pair():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return instantiate(compose("train").clip.model).eval()


def test_clip_reward_is_the_cosine_of_image_and_prompt(pair):
    prompts = ScenePrompts(data=DATA).draw(0, 7)
    images = torch.from_numpy(np.stack([DATA.render(prompt.scene) for prompt in prompts]))
    with torch.no_grad():
        seen, meant = pair.image_features(images), pair.text_features([p.text for p in prompts])
    expected = torch.cosine_similarity(seen, meant).double()
    for batch_size in (2, 64):
        found = checked(CLIPReward(clip=pair, batch_size=batch_size), images, prompts)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_clip_must_be_there(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        CLIPReward(clip=tmp_path / "nothing")
    with pytest.raises(UserError, match=r"reward\.clip"):
        CLIPReward(clip=None)


# --- spelling ---


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("open", "opne", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_spelling_compares_what_is_read_with_what_is_quoted():
    read = iter(["OPEN", "o pen", "opne", "", "open closed"])
    reward = SpellingReward(reader=lambda image: next(read))
    prompts = [Prompt('a sign that says "Open"')] * 5
    found = checked(reward, torch.zeros(5, 8, 8, 3, dtype=torch.uint8), prompts)
    assert found.tolist() == pytest.approx([1, 1, 1 / 2, 0, 4 / 10])
    assert likeness("", "") == 1
    assert quoted('“eins” and «zwei» and "drei", don\'t') == "eins zwei drei"
    with pytest.raises(UserError, match="within quotes"):
        checked(reward, IMAGES, TEXTS)


def test_reading_needs_rapidocr(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match="pip install rapidocr onnxruntime"):
        SpellingReward()


def test_rapidocr_is_asked_in_its_order_of_colours(monkeypatch):
    seen = []

    class Engine:
        def __init__(self, params):
            pass

        def __call__(self, image):
            seen.append(image)
            return types.SimpleNamespace(txts=("a", "b") if len(seen) == 1 else None)

    monkeypatch.setitem(sys.modules, "rapidocr", types.SimpleNamespace(RapidOCR=Engine))
    reader = SpellingReward().reader
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert (reader(red), reader(red)) == ("a b", "")
    assert (seen[0] == (0, 0, 255)).all()


# --- one's own function, and sums ---


def test_a_function_gets_a_copy_of_the_images_and_the_texts(monkeypatch):
    def greed(images, texts):
        images += 9
        assert texts == ["a cat", "a dog", "a dog"] and isinstance(texts, list)
        return images.float().mean(dim=(1, 2, 3))

    monkeypatch.setitem(sys.modules, "own_rewards", types.SimpleNamespace(greed=greed))
    for function in (greed, "own_rewards:greed"):
        found = checked(FunctionReward(function=function), IMAGES, TEXTS)
        assert found.tolist() == [9, 9, 9] and found.dtype == torch.float64
    assert not IMAGES.any()


@pytest.mark.parametrize(
    "values",
    [
        [0, True, 2.5],
        (0, 1, 2.5),
        np.array([0, 1, 2.5]),
        np.array([0, 1, 2.5], np.float16),
        torch.tensor([0, 1, 2.5], requires_grad=True),
        torch.tensor([0, 1, 2.5], dtype=torch.bfloat16),
        [torch.tensor(0.0), np.float32(1), 2.5],
    ],
)
def test_numbers_of_any_kind_are_rewards(values):
    found = checked(lambda images, prompts: values, IMAGES, TEXTS)
    assert found.tolist() == [0, 1, 2.5]
    assert (found.dtype, found.requires_grad) == (torch.float64, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1], "returned 2 values for 3 images"),
        ([0, 1, 2, 3], "returned 4 values for 3 images"),
        (torch.zeros(3, 1), r"values of shape \(3, 1\) for 3 images"),
        (1.0, r"values of shape \(\) for 3 images"),
        ([0, float("nan"), float("nan")], "nan for 2 of 3 images, first for one of 'a dog'"),
        ([float("inf"), 0, 0], "inf for 1 of 3 images, first for one of 'a cat'"),
        (["1", "2", "3"], "returned a list, which is not a list of numbers"),
        ([1, None, 2], "not a list of numbers"),
        ([[1], [2, 3], []], "not a list of numbers"),
        ([1j, 0, 0], "not a list of numbers"),
        (np.array([1j, 0, 0]), "must be real"),
        (np.array(["a", "b", "c"]), "not a list of numbers"),
        (None, "returned a NoneType"),
        ({0: 1.0}, "returned a dict"),
        (iter([1, 2, 3]), "not a list of numbers"),
        ([10**400, 0, 0], "not a list of numbers"),
    ],
)
def test_what_is_not_a_number_for_each_image_is_one_message(values, message):
    reward = FunctionReward(function=lambda images, texts: values)
    with pytest.raises(UserError, match=message) as caught:
        checked(reward, IMAGES, TEXTS)
    assert "FunctionReward" in str(caught.value) and "checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_that_raises_is_named_with_its_message_and_line():
    def broken(images, texts):
        return {}["wings"]

    with pytest.raises(UserError) as caught:
        checked(FunctionReward(function=broken), IMAGES, TEXTS)
    for part in ("FunctionReward", "KeyError", "'wings'", "test_rewards.py, line", "checkpoint"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("much"), MemoryError(), KeyboardInterrupt()]
)
def test_what_a_reward_cannot_help_is_not_its_fault(error):
    def broken(images, texts):
        raise error

    with pytest.raises(type(error)):
        checked(FunctionReward(function=broken), IMAGES, TEXTS)


def test_a_sum_weighs_its_parts_and_names_them():
    parts = {
        "a": lambda images, prompts: [1.0, 2.0, 3.0],
        "b": lambda images, prompts: torch.tensor([1.0, 0.0, 0.0]),
    }
    reward = WeightedSum(rewards=parts, weights={"b": -1, "a": 0.5})
    expected = [-0.5, 1.0, 1.5]
    assert checked(reward, IMAGES, TEXTS).tolist() == expected
    found = columns(reward, IMAGES, TEXTS)
    assert {name: column.tolist() for name, column in found.items()} == {
        "reward": expected, "a": [1, 2, 3], "b": [1, 0, 0],
    }  # fmt: skip
    alone = columns(parts["a"], IMAGES, TEXTS)
    assert list(alone) == ["reward"] and alone["reward"].tolist() == [1, 2, 3]


def test_a_part_that_fails_is_named():
    reward = WeightedSum(
        rewards={
            "good": lambda i, p: [0.0] * 3,
            "bad": FunctionReward(function=lambda i, t: [0.0]),
        },
        weights={"good": 1, "bad": 1},
    )
    for score in (checked, columns):
        with pytest.raises(UserError, match="returned 1 values for 3 images"):
            score(reward, IMAGES, TEXTS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CompositionalReward(data="shapes"), r"reward\.data is a str"),
        (lambda: CompositionalReward(data=DATA, partial=1), r"reward\.partial"),
        (lambda: FunctionReward(function="score"), "must be module:name"),
        (lambda: FunctionReward(function=":score"), "must be module:name"),
        (lambda: FunctionReward(function="a:b:c"), "must be module:name"),
        (lambda: FunctionReward(function="no_such_module:score"), "no_such_module"),
        (lambda: FunctionReward(function="mmdit:no_such_function"), "no_such_function"),
        (lambda: FunctionReward(function="..x:score"), "must be module:name"),
        (lambda: FunctionReward(function=3), "must be a function"),
        (lambda: WeightedSum(rewards={}, weights={}), "at least one"),
        (lambda: WeightedSum(rewards={"a": len}, weights={}), "weights has no 'a'"),
        (lambda: WeightedSum(rewards={"a": len}, weights={"a": 1, "b": 1}), "rewards has no 'b'"),
        (lambda: WeightedSum(rewards={"a": len}, weights={"a": 0}), "not all be zero"),
        (lambda: WeightedSum(rewards={"a": len}, weights={"a": "much"}), r"weights\.a='much'"),
        (lambda: WeightedSum(rewards={"a": 1}, weights={"a": 1}), r"rewards\.a=1 must be a reward"),
        (lambda: WeightedSum(rewards={"reward": len}, weights={"reward": 1}), "name of the sum"),
        (lambda: WeightedSum(rewards=[len], weights={"a": 1}), r"reward\.rewards"),
        (lambda: CLIPReward(clip="x", batch_size=0), r"reward\.batch_size"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --- as configs build them ---


def config_of(*words: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", ["reward=weighted_sum", *words])


def test_the_yaml_of_a_sum_takes_further_parts():
    half = "reward@reward.rewards.half=compositional"
    config = config_of(f"+{half}", "reward.rewards.half.partial=true", "+reward.weights.half=0.5")
    reward = instantiate(config.reward)
    prompt = ScenePrompts(data=DATA).draw(0, 1)
    image = torch.from_numpy(DATA.render(prompt[0].scene))[None]
    assert columns(reward, image, prompt)["reward"].tolist() == [1.5]


def test_a_config_cannot_name_a_function_of_a_module_that_is_not_trusted(monkeypatch):
    config = config_of("+reward@reward.rewards.own=function", "+reward.weights.own=1")
    config.reward.rewards.own.function = "os:system"
    with pytest.raises(UserError, match=r"own.function: 'os.system' is not part of mmdit"):
        check_targets(config, ())
    module = types.ModuleType("own_rewards")
    module.score = lambda images, texts: [0.0]
    module.score.__module__ = "own_rewards"
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    config.reward.rewards.own.function = "own_rewards:score"
    check_targets(config, ["own_rewards"])
    with pytest.raises(UserError, match="imports="):
        check_targets(config, ())


def test_an_answer_that_is_given_often_is_worth_less() -> None:
    asked = scene("single_object", RED)  # "a circle": place and colour are free
    blue = BLUE._replace(shape="circle")
    images = torch.cat([drawn(RED), drawn(RED), drawn(blue), drawn(SIDE), drawn(LOW_RED)])
    prompts = [Prompt(short_caption(asked), asked)] * 5
    reward = CompositionalReward(data=DATA, novelty=0.6)
    # The triangle is wrong. Of the 3 other right images, one is where each is; two are as red.
    place = torch.tensor([1, 1, 1, 0, 1]) / 3
    colour = torch.tensor([2, 2, 0, 0, 2]) / 3
    expected = 1 - 0.6 * (place + colour).double() / 2
    expected[3] = 0
    torch.testing.assert_close(reward(images, prompts), expected, rtol=1e-6, atol=1e-6)
    plain = CompositionalReward(data=DATA)(images, prompts)
    assert plain.tolist() == [1, 1, 1, 0, 1]


def test_novelty_compares_images_of_one_prompt_alone() -> None:
    one, other = scene("single_object", RED), scene("colours", RED)
    prompts = [Prompt(short_caption(each), each) for each in (one, other)]
    reward = CompositionalReward(data=DATA, novelty=1.0)
    assert reward(torch.cat([drawn(RED)] * 2), prompts).tolist() == [1, 1]
    assert reward(torch.cat([drawn(RED)] * 2), prompts[:1] * 2).tolist() == [0, 0]


def test_novelty_is_a_share() -> None:
    with pytest.raises(UserError, match=r"reward\.novelty="):
        CompositionalReward(data=DATA, novelty=1.5)
