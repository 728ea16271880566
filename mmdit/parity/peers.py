"""Runs models of the public formats here and in diffusers or transformers, recording all stages.

A side defines, for one kind of model, how the peer loads a file's weights, and which part of our
model corresponds to which part of the peer's.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdit.checkpoints.building import Unfilled
from mmdit.checkpoints.public import Match, exported, load_into
from mmdit.checkpoints.values import computed_in
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.registry import build, describe

Inputs = dict[str, Tensor]
Config = dict[str, Any]


class Stages(dict[str, Tensor]):
    """Outputs of a model's parts, by name, in the order of computation."""

    def __init__(self, bar: tqdm) -> None:
        super().__init__()
        self.bar = bar

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor.clone())
        self.bar.update()

    def watch(self, module: nn.Module, *names: str) -> None:
        """Record a part's output; of several tensors, those whose name is not empty."""

        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            self._keep(names, output if isinstance(output, tuple) else (output,))

        module.register_forward_hook(keep)

    def watch_inputs(self, module: nn.Module, *names: str) -> None:
        """Record a part's inputs."""
        module.register_forward_pre_hook(lambda _, arguments: self._keep(names, arguments))

    def _keep(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        for name, tensor in zip(names, tensors, strict=False):
            if name:
                self[name] = tensor


def compute_in(dtype: torch.dtype, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Convert a model's weights, but those of its blocks only while each block is running.

    The blocks' weights stay mapped from the file: all of T5 in float32 would take 19 GB.
    """
    late = {id(parameter) for block in blocks for parameter in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in late:
            parameter.data = parameter.data.to(dtype)
    stored: list[tuple[nn.Parameter, Tensor]] = []  # unconverted weights of the running block

    def widen(block: nn.Module, _arguments: Any) -> None:
        stored[:] = [(parameter, parameter.data) for parameter in block.parameters()]
        for parameter, data in stored:
            parameter.data = data.to(dtype)

    def restore(*_: Any) -> None:
        for parameter, data in stored:
            parameter.data = data

    for block in blocks:
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(restore)


def parts(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Parts of a model by name; a list of modules is replaced by its elements."""
    found: list[nn.Module] = []
    for name in names:
        part = model.get_submodule(name)
        found += part if isinstance(part, nn.ModuleList) else [part]
    return found


def tensors_of(match: Match) -> dict[str, Tensor]:
    """A file's tensors by the file's keys, mapped, without those that no model needs."""
    needless = re.compile("|".join(match.format.extras) or r"(?!)")
    stored = {
        key: match.tensor(key)
        for key in match.infos
        if key not in match.format.arguments and not needless.fullmatch(key)
    }
    return {key: tensor.to(computed_in(tensor, None)) for key, tensor in stored.items()}


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=generator)


def times(generator: torch.Generator, batch: int) -> Tensor:
    """Random times (b,), multiples of 1/64, so that multiplying by 1000 is exact."""
    return torch.randint(1, 65, (batch,), generator=generator) / 64


class Side(ABC):
    """How to run one kind of model, ours and the peer's.

    Attributes:
        our_blocks, their_blocks: names of the parts whose weights are converted one at a time.
    """

    our_blocks: tuple[str, ...] = ()
    their_blocks: tuple[str, ...] = ()

    @abstractmethod
    def inputs(self, model: Any, size: Mapping[str, int], generator: torch.Generator) -> Inputs:
        """Random inputs for our model.

        Args:
            model: our model.
            size: height and width in pixels, text_length in tokens, and batch_size.
            generator: source of randomness.
        """

    @abstractmethod
    def ours(self, model: Any, x: Inputs, stages: Stages) -> None:
        """Run our model, recording its stages."""

    @abstractmethod
    def peer(self, match: Match, config: Config) -> nn.Module:
        """The peer's model with the weights of a file."""

    @abstractmethod
    def theirs(self, model: Any, x: Inputs, stages: Stages) -> None:
        """Run the peer's model, recording its stages under our names."""


class TransformerSide(Side):
    """MMDiT and diffusers' SD3Transformer2DModel."""

    our_blocks = ("blocks", "last_block")
    their_blocks = ("transformer_blocks",)

    def inputs(self, model: MMDiT, size: Mapping[str, int], generator: torch.Generator) -> Inputs:
        b, h, w = size["batch_size"], size["height"] // 8, size["width"] // 8
        return {
            "z": noise(generator, b, model.latent_channels, h, w),
            "t": times(generator, b),
            "pooled": noise(generator, b, model.pooled_width),
            "text": noise(generator, b, size["text_length"], model.context_width),
        }

    def ours(self, model: MMDiT, x: Inputs, stages: Stages) -> None:
        first = [*model.blocks, model.last_block][0]
        stages.watch_inputs(first, "text_tokens", "image_tokens", "vector")
        for i, block in enumerate(model.blocks):
            stages.watch(block, f"blocks.{i}.text", f"blocks.{i}.image")
        stages.watch(model.last_block, "last_block")
        stages["output"] = model(x["z"], x["t"], x["pooled"], x["text"])

    def peer(self, match: Match, config: Config) -> nn.Module:
        from diffusers import SD3Transformer2DModel
        from diffusers.loaders import single_file_utils

        tensors = tensors_of(match)
        if match.format.layout == "original":
            convert = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
            tensors = convert(tensors)
        with torch.device("meta"), Unfilled():
            model = SD3Transformer2DModel.from_config(config)
        model.load_state_dict(tensors, assign=True)
        return model

    def theirs(self, model: Any, x: Inputs, stages: Stages) -> None:
        *inner, last = model.transformer_blocks
        stages.watch(model.context_embedder, "text_tokens")
        stages.watch(model.pos_embed, "image_tokens")
        stages.watch(model.time_text_embed, "vector")
        for i, block in enumerate(inner):
            stages.watch(block, f"blocks.{i}.text", f"blocks.{i}.image")
        stages.watch(last, "", "last_block")
        stages["output"] = model(
            hidden_states=x["z"],
            timestep=1000 * x["t"],
            pooled_projections=x["pooled"],
            encoder_hidden_states=x["text"],
        ).sample


class AutoencoderSide(Side):
    """Autoencoder and diffusers' AutoencoderKL."""

    def inputs(
        self, model: Autoencoder, size: Mapping[str, int], generator: torch.Generator
    ) -> Inputs:
        b, h, w = size["batch_size"], size["height"], size["width"]
        latent = (b, model.latent_channels, h // model.factor, w // model.factor)
        image = torch.rand(b, 3, h, w, generator=generator)
        return {"image": 2 * image - 1, "latent": noise(generator, *latent)}

    def ours(self, model: Autoencoder, x: Inputs, stages: Stages) -> None:
        stages.watch(model.encoder.conv_in, "encoder.conv_in")
        for i, level in enumerate(model.encoder.levels):
            stages.watch(level, f"encoder.levels.{i}")
        stages.watch(model.encoder.middle, "encoder.middle")
        stages.watch(model.encoder, "encoder.moments")
        stages["encoder.latent"] = model.encode(x["image"])
        stages.watch(model.decoder.conv_in, "decoder.conv_in")
        stages.watch(model.decoder.middle, "decoder.middle")
        for i, level in enumerate(model.decoder.levels):
            stages.watch(level, f"decoder.levels.{i}")
        stages["decoder.image"] = model.decode(x["latent"])

    def peer(self, match: Match, config: Config) -> nn.Module:
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        tensors = tensors_of(match)
        if match.format.layout == "original":
            tensors = convert_ldm_vae_checkpoint(tensors, config)
        with torch.device("meta"), Unfilled():
            model = AutoencoderKL.from_config(config)
        model.load_state_dict(tensors, assign=True)
        return model

    def theirs(self, model: Any, x: Inputs, stages: Stages) -> None:
        stages.watch(model.encoder.conv_in, "encoder.conv_in")
        for i, level in enumerate(model.encoder.down_blocks):
            stages.watch(level, f"encoder.levels.{i}")
        stages.watch(model.encoder.mid_block, "encoder.middle")
        stages.watch(model.encoder, "encoder.moments")
        scale, shift = model.config.scaling_factor, model.config.shift_factor
        mean = model.encode(x["image"]).latent_dist.mode()
        stages["encoder.latent"] = (mean - shift) * scale
        stages.watch(model.decoder.conv_in, "decoder.conv_in")
        stages.watch(model.decoder.mid_block, "decoder.middle")
        for i, level in enumerate(model.decoder.up_blocks):
            stages.watch(level, f"decoder.levels.{i}")
        stages["decoder.image"] = model.decode(x["latent"] / scale + shift).sample


class CLIPSide(Side):
    """CLIPTextModel and transformers' CLIPTextModelWithProjection."""

    our_blocks = ("layers",)
    their_blocks = ("text_model.encoder.layers",)

    def inputs(
        self, model: CLIPTextModel, size: Mapping[str, int], generator: torch.Generator
    ) -> Inputs:
        end = model.vocabulary_size - 1
        shape = (size["batch_size"], model.length)
        ids = torch.randint(end, shape, generator=generator)
        ids[:, model.length // 2 :] = end
        return {"ids": ids}

    def ours(self, model: CLIPTextModel, x: Inputs, stages: Stages) -> None:
        stages.watch_inputs(model.layers[0], "embedding")
        for i, layer in enumerate(model.layers):
            stages.watch(layer, f"layers.{i}")
        stages.watch(model.final_norm, "final_norm")
        stages["hidden"], stages["pooled"] = model(x["ids"])

    def peer(self, match: Match, config: Config) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        tensors, width = tensors_of(match), config["hidden_size"]
        with torch.device("meta"), Unfilled():
            model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        # diffusers' converter uses the identity if a single file has no projection or an unread one
        if match.format.identity not in tensors:
            tensors["text_projection.weight"] = torch.eye(width)
        model.load_state_dict(tensors, assign=True)
        positions = torch.arange(config["max_position_embeddings"])[None]
        model.text_model.embeddings.position_ids = positions  # not in the file: still on meta
        return model

    def theirs(self, model: Any, x: Inputs, stages: Stages) -> None:
        text = model.text_model
        stages.watch(text.embeddings, "embedding")
        for i, layer in enumerate(text.encoder.layers):
            stages.watch(layer, f"layers.{i}")
        stages.watch(text.final_layer_norm, "final_norm")
        output = model(x["ids"], output_hidden_states=True)
        stages["hidden"], stages["pooled"] = output.hidden_states[-2], output.text_embeds


class T5Side(Side):
    """T5Encoder and transformers' T5EncoderModel."""

    our_blocks = ("layers",)
    their_blocks = ("encoder.block",)

    def inputs(
        self, model: T5Encoder, size: Mapping[str, int], generator: torch.Generator
    ) -> Inputs:
        shape = (size["batch_size"], size["text_length"])
        ids = torch.randint(model.vocabulary_size, shape, generator=generator)
        ids[:, shape[1] // 2 :] = 0  # padding, which is attended to
        return {"ids": ids}

    def ours(self, model: T5Encoder, x: Inputs, stages: Stages) -> None:
        stages.watch(model.token_embedding, "embedding")
        for i, layer in enumerate(model.layers):
            stages.watch(layer, f"layers.{i}")
        stages["hidden"] = model(x["ids"])

    def peer(self, match: Match, config: Config) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        tensors = tensors_of(match)
        with torch.device("meta"), Unfilled():
            model = T5EncoderModel(T5Config(**config))
        # One tensor has two names; a file contains one or both.
        names = ("shared.weight", "encoder.embed_tokens.weight")
        tensors |= dict.fromkeys(names, next(tensors[name] for name in names if name in tensors))
        model.load_state_dict(tensors, assign=True)
        return model

    def theirs(self, model: Any, x: Inputs, stages: Stages) -> None:
        stages.watch(model.encoder.embed_tokens, "embedding")
        for i, layer in enumerate(model.encoder.block):
            stages.watch(layer, f"layers.{i}")
        stages["hidden"] = model(x["ids"]).last_hidden_state


class ControlNetSide(Side):
    """ControlNet and diffusers' SD3ControlNetModel, both given a base model's image tokens."""

    our_blocks = ("blocks", "to_residuals")
    their_blocks = ("transformer_blocks", "controlnet_blocks")

    def inputs(
        self, model: ControlNet, size: Mapping[str, int], generator: torch.Generator
    ) -> Inputs:
        b, a = size["batch_size"], describe(model)
        h, w, p = size["height"] // 8, size["width"] // 8, a["patch_size"]
        return {
            "tokens": noise(generator, b, (h // p) * (w // p), model.width),
            "control": noise(generator, b, a["latent_channels"], h, w),
            "t": times(generator, b),
            "pooled": noise(generator, b, a["pooled_width"]),
        }

    def ours(self, model: ControlNet, x: Inputs, stages: Stages) -> None:
        stages.watch_inputs(model.blocks[0], "image_tokens", "vector")
        for i, block in enumerate(model.blocks):
            stages.watch(block, f"blocks.{i}")
            stages.watch(model.to_residuals[i], f"residuals.{i}")
        tokens = x["tokens"]
        base = SimpleNamespace(image_tokens=lambda _: tokens, compute_dtype=tokens.dtype)
        model(cast(MMDiT, base), tokens, x["t"], x["pooled"], x["control"])

    def peer(self, match: Match, config: Config) -> nn.Module:
        from diffusers import SD3ControlNetModel

        tensors = tensors_of(match)
        if match.format.layout == "original":  # diffusers cannot read it: rename by our table
            with torch.device("meta"), Unfilled():
                renamed = build(match.format.describe(match.infos, {}))
            load_into(renamed, match)
            tensors = dict(exported(renamed, "diffusers"))
        with torch.device("meta"), Unfilled():
            model = SD3ControlNetModel.from_config(config)
        model.load_state_dict(tensors, assign=True)
        return model

    def theirs(self, model: Any, x: Inputs, stages: Stages) -> None:
        stages.watch_inputs(model.transformer_blocks[0], "image_tokens", "vector")
        for i, block in enumerate(model.transformer_blocks):
            stages.watch(block, f"blocks.{i}")
            stages.watch(model.controlnet_blocks[i], f"residuals.{i}")
        model(
            hidden_states=x["tokens"],
            controlnet_cond=x["control"],
            pooled_projections=x["pooled"],
            timestep=1000 * x["t"],
        )


SIDES: dict[str, Side] = {
    "mmdit": TransformerSide(),
    "autoencoder": AutoencoderSide(),
    "clip_l": CLIPSide(),
    "clip_g": CLIPSide(),
    "t5": T5Side(),
    "controlnet": ControlNetSide(),
}
