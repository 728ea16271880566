"""Frozen text encoders that are in memory only while something is encoded, one after another."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.models.clip import CLIPTextModel
from mmdit.models.t5 import T5Encoder
from mmdit.nn.network import Network
from mmdit.nn.stored import compute_in_float32
from mmdit.registry import describe
from mmdit.text.conditioning import NAMES, Encoding, TextConditioner, TextEncoder

AT_ONCE = 16  # prompts per batch
Row: TypeAlias = tuple[torch.dtype, bytes]


class WaitingEncoder(TextEncoder, Network):
    """A frozen encoder that is opened when there is something to encode, and closed again.

    T5 alone takes 9.5 GB, twice the network of SD3 Medium. Training on cached embeddings needs it
    for the prompts of its evaluations alone, which `remember` encodes beforehand.

    Copies of a model share it, as they share other frozen weights.

    Args:
        encoder: the encoder that it stands for, which it lets go.
        open: opens its network again, on the CPU.

    Attributes:
        weights: number of weights of the network.
    """

    model: CLIPTextModel | T5Encoder  # only while it is open

    def __init__(self, encoder: TextEncoder, open: Callable[[], CLIPTextModel | T5Encoder]) -> None:
        Network.__init__(self)
        self.compute_dtype = encoder.model.compute_dtype
        self.tokenizer, self.length = encoder.tokenizer, encoder.length
        self.width, self.pooled_width = encoder.width, encoder.pooled_width
        self._open, self._description = open, describe(encoder)
        self.weights = sum(weight.numel() for weight in encoder.model.parameters())
        self._stored = self._opened = encoder.model.compute_dtype
        self._remembered: dict[Row, Encoding] = {}
        self.place: Tensor
        # Empty, but moves with the model: it is encoded where this is.
        self.register_buffer("place", torch.empty(0, device=encoder.device), persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def device(self) -> torch.device:
        return self.place.device

    def _apply(self, fn, recurse=True) -> Self:  # a dtype is that of the weights, once opened
        super()._apply(fn, recurse)
        self._stored = fn(torch.empty(0, dtype=self._stored, device="cpu")).dtype
        return self

    @contextmanager
    def opened(self) -> Iterator[None]:
        if "model" in self.__dict__:
            yield
            return
        model = self._open().requires_grad_(False).to(self.device)
        if self._stored != self._opened:
            model.to(self._stored)
        if self.compute_dtype == torch.float32:
            compute_in_float32(model)
        # Not a submodule: its weights are not those of the model that waits.
        object.__setattr__(self, "model", model)
        try:
            yield
        finally:
            object.__delattr__(self, "model")

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Encoding:  # (b, length) int64, anywhere
        rows = self._rows(ids)
        if not all(row in self._remembered for row in rows):
            with self.opened():
                return super().forward(ids)
        hidden, pooled = zip(*(self._remembered[row] for row in rows), strict=True)
        return Encoding(torch.stack(hidden).to(self.device), torch.stack(pooled).to(self.device))

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode prompts that will be asked for again, and keep their encodings on the CPU."""
        ids = self.tokenize(prompts).unique(dim=0)
        new = ids[[row not in self._remembered for row in self._rows(ids)]]
        if not len(new):
            return
        with self.opened():
            for batch in new.split(AT_ONCE):
                parts = (part.cpu().unbind() for part in self(batch))
                kept = (Encoding(*pair) for pair in zip(*parts, strict=True))
                self._remembered |= dict(zip(self._rows(batch), kept, strict=True))

    def _rows(self, ids: Tensor) -> list[Row]:
        """What tells encodings apart: the dtype of the computation, and the ids of a prompt."""
        return [(self.compute_dtype, row.numpy().tobytes()) for row in ids.cpu()]


def waiting(text: TextConditioner) -> dict[str, WaitingEncoder]:
    """The encoders of a conditioner that wait, by kind."""
    return {
        name: encoder
        for name, encoder in zip(NAMES, text.encoders, strict=True)
        if isinstance(encoder, WaitingEncoder)
    }


def remember(text: TextConditioner, prompts: Sequence[str], *, shown: bool) -> None:
    """Encode prompts that will be asked for again, one waiting encoder after another.

    Args:
        shown: whether there is a progress bar.
    """
    encoders = waiting(text)
    bar = tqdm(encoders.items(), unit="encoder", disable=None if shown and encoders else True)
    for name, encoder in bar:
        bar.set_description(f"encoding prompts with {NAMES[name]}")
        encoder.remember(prompts)
