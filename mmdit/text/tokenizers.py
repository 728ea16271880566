"""Text to token ids, with one interface: `tokenizer(texts) -> (b, length) int64`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from mmdit.bounds import LONGEST_PROMPT, MOST_WORDS
from mmdit.errors import UserError
from mmdit.registry import register

UNKNOWN = "[UNK]"


class PromptTokenizer(ABC):
    """Tokenizes prompts, truncated and padded to `length` ids, special tokens included.

    Args:
        tokenizer: adds special tokens, but neither truncates nor pads.
        pad: the padding token.
        length: number of ids per prompt, at least 3.

    Raises:
        UserError: the length leaves no room for a word, or exceeds the limit.
    """

    def __init__(self, tokenizer: Tokenizer, *, pad: str, length: int) -> None:
        if not 3 <= length <= LONGEST_PROMPT:
            raise UserError(f"tokenizer length {length} must be from 3 to {LONGEST_PROMPT}")
        self.length = length
        self.vocabulary_size: int = tokenizer.get_vocab_size()
        self._tokenizer = tokenizer
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)

    def __call__(self, texts: Sequence[str]) -> Tensor:  # -> (b, length) int64
        encoded = self._tokenizer.encode_batch(list(texts))
        return torch.tensor([item.ids for item in encoded], dtype=torch.int64)

    def identity(self) -> str:
        """SHA-256 of everything that determines ids: vocabulary, rules, length and padding."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def excess(self, text: str) -> int:
        """Number of tokens by which `text` exceeds `length`; these are dropped."""
        overflowing = self._tokenizer.encode(text).overflowing
        # Each overflowing part has start, end and padding of its own, which do not count.
        return sum(part.special_tokens_mask.count(0) for part in overflowing)

    @abstractmethod
    def unknown_words(self, text: str) -> list[str]:
        """Words of `text` that the vocabulary does not represent, in order, each once."""


class WordTokenizer(PromptTokenizer):
    """Word-level tokenizer with a closed vocabulary, for the toy encoders.

    Text is lowercased, punctuation is split off, and words outside the vocabulary become [UNK].
    """

    def __init__(self, *, vocabulary: Sequence[str], template: str, pad: str, length: int) -> None:
        if len(vocabulary) > MOST_WORDS:
            raise UserError(
                f"a vocabulary of {len(vocabulary):,} words is too large: the limit is "
                f"{MOST_WORDS:,}"
            )
        ids = {token: i for i, token in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [(token, ids[token]) for token in template.split() if token in ids]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
        super().__init__(tokenizer, pad=pad, length=length)

    def unknown_words(self, text: str) -> list[str]:
        folded = self._tokenizer.normalizer.normalize_str(text)
        words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(folded)]
        known = self._tokenizer.get_vocab()
        return list(dict.fromkeys(word for word in words if word not in known))


@register
class CLIPWordTokenizer(WordTokenizer):
    """Word-level tokenizer with CLIP's layout: start, words, end; the end token has the highest id.

    Args:
        words: the vocabulary.
        length: number of ids per prompt, special tokens and padding included.
        pad_with_end: pad with the end token (CLIP-L) or with id 0 (CLIP-G).
    """

    def __init__(self, *, words: Sequence[str], length: int, pad_with_end: bool) -> None:
        super().__init__(
            vocabulary=["[PAD]", UNKNOWN, *words, "[START]", "[END]"],
            template="[START] $A [END]",
            pad="[END]" if pad_with_end else "[PAD]",
            length=length,
        )


@register
class T5WordTokenizer(WordTokenizer):
    """Word-level tokenizer with T5's layout: words, end; padding is 0, end 1, unknown 2.

    Args:
        words: the vocabulary.
        length: number of ids per prompt, end token and padding included.
    """

    def __init__(self, *, words: Sequence[str], length: int) -> None:
        super().__init__(
            vocabulary=["[PAD]", "[END]", UNKNOWN, *words],
            template="$A [END]",
            pad="[PAD]",
            length=length,
        )
