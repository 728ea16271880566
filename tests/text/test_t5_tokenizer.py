import pickle

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from mmdit.errors import UserError
from mmdit.registry import build, describe
from mmdit.text.t5_tokenizer import ORIGIN, T5Tokenizer, t5_tokenizer_in
from mmdit.text.vocabularies import VocabularyFile

PROMPTS = ["", "a red cat", "A red\n  CAT, 42", "two ﬁne cats 日本", "cat " * 20]


@pytest.fixture
def t5(t5_files) -> T5Tokenizer:
    return t5_tokenizer_in(t5_files, length=12)


def test_layout_is_that_of_sentencepiece_then_end_then_padding(t5, t5_files):
    peer = SentencePieceProcessor(model_file=str(t5_files / "spiece.model"))
    pieces = peer.encode("a red cat")
    assert len(pieces) > 2
    assert t5(["a red cat"]).tolist() == [[*pieces, 1, *[0] * (11 - len(pieces))]]
    assert t5([""]).tolist() == [[1, *[0] * 11]]
    assert t5.vocabulary_size == peer.get_piece_size() + 100


def test_a_long_prompt_keeps_the_end_token_and_tells_its_excess(t5, t5_files):
    peer = SentencePieceProcessor(model_file=str(t5_files / "spiece.model"))
    prompt = "red cat " * 10
    (row,) = t5([prompt])
    assert row.tolist() == [*peer.encode(prompt)[:11], 1]
    assert t5.excess(prompt) == len(peer.encode(prompt)) - 11
    assert t5.excess("cat") == 0


def test_words_with_unknown_characters_are_told_once(t5):
    assert t5.unknown_words("a red 日本 cat 🐶 日本") == ["日本", "🐶"]


def test_it_is_described_by_its_path_and_survives_pickling(t5):
    for other in (build(describe(t5)), pickle.loads(pickle.dumps(t5))):
        assert torch.equal(other(PROMPTS), t5(PROMPTS))


@pytest.mark.parametrize("kept", ["spiece.model", "tokenizer.json"])
def test_a_saved_folder_opens_here_and_in_transformers_with_either_file(t5, tmp_path, kept):
    transformers = pytest.importorskip("transformers")
    t5.save(tmp_path)
    for name in {"spiece.model", "tokenizer.json"} - {kept}:
        (tmp_path / name).unlink()
    again = t5_tokenizer_in(tmp_path, length=12)
    peer = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    theirs = peer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(again(PROMPTS), t5(PROMPTS))
    assert torch.equal(theirs.input_ids, t5(PROMPTS))


def test_a_folder_saved_by_transformers_opens_here(t5, tmp_path):
    transformers = pytest.importorskip("transformers")
    t5.save(tmp_path / "ours")
    peer = transformers.T5TokenizerFast.from_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    assert torch.equal(t5_tokenizer_in(tmp_path / "theirs", length=12)(PROMPTS), t5(PROMPTS))


# Files of no use


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(UserError, match=r"spiece.model and tokenizer.json .* google/t5-v1_1-xxl"):
        t5_tokenizer_in(tmp_path, length=77)
    with pytest.raises(UserError, match=r"none.model cannot be read .* google/t5-v1_1-xxl"):
        T5Tokenizer(model=VocabularyFile.read(tmp_path / "none.model", ORIGIN), length=77)


CHARACTERS = '"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}'


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("spiece.model", b"", "it is empty"),
        ("spiece.model", b"<html>", "a web page was saved in its place"),
        ("spiece.model", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("spiece.model", b"c a\nca t</w>\n", "not a sentencepiece model"),
        ("tokenizer.json", b'{"model": ', "not complete JSON"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}', "not a T5 tokenizer.json"),
        (
            "tokenizer.json",
            f'{{"model": {{"vocab": [["a", 0]]}}, {CHARACTERS}}}'.encode(),
            "first three pieces are not <pad>, </s>, <unk>",
        ),
        (
            "tokenizer.json",
            f'{{"model": {{"vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0]]}}, {CHARACTERS}}}'
            "".encode(),
            "charsmap",
        ),
    ],
)
def test_a_file_of_no_use_is_named(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        T5Tokenizer(model=VocabularyFile.read(path, ORIGIN), length=77)
    for part in (str(path), fault, "google/t5-v1_1-xxl"):
        assert part in str(error.value)


def test_a_model_that_was_cut_off_is_refused_wherever_the_cut_is(t5_files, tmp_path):
    whole = (t5_files / "spiece.model").read_bytes()
    path = tmp_path / "spiece.model"
    for size in range(1, len(whole) * 99 // 100, len(whole) // 50):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"probably its download was incomplete"):
            T5Tokenizer(model=VocabularyFile.read(path, ORIGIN), length=77)


# Many prompts, with a vocabulary learned from them


def test_transformers_gives_the_same_ids(learned_t5_files, prompts, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = t5_tokenizer_in(learned_t5_files, length=256)
    tokenizer.save(tmp_path)
    peer = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    theirs = peer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids, tokenizer(prompts))
    assert len(tokenizer(prompts).unique()) > 200 and (tokenizer(prompts) == 2).any()


def test_sentencepiece_gives_ordinary_prompts_the_same_ids(learned_t5_files, prompts):
    """Stacked accents and special tokens come out differently; aaaa splits in many ways."""
    tokenizer = t5_tokenizer_in(learned_t5_files, length=256)
    peer = SentencePieceProcessor(model_file=str(learned_t5_files / "spiece.model"))
    ordinary = [p for p in prompts if p.isascii() and "<" not in p and len(set(p)) > 1]
    assert len(ordinary) > 40
    for prompt in ordinary:
        (row,) = tokenizer([prompt]).tolist()
        pieces = peer.encode(prompt)[:255]
        assert row == [*pieces, 1, *[0] * (255 - len(pieces))], prompt
