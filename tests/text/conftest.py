"""Tokenizer files: tiny ones in the published formats, and the real ones of ../shared."""

import io
import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import pre_tokenizers

MERGES = ["c a", "ca t</w>", "r e", "re d</w>", "' s</w>", "! !</w>"]
SENTENCES = ["a photo of a red cat", "two blue cats, one dog", "the dog's red ball!", "a cat reads"]


@pytest.fixture(scope="session")
def clip_files(tmp_path_factory) -> Path:
    """A folder with vocab.json and merges.txt: 520 tokens, of which 518 start and 519 end."""
    folder = tmp_path_factory.mktemp("clip")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # an exclamation mark comes first
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def t5_files(tmp_path_factory) -> Path:
    """A folder with spiece.model: pad 0, end 1, unknown 2, and 100 sentinels after the pieces."""
    folder = tmp_path_factory.mktemp("t5")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=model,
        vocab_size=50,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of the real vocabularies and of ids, or a skipped test where it is absent."""
    folder = Path(__file__).resolve().parents[3] / "shared"
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"no tokenizers in {folder}")
    return folder
