"""Preferences that were collected elsewhere: pairs of images, one of which somebody preferred."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.alignment.collector import text_of
from mmdit.alignment.prompts import Prompt
from mmdit.alignment.rollouts import Rollouts
from mmdit.checks import expanded, seed_number, whole_number
from mmdit.data.buckets import fit
from mmdit.data.caption_sources import table_rows
from mmdit.data.images import BadImage, decode, read_bytes
from mmdit.data.order import ShuffledOrder
from mmdit.errors import UserError
from mmdit.latents.encoding import encode
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast
from mmdit.processes import Processes

TABLES = ("pairs.jsonl", "pairs.csv")
COLUMNS = ("prompt", "preferred", "other")


class Pair(NamedTuple):
    """Two images of a prompt."""

    prompt: str
    preferred: Path
    other: Path

    def images(self, side: int) -> Tensor:
        """Both, the preferred first, cropped to squares: uint8 (2, side, side, 3).

        Raises:
            UserError: one of them is missing or broken.
        """
        pixels = []
        for path in (self.preferred, self.other):
            try:
                image = decode(read_bytes(path))
            except (BadImage, OSError) as error:
                raise UserError(f"pairs: {path}: {error}") from error
            pixels.append(torch.tensor(fit(image, (side, side))))
        return torch.stack(pixels)


class PreferencePairs:
    """Reads a round of pairs in place of sampling: the preferred image has reward 1, the other 0.

    A folder holds a table, `pairs.jsonl` or `pairs.csv`, with the columns `prompt`, `preferred` and
    `other`: a text and two files of images, relative to the folder. Each pair comes once before any
    comes again.

    Args:
        root: the folder.
        groups: pairs of a round.
        updates: steps of a round.
        seed: another seed shuffles them differently.
        autocast: precision of the autoencoder.
        processes: all of them read the same pairs.

    Raises:
        UserError: the folder, its table or an image does not exist, or a line cannot be read.
    """

    members, guidance, evaluations = 2, 1.0, 0
    steps: int | None = None  # nothing is sampled

    def __init__(
        self,
        *,
        root: str | Path,
        groups: int = 16,
        updates: int = 1,
        seed: int = 0,
        autocast: Autocast,
        processes: Processes,
    ) -> None:
        del processes
        self.groups = whole_number("collector.groups", groups)
        self.updates = whole_number("collector.updates", updates)
        self.pairs = list(pairs_in(expanded(root)))
        if not self.pairs:
            raise UserError(f"collector.root={root}: its table has no pairs")
        self._order = ShuffledOrder(
            size=len(self.pairs), seed=seed_number("collector.seed", seed), stream="pairs"
        )
        self.autocast = autocast
        self._rollouts: Rollouts | None = None

    @property
    def rollouts(self) -> Rollouts:
        """The pairs of the newest round."""
        assert self._rollouts is not None, "a round begins with reading"
        return self._rollouts

    def __call__(self, number: int, averaged: Pipeline) -> dict[str, float]:
        """Read and encode the pairs of round `number`, from 0.

        Raises:
            UserError: an image is missing or broken.
        """
        chosen = [self.pairs[i] for i in self._order(number * self.groups, self.groups)]
        prompts = [Prompt(pair.prompt) for pair in chosen]
        images = torch.cat([pair.images(averaged.image_size) for pair in chosen])
        latents = encode(averaged.autoencoder, images, self.autocast).float().cpu()
        rewards = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(chosen))
        with self.autocast():
            text = text_of(averaged.text, prompts)
        self._rollouts = Rollouts(prompts, text, latents, rewards)
        return {}


def pairs_in(root: Path) -> Iterator[Pair]:
    """The pairs of a folder, whose images are looked for.

    Raises:
        UserError: see `PreferencePairs`.
    """
    tables = [root / name for name in TABLES if (root / name).is_file()]
    if len(tables) != 1:
        problem = "holds both" if tables else "has no"
        raise UserError(f"collector.root={root} {problem} {' and '.join(TABLES)}: give one of them")
    for place, row in table_rows(tables[0], COLUMNS):
        values = [_text(row, column, place) for column in COLUMNS]
        pair = Pair(values[0], *(root / name for name in values[1:]))
        for path in pair[1:]:
            if not path.is_file():
                raise UserError(f"{place}: the image {path} does not exist")
        yield pair


def _text(row: dict[str, Any], column: str, place: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {column}={value!r} must be a text that is not empty")
    return value
