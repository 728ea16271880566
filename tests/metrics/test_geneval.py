import json
import re

import pytest
import torch
from PIL import Image

from mmdit.data.captions import TASKS
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.metrics.geneval import GenEvalFolder, checked, read_metadata, scene_metadata

# As the official list writes them.
LINES = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], '
    '"prompt": "a photo of a bench"}',
    '{"tag": "counting", "include": [{"class": "clock", "count": 2}], '
    '"exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}',
    '{"tag": "position", "include": [{"class": "tv", "count": 1}, '
    '{"class": "dog", "count": 1, "position": ["right of", 0]}], '
    '"prompt": "a photo of a dog right of a tv"}',
    '{"tag": "color_attr", "include": [{"class": "bowl", "count": 1, "color": "red"}, '
    '{"class": "cow", "count": 1, "color": "pink"}], "prompt": "a red bowl and a pink cow"}',
]
SETTINGS = {"protocol": "geneval-1", "weights_sha256": "ab", "seed": 0}


def satisfied(metadata: dict, things: list[tuple[str, str, float, float]]) -> bool:
    """The evaluator's rules, on objects that are known: (shape, colour, x, y)."""
    groups: list[list[tuple[str, str, float, float]]] = []
    for clause in metadata["include"]:
        fitting = [
            thing
            for thing in things
            if thing[0] == clause["class"] and clause.get("color", thing[1]) == thing[1]
        ]
        if len(fitting) < clause["count"]:
            return False
        if "position" in clause:
            relation, target = clause["position"]
            (_, _, x, y), (_, _, x_of, y_of) = fitting[0], groups[target][0]
            holds = {
                "left of": x < x_of,
                "right of": x > x_of,
                "above": y < y_of,
                "below": y > y_of,
            }
            if not holds[relation]:
                return False
        groups.append(fitting)
    return not any(
        sum(thing[0] == clause["class"] for thing in things) >= clause["count"]
        for clause in metadata.get("exclude", [])
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_scene_meets_its_own_metadata_and_what_lacks_an_object_does_not(task):
    data = Shapes(split="validation")
    for i in range(20):
        scene = data.scene_for_task(task, i)
        metadata = scene_metadata(scene)
        assert checked(json.dumps(metadata), "here") == metadata
        things = [(o.shape, o.colour, o.x, o.y) for o in scene.objects]
        assert satisfied(metadata, things)
        assert not satisfied(metadata, things[1:])
        if task == "position":
            mirrored = [(shape, colour, -x, -y) for shape, colour, x, y in things]
            assert not satisfied(metadata, mirrored)
        if task == "counting":
            assert not satisfied(metadata, [*things, things[0]])


def test_tags_are_those_of_the_official_list():
    data = Shapes(split="validation")
    tags = [scene_metadata(data.scene_for_task(task, 0))["tag"] for task in TASKS]
    assert tags == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]


def test_an_official_list_is_read_as_it_is(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    assert read_metadata(path) == [json.loads(line) for line in LINES]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"tag": "x", "include": [{"class": "a", "count": 1}]}', "prompt None"),
        ('{"include": [{"class": "a", "count": 1}], "prompt": "a"}', "tag None"),
        ('{"tag": "x", "include": [], "prompt": "a"}', "include []"),
        ('{"tag": "x", "include": ["a"], "prompt": "a"}', "include[0] 'a'"),
        ('{"tag": "x", "include": [{"class": "a"}], "prompt": "a"}', "count None"),
        ('{"tag": "x", "include": [{"class": "a", "count": 0}], "prompt": "a"}', "count 0"),
        ('{"tag": "x", "include": [{"class": "a", "count": true}], "prompt": "a"}', "count True"),
        (
            '{"tag": "x", "include": [{"class": "a", "count": 1, "color": 3}], "prompt": "a"}',
            "color 3",
        ),
        (LINES[2].replace('"right of", 0', '"right of", 1'), "position ['right of', 1]"),
        (LINES[2].replace('"right of", 0', '"beside", 0'), "position ['beside', 0]"),
        (LINES[2].replace('["right of", 0]', '"right of"'), "position 'right of'"),
        (LINES[1].replace('"exclude": [{"class": "clock",', '"exclude": [{'), "exclude[0]"),
    ],
)
def test_corrupt_metadata_is_refused_by_its_line(line, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{LINES[0]}\n{line}\n")
    with pytest.raises(UserError, match=re.escape(message)) as told:
        read_metadata(path)
    assert "line 2" in str(told.value)


def test_files_that_are_no_list_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("empty.jsonl", "is empty"),
        ("binary.jsonl", "UTF-8"),
        ("absent.jsonl", "cannot be read"),
        (".", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_metadata(tmp_path / name)


def plain_image(value: int) -> torch.Tensor:
    return torch.full((8, 6, 3), value, dtype=torch.uint8)


def test_the_layout_is_what_the_official_evaluator_walks_through(tmp_path):
    out = tmp_path / "a" / "b"
    folder = GenEvalFolder(out, SETTINGS)
    for index, line in enumerate(LINES):
        assert folder.missing(index, json.loads(line), 2) == [0, 1]
        for sample in range(2):
            folder.write(index, sample, plain_image(10 * index + sample))
    numbered = sorted(path for path in out.iterdir() if path.is_dir())
    assert [path.name for path in numbered] == ["00000", "00001", "00002", "00003"]
    for index, path in enumerate(numbered):
        with (path / "metadata.jsonl").open() as file:
            assert json.load(file) == json.loads(LINES[index])
        names = sorted(p.name for p in (path / "samples").iterdir())
        assert names == ["0000.png", "0001.png"]
        with Image.open(path / "samples" / "0001.png") as image:
            assert image.size == (6, 8)
            assert image.getpixel((0, 0)) == (10 * index + 1,) * 3


def test_what_is_there_is_not_generated_again(tmp_path):
    metadata = json.loads(LINES[0])
    first = GenEvalFolder(tmp_path, SETTINGS)
    first.missing(0, metadata, 3)
    first.write(0, 1, plain_image(1))
    again = GenEvalFolder(tmp_path, SETTINGS)
    assert again.missing(0, metadata, 3) == [0, 2]
    assert again.missing(0, metadata, 4) == [0, 2, 3]


def test_images_of_two_settings_or_prompts_are_not_mixed(tmp_path):
    folder = GenEvalFolder(tmp_path, SETTINGS)
    folder.missing(0, json.loads(LINES[0]), 1)
    with pytest.raises(UserError, match="weights_sha256 'ab', not 'cd'"):
        GenEvalFolder(tmp_path, {**SETTINGS, "weights_sha256": "cd"})
    with pytest.raises(UserError, match="a photo of a bench"):
        folder.missing(0, json.loads(LINES[1]), 1)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"tag":')
    with pytest.raises(UserError, match="is not JSON"):
        folder.missing(0, json.loads(LINES[0]), 1)
    (tmp_path / "geneval.json").unlink()
    with pytest.raises(UserError, match="no geneval"):
        GenEvalFolder(tmp_path, SETTINGS)
