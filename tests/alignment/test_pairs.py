"""Preferences from a folder, in place of images that are sampled and rewarded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmdit
from mmdit.alignment import DiffusionDPO, PreferencePairs
from mmdit.errors import UserError
from mmdit.precision import autocast
from mmdit.processes import Processes

ROWS = [{"prompt": f"image {i}", "preferred": f"{i}w.png", "other": f"{i}l.png"} for i in range(3)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for row in ROWS:
        for column in ("preferred", "other"):
            pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / row[column])
    write(tmp_path)
    return tmp_path


def write(root: Path, rows: list[dict[str, object]] | None = None) -> None:
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows or ROWS))


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published).requires_grad_(False)


def pairs_of(root: Path, **changes) -> PreferencePairs:
    precision = autocast(torch.device("cpu"), "fp32")
    given = {"root": root, "groups": 2, "autocast": precision, "processes": Processes()}
    return PreferencePairs(**{**given, **changes})


def test_each_pair_comes_once_before_any_comes_again(pipe, root: Path) -> None:
    collector, seen = pairs_of(root), list[str]()
    for number in range(3):
        assert collector(number, pipe) == {}
        seen += [prompt.text for prompt in collector.rollouts.prompts]
    assert sorted(seen[:3]) == sorted(seen[3:]) == ["image 0", "image 1", "image 2"]
    other = pairs_of(root, seed=1)
    other(2, pipe)
    collector(2, pipe)
    again = pairs_of(root)
    again(2, pipe)
    assert torch.equal(collector.rollouts.x_0, again.rollouts.x_0)


def test_the_preferred_image_is_the_better_one(pipe, root: Path) -> None:
    collector = pairs_of(root)
    collector(0, pipe)
    rollouts = collector.rollouts
    assert rollouts.rewards.tolist() == [1, 0, 1, 0] and rollouts.members == 2
    assert DiffusionDPO().select(rollouts).tolist() == [[0, 1], [2, 3]]
    side = pipe.image_size // pipe.autoencoder.factor
    assert rollouts.x_0.shape == (4, pipe.mmdit.latent_channels, side, side)


def test_a_table_may_be_csv(pipe, root: Path) -> None:
    (root / "pairs.jsonl").unlink()
    lines = ["prompt,preferred,other", *(",".join(row.values()) for row in ROWS)]
    (root / "pairs.csv").write_text("\n".join(lines))
    assert [pair.prompt for pair in pairs_of(root).pairs] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": "gone.png"}, r"line 2: the image .*gone\.png does not exist"),
        ({"prompt": " "}, "line 2: prompt=' ' must be a text that is not empty"),
        ({"preferred": 3}, "line 2: preferred=3 must be a text"),
    ],
)
def test_a_bad_line_is_named(root: Path, change, message: str) -> None:
    write(root, [ROWS[0], ROWS[1] | change, ROWS[2]])
    with pytest.raises(UserError, match=message):
        pairs_of(root)


def test_a_broken_image_is_named(pipe, root: Path) -> None:
    (root / "1l.png").write_bytes(b"nothing")
    collector = pairs_of(root, groups=3)
    with pytest.raises(UserError, match=r"1l\.png"):
        collector(0, pipe)


def test_folders_without_pairs_are_refused(root: Path, tmp_path: Path) -> None:
    (root / "pairs.csv").write_text("prompt,preferred,other\n")
    with pytest.raises(UserError, match="holds both"):
        pairs_of(root)
    (root / "pairs.jsonl").unlink()
    with pytest.raises(UserError, match="has no pairs"):
        pairs_of(root)
    with pytest.raises(UserError, match=r"has no pairs\.jsonl and pairs\.csv"):
        pairs_of(tmp_path / "absent")
    with pytest.raises(UserError, match=r"collector\.groups"):
        pairs_of(root, groups=0)
