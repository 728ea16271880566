"""Pairs of noise and of what a teacher makes of it, computed once and kept on disk."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from mmdit.atomic import write_atomically
from mmdit.checks import expect_finite
from mmdit.data.dataset import Data
from mmdit.data.order import ShuffledOrder
from mmdit.errors import UserError
from mmdit.flow.guidance import ClassifierFreeGuidance
from mmdit.keys import generator_for
from mmdit.latents.encoding import HALF
from mmdit.latents.sources import Read
from mmdit.out_of_memory import enough_memory
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast
from mmdit.printable import logger
from mmdit.processes import Processes
from mmdit.recipes import config_hash
from mmdit.runs.folder import RunFolder
from mmdit.text.conditioning import TextConditioner

log = logger("mmdit.train")
PER_FILE = 64  # pairs; so many are lost at most when the process that makes them stops


class Recipe(NamedTuple):
    """What determines pairs; the folder is named by a hash of it."""

    weights_sha256: str  # of the teacher
    data: Any  # plain config of the captions
    objective: Any  # of the teacher, described
    image_size: int
    pairs: int
    steps: int
    guidance: float
    seed: int


class Pairs:
    """A source of latents (`LatentSource`): x_0 and epsilon of each pair, (b, 2, c, h, w).

    x_0 is stored, rounded to half precision as other cached latents are; epsilon is drawn again
    from its key. Pair i has the caption of training sample i.

    Args:
        teacher: makes the pairs that are missing when `prepare` is called, and is not kept.
        text: tokenizes captions.
        recipe: of the pairs.
        data: whose captions they have.
        root: parent of the folder.
        batch_size: pairs made at a time.
        autocast: precision of the teacher.
    """

    def __init__(
        self,
        teacher: Pipeline,
        *,
        recipe: Recipe,
        data: Data,
        root: str | Path,
        batch_size: int,
        autocast: Autocast,
    ) -> None:
        self.text: TextConditioner = teacher.text
        self.recipe, self.data, self.batch_size = recipe, data, batch_size
        self.folder = Path(root) / f"pairs-{config_hash(recipe._asdict())}"
        self.device = teacher.device
        side = recipe.image_size
        self.shape = (teacher.mmdit.latent_channels, *teacher.latent_size(side, side))
        self._teacher, self._autocast = teacher, autocast

    def prepare(self, processes: Processes) -> None:
        """Make the missing pairs, which all processes share.

        Raises:
            UserError: memory ran out, or the folder cannot be written.
        """
        if not processes.broadcast(self._absent()):
            log.info("reusing the %d pairs of %s", self.recipe.pairs, self.folder)
            return
        held = RunFolder(self.folder, wait=True, held=processes.main)
        try:
            absent = processes.broadcast(self._absent())  # another run may have made some
            count = sum(len(self._numbers(file)) for file in absent)
            log.info("making %d of %d pairs in %s", count, self.recipe.pairs, self.folder)
            if processes.main:
                described = json.dumps(self.recipe._asdict(), indent=1)
                write_atomically(self.folder / "recipe.json", described.encode())
            own = absent[processes.rank :: processes.world_size]
            total = sum(len(self._numbers(file)) for file in own)
            hidden = None if processes.main else True  # None hides it where there is no terminal
            with tqdm(total=total, desc="pairs", unit="pair", disable=hidden) as bar:
                for file in own:
                    self._make(file, bar.update)
            processes.barrier()
        finally:
            held.close()

    def order(self, *, batch_size: int, seed: int) -> ShuffledOrder:
        """Sample indices by position."""
        del batch_size
        return ShuffledOrder(size=self.recipe.pairs, seed=seed, stream="pairs")

    def read(self, step: int, indices: Sequence[int]) -> Read:
        """The pairs with these numbers."""
        del step
        numbers = [index % self.recipe.pairs for index in indices]
        latents, captions = self._stored
        x_0 = torch.stack([latents[n // PER_FILE][n % PER_FILE] for n in numbers]).float()
        x = torch.stack([x_0, self._noise(numbers)], dim=1)
        return Read(x, self.text.tokenize([captions[n] for n in numbers]))

    def latent_shape(self, x: Tensor) -> tuple[int, int, int]:
        """The shape (c, h, w) of a latent."""
        _, _, c, h, w = x.shape
        return c, h, w

    def latents(self, x: Tensor) -> Tensor:
        """The pairs (b, 2, c, h, w) on the model's device."""
        return x.to(self.device, non_blocking=True)

    @cached_property
    def _stored(self) -> tuple[list[Tensor], list[str]]:
        """x_0 of each file, which stays on disk until it is used, and all captions."""
        latents, captions = list[Tensor](), list[str]()
        for file in self._files():
            path = self._path(file)
            try:
                with safe_open(path, "pt") as opened:
                    latents.append(opened.get_tensor("x_0"))
                    captions += json.loads(opened.metadata()["captions"])
            except (OSError, SafetensorError, KeyError) as error:
                raise UserError(
                    f"{path} is damaged ({error}): delete it, and its pairs are made again"
                ) from error
        return latents, captions

    def _make(self, file: int, count: Callable[[int], object]) -> None:
        """Compute the pairs of one file and write it."""
        latents, captions = list[Tensor](), list[str]()
        for numbers in split(self._numbers(file), self.batch_size):
            n = len(self.data)
            texts = [self.data.batch([i % n], i // n).captions[0] for i in numbers]
            doing = f"making {len(numbers)} pairs at a time"
            with enough_memory(doing, "a smaller student.batch_size"), self._autocast():
                made = self._denoised(numbers, texts)
            expect_finite("the teacher", made)
            latents.append(made.to("cpu", HALF))
            captions += texts
            count(len(numbers))
        kept = {"x_0": torch.cat(latents)}
        write_atomically(self._path(file), save(kept, {"captions": json.dumps(captions)}))

    @torch.no_grad()
    def _denoised(self, numbers: Sequence[int], captions: Sequence[str]) -> Tensor:
        """The ends of the guided trajectories from the noise of these pairs (b, c, h, w)."""
        pipe, recipe = self._teacher, self.recipe
        times = pipe.objective.times(recipe.steps)
        guidance = ClassifierFreeGuidance(scale=recipe.guidance)
        positive, negative = pipe.encode(captions), None
        if guidance.reads_negative:
            negative = pipe.encode([""] * len(captions))
        z = times[0].item() * self._noise(numbers).to(pipe.device)
        return pipe.denoise(z, times, positive, negative, guidance=guidance).latents

    def _noise(self, numbers: Sequence[int]) -> Tensor:
        """epsilon of these pairs (b, c, h, w), float32 on the CPU."""
        keys = [generator_for(self.recipe.seed, "pair", number) for number in numbers]
        return torch.stack([torch.randn(self.shape, generator=key) for key in keys])

    def _files(self) -> range:
        return range(-(-self.recipe.pairs // PER_FILE))

    def _numbers(self, file: int) -> range:
        """The numbers of the pairs of a file."""
        return range(file * PER_FILE, min((file + 1) * PER_FILE, self.recipe.pairs))

    def _path(self, file: int) -> Path:
        return self.folder / f"{file:06d}.safetensors"

    def _absent(self) -> list[int]:
        return [file for file in self._files() if not self._path(file).is_file()]


def split(numbers: range, size: int) -> Iterator[range]:
    """Consecutive parts of at most this size."""
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
