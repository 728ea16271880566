"""Textual inversion: new words in all encoders, from outside, kept in files of other programs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmdit
from mmdit.adapters import NewWords, lora, read_adapter, textual_inversion, write_adapter
from mmdit.adapters.adapter import Adapter, adapter_in
from mmdit.adapters.words import AdaptedEmbedding, ExtendedTokenizer
from mmdit.errors import UserError
from mmdit.registry import build, describe
from mmdit.text.conditioning import TextEncoder

PROMPTS = ["a photo of zork on a beach", "Zork, tasks and a zorker"]
EMBEDDINGS = [f"text.{part}.model.token_embedding" for part in ("clip_l", "clip_g", "t5")]


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published)


def encoders(pipe: mmdit.Pipeline) -> list[TextEncoder]:
    return [encoder for encoder in pipe.text.encoders if isinstance(encoder, TextEncoder)]


def encoded(pipe: mmdit.Pipeline, *prompts: str) -> list[Tensor]:
    condition = pipe.encode(list(prompts))
    return [condition.c_vec, condition.c_ctxt]


@torch.no_grad()
def trained(adapter: Adapter) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    for weight in adapter.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator))
    return adapter


def test_a_new_word_begins_as_what_it_was(pipe) -> None:
    before = encoded(pipe, PROMPTS[0])
    pipe.load_lora(textual_inversion(pipe, words=["zork"]), name="zork")
    for old, new in zip(before, encoded(pipe, PROMPTS[0]), strict=True):
        assert torch.equal(old, new)
    for ids in pipe.text.tokenize(PROMPTS):
        assert (ids == -1).sum(1).tolist() == [1, 1]  # in "Zork", too, but not in "zorker"


def test_it_begins_as_another_text_of_any_length(pipe) -> None:
    as_cat = encoded(pipe, "a cat", "two cats")
    pipe.load_lora(textual_inversion(pipe, words=["<it>"], start="cat"))
    for old, new in zip(as_cat, encoded(pipe, "a <it>", "two cats"), strict=True):
        assert torch.equal(old, new)
    pipe.unload_lora()
    pipe.load_lora(textual_inversion(pipe, words=["<it>"], start="cat", vectors=5))
    assert [(ids < 0).sum().item() for ids in pipe.text.tokenize(["a <it>"])] == [5, 5, 5]


def test_trained_words_change_their_own_prompts_alone(pipe) -> None:
    without = encoded(pipe, "a zorker")
    before = encoded(pipe, *PROMPTS)
    tokenizers = [encoder.tokenizer for encoder in encoders(pipe)]
    pipe.load_lora(trained(textual_inversion(pipe, words=["zork"])), name="zork")
    assert all(isinstance(e.tokenizer, ExtendedTokenizer) for e in encoders(pipe))
    for old, new in zip(without, encoded(pipe, "a zorker"), strict=True):
        assert torch.equal(old, new)
    for old, new in zip(before, encoded(pipe, *PROMPTS), strict=True):
        assert not torch.allclose(old, new)
    pipe.unload_lora("zork")
    assert [encoder.tokenizer for encoder in encoders(pipe)] == tokenizers
    assert type(pipe.get_submodule(EMBEDDINGS[0])) is torch.nn.Embedding
    for old, new in zip(before, encoded(pipe, *PROMPTS), strict=True):
        assert torch.equal(old, new)


def test_clip_pools_at_the_end_token_as_before(pipe) -> None:
    pipe.load_lora(trained(textual_inversion(pipe, words=["zork"])))
    for encoder in encoders(pipe)[:2]:
        ids = encoder.tokenize(["zork"])
        end = encoder.tokenizer.vocabulary_size - 1
        assert ids[0, ids.argmax()] == end


def test_gradients_reach_the_new_words_alone(pipe) -> None:
    pipe.requires_grad_(False)
    pipe.load_lora(textual_inversion(pipe, words=["zork"]))
    assert not pipe.text.frozen
    condition = pipe.text(pipe.text.tokenize(PROMPTS))
    (condition.c_vec.square().sum() + condition.c_ctxt.square().sum()).backward()
    moved = [name for name, weight in pipe.named_parameters() if weight.grad is not None]
    assert moved == [f"{at}.changes.adapter.vectors" for at in EMBEDDINGS]
    assert all(pipe.get_parameter(name).grad.abs().sum() > 0 for name in moved)


def test_several_adapters_and_fusing(pipe) -> None:
    one = trained(textual_inversion(pipe, words=["zork"]))
    two = trained(textual_inversion(pipe, words=["blib"], vectors=2))
    pipe.load_lora(one, name="one")
    alone = encoded(pipe, PROMPTS[0])
    pipe.load_lora(two, name="two")
    pipe.load_lora(lora(pipe, rank=2), name="style")
    both = encoded(pipe, "zork blib")
    pipe.fuse_lora()
    assert all(torch.equal(a, b) for a, b in zip(both, encoded(pipe, "zork blib"), strict=True))
    pipe.unload_lora()
    assert not pipe.adapters and type(pipe.get_submodule(EMBEDDINGS[2])) is torch.nn.Embedding
    pipe.load_lora(two, name="two")
    pipe.load_lora(one, name="one")
    for old, new in zip(alone, encoded(pipe, PROMPTS[0]), strict=True):
        assert torch.equal(old, new)  # whatever their ids
    with pytest.raises(UserError, match="the word 'Zork' is already taught"):
        pipe.load_lora(textual_inversion(pipe, words=["Zork"]), name="three")
    assert [*pipe.adapters] == ["two", "one"]


def test_words_have_no_scale(pipe) -> None:
    with pytest.raises(UserError, match=r"scale=0\.8: new words"):
        pipe.load_lora(textual_inversion(pipe, words=["zork"]), 0.8)
    pipe.load_lora(textual_inversion(pipe, words=["zork"]), name="zork")
    with pytest.raises(UserError, match=r"scale=0: new words"):
        pipe.lora_scale("zork", 0)


def test_a_description_builds_the_same(pipe) -> None:
    adapter = trained(textual_inversion(pipe, words=["zork", "zorks"], vectors=2))
    again = build(describe(adapter))
    again.load_state_dict(adapter.state_dict())
    pipe.load_lora(again)
    taken = adapter_in(pipe, "adapter")
    assert taken.changes.keys() == adapter.changes.keys() == {*EMBEDDINGS}
    assert all(new.words == {"zork": 2, "zorks": 2} for new in taken.changes.values())


@pytest.mark.parametrize(("dialect", "t5"), [("comfyui", "t5xxl"), ("diffusers", "t5")])
def test_files_of_other_programs(pipe, tmp_path, dialect, t5) -> None:
    adapter = trained(textual_inversion(pipe, words=["<zork>"], vectors=3))
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect=dialect, root=pipe)
    assert {key: len(table) for key, table in load_file(path).items()} == {
        "clip_l": 3,
        "clip_g": 3,
        t5: 3,
    }
    read = read_adapter(path, pipe)
    for at, new in adapter.changes.items():
        assert isinstance(new, NewWords) and read.changes[at].words == {"<zork>": 3}
        assert torch.equal(read.changes[at].vectors, new.vectors)
    assert pipe.load_lora(path) == "a"
    # Files of others name no word: it is that of the file.
    save_file({"clip_l": load_file(path)["clip_l"].half()}, tmp_path / "blib.safetensors")
    pipe.load_lora(tmp_path / "blib.safetensors")
    embedding = pipe.get_submodule(EMBEDDINGS[0])
    assert isinstance(embedding, AdaptedEmbedding)
    assert embedding.words == {"<zork>": 3, "blib": 3}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_l": torch.zeros(2, 7)}, "is 7 in it and"),
        ({"clip_l": torch.full((1, 16), torch.nan)}, "clip_l has NaN"),
        ({"clip_l": torch.zeros(1, 1, 16)}, "not a table"),
        ({"clip_l": torch.zeros(1, 16, dtype=torch.int32)}, "not a table"),
        ({"clip_l": torch.zeros(0, 16)}, "vectors of 'a'"),
        ({"clip_l": torch.zeros(65, 16)}, "vectors of 'a'"),
        ({"t5": torch.zeros(1, 32), "t5xxl": torch.zeros(1, 32)}, "are the same encoder"),
    ],
)
def test_bad_files_are_refused(pipe, tmp_path, tensors, message) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        pipe.load_lora(tmp_path / "a.safetensors")
    assert not pipe.adapters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": "zork"}, "must be a list"),
        ({"words": ["a dog"]}, "must be one word"),
        ({"words": [""]}, "must be one word"),
        ({"words": ["x" * 101]}, "must be one word"),
        ({"words": ["zork", "ZORK"]}, "whatever its case"),
        ({"words": ["zork", "zork"]}, "whatever its case"),
        ({"words": ["zork"], "start": " "}, "has no tokens"),
        ({"words": ["zork"], "vectors": 0}, "vectors=0"),
        ({"words": ["zork"], "parts": ["mmdit"]}, "parts='mmdit'"),
    ],
)
def test_bad_words_are_refused(pipe, options, message) -> None:
    with pytest.raises(UserError, match=message):
        textual_inversion(pipe, **options)


def test_one_word_a_file(pipe, tmp_path) -> None:
    two = textual_inversion(pipe, words=["zork", "blib"])
    with pytest.raises(UserError, match="a file holds one word"):
        write_adapter(two, tmp_path / "a.safetensors", dialect="comfyui", root=pipe)
    one = textual_inversion(pipe, words=["zork"])
    with pytest.raises(UserError, match="dialect=sd-scripts has no file for a new word"):
        write_adapter(one, tmp_path / "a.safetensors", dialect="sd-scripts", root=pipe)


@pytest.mark.parametrize(
    ("word", "prompt", "times"),
    [
        ("sks", "a \u017fks dog", 1),  # a long s is one in another case
        ("i", "\u0130 and i", 2),
        ("zork", "a \ue000 dog", 0),  # a character that stands for nothing
        ("zork", "zork\ue000zork", 0),  # and does not separate words
        ("<a|b>", "a <a|b>, <A|B>", 2),
        ("a.c", "abc a.c", 1),
        ("\u732b", "\u732b \u732b\u732b", 1),
    ],
)
def test_words_are_found_whatever_their_characters(pipe, word, prompt, times) -> None:
    pipe.load_lora(textual_inversion(pipe, words=[word], vectors=2))
    for ids in pipe.text.tokenize([prompt]):
        assert (ids == -1).sum() == (ids == -2).sum() == times
        assert (ids >= -2).all()


def test_the_longest_word_is_read_first(pipe) -> None:
    pipe.load_lora(textual_inversion(pipe, words=["<a>", "<a>-b"], vectors=1))
    ids = pipe.text.tokenize(["<a>-b <a>"]).clip_l[0]
    assert ids[ids < 0].tolist() == [-2, -1]


def test_the_identity_of_a_tokenizer_tells_its_words(pipe) -> None:
    own = pipe.text.clip_l.tokenizer
    found = {ExtendedTokenizer(own, words).identity() for words in ({"a": 1}, {"b": 1}, {"a": 2})}
    assert len({own.identity(), *found}) == 4
