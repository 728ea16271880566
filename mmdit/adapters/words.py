"""Textual inversion: new words with trained embeddings, in all text encoders (Gal et al. 2022).

A word stands for one or more token embeddings of its own. Their ids are negative, -1, -2, ..., so
that the end token of CLIP keeps the highest id, at which its pooled vector is read.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from mmdit.adapters.targets import PARTS
from mmdit.checkpoints.archive import Archive, write_archive
from mmdit.checks import expect, listed, mapping, text, whole_number
from mmdit.dtypes import wide
from mmdit.errors import UserError
from mmdit.registry import register
from mmdit.text.conditioning import TextConditioner, TextEncoder
from mmdit.text.tokenizers import PromptTokenizer
from mmdit.text.waiting import WaitingEncoder

LONGEST_WORD = 100  # characters
EMBEDDING = "token_embedding"  # the layer of a text encoder
FIRST = 0xE000  # characters without a meaning, which stand for new tokens while a prompt is split


@register
class NewWords(nn.Module):
    """Embeddings of new words for one text encoder.

    Args:
        words: how many token embeddings each word has.
        width: of an embedding.

    Raises:
        UserError: a word is empty, has a space or is there twice, or a number is not positive.
    """

    def __init__(self, *, words: Mapping[str, int], width: int) -> None:
        super().__init__()
        mapping("words", words)
        for word, vectors in words.items():
            check_word(word)
            whole_number(f"vectors of {word!r}", vectors, most=64)
        if len({word.casefold() for word in words}) < len(words):
            raise UserError(f"words={list(words)}: each may be there once, whatever its case")
        self.words, self.width = dict(words), width
        self.vectors = nn.Parameter(torch.zeros(sum(words.values()), width))


def check_word(word: str) -> None:
    """Raise UserError unless a text can be recognized as one word of a prompt."""
    text("word", word)
    if len(word) > LONGEST_WORD or not re.fullmatch(r"\S+", word):
        raise UserError(
            f"word={word[:LONGEST_WORD]!r} must be one word of up to {LONGEST_WORD} characters, "
            "without spaces"
        )


class AdaptedEmbedding(nn.Module):
    """Token embeddings with those of new words beside them, for ids below zero.

    Args:
        embedding: the one that it takes the place of; its weight keeps its key.

    Attributes:
        changes: the new words, by the name of their adapter.
        scales: 1 for each; words are not scaled.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding_dim = embedding.embedding_dim
        self.weight = embedding.weight
        self.changes = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:  # (b, n) int64 -> (b, n, d)
        known = F.embedding(ids.clamp(min=0), self.weight)
        table = torch.cat([new.vectors for new in self.changes.values()])  # type: ignore[misc]
        new = F.embedding((-1 - ids).clamp(min=0), table.to(known.dtype))
        return torch.where((ids < 0)[..., None], new, known)

    @property
    def words(self) -> dict[str, int]:
        """The words of all adapters, in the order of their ids."""
        found: dict[str, int] = {}
        for new in self.changes.values():
            assert isinstance(new, NewWords)
            found |= new.words
        return found

    def without(self) -> nn.Embedding:
        """The embedding that this one took the place of."""
        with torch.device("meta"):
            embedding = nn.Embedding(*self.weight.shape)
        embedding.weight = self.weight
        return embedding.train(self.training)


