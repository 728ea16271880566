"""Prompts to conditions: three encoders make c_vec and c_ctxt (App. B.2)."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.bounds import LONGEST_PROMPT
from mmdit.checks import at_least_one, expect_finite, number, one_of
from mmdit.errors import UserError
from mmdit.flow.guidance import Condition
from mmdit.models.clip import CLIPTextModel
from mmdit.models.t5 import T5Encoder
from mmdit.registry import register
from mmdit.text.tokenizers import PromptTokenizer

NAMES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}  # as people call them
ENCODERS = tuple(NAMES)  # in the order in which a conditioner holds them
EMPTY_PROMPTS = ("zeros", "encoded")


class TokenIds(NamedTuple):
    """A batch of prompts as each encoder reads them, each (b, length) int64."""

    clip_l: Tensor
    clip_g: Tensor
    t5: Tensor


class Encoding(NamedTuple):
    """What one encoder says of a batch of prompts."""

    hidden: Tensor  # (b, length, d)
    pooled: Tensor  # (b, p); T5 pools nothing: p = 0


class Encodings(NamedTuple):
    """What each encoder says of a batch of prompts."""

    clip_l: Encoding
    clip_g: Encoding
    t5: Encoding


@register
class TextEncoder(nn.Module):
    """A tokenizer and the network that reads its ids.

    Raises:
        UserError: the network has too few ids or positions for the tokenizer.
    """

    def __init__(self, *, tokenizer: PromptTokenizer, model: CLIPTextModel | T5Encoder) -> None:
        super().__init__()
        name, size = type(model).__name__, model.vocabulary_size
        if tokenizer.vocabulary_size > size:
            raise UserError(
                f"vocabulary_size {size} of {name} must be at least "
                f"{tokenizer.vocabulary_size}, the size of its tokenizer's vocabulary"
            )
        self.pooled_width = 0
        if isinstance(model, CLIPTextModel):
            if tokenizer.length > model.length:
                raise UserError(
                    f"length {model.length} of {name} must be at least {tokenizer.length}, "
                    "the length of its tokenizer"
                )
            self.pooled_width = model.pooled_width
        self.width, self.length = model.width, tokenizer.length
        self.tokenizer, self.model = tokenizer, model

    @property
    def device(self) -> torch.device:
        return self.model.device

    def tokenize(self, prompts: Sequence[str]) -> Tensor:  # -> (b, length) int64, on the CPU
        return self.tokenizer(prompts)

    def forward(self, ids: Tensor) -> Encoding:  # (b, length) int64, anywhere
        ids = ids.to(self.device, non_blocking=True)
        if isinstance(self.model, CLIPTextModel):
            return Encoding(*self.model(ids))
        hidden = self.model(ids)
        return Encoding(hidden, hidden.new_empty(len(ids), 0))


@register
class AbsentEncoder(nn.Module):
    """Stands where an encoder is left out: zeros, as if it were always dropped (App. B.3).

    Args:
        width: of the hidden states of the encoder left out.
        pooled_width: of its pooled vector; 0 for T5.
        length: of its rows of ids.
    """

    def __init__(self, *, width: int, pooled_width: int = 0, length: int) -> None:
        super().__init__()
        at_least_one("AbsentEncoder", width=width, length=length)
        if length > LONGEST_PROMPT:
            raise UserError(f"AbsentEncoder: length {length} must be at most {LONGEST_PROMPT}")
        self.width, self.pooled_width, self.length = width, pooled_width, length
        self.place: Tensor
        # Holds nothing, but follows the module to its device and dtype.
        self.register_buffer("place", torch.empty(0), persistent=False)

    @classmethod
    def instead_of(cls, encoder: "TextEncoder | AbsentEncoder") -> Self:
        """One of the same widths, length and device."""
        width, pooled_width = encoder.width, encoder.pooled_width
        absent = cls(width=width, pooled_width=pooled_width, length=encoder.length)
        return absent.to(encoder.device)

    @property
    def device(self) -> torch.device:
        return self.place.device

    def tokenize(self, prompts: Sequence[str]) -> Tensor:  # -> (b, length) int64, all zeros
        return torch.zeros(len(prompts), self.length, dtype=torch.int64)

    def forward(self, ids: Tensor) -> Encoding:  # (b, length) int64
        hidden = self.place.new_zeros(*ids.shape, self.width)
        return Encoding(hidden, self.place.new_zeros(len(ids), self.pooled_width))


@register
class TextConditioner(nn.Module):
    """CLIP-L, CLIP-G and T5 side by side.

    c_vec is the two pooled CLIP vectors, concatenated. c_ctxt is the sequence of the two CLIPs'
    hidden states, concatenated channel-wise and zero-padded to T5's width, followed by T5's.
    An encoder that is dropped contributes zeros, and so does an absent one.

    Encoders may differ in dtype and device. The condition has one dtype, the widest among them
    (float32 for CLIP in float32 beside T5 in bfloat16), which rounds nobody's values. It lies on
    the device of `clip_l`; the network brings it to its own device and dtype.

    Args:
        clip_l, clip_g, t5: the encoders.
        dropout: probability with which training drops each encoder, independently (App. B.3).
        empty_prompt: how `encode` reads an empty prompt: 'zeros', as if all encoders were dropped
            (the paper's training), or 'encoded' like any other (the public weights' guidance).

    Raises:
        UserError: the encoders do not fit each other or their places, or an impossible argument.
    """

    def __init__(
        self,
        *,
        clip_l: TextEncoder | AbsentEncoder,
        clip_g: TextEncoder | AbsentEncoder,
        t5: TextEncoder | AbsentEncoder,
        dropout: float = 0.464,
        empty_prompt: str = "zeros",
    ) -> None:
        super().__init__()
        number("text dropout", dropout, 0, 1)
        one_of("empty_prompt", empty_prompt, EMPTY_PROMPTS)
        if not (clip_l.pooled_width and clip_g.pooled_width) or t5.pooled_width:
            raise UserError(
                "text.clip_l and text.clip_g must hold a CLIPTextModel, which has a pooled vector, "
                "t5 a T5Encoder, which has none; their pooled_width are "
                f"{clip_l.pooled_width}, {clip_g.pooled_width}, {t5.pooled_width}"
            )
        if clip_l.length != clip_g.length:
            raise UserError(
                f"length {clip_l.length} of text.clip_l and {clip_g.length} of text.clip_g must be "
                "the same: their states lie side by side"
            )
        if clip_l.width + clip_g.width > t5.width:
            raise UserError(
                f"CLIP widths {clip_l.width} + {clip_g.width} must not exceed the width of T5, "
                f"{t5.width}"
            )
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.dropout, self.empty_prompt = dropout, empty_prompt
        self.context_width = t5.width
        self.pooled_width = clip_l.pooled_width + clip_g.pooled_width
        self.context_length = clip_l.length + t5.length  # the CLIPs lie side by side

    @property
    def encoders(self) -> tuple[TextEncoder | AbsentEncoder, ...]:
        """CLIP-L, CLIP-G, T5."""
        return self.clip_l, self.clip_g, self.t5

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """Ids of the prompts for each encoder, on the CPU: a loader's worker can make them."""
        return TokenIds(*(encoder.tokenize(prompts) for encoder in self.encoders))

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """What the reader of these prompts should know: words not understood, text cut off."""
        remarks = []
        for prompt in dict.fromkeys(prompts):
            if unknown := self._unknown(prompt):
                words = _shown(unknown) + (", ..." if len(unknown) > 8 else "")
                remarks.append(f"this model does not know {len(unknown)} of the words: {words}")
            if cuts := self._cuts(prompt):
                read = "; ".join(
                    f"{name} reads {length} tokens, not its last {excess}"
                    for name, length, excess in cuts
                )
                remarks.append(f"a prompt of {len(prompt)} characters is cut: {read}")
        return remarks

    def remarks_on_captions(self, captions: Sequence[str]) -> list[str]:
        """What to know before training on captions like these: what of them is not understood."""
        unknown = [words for caption in captions if (words := self._unknown(caption))]
        cut = [cuts for caption in captions if (cuts := self._cuts(caption))]
        remarks = []
        if unknown:
            counts = Counter(word for words in unknown for word in words)
            often = _shown([word for word, _ in counts.most_common(8)])
            remarks.append(
                f"{len(unknown)} of {len(captions)} captions have words that the text encoders do "
                f"not know, and cannot tell apart: {often}. The toy's know the words of "
                "data=shapes; text=published reads any"
            )
        if cut:
            lengths = {name: length for cuts in cut for name, length, _ in cuts}
            read = ", ".join(f"{name} reads {length} tokens" for name, length in lengths.items())
            remarks.append(
                f"{len(cut)} of {len(captions)} captions are cut, being too long: {read}"
            )
        return remarks

    @property
    def _tokenizers(self) -> list[PromptTokenizer]:
        return [encoder.tokenizer for encoder in self.encoders if isinstance(encoder, TextEncoder)]

    def _unknown(self, prompt: str) -> list[str]:
        """Words of a prompt that no encoder knows."""
        first, *others = [t.unknown_words(prompt) for t in self._tokenizers] or [[]]
        in_all = set(first).intersection(*others)
        return [word for word in first if word in in_all]

    def _cuts(self, prompt: str) -> list[tuple[str, int, int]]:
        """Encoders that read less than all: name, tokens that it reads, tokens that are left."""
        return [
            (name, encoder.length, excess)
            for name, encoder in zip(NAMES.values(), self.encoders, strict=True)
            if isinstance(encoder, TextEncoder) and (excess := encoder.tokenizer.excess(prompt))
        ]

    def draw_kept(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Which encoders each training sample keeps: bool (b, 3)."""
        draws = torch.stack([torch.rand(3, generator=generator) for generator in generators])
        return draws >= self.dropout

    @property
    def frozen(self) -> bool:
        """Whether nothing in it is trained, so that its words for a prompt never change."""
        return not any(weight.requires_grad for weight in self.parameters())

    def forward(self, ids: TokenIds, kept: Tensor | None = None) -> Condition:
        """Token ids to the condition; `kept` (b, 3) says which encoders speak, all when None."""
        return self.join(self.encodings(ids), kept)

    def encodings(self, ids: TokenIds) -> Encodings:
        """What each encoder says, on its own device."""
        both = zip(self.encoders, ids, strict=True)
        return Encodings(*(encoder(own_ids) for encoder, own_ids in both))

    def join(self, encodings: Encodings, kept: Tensor | None = None) -> Condition:
        """The condition that the encoders' words make; `kept` as in `forward`."""
        device = self.clip_l.device
        hidden, pooled = [], []
        for i, encoding in enumerate(encodings):
            states, vector = (part.to(device, non_blocking=True) for part in encoding)
            if kept is not None:
                # Filled rather than multiplied: zero times an overflow would not be zero.
                drop = ~kept[:, i].to(device)
                states = states.masked_fill(drop[:, None, None], 0)
                vector = vector.masked_fill(drop[:, None], 0)
            hidden.append(states)
            pooled.append(vector)
        clip = torch.cat(hidden[:2], dim=-1)
        clip = F.pad(clip, (0, self.context_width - clip.shape[-1]))
        # Concatenation promotes to the widest dtype; T5's empty vector gives c_vec a say in T5's.
        return Condition(torch.cat(pooled, dim=-1), torch.cat([clip, hidden[2]], dim=1))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Condition of each prompt; `empty_prompt` says what an empty one means.

        Raises:
            NotFinite: an encoder gives NaN or infinite values; the message names it.
        """
        ids, kept = self.tokenize(prompts), None
        if self.empty_prompt == "zeros":
            spoken = torch.tensor([bool(prompt.strip()) for prompt in prompts])
            kept = spoken[:, None].expand(-1, 3)
        condition: Condition = self(ids, kept)
        expect_finite_encodings(self.split(condition))
        return condition

    def split(self, condition: Condition) -> Encodings:
        """What each encoder says in a condition: inverts `join`."""
        narrow, wide, n = self.clip_l, self.clip_g, self.clip_l.length
        clip, t5 = condition.c_ctxt[:, :n], condition.c_ctxt[:, n:]
        pooled = condition.c_vec.split([narrow.pooled_width, wide.pooled_width], dim=-1)
        return Encodings(
            Encoding(clip[..., : narrow.width], pooled[0]),
            Encoding(clip[..., narrow.width : narrow.width + wide.width], pooled[1]),
            Encoding(t5, condition.c_vec[:, :0]),
        )


def expect_finite_encodings(encodings: Encodings) -> None:
    """Raise NotFinite, naming the encoder, if a value is NaN or infinite."""
    for name, encoding in zip(NAMES.values(), encodings, strict=True):
        for part in encoding:
            expect_finite(f"the text encoder {name}", part)


def _shown(words: Sequence[str]) -> str:
    """The first eight words, of those that are long their beginnings."""
    return ", ".join(f"{word[:40]}..." if len(word) > 43 else word for word in words[:8])
