"""A reward for words in images: optical character recognition reads what a prompt has in quotes."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdit.alignment.prompts import Prompt
from mmdit.checks import expect
from mmdit.errors import UserError

Reader: TypeAlias = Callable[[NDArray[np.uint8]], str]
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»')


class SpellingReward:
    """How well an image spells the text that its prompt has within double quotes, in [0, 1].

    It is 1 - d / max(n, m) for n characters asked for, m characters read and their edit distance d.
    Case and spaces do not count. Several quoted texts are one after another.

    Example:
        python train.py ... prompt_source=file prompt_source.path=signs.txt reward=spelling
        # signs.txt: a sign that says "open"

    Args:
        reader: reads all the text in an image, uint8 (h, w, 3) RGB; None is RapidOCR, whose models
            come with its package: `pip install "sd3-mmdit[ocr]"`.

    Raises:
        UserError: RapidOCR is not installed.
    """

    def __init__(self, *, reader: Reader | None = None) -> None:
        self.reader = rapid_ocr() if reader is None else reader
        expect(callable(self.reader), "reward.reader", reader, "must be a function")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The reward of each image.

        Raises:
            UserError: a prompt has nothing within quotes.
        """
        asked = [plain(quoted(prompt.text)) for prompt in prompts]
        scores = [
            likeness(text, plain(self.reader(image.numpy())))
            for text, image in zip(asked, images, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float64)


def quoted(prompt: str) -> str:
    """The text within double quotes, straight or curly.

    Raises:
        UserError: there is none.
    """
    found = ["".join(groups) for groups in QUOTED.findall(prompt)]
    if not plain("".join(found)):
        raise UserError(
            f"SpellingReward reads what a prompt has within quotes, but {prompt!r} has nothing: "
            'write, for example, a sign that says "open"'
        )
    return " ".join(found)


def plain(text: str) -> str:
    """A text without what does not count: case, spaces, ways to encode a character."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def likeness(asked: str, read: str) -> float:
    """1 - the edit distance over the length of the longer text; 1 for two empty ones."""
    longest = max(len(asked), len(read))
    return 1 - edit_distance(asked, read) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """The least number of insertions, deletions and replacements of a character (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (one != other)))
    return row[-1]


def rapid_ocr() -> Reader:
    """RapidOCR with the models of its package, line by line.

    Raises:
        UserError: it is not installed.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            f"SpellingReward reads with RapidOCR, which is not installed ({error}): pip install "
            '"sd3-mmdit[ocr]", or pip install rapidocr onnxruntime'
        ) from error
    engine: Any = RapidOCR(
        params={
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        }
    )

    def read(image: NDArray[np.uint8]) -> str:
        lines = engine(np.ascontiguousarray(image[..., ::-1])).txts  # OpenCV's order: blue first
        return " ".join(lines or ())

    return read
