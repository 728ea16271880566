"""The published vocabularies give the ids of the reference and of diffusers.

They are not in the repository, so that pytest collects this file only when it is named:

    MMDIT_TOKENIZERS=<folder with clip/ and t5/> pytest tests/text/published_vocabularies.py
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit.text.clip_tokenizer import clip_tokenizer_in
from mmdit.text.t5_tokenizer import t5_tokenizer_in
from tests import references


@pytest.fixture
def published() -> Path:
    """A folder with clip/vocab.json, clip/merges.txt and t5/spiece.model."""
    return Path(os.environ["MMDIT_TOKENIZERS"])


@pytest.fixture
def reference() -> list[dict[str, Any]]:
    return references.table("token_ids")["reference"]


@pytest.fixture
def both() -> list[dict[str, Any]]:
    return references.table("token_ids")["both"]["cases"]


def test_clip_ids_match_the_reference(published, reference):
    tokenizer = clip_tokenizer_in(published / "clip", pad_with_end=True)
    assert len(reference) == 100
    ids = tokenizer([case["prompt"] for case in reference]).tolist()
    assert ids == [case["clip77"] for case in reference]


def test_clip_ids_match_diffusers_and_where_they_differ_from_the_reference(published, both):
    clip_l = clip_tokenizer_in(published / "clip", pad_with_end=True)
    clip_g = clip_tokenizer_in(published / "clip", pad_with_end=False)
    for case in both:
        prompt = case["prompt"]
        row_l, row_g = clip_l([prompt])[0].tolist(), clip_g([prompt])[0].tolist()
        assert row_l == case["diffusers"]["l"]
        if "(" not in prompt:  # a weight or an escape to the reference
            assert row_l == case["stability"]["l"]
            assert row_g == case["stability"]["g"]
        if "!" not in prompt:  # padding to diffusers
            assert row_g == case["diffusers"]["g"]


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_transformers_gives_the_same_clip_ids(published, reference, tmp_path, pad_with_end):
    transformers = pytest.importorskip("transformers")
    tokenizer = clip_tokenizer_in(published / "clip", pad_with_end=pad_with_end, length=77)
    tokenizer.save(tmp_path)
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    # With id 0 for padding, an exclamation mark is padding there.
    prompts = [case["prompt"] for case in reference if pad_with_end or "!" not in case["prompt"]]
    theirs = peer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids, tokenizer(prompts))


@pytest.mark.parametrize("length", [77, 256])
def test_t5_ids_match_the_reference(published, reference, length):
    tokenizer = t5_tokenizer_in(published / "t5", length=length)
    assert len(reference) == 100
    rows = tokenizer([case["prompt"] for case in reference]).tolist()
    for row, case in zip(rows, reference, strict=True):
        expected = case[f"t5_{length}_trimmed"]
        assert row == [*expected, *[0] * (length - len(expected))]


def test_t5_ids_match_diffusers_and_where_they_differ_from_the_reference(published, both):
    tokenizer = t5_tokenizer_in(published / "t5", length=256)
    for case in both:
        prompt, theirs = case["prompt"], case["stability"]["t5"]
        (row,) = tokenizer([prompt]).tolist()
        assert row == case["diffusers"]["t5_256"]
        if "(" not in prompt and len(prompt) <= 226:  # a weight or an escape; cut by characters
            assert row[: len(theirs)] == theirs


def test_transformers_gives_the_same_t5_ids(published, reference, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = t5_tokenizer_in(published / "t5", length=256)
    tokenizer.save(tmp_path)
    peer = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    prompts = [case["prompt"] for case in reference]
    theirs = peer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids, tokenizer(prompts))
