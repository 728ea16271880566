"""The cases of the speed comparison: uses of a model, ours and the peer's with equal weights."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.checkpoints.building import Unfilled
from mmdit.checkpoints.folders import REQUIRED_FIELDS, config_of
from mmdit.checkpoints.public import exported
from mmdit.engine.optimizers import adamw
from mmdit.nn.network import Network
from mmdit.parity.random_weights import ENCODERS
from mmdit.registry import build

Inputs = dict[str, Tensor]
Call = Callable[[], Tensor]


class Case(NamedTuple):
    """A model, one of its uses, and the size of its inputs."""

    kind: str
    model: dict[str, Any]
    use: str  # forward, train, encode or decode
    batch: int
    pixels: int = 0  # side of the images
    text: int = 0  # number of tokens


SMALL = {"class": "MMDiT", "depth": 6, "width": 384, "num_heads": 6}  # 33M parameters
# The size of configs/model/toy.yaml, except for its narrower MLPs, which diffusers lacks.
TOY = {
    "class": "MMDiT",
    "depth": 4,
    "width": 192,
    "num_heads": 3,
    "context_width": 128,
    "pooled_width": 128,
    "position_size": 24,
    "position_grid": 4,
    "position_base": 4,
}
D24 = {"class": "MMDiT", "depth": 24, "width": 1536, "num_heads": 24}  # 2.0B: SD3 Medium
VAE: dict[str, Any] = {"class": "Autoencoder"}
T5 = {**ENCODERS["t5"], "depth": 4}  # instead of 24 equal layers
CASES = {
    "small_forward": Case("mmdit", SMALL, "forward", batch=4, pixels=256, text=154),
    "small_train": Case("mmdit", SMALL, "train", batch=4, pixels=256, text=154),
    "toy_train": Case("mmdit", TOY, "train", batch=128, pixels=64, text=26),
    "d24_forward": Case("mmdit", D24, "forward", batch=1, pixels=512, text=154),
    "d24_forward_333": Case("mmdit", D24, "forward", batch=1, pixels=512, text=333),
    "vae_decode": Case("autoencoder", VAE, "decode", batch=1, pixels=512),
    "vae_encode": Case("autoencoder", VAE, "encode", batch=1, pixels=512),
    "clip_l": Case("clip_l", ENCODERS["clip_l"], "forward", batch=2, text=77),
    "clip_g": Case("clip_g", ENCODERS["clip_g"], "forward", batch=2, text=77),
    "t5": Case("t5", T5, "forward", batch=2, text=154),
}


def random_model(description: dict[str, Any], dtype: torch.dtype) -> Network:
    """One of our models, with random nonzero weights that keep activations of order 1."""
    with Unfilled():
        model: Network = build(description).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5)
    return model.eval()


def twin(kind: str, model: Network) -> nn.Module:
    """The peer's counterpart of our model, with a copy of its weights."""
    import diffusers
    import transformers

    config = {**REQUIRED_FIELDS[kind], **config_of(kind, model)}
    tensors = {key: tensor.clone() for key, tensor in exported(model, "diffusers")}
    peer: Any
    with torch.device("meta"), Unfilled():
        match kind:
            case "mmdit":
                peer = diffusers.SD3Transformer2DModel.from_config(config)
            case "autoencoder":
                peer = diffusers.AutoencoderKL.from_config(config)
            case "t5":
                peer = transformers.T5EncoderModel(transformers.T5Config(**config))
                tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
            case _:
                settings = transformers.CLIPTextConfig(**config)
                peer = transformers.CLIPTextModelWithProjection(settings)
    peer.load_state_dict(tensors, assign=True)
    if kind.startswith("clip"):  # a buffer in no file, still on meta
        positions = torch.arange(config["max_position_embeddings"])[None]
        peer.text_model.embeddings.position_ids = positions
    return peer.eval()


def compiled(kind: str, model: nn.Module, *, ours: bool) -> nn.Module:
    """A compiled copy that shares the model's weights: ours by `compile`, theirs block by block."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: Any = copy.deepcopy(model, shared)
    match kind:
        case _ if ours:
            parts = [twin]
        case "mmdit":
            parts = [*twin.transformer_blocks]
        case "autoencoder":
            parts = [twin.encoder, twin.decoder]
        case "t5":
            parts = [*twin.encoder.block]
        case _:
            parts = [*twin.text_model.encoder.layers]
    for part in parts:
        part.compile()
    return twin


def random_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Random inputs of a case, including the target of a training step."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    b, side = case.batch, case.pixels // 8
    match case.kind:
        case "mmdit":
            return {
                "z_t": noise(b, 16, side, side),
                "t": torch.linspace(0.1, 0.9, b),
                "c_vec": noise(b, case.model.get("pooled_width", 2048)),
                "c_ctxt": noise(b, case.text, case.model.get("context_width", 4096)),
                "target": noise(b, 16, side, side),
            }
        case "autoencoder":
            return {"latent": noise(b, 16, side, side), "image": noise(b, 3, 8 * side, 8 * side)}
        case _:
            ids = torch.randint(1000, (b, case.text), generator=generator)
            ids[:, case.text // 2 :] = 0 if case.kind == "t5" else 49407
            return {"ids": ids}


def our_call(case: Case, model: Any, x: Inputs) -> Call:
    """A case as a call of our model."""
    match case.kind, case.use:
        case "mmdit", "train":
            step = adamw(model, lr=1e-4)
            return training_step(lambda: model(x["z_t"], x["t"], x["c_vec"], x["c_ctxt"]), step, x)
        case "mmdit", _:
            return lambda: model(x["z_t"], x["t"], x["c_vec"], x["c_ctxt"])
        case _, "decode":
            return lambda: model.decode(x["latent"])
        case _, "encode":
            return lambda: model.encode(x["image"])
        case "t5", _:
            return lambda: model(x["ids"])
        case _:
            return lambda: model(x["ids"]).hidden


def their_call(case: Case, model: Any, x: Inputs) -> Call:
    """A case as a call of the peer's model."""

    def velocity() -> Tensor:
        return model(
            hidden_states=x["z_t"],
            timestep=1000 * x["t"],
            pooled_projections=x["c_vec"],
            encoder_hidden_states=x["c_ctxt"],
            return_dict=False,
        )[0]

    match case.kind, case.use:
        case "mmdit", "train":
            return training_step(velocity, torch.optim.AdamW(model.parameters(), lr=1e-4), x)
        case "mmdit", _:
            return velocity
        case _, "decode":
            scale, shift = model.config.scaling_factor, model.config.shift_factor
            return lambda: model.decode(x["latent"] / scale + shift).sample
        case _, "encode":
            scale, shift = model.config.scaling_factor, model.config.shift_factor
            return lambda: (model.encode(x["image"]).latent_dist.mode() - shift) * scale
        case "t5", _:
            return lambda: model(x["ids"]).last_hidden_state
        case _:
            return lambda: model(x["ids"], output_hidden_states=True).hidden_states[-2]


def training_step(call: Call, optimizer: torch.optim.Optimizer, x: Inputs) -> Call:
    """A training step: forward under bf16 autocast, squared error, backward, update."""

    def step() -> Tensor:
        with torch.autocast(x["target"].device.type, dtype=torch.bfloat16):
            output = call()
        (output.float() - x["target"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return output.detach()

    return step
