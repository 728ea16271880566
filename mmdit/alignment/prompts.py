"""The prompts that a round of post-training samples images for.

Prompt i of round r depends only on (seed, r, i): not on how many are drawn, nor on which process
draws them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from mmdit.checks import expanded, flag, seed_number
from mmdit.data.captions import Scene, short_caption
from mmdit.data.dataset import Data
from mmdit.data.order import ShuffledOrder
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.keys import generator_for

LONGEST_PROMPT = 2_000  # characters; encoders cut prompts far below that
LONGEST_FILE = 100_000_000  # bytes


class Prompt(NamedTuple):
    """A text, and the scene that an exact judge compares images of it with, if there is one."""

    text: str
    scene: Scene | None = None

    @property
    def task(self) -> str | None:
        """The scene's task, by which rewards are logged; None without a scene."""
        return None if self.scene is None else self.scene.task


class Prompts(Protocol):
    """Where prompts come from."""

    def draw(self, round: int, count: int) -> list[Prompt]:
        """The first `count` prompts of a round, counted from 0."""


class ScenePrompts:
    """Prompts of training scenes of shapes, which an exact judge can score.

    Example:
        prompts = ScenePrompts(data=Shapes(), task_weights={"position": 1, "counting": 1})
        [prompt.text for prompt in prompts.draw(round=0, count=12)]

    Args:
        data: the shapes; combinations that it holds out never occur, whatever its split.
        seed: another seed draws other scenes.
        rich: use the caption of the training sample, which describes everything in
            `data.rich_fraction` of the cases, instead of the short caption. The judge's criterion
            remains the short one.
        task_weights: task -> relative frequency; None takes that of `data`.

    Raises:
        UserError: the data has no scenes, or a task does not fit it.
    """

    def __init__(
        self,
        *,
        data: Shapes,
        seed: int = 0,
        rich: bool = False,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        scenes = expect_shapes("prompts.data", data)
        seed_number("prompts.seed", seed)
        flag("prompts.rich", rich)
        changes = {} if task_weights is None else {"task_weights": task_weights}
        try:
            self.data = Shapes(**{**scenes.identity(), **changes, "split": "train"})
        except ValueError as error:
            raise UserError(f"prompts: {error}") from error
        self.seed, self.rich = seed, rich

    def draw(self, round: int, count: int) -> list[Prompt]:
        return [self._prompt(round, number) for number in range(count)]

    def _prompt(self, round: int, number: int) -> Prompt:
        generator = generator_for(self.seed, "prompt", round, number)
        index = int(torch.randint(len(self.data), (), generator=generator))
        scene = self.data.scene(index)
        return Prompt(self.data.caption(index) if self.rich else short_caption(scene), scene)


class DataPrompts:
    """Captions of training samples of any data set; those of a round are of distinct samples.

    Where a sample has several captions, the round decides which is used.

    Args:
        data: the data set.
        seed: another seed draws other samples.

    Raises:
        UserError: the seed is not one, or a sample cannot be read.
    """

    def __init__(self, *, data: Data, seed: int = 0) -> None:
        self.data = data.view("train")
        self.seed = seed_number("prompts.seed", seed)

    def draw(self, round: int, count: int) -> list[Prompt]:
        order = _order_of(self.seed, round, len(self.data))
        return [Prompt(self.data.batch([index], round).captions[0]) for index in order(0, count)]


class PromptFile:
    """Prompts of a text file, one per line; a round repeats one only after all others.

    Args:
        path: UTF-8 text.
        seed: another seed shuffles them differently.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line is empty or too long; the
            message names the line.
    """

    def __init__(self, *, path: str | Path, seed: int = 0) -> None:
        self.seed = seed_number("prompts.seed", seed)
        self.path = str(path)
        self._texts = _lines_of(expanded(path))

    def draw(self, round: int, count: int) -> list[Prompt]:
        order = _order_of(self.seed, round, len(self._texts))
        return [Prompt(self._texts[line]) for line in order(0, count)]


def expect_shapes(field: str, data: object) -> Shapes:
    """The data, if it has scenes, as data=shapes has.

    Raises:
        UserError: it is another kind of data; the message names the field.
    """
    if isinstance(data, Shapes):
        return data
    raise UserError(
        f"{field} is a {type(data).__name__}, but only data=shapes has scenes, by which images can "
        "be judged"
    )


def _order_of(seed: int, round: int, size: int) -> ShuffledOrder:
    return ShuffledOrder(size=size, seed=seed, stream=f"prompts of round {round}")


def _lines_of(path: Path) -> list[str]:
    """The lines of a prompt file."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"prompts.path={path} cannot be read: {error}") from error
    if len(content) > LONGEST_FILE:
        raise UserError(f"prompts.path={path} is larger than {LONGEST_FILE:,} bytes: split it")
    lines = content.removesuffix(b"\n").split(b"\n")
    if not content.strip():
        raise UserError(f"prompts.path={path} is empty: write one prompt per line")
    return [_prompt_in(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def _prompt_in(line: bytes, place: str) -> str:
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: must be UTF-8") from error
    if not text:
        raise UserError(f"{place}: is empty: write a prompt, or remove the line")
    if len(text) > LONGEST_PROMPT:
        raise UserError(
            f"{place}: has {len(text):,} characters, but a prompt has at most {LONGEST_PROMPT:,}"
        )
    return text
