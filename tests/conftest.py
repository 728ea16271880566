"""Golden cases of the reference code, foreign weights made ours, and tiny tokenizer files."""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceTrainer
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder

SHARED = Path(__file__).resolve().parents[2] / "shared"

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


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
def load_renamed() -> Callable[[nn.Module, Mapping[str, Tensor], Sequence[Rule]], None]:
    """`load_renamed(module, tensors, rules)`: every rule renames, then everything must fit.

    A new name may contain `#qkv`, a fused matrix of which we keep thirds, or `#swap`, the two
    halves exchanged. Shapes differ by a reshape at most (a convolution over patches is a matrix).
    """

    def load(module: nn.Module, tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> None:
        ours: dict[str, Tensor] = {}
        for key, value in tensors.items():
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            if "#swap" in key:
                value = torch.cat(value.chunk(2)[::-1])
            parts = value.chunk(3) if "#qkv" in key else (value,)
            for part, letter in zip(parts, "qkv", strict=False):
                ours[key.replace("#swap", "").replace("#qkv", letter)] = part
        wanted = module.state_dict()
        assert ours.keys() == wanted.keys()
        module.load_state_dict({key: v.reshape(wanted[key].shape) for key, v in ours.items()})

    return load


@pytest.fixture
def load_original(load_renamed) -> Callable[[nn.Module, Mapping[str, Tensor]], None]:
    """`load_original(module, tensors)`: weights in the layout of the published single files."""

    def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        match module:
            case MMDiT():
                load_renamed(module, tensors, _mmdit(last=len(module.blocks)))
            case Autoencoder():
                constants = {"scale": module.scale, "shift": module.shift}
                load_renamed(module, {**tensors, **constants}, _autoencoder(module))
            case CLIPTextModel():
                load_renamed(module, tensors, CLIP)
            case T5Encoder():
                # The file stores the embedding twice.
                once = {k: v for k, v in tensors.items() if k != "shared.weight"}
                load_renamed(module, once, T5)

    return load


def _mmdit(last: int) -> list[Rule]:
    return [
        (r"^x_embedder\.proj", "patch_embedding.proj"),
        (r"^pos_embed$", "positions"),
        (r"^t_embedder\.mlp\.0", "timestep_embedding.fc1"),
        (r"^t_embedder\.mlp\.2", "timestep_embedding.fc2"),
        (r"^y_embedder\.mlp\.0", "pooled_embedding.fc1"),
        (r"^y_embedder\.mlp\.2", "pooled_embedding.fc2"),
        (r"^context_embedder", "context_embedding"),
        (rf"^joint_blocks\.{last}\.", "last_block."),
        (r"^joint_blocks\.", "blocks."),
        (r"\.context_block\.", ".text."),
        (r"\.x_block\.", ".image."),
        (r"attn\.qkv", "attention_in.#qkv"),
        (r"attn2\.qkv", "attention2_in.#qkv"),
        (r"attn2\.ln_([qk])", r"attention2_in.\1_norm"),
        (r"attn2\.proj", "attention2_out"),
        (r"attn\.ln_([qk])", r"attention_in.\1_norm"),
        (r"attn\.proj", "attention_out"),
        (r"^final_layer", "output"),
        (r"adaLN_modulation\.1", "modulation.linear"),
    ]


def _autoencoder(module: Autoencoder) -> list[Rule]:
    top = len(module.decoder.levels) - 1
    blocks = len(module.encoder.levels[-1])

    def level(match: re.Match[str]) -> str:  # counted from full resolution there, from z here
        return f"levels.{top - int(match[1])}"

    return [
        (r"\bdown\.(\d+)\.block", r"levels.\1"),
        (r"\bdown\.(\d+)\.downsample", rf"levels.\1.{blocks}"),
        (r"\bup\.(\d+)\.block", level),
        (r"\bup\.(\d+)\.upsample", lambda match: f"{level(match)}.{blocks + 1}"),
        (r"\bmid\.block_1", "middle.0"),
        (r"\bmid\.attn_1", "middle.1"),
        (r"\bmid\.block_2", "middle.2"),
        (r"nin_shortcut", "shortcut"),
        (r"proj_out", "proj"),
    ]


CLIP: list[Rule] = [
    (r"^text_model\.", ""),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "position_embedding"),
    (r"^encoder\.", ""),
    (r"self_attn\.([qkv])_proj", r"attention_in.\1"),
    (r"self_attn\.out_proj", "attention_out"),
    (r"^final_layer_norm", "final_norm"),
    (r"layer_norm([12])", r"norm\1"),
    (r"^text_projection", "projection"),
]

T5: list[Rule] = [
    (r"^encoder\.", ""),
    (r"^embed_tokens", "token_embedding"),
    (r"^block\.0\.layer\.0\.SelfAttention\.relative_attention_bias", "position_bias.embedding"),
    (r"^block\.(\d+)\.layer\.0\.layer_norm", r"layers.\1.norm1"),
    (r"^block\.(\d+)\.layer\.1\.layer_norm", r"layers.\1.norm2"),
    (r"^block\.(\d+)\.layer\.[01]", r"layers.\1"),
    (r"SelfAttention\.([qkv])\.weight", r"attention_in.\1.weight"),
    (r"SelfAttention\.o", "attention_out"),
    (r"DenseReluDense\.wi_0", "gate"),
    (r"DenseReluDense\.wi_1", "up"),
    (r"DenseReluDense\.wo", "down"),
    (r"^final_layer_norm", "final_norm"),
]


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
