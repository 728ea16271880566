"""Golden cases of the reference code, foreign weights made ours, and tiny tokenizer files."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceTrainer
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from mmdit.checkpoints.formats import FORMATS
from mmdit.checkpoints.public import kind_of, slots_of

SHARED = Path(__file__).resolve().parents[2] / "shared"


class GoldenCase(NamedTuple):
    """One file of ../shared/golden, described in its README."""

    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    weights: dict[str, Tensor]  # the original key, its prefix stripped; float32

    def check(self, name: str, actual: Tensor) -> None:
        tolerance = self.config["tolerance"]["float32"]
        torch.testing.assert_close(actual, self.outputs[name], rtol=0, atol=tolerance)


@pytest.fixture
def golden() -> Callable[[str], GoldenCase]:
    """`golden(name)`: a case, or a skipped test where ../shared is absent."""

    def load(name: str) -> GoldenCase:
        path = SHARED / "golden" / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no golden case at {path}")
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        prefix = config.get("weights_prefix", "")
        return GoldenCase(
            config,
            _below("inputs.", tensors),
            _below("outputs.", tensors),
            {k: v.float() for k, v in _below(f"weights.{prefix}", tensors).items()},
        )

    return load


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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