class ExtendedTokenizer(PromptTokenizer):
    """A tokenizer that knows new words, whatever their case.

    Args:
        own: the tokenizer of the model.
        words: how many tokens each word has; their ids are -1, -2, ...
    """

    def __init__(self, own: PromptTokenizer, words: Mapping[str, int]) -> None:
        self.own, self.words = own, dict(words)
        self.length, self.vocabulary_size = own.length, own.vocabulary_size
        self._tokenizer = Tokenizer.from_str(own._tokenizer.to_str())
        numbers = count(FIRST)
        places = {word: "".join(chr(next(numbers)) for _ in range(n)) for word, n in words.items()}
        characters = "".join(places.values())
        self._tokenizer.add_tokens([AddedToken(c, normalized=False) for c in characters])
        added = [self._tokenizer.token_to_id(c) for c in characters]
        assert added[0] is not None
        self._first = added[0]  # the others follow it
        self._removed = dict.fromkeys(map(ord, characters))  # they mean nothing in a prompt itself
        # One group for each word, the longest first.
        in_order = sorted(places, key=len, reverse=True)
        groups = "|".join(f"({re.escape(word)})" for word in in_order)
        self._pattern = re.compile(rf"(?<!\w)(?:{groups})(?!\w)", re.IGNORECASE)
        self._places = [places[word] for word in in_order]

    def identity(self) -> str:
        return hashlib.sha256(f"{self.own.identity()} {self.words}".encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        ids = super().__call__([self._marked(text) for text in texts])
        return torch.where(ids < self._first, ids, self._first - 1 - ids)

    def excess(self, text: str) -> int:
        return super().excess(self._marked(text))

    def unknown_words(self, text: str) -> list[str]:
        return self.own.unknown_words(self._pattern.sub(" ", text))

    def _marked(self, text: str) -> str:
        """A prompt with the characters that stand for the tokens of its new words."""
        text = text.translate(self._removed)
        return self._pattern.sub(lambda match: self._places[(match.lastindex or 1) - 1], text)


def read_new_words(root: nn.Module) -> None:
    """Let the tokenizers of a pipeline's encoders read the words whose embeddings are there."""
    for encoder in root.modules():
        if isinstance(encoder, TextEncoder) and not isinstance(encoder, WaitingEncoder):
            embedding, tokenizer = encoder.model.token_embedding, encoder.tokenizer
            own = tokenizer.own if isinstance(tokenizer, ExtendedTokenizer) else tokenizer
            words = embedding.words if isinstance(embedding, AdaptedEmbedding) else {}
            encoder.tokenizer = ExtendedTokenizer(own, words) if words else own


@torch.no_grad()
def new_words(
    encoder: TextEncoder,
    words: Sequence[str],
    *,
    vectors: int | None = None,
    start: str | None = None,
) -> NewWords:
    """New words for one encoder, which begin as a text that the encoder can read.

    Args:
        vectors: number of embeddings of each; None is one for each token of `start`.
        start: the text, whose tokens' embeddings are repeated in turn; None is each word as the
            encoder reads it now, so that the outputs of prompts in which it stands between spaces
            are those of before.

    Raises:
        UserError: the text is empty, or a word is there twice.
    """
    ids: dict[str, list[int]] = {}
    for word in words:
        check_word(word)
        own = ids_of(encoder.tokenizer, word if start is None else start)
        number = len(own) if vectors is None else whole_number("vectors", vectors, most=64)
        if word in ids:
            raise UserError(f"words={list(words)}: each may be there once, whatever its case")
        ids[word] = [own[i % len(own)] for i in range(number)]
    new = NewWords(words={word: len(own) for word, own in ids.items()}, width=encoder.width)
    chosen = torch.tensor([i for own in ids.values() for i in own], device=encoder.device)
    new.to(encoder.device).vectors.copy_(encoder.model.token_embedding(chosen))
    return new


@torch.no_grad()
def start_words(conditioner: TextConditioner, starts: Mapping[str, Sequence[str]]) -> None:
    """Let words of the encoders' vocabularies begin as the mean of others, for what is new to them.

    The embedding of a word that training has never seen is random: "star" then means nothing, not
    even a shape.

    Args:
        conditioner: its token embeddings are changed.
        starts: by word, those whose embeddings are averaged: {"star": ["circle", "square"]}.

    Raises:
        UserError: a word is not one token of an encoder.

    Example:
        start_words(pipe.text, {"star": ["circle", "square"], "stars": ["circles", "squares"]})
    """
    mapping("start_words", starts)
    changes: list[tuple[Tensor, dict[int, Tensor]]] = []
    for encoder in conditioner.encoders:
        if not isinstance(encoder, TextEncoder):
            continue
        weight, new = encoder.model.token_embedding.weight, {}
        for word, others in starts.items():
            key = f"start_words[{word!r}]"
            listed(key, others)
            expect(len(others) > 0, key, list(others), "must name words")
            known = torch.stack([weight[token_of(encoder.tokenizer, other)] for other in others])
            new[token_of(encoder.tokenizer, word)] = known.mean(0)
        changes.append((weight, new))
    for weight, new in changes:
        for token, embedding in new.items():
            weight[token] = embedding


def token_of(tokenizer: PromptTokenizer, word: str) -> int:
    """The only token of a word.

    Raises:
        UserError: it is unknown, or has several, which are those of other words, too.
    """
    text("start_words", word)
    expect(bool(word.strip()), "start_words", word, "must name words")
    if tokenizer.unknown_words(word):
        raise UserError(f"start_words: the text encoders do not know the word {word!r}")
    ids = ids_of(tokenizer, word)
    if len(ids) > 1:
        raise UserError(
            f"start_words: {word!r} has {len(ids)} tokens, which other words have, too; "
            "adapter=textual_inversion teaches such words"
        )
    return ids[0]


def ids_of(tokenizer: PromptTokenizer, start: str) -> list[int]:
    """The ids of a text, without those that a tokenizer adds to it.

    Raises:
        UserError: it has none.
    """
    encoded = tokenizer._tokenizer.encode(start)
    pairs = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
    if found := [i for i, special in pairs if not special]:
        return found
    raise UserError(f"start={start!r} has no tokens")


# Files: one tensor (vectors, width) for each encoder. The word is in the header or the file's name.
FILES = {
    "comfyui": {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"},
    "diffusers": {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5"},
}
WORD = "mmdit.word"  # metadata key


def embedding_of(part: str) -> str:
    """The name in a pipeline of the token embeddings of a text encoder."""
    return f"{PARTS[part]}.{EMBEDDING}"


def is_inversion(archive: Archive) -> bool:
    """Whether a file holds a new word: tensors named by text encoders, and nothing else."""
    keys = {key for names in FILES.values() for key in names.values()}
    return bool(archive.infos) and keys.issuperset(archive.infos)


def words_in(archive: Archive) -> dict[str, NewWords]:
    """The new word of a file, by the layers of a pipeline.

    Raises:
        UserError: a tensor is not a table of finite numbers.
    """
    parts = {key: part for names in FILES.values() for part, key in names.items()}
    word = archive.metadata.get(WORD) or Path(archive.name).stem
    changes = {}
    for key, info in archive.infos.items():
        if not info.dtype.startswith(("F", "BF")) or not 1 <= len(info.shape) <= 2:
            raise UserError(
                f"{archive.name}: {key} is {info.dtype} of shape {list(info.shape)}, not a table "
                "of embeddings (vectors, width). Nothing was loaded"
            )
        table = wide(archive[key]).reshape(-1, info.shape[-1])
        if not table.isfinite().all():
            raise UserError(f"{archive.name}: {key} has NaN or infinite values")
        try:
            new = NewWords(words={word: len(table)}, width=table.shape[1])
        except UserError as error:
            raise UserError(f"{archive.name}: {error}") from None
        new.vectors.data = table
        changes[embedding_of(parts[key])] = new
    if len(changes) < len(archive.infos):
        raise UserError(f"{archive.name}: t5 and t5xxl are the same encoder")
    return changes


def write_words(words: Mapping[str, NewWords], path: Path, dialect: str) -> None:
    """Write a new word, by the layers of a pipeline, as another program reads it.

    Raises:
        UserError: there are several words, or the dialect has no such file.
    """
    names = sorted({word for new in words.values() for word in new.words})
    if len(names) > 1:
        raise UserError(f"a file holds one word, but this adapter has {', '.join(names)}")
    if dialect not in FILES:
        raise UserError(
            f"dialect={dialect} has no file for a new word: choose {' or '.join(FILES)}"
        )
    parts = {embedding_of(part): key for part, key in FILES[dialect].items()}
    tensors = {parts[at]: new.vectors.detach().cpu() for at, new in words.items()}
    write_archive(path, tensors, {WORD: names[0]})
