"""Prompts to conditions: three encoders make c_vec and c_ctxt (App. B.2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.flow.guidance import Condition
from mmdit.models.clip import CLIPTextModel
from mmdit.models.t5 import T5Encoder
from mmdit.registry import register
from mmdit.text.tokenizers import WordTokenizer


class TokenIds(NamedTuple):
    """A batch of prompts as each encoder reads them, each (b, length) int64."""

    clip_l: Tensor
    clip_g: Tensor
    t5: Tensor


@register
class TextEncoder(nn.Module):
    """A tokenizer and the network that reads its ids.

    Raises:
        ValueError: the network's vocabulary is smaller than the tokenizer's.
    """

    def __init__(self, *, tokenizer: WordTokenizer, model: CLIPTextModel | T5Encoder) -> None:
        super().__init__()
        size = model.token_embedding.num_embeddings
        if tokenizer.vocabulary_size > size:
            raise ValueError(
                f"vocabulary_size {size} of {type(model).__name__} must be at least "
                f"{tokenizer.vocabulary_size}, the size of its tokenizer's vocabulary"
            )
        self.tokenizer, self.model = tokenizer, model


@register
class TextConditioner(nn.Module):
    """CLIP-L, CLIP-G and T5 side by side.

    c_vec is the two pooled CLIP vectors, concatenated. c_ctxt is the sequence of the two CLIPs'
    hidden states, concatenated channel-wise and zero-padded to T5's width, followed by T5's.
    An encoder that is dropped contributes zeros.

    Args:
        clip_l, clip_g, t5: the encoders.
        dropout: probability with which training drops each encoder, independently (Sec. B.3).
    """

    def __init__(
        self, *, clip_l: TextEncoder, clip_g: TextEncoder, t5: TextEncoder, dropout: float = 0.464
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"text dropout {dropout} must lie in [0, 1]")
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.dropout = dropout
        clips = [clip_l.model, clip_g.model]
        towers = [clip for clip in clips if isinstance(clip, CLIPTextModel)]
        if towers != clips or not isinstance(t5.model, T5Encoder):
            raise ValueError(
                "text.clip_l and text.clip_g must hold a CLIPTextModel, t5 a T5Encoder"
            )
        self.context_width = t5.model.width
        self.pooled_width = sum(clip.pooled_width for clip in towers)
        if sum(clip.width for clip in towers) > self.context_width:
            raise ValueError(
                f"CLIP widths {' + '.join(str(clip.width) for clip in towers)} must not exceed "
                f"the width of T5, {self.context_width}"
            )

    @property
    def encoders(self) -> tuple[TextEncoder, TextEncoder, TextEncoder]:
        """CLIP-L, CLIP-G, T5."""
        return self.clip_l, self.clip_g, self.t5

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """Ids of the prompts for each encoder, on the encoders' device."""
        device = next(self.parameters()).device
        return TokenIds(*(encoder.tokenizer(prompts).to(device) for encoder in self.encoders))

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """What the reader of these prompts should know: words not understood, text cut off."""
        remarks = []
        tokenizer = self.t5.tokenizer
        for prompt in dict.fromkeys(prompts):
            if unknown := tokenizer.unknown_words(prompt):
                words = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
                remarks.append(f"this model does not know {len(unknown)} of the words: {words}")
            shortest = min(self.encoders, key=lambda encoder: encoder.tokenizer.length).tokenizer
            if excess := shortest.excess(prompt):
                remarks.append(
                    f"a prompt of {len(prompt)} characters is cut: its last {excess} tokens exceed "
                    f"the {shortest.length} that the encoder reads"
                )
        return remarks

    def draw_kept(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Which encoders each training sample keeps: bool (b, 3)."""
        draws = torch.stack([torch.rand(3, generator=generator) for generator in generators])
        return draws >= self.dropout

    def forward(self, ids: TokenIds, kept: Tensor | None = None) -> Condition:
        """Token ids to the condition; `kept` (b, 3) says which encoders speak, all when None."""
        clip_l = self.clip_l.model(ids.clip_l)
        clip_g = self.clip_g.model(ids.clip_g)
        t5 = self.t5.model(ids.t5)
        (hidden_l, pooled_l), (hidden_g, pooled_g) = clip_l, clip_g
        if kept is not None:
            # Filled rather than multiplied: zero times an overflow would not be zero.
            drop_l, drop_g, drop_t5 = (~kept).unbind(dim=1)
            pooled_l = pooled_l.masked_fill(drop_l[:, None], 0)
            pooled_g = pooled_g.masked_fill(drop_g[:, None], 0)
            hidden_l = hidden_l.masked_fill(drop_l[:, None, None], 0)
            hidden_g = hidden_g.masked_fill(drop_g[:, None, None], 0)
            t5 = t5.masked_fill(drop_t5[:, None, None], 0)
        clip = torch.cat([hidden_l, hidden_g], dim=-1)
        clip = F.pad(clip, (0, self.context_width - clip.shape[-1]))
        return Condition(
            torch.cat([pooled_l, pooled_g], dim=-1), torch.cat([clip, t5.to(clip.dtype)], dim=1)
        )

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Condition of each prompt; an empty one is unconditional, all zeros as in training."""
        ids = self.tokenize(prompts)
        spoken = torch.tensor([bool(p.strip()) for p in prompts], device=ids.t5.device)
        return self(ids, spoken[:, None].expand(-1, 3))
