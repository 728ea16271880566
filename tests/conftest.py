"""Golden cases of the reference code, foreign weights made ours, and tiny tokenizer files."""

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from tokenizers import pre_tokenizers
from torch import Tensor, nn

import mmdit
from mmdit.checkpoints.formats import FORMATS
from mmdit.checkpoints.public import kind_of, slots_of
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.pipeline import Pipeline
from mmdit.published import published_objective
from mmdit.text.clip_tokenizer import clip_tokenizer_in
from mmdit.text.conditioning import TextConditioner, TextEncoder
from mmdit.text.t5_tokenizer import t5_tokenizer_in
from tests import references, variants
from tests.references import GoldenCase

# Tests run two at a time, and so do the processes that they start: one thread for each. Threads
# that wait for each other's cores would make a test many times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Remove the handlers that a command sets up, whose captured output ends with the test."""
    before = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = [h for h in logging.root.handlers if h in before]


# Laws of whatever is registered


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("variants of your own, tested as those of the project")
    group.addoption("--config-dir", action="append", default=[], help="folder of their yamls")
    group.addoption("--imports", action="append", default=[], help="module of their classes")


def pytest_configure(config: pytest.Config) -> None:
    variants.look_in(config.getoption("config_dir"), config.getoption("imports"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `each("density")` runs on every density, given as its argument `density`."""
    for mark in metafunc.definition.iter_markers("each"):
        for kind in mark.args:
            found = variants.variants(kind)
            metafunc.parametrize(kind, found.values(), ids=found, indirect=True)


@pytest.hookimpl(tryfirst=True)  # before those that are marked slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give `few(n)` its meaning, and begin with the files whose tests start processes.

    The last file then is a short one, and no process waits long for the other.
    """
    seen: Counter[str] = Counter()
    for item in items:
        if mark := item.get_closest_marker("few"):
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > mark.args[0]:
                item.add_marker(pytest.mark.slow)
    order = {name: i for i, name in enumerate(("cli", "study", "engine", "runs", "tests"))}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))


def _variant(kind: str) -> Any:
    return pytest.fixture(lambda request: request.param(), name=kind)


density, path, prediction = _variant("density"), _variant("path"), _variant("prediction")
shift, grid, solver = _variant("shift"), _variant("grid"), _variant("solver")
guidance, schedule, profile = _variant("guidance"), _variant("schedule"), _variant("profile")
backbone, transition = _variant("backbone"), _variant("transition")


@pytest.fixture
def golden() -> Callable[[str], GoldenCase]:
    """`golden(name)`: a case of tests/golden."""
    return references.case


@pytest.fixture
def load_original() -> Callable[[nn.Module, Mapping[str, Tensor]], None]:
    """`load_original(module, tensors)`: weights in the layout of the published single files."""
    return lambda module, tensors: load_public(module, tensors, "original")


@pytest.fixture
def load_diffusers() -> Callable[[nn.Module, Mapping[str, Tensor]], None]:
    """`load_diffusers(module, tensors)`: the state dict of a model of diffusers or transformers."""
    return lambda module, tensors: load_public(module, tensors, "diffusers")


def load_public(module: nn.Module, tensors: Mapping[str, Tensor], layout: str) -> None:
    """Through the project's own tables; every key must be used."""
    kind = kind_of(module)
    format = next(f for f in FORMATS if f.kind == kind and f.layout == layout)
    slots = slots_of(module, format)
    beside = {*format.copies, *format.arguments, format.identity}
    assert tensors.keys() - beside == slots.keys() - beside
    ours = {
        name: part for key, slot in slots.items() for name, part in slot.read(tensors[key]).items()
    }
    constants = {name: getattr(module, name) for name in format.constants}
    module.load_state_dict({**ours, **constants})


@pytest.fixture
def randomize() -> Callable[[nn.Module, int], nn.Module]:
    """`randomize(module, seed)`: no parameter stays at its initial value, activations stay O(1)."""

    @torch.no_grad()
    def draw(module: nn.Module, seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
        return module.eval()

    return draw


# Tokenizer files in the published formats


MERGES = ["c a", "ca t</w>", "r e", "re d</w>", "' s</w>", "! !</w>"]
SENTENCES = ["a photo of a red cat", "two blue cats, one dog", "the dog's red ball!", "a cat reads"]


def write_clip_files(folder: Path, merges: Sequence[str]) -> Path:
    """vocab.json and merges.txt: each byte, alone and at the end of a word, and each merge."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # an exclamation mark comes first
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def clip_files(tmp_path_factory) -> Path:
    """A folder with vocab.json and merges.txt: 520 tokens, of which 518 start and 519 end."""
    return write_clip_files(tmp_path_factory.mktemp("clip"), MERGES)


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


# A tiny model of every part


@pytest.fixture(scope="session")
def tiny_published(tmp_path_factory, clip_files, t5_files) -> Path:
    """A whole MMDiT-X pipeline of tiny random models, as a folder in diffusers' layout."""
    torch.manual_seed(0)
    clip_l = clip_tokenizer_in(clip_files, pad_with_end=True)
    clip_g = clip_tokenizer_in(clip_files, pad_with_end=False)
    t5 = t5_tokenizer_in(t5_files, length=20)
    towers = {"vocabulary_size": 520, "depth": 3}
    pipe = Pipeline(
        mmdit=MMDiT(
            depth=3,
            width=64,
            num_heads=4,
            context_width=48,
            pooled_width=40,
            qk_norm=True,
            dual_attention=[0],
            position_size=12,
            position_grid=8,
        ),
        text=TextConditioner(
            clip_l=TextEncoder(
                tokenizer=clip_l, model=CLIPTextModel(width=16, num_heads=2, **towers)
            ),
            clip_g=TextEncoder(
                tokenizer=clip_g,
                model=CLIPTextModel(
                    width=24, num_heads=3, activation="gelu", projection_width=24, **towers
                ),
            ),
            t5=TextEncoder(
                tokenizer=t5,
                model=T5Encoder(
                    vocabulary_size=t5.vocabulary_size,
                    width=48,
                    depth=2,
                    num_heads=4,
                    head_width=8,
                    hidden=64,
                ),
            ),
            empty_prompt="encoded",
        ),
        autoencoder=Autoencoder(width=32, multipliers=[1, 2], blocks=1),
        objective=published_objective(3.0),
        image_size=32,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pipe.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return mmdit.save_diffusers(pipe, tmp_path_factory.mktemp("published") / "tiny")
