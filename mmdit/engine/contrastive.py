"""CLIP's own training: a picture and its caption must find each other in a batch."""

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.checks import whole_number
from mmdit.data.dataset import Batch
from mmdit.data.order import Order
from mmdit.data.shapes import Shapes
from mmdit.engine.tasks import Work
from mmdit.errors import UserError
from mmdit.precision import Autocast
from mmdit.text.clip_pair import CLIPPair

CHOICES = 64  # captions among which each picture of the evaluation chooses


class ContrastiveTask:
    """Symmetric InfoNCE (Radford et al. 2021, Fig. 3) on captioned images.

    A batch may hold a caption twice, as short ones often are; a picture's loss then counts neither
    the twin caption nor the twin's picture as wrong.

    Nothing is drawn: what a sample is follows from its index.

    Args:
        module: the two towers.
        data: training images.
        validation: images for the evaluation.
        rounds: batches of `CHOICES` images with distinct captions in the evaluation.
        autocast: precision of the forward pass.
    """

    higher_is_better: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    def __init__(
        self,
        *,
        module: CLIPPair,
        data: Shapes,
        validation: Shapes,
        rounds: int = 16,
        autocast: Autocast,
    ) -> None:
        whole_number("rounds", rounds)
        self.module, self.data, self.autocast = module, data, autocast
        self._rounds = distinct_batches(validation, rounds)

    @property
    def protocol(self) -> dict[str, str | int]:
        return {"protocol": "retrieval-1", "samples": CHOICES * len(self._rounds), "seed": 0}

    def order(self, *, batch_size: int, seed: int) -> Order:
        return self.data.order(batch_size=batch_size, seed=seed)

    def example(self, step: int, indices: Sequence[int]) -> Batch:
        return self.data.batch(indices, step)

    def times(self, example: Batch) -> None:
        return None

    def figures(self) -> dict[str, float]:
        return {}

    def work(self, example: Batch) -> Work:
        return Work()

    def loss(self, example: Batch) -> Tensor:
        images, captions, _ = example
        with self.autocast():
            seen = self.module.image_features(images)
            told = self.module.text_features(captions)
        return contrastive_loss(seen, told, self.module.scale, twins(captions).to(seen.device))

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """The loss, and how often a picture finds its own caption among `CHOICES` distinct ones."""
        assert isinstance(module, CLIPPair)
        losses, right = [], []
        for images, captions, _ in self._rounds:
            with self.autocast():
                seen, told = module.image_features(images), module.text_features(captions)
            alone = torch.eye(len(captions), dtype=torch.bool, device=seen.device)
            losses.append(contrastive_loss(seen, told, module.scale, alone))
            right.append(chosen(seen, told) == torch.arange(len(captions), device=seen.device))
        return {
            "loss": torch.cat(losses).mean().item(),
            "accuracy": torch.cat(right).float().mean().item(),
        }

    @torch.no_grad()
    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        """Pictures of the evaluation, under the captions chosen for them."""
        assert isinstance(module, CLIPPair)
        images, captions, _ = self._rounds[0]
        with self.autocast():
            choice = chosen(module.image_features(images[:16]), module.text_features(captions))
        return images[:16], [captions[i] for i in choice.tolist()]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Mean of both cross-entropies of each pair: its picture among pictures, text among texts.

    Args:
        image, text: unit features (b, d); a row of one belongs to that of the other.
        scale: factor of the cosines.
        same: bool (b, b), where two captions are the same; none counts as wrong for the other.

    Returns:
        (b,) nats, float32.
    """
    own = torch.arange(len(image), device=image.device)
    eye = torch.eye(len(image), dtype=torch.bool, device=image.device)
    logits = (scale * image @ text.T).masked_fill(same & ~eye, float("-inf"))
    return (
        F.cross_entropy(logits, own, reduction="none")
        + F.cross_entropy(logits.T, own, reduction="none")
    ) / 2


def twins(captions: Sequence[str]) -> Tensor:
    """Which captions are the same: bool (b, b)."""
    numbers = {caption: i for i, caption in enumerate(captions)}
    of = torch.tensor([numbers[caption] for caption in captions])
    return of[:, None] == of[None]


def chosen(image: Tensor, text: Tensor) -> Tensor:
    """The text nearest to each picture: features (n, d) and (m, d) to indices (n,)."""
    return (image @ text.T).argmax(dim=1)


def distinct_batches(data: Shapes, rounds: int) -> list[Batch]:
    """Batches of `CHOICES` samples, in the order of their indices, no caption twice in a batch.

    Raises:
        UserError: the dataset has too few captions.
    """
    captions = ((data.caption(index), index) for index in itertools.count())
    batches = []
    for _ in range(rounds):
        picked: dict[str, int] = {}
        for caption, index in itertools.islice(captions, 100 * CHOICES):
            picked.setdefault(caption, index)
            if len(picked) == CHOICES:
                break
        else:
            raise UserError(
                f"data has {len(picked)} distinct captions in {100 * CHOICES} images, and the "
                f"evaluation needs {CHOICES}: use more colours, shapes or tasks"
            )
        batches.append(data.batch(picked.values()))
    return batches
