import json
import pickle
from pathlib import Path

import pytest
import torch

from mmdit.errors import UserError
from mmdit.registry import build, describe
from mmdit.text.clip_tokenizer import ORIGIN, CLIPTokenizer, clip_tokenizer_in
from mmdit.text.vocabularies import VocabularyFile

START, END = 518, 519
PROMPTS = ["", "a cat", "A CAT's  red\n cat", "naïve 日本 42", "cat " * 20]


@pytest.fixture
def clip(clip_files) -> CLIPTokenizer:
    return clip_tokenizer_in(clip_files, pad_with_end=True, length=12)


def test_layout(clip, clip_files):
    ids = json.loads((clip_files / "vocab.json").read_text(encoding="utf-8"))
    words = [ids["cat</w>"], ids["'s</w>"], ids["red</w>"], ids["4</w>"], ids["2</w>"]]
    row = [START, *words, END]
    assert clip(["cat's red 42"]).tolist() == [[*row, *[END] * 5]]
    with_zero = clip_tokenizer_in(clip_files, pad_with_end=False, length=12)
    assert with_zero(["cat's red 42"]).tolist() == [[*row, *[0] * 5]]
    assert clip.vocabulary_size == len(ids) == END + 1


def test_case_and_kind_of_space_and_composition_do_not_matter(clip):
    one, *others = clip(["a red café", " A\tReD \n CAFE\N{COMBINING ACUTE ACCENT} "])
    assert all(torch.equal(other, one) for other in others)


def test_a_long_prompt_keeps_start_and_end_and_tells_its_excess(clip):
    (row,) = clip(["cat " * 13])
    assert row[0] == START and row[-1] == END
    assert clip.excess("cat " * 13) == 3
    assert clip.excess("cat " * 10) == 0


def test_no_word_is_unknown(clip):
    assert clip.unknown_words("zebra 🦓 日本") == []


def test_the_end_token_can_be_written(clip):
    """As in the reference and in diffusers."""
    assert clip(["cat<|endoftext|>"])[0].tolist().count(END) == clip(["cat"])[0].tolist().count(END)
    assert clip(["cat<|endoftext|>cat"])[0, 2] == END


def test_it_is_described_by_its_paths_and_survives_pickling(clip):
    for other in (build(describe(clip)), pickle.loads(pickle.dumps(clip))):
        assert torch.equal(other(PROMPTS), clip(PROMPTS))


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_a_saved_folder_reads_back(clip_files, tmp_path, pad_with_end):
    tokenizer = clip_tokenizer_in(clip_files, pad_with_end=pad_with_end, length=12)
    tokenizer.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        original = (clip_files / name).read_text(encoding="utf-8")
        assert "".join(text.split()) == "".join(original.split())
    again = clip_tokenizer_in(tmp_path, pad_with_end=pad_with_end, length=12)
    assert torch.equal(again(PROMPTS), tokenizer(PROMPTS))


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_transformers_opens_a_saved_folder_and_we_open_theirs(clip_files, tmp_path, pad_with_end):
    transformers = pytest.importorskip("transformers")
    tokenizer = clip_tokenizer_in(clip_files, pad_with_end=pad_with_end, length=12)
    tokenizer.save(tmp_path / "ours")
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    theirs = peer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids, tokenizer(PROMPTS))
    # Version 5 writes a tokenizer.json alone.
    peer.save_pretrained(tmp_path / "theirs")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "theirs" / name).unlink(missing_ok=True)
    again = clip_tokenizer_in(tmp_path / "theirs", pad_with_end=pad_with_end, length=12)
    assert torch.equal(again(PROMPTS), tokenizer(PROMPTS))


# Files of no use


def test_missing_files_are_listed(clip_files, tmp_path):
    with pytest.raises(UserError, match=r"vocab.json and merges.txt missing.*clip-vit-large") as e:
        clip_tokenizer_in(tmp_path, pad_with_end=True)
    assert str(tmp_path) in str(e.value)
    (tmp_path / "vocab.json").write_bytes((clip_files / "vocab.json").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer: merges.txt missing"):
        clip_tokenizer_in(tmp_path, pad_with_end=True)


def refusal(vocabulary: Path, merges: Path | None) -> str:
    with pytest.raises(UserError) as error:
        CLIPTokenizer(
            vocabulary=VocabularyFile.read(vocabulary, ORIGIN),
            merges=None if merges is None else VocabularyFile.read(merges, ORIGIN),
            pad_with_end=True,
        )
    assert "clip-vit-large-patch14" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html>", "a web page was saved in its place"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'{"!": 0, "a": ', "not complete JSON"),
        (b"[0]", "not a JSON object"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b'{"!": 0}', r"it lacks <|startoftext|>, <|endoftext|>"),
        (b'{"!": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}', "it lacks some bytes"),
    ],
)
def test_a_vocabulary_of_no_use_is_named(clip_files, tmp_path, content, fault):
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    message = refusal(path, clip_files / "merges.txt")
    assert str(path) in message and fault in message


@pytest.mark.parametrize("changed", [{"!": 1}, {"<|endoftext|>": 600}, {"a": "x"}])
def test_ids_that_do_not_run_from_zero_to_the_end_token_are_refused(clip_files, tmp_path, changed):
    ids = json.loads((clip_files / "vocab.json").read_text(encoding="utf-8"))
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({**ids, **changed}))
    assert "must run from 0 (!) to 519" in refusal(path, clip_files / "merges.txt")


@pytest.mark.parametrize(
    ("merges", "fault"),
    [
        ("#version: 0.2\nc a\n", "1 merges, but the 520 tokens"),
        ("#version: 0.2\nc a\nr", "the merge 'r' is not a pair"),
        ("#version: 0.2\nc a\nca t</w>\nr e\nre d</w>\n' s</w>\nx y\n", "out of vocabulary"),
    ],
)
def test_merges_that_do_not_belong_to_the_vocabulary_are_refused(
    clip_files, tmp_path, merges, fault
):
    path = tmp_path / "merges.txt"
    path.write_text(merges)
    message = refusal(clip_files / "vocab.json", path)
    assert str(path) in message and fault in message


def test_files_of_other_tokenizers_are_refused(clip_files, t5_files, tmp_path):
    assert "not UTF-8 text" in refusal(t5_files / "spiece.model", clip_files / "merges.txt")
    assert "no BPE merges" in refusal(clip_files / "vocab.json", None)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["<pad>", 0.0]]}}))
    assert "no BPE merges" in refusal(path, None)


# Many prompts, with a vocabulary learned from them


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_transformers_gives_the_same_ids(learned_clip_files, prompts, tmp_path, pad_with_end):
    transformers = pytest.importorskip("transformers")
    tokenizer = clip_tokenizer_in(learned_clip_files, pad_with_end=pad_with_end, length=77)
    tokenizer.save(tmp_path)
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    # With id 0 for padding, an exclamation mark is padding there.
    prompts = [prompt for prompt in prompts if pad_with_end or "!" not in prompt]
    theirs = peer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids, tokenizer(prompts))
    used = tokenizer(prompts).unique()
    assert (used >= 512).sum() > 150  # ids of merges
