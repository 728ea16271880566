"""Prompts of every kind, and vocabularies learned from them."""

import io
import itertools
from collections import Counter
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from mmdit.text.clip_tokenizer import clip_tokenizer_in
from tests import references
from tests.conftest import write_clip_files


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Many scripts, signs, emoji, odd spaces and accents, names of special tokens."""
    table = references.table("token_ids")
    rows = [*table["reference"], *table["both"]["cases"]]
    return list(dict.fromkeys(row["prompt"] for row in rows))


@pytest.fixture(scope="session")
def learned_clip_files(tmp_path_factory, clip_files, prompts) -> Path:
    """A folder with vocab.json and merges.txt: 300 merges, the most frequent pair first."""
    backend = clip_tokenizer_in(clip_files, pad_with_end=True)._tokenizer
    words: Counter[tuple[str, ...]] = Counter()
    for prompt in prompts:
        text = backend.normalizer.normalize_str(prompt)
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            words[(*word[:-1], f"{word[-1]}</w>")] += 1
    merges = []
    for _ in range(300):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(" ".join(best))
        words = Counter({_merged(word, best): count for word, count in words.items()})
    return write_clip_files(tmp_path_factory.mktemp("learned_clip"), merges)


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    symbols: list[str] = []
    for symbol in word:
        if symbols and (symbols[-1], symbol) == pair:
            symbols[-1] += symbol
        else:
            symbols.append(symbol)
    return tuple(symbols)


@pytest.fixture(scope="session")
def learned_t5_files(tmp_path_factory, prompts) -> Path:
    """A folder with spiece.model of a few hundred pieces."""
    folder = tmp_path_factory.mktemp("learned_t5")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(prompts * 3),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=0.99,  # some stay unknown, as with the published vocabulary
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder
