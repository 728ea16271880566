"""From prompts to conditions: three text encoders give c_vec and c_ctxt (App. B.2)."""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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

NAMES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}  # for messages
ENCODERS = tuple(NAMES)  # in the order of a conditioner's `encoders`
EMPTY_PROMPTS = ("zeros", "encoded")


class TokenIds(NamedTuple):
    """Token ids of a batch of prompts for each encoder, each (b, length) int64."""

    clip_l: Tensor
    clip_g: Tensor
    t5: Tensor


class Encoding(NamedTuple):
    """Output of one encoder for a batch of prompts."""

    hidden: Tensor  # (b, length, d)
    pooled: Tensor  # (b, p); T5 has no pooled output: p = 0


class Encodings(NamedTuple):
    """Outputs of all encoders for a batch of prompts."""

    clip_l: Encoding
    clip_g: Encoding
    t5: Encoding


@register
class TextEncoder(nn.Module):
    """A tokenizer and the network that encodes its ids.

    Args:
        tokenizer: prompts to ids.
        model: ids to hidden states and, for CLIP, a pooled vector.

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

    def opened(self) -> AbstractContextManager[None]:
        """A block in which `model` is there; a `WaitingEncoder` opens it for the block."""
        return nullcontext()

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
    """Replaces an encoder that is left out: outputs zeros, as if always dropped (App. B.3).

    Args:
        width: channels of the omitted encoder's hidden states.
        pooled_width: channels of its pooled vector; 0 for T5.
        length: number of ids per prompt.

    Raises:
        UserError: a width or length is not positive, or the length is out of range.
    """

    def __init__(self, *, width: int, pooled_width: int = 0, length: int) -> None:
        super().__init__()
        at_least_one("AbsentEncoder", width=width, length=length)
        if length > LONGEST_PROMPT:
            raise UserError(f"AbsentEncoder: length {length} must be at most {LONGEST_PROMPT}")
        self.width, self.pooled_width, self.length = width, pooled_width, length
        self.place: Tensor
        # Empty, but moves with the module and so records its device and dtype.
        self.register_buffer("place", torch.empty(0), persistent=False)

    @classmethod
    def instead_of(cls, encoder: "TextEncoder | AbsentEncoder") -> Self:
        """A replacement for `encoder`, with the same widths, length and device."""
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
    """The paper's text conditioning: CLIP-L, CLIP-G and T5 (App. B.2).

    c_vec is the concatenation of the two pooled CLIP vectors. c_ctxt is a sequence: the hidden
    states of the two CLIPs, concatenated channel-wise and zero-padded to T5's width, then T5's.
    A dropped encoder contributes zeros, and so does an absent one.

    Encoders may differ in dtype and device. The condition has the widest of their dtypes (float32
    for CLIP in float32 and T5 in bfloat16), so that no value is rounded. It is on the device of
    `clip_l`; the network moves it to its own device and dtype.

    Args:
        clip_l, clip_g, t5: the encoders.
        dropout: probability in [0, 1] with which training drops each encoder, independently
            (App. B.3).
        empty_prompt: how `encode` treats an empty prompt: 'zeros', as if all encoders were dropped
            (the paper's training), or 'encoded' like any other (the public weights' guidance).

    Raises:
        UserError: the encoders do not fit together or are exchanged, or an argument is out of
            range.
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
                "the same: their hidden states are concatenated channel-wise"
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
        self.context_length = clip_l.length + t5.length  # the CLIPs share their tokens

    @property
    def encoders(self) -> tuple[TextEncoder | AbsentEncoder, ...]:
        """CLIP-L, CLIP-G, T5."""
        return self.clip_l, self.clip_g, self.t5

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """Token ids of the prompts, on the CPU, so that a data loader's worker can compute them."""
        return TokenIds(*(encoder.tokenize(prompts) for encoder in self.encoders))

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Warnings about prompts: unknown words and truncated text."""
        remarks = []
        for prompt in dict.fromkeys(prompts):
            if unknown := self._unknown(prompt):
                words = _shown(unknown) + (", ..." if len(unknown) > 8 else "")
                remarks.append(f"words unknown to this model ({len(unknown)}): {words}")
            if cuts := self._cuts(prompt):
                read = "; ".join(
                    f"{name} reads {length} tokens and ignores the last {excess}"
                    for name, length, excess in cuts
                )
                remarks.append(f"a prompt of {len(prompt)} characters is truncated: {read}")
        return remarks

    def remarks_on_captions(self, captions: Sequence[str]) -> list[str]:
        """Warnings before training on such captions: unknown words and truncated text."""
        unknown = [words for caption in captions if (words := self._unknown(caption))]
        cut = [cuts for caption in captions if (cuts := self._cuts(caption))]
        remarks = []
        if unknown:
            counts = Counter(word for words in unknown for word in words)
            frequent = _shown([word for word, _ in counts.most_common(8)])
            remarks.append(
                f"{len(unknown)} of {len(captions)} captions contain words unknown to the "
                f"text encoders, which cannot tell them apart: {frequent}. The toy encoders know "
                "the words of data=shapes; text=published reads any word"
            )
        if cut:
            lengths = {name: length for cuts in cut for name, length, _ in cuts}
            read = ", ".join(f"{name} reads {length} tokens" for name, length in lengths.items())
            remarks.append(
                f"{len(cut)} of {len(captions)} captions are too long and truncated: {read}"
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
        """Encoders that truncate the prompt: name, tokens that it reads, tokens that it drops."""
        return [
            (name, encoder.length, excess)
            for name, encoder in zip(NAMES.values(), self.encoders, strict=True)
            if isinstance(encoder, TextEncoder) and (excess := encoder.tokenizer.excess(prompt))
        ]

    def draw_kept(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw which encoders each training sample keeps, with its generator: bool (b, 3)."""
        draws = torch.stack([torch.rand(3, generator=generator) for generator in generators])
        return draws >= self.dropout

    @property
    def frozen(self) -> bool:
        """Whether no weight is trained, so that a prompt always has the same encoding."""
        return not any(weight.requires_grad for weight in self.parameters())

    def forward(self, ids: TokenIds, kept: Tensor | None = None) -> Condition:
        """The condition for token ids.

        Args:
            ids: of `tokenize`.
            kept: bool (b, 3), the encoders that are not dropped; None keeps all.
        """
        return self.join(self.encodings(ids), kept)

    def encodings(self, ids: TokenIds) -> Encodings:
        """Each encoder's output, on the encoder's device."""
        pairs = zip(self.encoders, ids, strict=True)
        return Encodings(*(encoder(own_ids) for encoder, own_ids in pairs))

    def join(self, encodings: Encodings, kept: Tensor | None = None) -> Condition:
        """The condition made of the encoders' outputs; `kept` as in `forward`."""
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
        # Concatenation promotes to the widest dtype, in c_vec too: T5's empty vector takes part.
        return Condition(torch.cat(pooled, dim=-1), torch.cat([clip, hidden[2]], dim=1))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition for prompts, where `empty_prompt` decides about empty ones.

        Raises:
            NotFinite: an encoder outputs NaN or infinite values; the message names it.
        """
        ids, kept = self.tokenize(prompts), None
        if self.empty_prompt == "zeros":
            nonempty = torch.tensor([bool(prompt.strip()) for prompt in prompts])
            kept = nonempty[:, None].expand(-1, 3)
        condition: Condition = self(ids, kept)
        expect_finite_encodings(self.split(condition))
        return condition

    def split(self, condition: Condition) -> Encodings:
        """Each encoder's part of a condition: the inverse of `join`."""
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
    """The first eight words in quotes, long ones abbreviated."""
    return ", ".join(repr(f"{word[:40]}..." if len(word) > 43 else word) for word in words[:8])
