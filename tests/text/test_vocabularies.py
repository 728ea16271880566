"""Checkpoints contain their tokenizers; files outside of a checkpoint are not read."""

import base64
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmdit
from mmdit.errors import UserError
from mmdit.registry import build, describe
from mmdit.runs.native import save_module
from mmdit.text.clip_tokenizer import clip_tokenizer_in
from mmdit.text.t5_tokenizer import t5_tokenizer_in
from mmdit.text.vocabularies import VocabularyFile


def test_a_description_builds_the_same_tokenizer_without_the_files(clip_files, t5_files):
    for tokenizer in (
        clip_tokenizer_in(clip_files, pad_with_end=True),
        t5_tokenizer_in(t5_files, length=12),
    ):
        description = json.loads(json.dumps(describe(tokenizer)))
        assert str(clip_files.parent) not in json.dumps(description)
        again = build(description)
        assert again.identity() == tokenizer.identity()
        assert describe(again) == describe(tokenizer)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"0" * 20_000_000, "is truncated, or larger than any vocabulary"),
        (b"no zlib", "is damaged"),
    ],
)
def test_packed_content_has_bounds(content, fault):
    packed = content if len(content) < 100 else zlib.compress(content)
    with pytest.raises(UserError, match=rf"content of vocab\.json {fault}"):
        VocabularyFile(name="vocab.json", content=base64.b64encode(packed).decode())


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            VocabularyFile.read(path, "the hub")
    with pytest.raises(UserError, match="is larger than 16,777,216 bytes"):
        VocabularyFile.read(tmp_path / "large", "the hub")


@pytest.fixture(scope="module")
def exported(tiny_published, tmp_path_factory) -> Path:
    """A pipeline with published tokenizers as one file of ours."""
    path = tmp_path_factory.mktemp("native") / "x.safetensors"
    save_module(path, mmdit.load_pipeline(tiny_published))
    return path


def as_older_versions_wrote(path: Path, out: Path, named: str) -> None:
    """The same file, its description with paths in place of the tokenizers."""
    description = describe(mmdit.load_pipeline(path))
    text = {**description["text"]}
    for kind in ("clip_l", "clip_g", "t5"):
        old = {**text[kind]["tokenizer"]}
        for part in ("vocabulary", "merges", "model"):
            if part in old:
                old[part] = named
        text[kind] = {**text[kind], "tokenizer": old}
    metadata = {"description": json.dumps({**description, "text": text})}
    save_file(load_file(path), out, metadata)


def test_a_file_holds_its_tokenizers(exported, tiny_published):
    ours, published = (mmdit.load_pipeline(path).text for path in (exported, tiny_published))
    for one, other in zip(ours.tokenize(["a cat"]), published.tokenize(["a cat"]), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="the model already includes its tokenizers"):
        mmdit.load_pipeline(exported, tokenizers=tiny_published)


def test_a_path_in_a_file_is_not_read(exported, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for named in ("/dev/zero", str(tmp_path / "pipe"), "../../etc/passwd", "vocab.json"):
        as_older_versions_wrote(exported, tmp_path / "x.safetensors", named)
        with pytest.raises(UserError, match="is recorded as the path") as refusal:
            mmdit.load_pipeline(tmp_path / "x.safetensors")
        assert "tokenizers=<folder>" in str(refusal.value)
        assert repr(named) in str(refusal.value)


def test_older_files_open_with_tokenizers_that_are_named_or_lie_beside(
    exported, tiny_published, tmp_path
):
    older = tmp_path / "x.safetensors"
    as_older_versions_wrote(exported, older, "/gone/vocab.json")
    expected = mmdit.load_pipeline(exported).text.tokenize(["a cat"])
    named = mmdit.load_pipeline(older, tokenizers=tiny_published)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (tmp_path / name).symlink_to(tiny_published / name)
    beside = mmdit.load_pipeline(older)
    for text in (named.text, beside.text):
        for one, other in zip(text.tokenize(["a cat"]), expected, strict=True):
            assert torch.equal(one, other)
