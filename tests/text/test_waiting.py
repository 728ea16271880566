"""Text encoders that are in memory only while something is encoded."""

import copy
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import mmdit
from mmdit.cli.initial import reopened
from mmdit.loading import open_source
from mmdit.nn.stored import compute_in_float32
from mmdit.pipeline import Pipeline
from mmdit.registry import describe
from mmdit.text.conditioning import TextConditioner
from mmdit.text.waiting import WaitingEncoder, remember, waiting

PROMPTS = ["a cat", "a red circle", ""]


@pytest.fixture
def plain(tiny_published: Path) -> TextConditioner:
    return mmdit.load_pipeline(tiny_published).text.requires_grad_(False)


@pytest.fixture
def opened() -> list[str]:
    """The kinds of the encoders that were opened, in order."""
    return []


@pytest.fixture
def text(plain: TextConditioner, tiny_published: Path, opened: list[str]) -> TextConditioner:
    def open_again(kind: str):
        opened.append(kind)
        return reopened(tiny_published, kind, open_source(tiny_published).sha256)

    def waits(kind: str) -> WaitingEncoder:
        return WaitingEncoder(getattr(plain, kind), partial(open_again, kind))

    return TextConditioner(
        clip_l=waits("clip_l"), clip_g=waits("clip_g"), t5=waits("t5"), empty_prompt="encoded"
    )


def test_conditions_are_those_of_the_encoders(plain, text, opened) -> None:
    for ours, theirs in zip(text.encode(PROMPTS)[:2], plain.encode(PROMPTS)[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert opened == ["clip_l", "clip_g", "t5"]
    assert text.frozen and not list(text.parameters())
    assert all("model" not in vars(encoder) for encoder in text.encoders)
    assert describe(text)["t5"] == describe(plain)["t5"]


def test_what_is_remembered_is_not_encoded_again(plain, text, opened) -> None:
    remember(text, PROMPTS, shown=False)
    remember(text, PROMPTS[:1], shown=False)
    assert opened == ["clip_l", "clip_g", "t5"]  # one after another, each once
    for ours, theirs in zip(text.encode(PROMPTS)[:2], plain.encode(PROMPTS)[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(opened) == 3
    text.encode(["a dog"])
    assert len(opened) == 6


def test_an_encoder_stays_open_in_a_block(text, opened) -> None:
    encoder = text.t5
    with encoder.opened():
        for prompt in PROMPTS:
            encoder(encoder.tokenize([prompt]))
        assert opened == ["t5"]
    with pytest.raises(AttributeError):
        _ = encoder.model


def test_copies_share_it(text) -> None:
    remember(text, PROMPTS, shown=False)
    assert copy.deepcopy(text).t5 is text.t5
    assert [*waiting(text)] == ["clip_l", "clip_g", "t5"]


def test_it_computes_in_float32_where_the_model_does(plain) -> None:
    encoder = copy.deepcopy(plain.t5).bfloat16()
    waits = WaitingEncoder(encoder, lambda: copy.deepcopy(plain.t5.model).bfloat16())
    ids = encoder.tokenize(PROMPTS)
    assert torch.equal(waits(ids).hidden, encoder(ids).hidden)
    compute_in_float32(waits)
    compute_in_float32(encoder)
    assert waits(ids).hidden.dtype == torch.float32
    assert torch.equal(waits(ids).hidden, encoder(ids).hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_its_weights_have_the_dtype_that_is_asked_for(plain, dtype, wide: bool) -> None:
    encoder, waits = (
        copy.deepcopy(plain.t5),
        WaitingEncoder(plain.t5, lambda: copy.deepcopy(plain.t5.model)),
    )
    for one in (encoder, waits):
        one.to(dtype)
        if wide:
            compute_in_float32(one)
    ids = encoder.tokenize(PROMPTS)
    ours, theirs = waits(ids).hidden, encoder(ids).hidden
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_what_is_remembered_in_one_precision_is_not_used_in_another(plain) -> None:
    waits = WaitingEncoder(plain.t5, lambda: copy.deepcopy(plain.t5.model).bfloat16())
    waits.compute_dtype = torch.bfloat16
    waits.remember(PROMPTS)
    before = waits(waits.tokenize(PROMPTS)).hidden
    compute_in_float32(waits)
    assert before.dtype == torch.bfloat16
    assert waits(waits.tokenize(PROMPTS)).hidden.dtype == torch.float32


def test_weights_that_have_changed_are_refused(tiny_published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_published, folder)
    digest = open_source(folder).sha256
    assert reopened(folder, "t5", digest).compute_dtype == torch.float32
    file = next((folder / "text_encoder_3").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(0, 0))
    with pytest.raises(mmdit.UserError, match="changed while they were in use"):
        reopened(folder, "t5", digest)


def test_adapters_find_nothing_to_change_in_it(text, tiny_published: Path) -> None:
    pipe = mmdit.load_pipeline(tiny_published)
    arguments = {"mmdit": pipe.mmdit, "autoencoder": pipe.autoencoder, "objective": pipe.objective}
    waits = Pipeline(**arguments, text=text, image_size=pipe.image_size, steps=1, guidance=1.0)
    waits.load_lora(mmdit.adapters.lora(waits, rank=2))
    assert waits.adapters
    with pytest.raises(mmdit.UserError, match="clip_l"):
        waits.load_lora(mmdit.adapters.lora(waits, rank=2, parts=["clip_l"]), name="text")
