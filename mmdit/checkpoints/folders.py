"""Folders in diffusers' layout: a subfolder per model, each with its config.json."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mmdit.bounds import LONGEST_JSON, parse_json, read_bounded
from mmdit.checkpoints.archive import write_shards
from mmdit.checkpoints.formats import Description
from mmdit.checkpoints.public import descriptions, exported, kind_of
from mmdit.checks import number
from mmdit.errors import UserError
from mmdit.nn.network import Network
from mmdit.registry import describe

SUBFOLDERS = {
    "mmdit": "transformer",
    "autoencoder": "vae",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
}
TOKENIZERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
# The subfolders of a saved pipeline, and the weight files that `write_model` writes.
LAYOUT = {*SUBFOLDERS.values(), *TOKENIZERS.values(), "scheduler"}
WEIGHTS_WRITTEN = re.compile(
    r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)
CLASSES = {
    "controlnet": "SD3ControlNetModel",
    "mmdit": "SD3Transformer2DModel",
    "autoencoder": "AutoencoderKL",
    "clip_l": "CLIPTextModelWithProjection",
    "clip_g": "CLIPTextModelWithProjection",
    "t5": "T5EncoderModel",
    "clip_image": "CLIPVisionModelWithProjection",
}
# Part of the config.json of a whole CLIP, like openai/clip-vit-large-patch14, for each tower.
HALVES = {"clip_l": "text_config", "clip_g": "text_config", "clip_image": "vision_config"}
# Settings of diffusers' scheduler that change its steps, and so the image, and SD3's values.
STEPS = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
# The first version of diffusers that supports all of SD3.5.
VERSION = "0.32.0"

Config = dict[str, Any]


def read_config(folder: Path, kind: str | None = None) -> Config:
    """The config.json in a model's folder; empty if there is none.

    For a tower of a whole CLIP it is the part about this tower.
    """
    config = read_json(folder / "config.json")
    half = config.get(HALVES.get(kind or "", ""))
    if not isinstance(half, dict):
        return config
    # The shared space is described at the top level; the entries in the towers may be wrong.
    return {**half, **{key: config[key] for key in ("projection_dim",) if key in config}}


def read_json(path: Path) -> Config:
    """The object in a JSON file; empty if the file does not exist.

    Raises:
        UserError: the file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        config = parse_json(read_bounded(path, LONGEST_JSON))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    return config


def read_index(folder: Path, kinds: Iterable[str]) -> list[str]:
    """The kinds of model that were left out when a folder was saved, by its model_index.json.

    Raises:
        UserError: the folder holds another kind of pipeline.
    """
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name", "StableDiffusion3Pipeline")
    if not str(name).startswith("StableDiffusion3"):
        raise UserError(f"{folder} holds a {name}, not a StableDiffusion3Pipeline")
    return [kind for kind in kinds if index.get(SUBFOLDERS[kind]) == [None, None]]


def stored_shift(folder: Path, default: float) -> float:
    """The shift in scheduler/scheduler_config.json, or `default` without one.

    Raises:
        UserError: it is not a positive number, or the scheduler differs from SD3's.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    shift = config.get("shift", default)
    name = str(config.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    others = [key for key, usual in STEPS.items() if config.get(key, usual) != usual]
    if not name.startswith("FlowMatch") or others:
        what = f"{others[0]} = {config[others[0]]!r}" if others else name
        raise UserError(
            f"{path}: {what} is not how SD3 is sampled. Take the scheduler folder of the published "
            "model; solver= and grid= choose other steps here"
        )
    return number(f"{path}: shift", shift, above=0, below=1000)


def hints_of(kind: str, config: Config) -> Description:
    """The values of a config.json that shapes do not determine, as arguments of our classes.

    Raises:
        UserError: a value is invalid.
    """
    names = {
        "mmdit": {"num_attention_heads": "num_heads"},
        "autoencoder": {"scaling_factor": "scale", "shift_factor": "shift"},
        "controlnet": {"num_attention_heads": "num_heads"},
        "clip_l": {"num_attention_heads": "num_heads", "hidden_act": "activation"},
        "clip_g": {"num_attention_heads": "num_heads", "hidden_act": "activation"},
        "clip_image": {"num_attention_heads": "num_heads"},
    }.get(kind, {})
    hints = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    for theirs, ours in names.items():
        if ours in hints and not fits(ours, hints[ours]):
            raise UserError(f"config.json: {theirs} is {hints[ours]!r}, not a valid {ours}")
    return hints


def fits(argument: str, value: Any) -> bool:
    """Whether a value read from JSON is valid for this argument of a model."""
    match argument:
        case "num_heads":
            return isinstance(value, int) and value > 0
        case "activation":
            return isinstance(value, str)
        case "scale":
            return isinstance(value, int | float) and value > 0
    return isinstance(value, int | float)


def check_config(kind: str, module: nn.Module, config: Config, folder: Path) -> None:
    """Compare config.json with the architecture of the weights.

    Raises:
        UserError: they contradict each other.
    """
    ours = config_of(kind, module)
    differing = [
        f"{key} is {config[key]}, but the weights have {value}"
        for key, value in ours.items()
        if not key.startswith("_") and config.get(key, value) != value
    ]
    if differing:
        raise UserError(
            f"{folder / 'config.json'} contradicts the weights beside it: {'; '.join(differing)}"
        )


def config_of(kind: str, module: nn.Module) -> Config:
    """The fields of config.json that follow from a model's architecture."""
    a = describe(module)
    match kind:
        case "mmdit":
            return {
                "_class_name": CLASSES[kind],
                "attention_head_dim": a["width"] // a["num_heads"],
                "caption_projection_dim": a["width"],
                "dual_attention_layers": list(a["dual_attention"]),
                "in_channels": a["latent_channels"],
                "joint_attention_dim": a["context_width"],
                "num_attention_heads": a["num_heads"],
                "num_layers": a["depth"],
                "out_channels": a["latent_channels"],
                "patch_size": a["patch_size"],
                "pooled_projection_dim": a["pooled_width"],
                "pos_embed_max_size": a["position_size"],
                "qk_norm": "rms_norm" if a["qk_norm"] else None,
            }
        case "autoencoder":
            widths = [a["width"] * multiplier for multiplier in a["multipliers"]]
            return {
                "_class_name": CLASSES[kind],
                "block_out_channels": widths,
                "down_block_types": ["DownEncoderBlock2D"] * len(widths),
                "latent_channels": a["latent_channels"],
                "layers_per_block": a["blocks"],
                "norm_num_groups": 32,
                # Decimals that round to the same float32.
                "scaling_factor": float(f"{module.scale:.7g}"),
                "shift_factor": float(f"{module.shift:.7g}"),
                "up_block_types": ["UpDecoderBlock2D"] * len(widths),
                "use_post_quant_conv": False,
                "use_quant_conv": False,
            }
        case "controlnet":
            return {
                "_class_name": CLASSES[kind],
                "attention_head_dim": a["width"] // a["num_heads"],
                "in_channels": a["latent_channels"],
                "num_attention_heads": a["num_heads"],
                "num_layers": a["depth"],
                "out_channels": a["latent_channels"],
                "patch_size": a["patch_size"],
                "pooled_projection_dim": a["pooled_width"],
                "use_pos_embed": False,
            }
        case "clip_l" | "clip_g":
            projection = a["projection_width"] or a["width"]
            return {
                "hidden_act": a["activation"],
                "hidden_size": a["width"],
                "intermediate_size": 4 * a["width"],
                "max_position_embeddings": a["length"],
                "model_type": "clip_text_model",
                "num_attention_heads": a["num_heads"],
                "num_hidden_layers": a["depth"],
                "projection_dim": projection,
                "vocab_size": a["vocabulary_size"],
            }
        case "clip_image":
            return {
                "hidden_act": "quick_gelu",
                "hidden_size": a["width"],
                "image_size": a["image_size"],
                "intermediate_size": 4 * a["width"],
                "model_type": "clip_vision_model",
                "num_attention_heads": a["num_heads"],
                "num_hidden_layers": a["depth"],
                "patch_size": a["patch_size"],
                "projection_dim": a["projection_width"],
            }
        case "t5":
            return {
                "d_ff": a["hidden"],
                "d_kv": a["head_width"],
                "d_model": a["width"],
                "feed_forward_proj": "gated-gelu",
                "layer_norm_epsilon": 1e-6,
                "model_type": "t5",
                "num_heads": a["num_heads"],
                "num_layers": a["depth"],
                "relative_attention_max_distance": 128,
                "relative_attention_num_buckets": 32,
                "vocab_size": a["vocabulary_size"],
            }
    raise UserError(f"{kind} has no config.json")


# Fields that diffusers and transformers expect in config.json and we do not use.
REQUIRED_FIELDS: dict[str, Config] = {
    "mmdit": {"_diffusers_version": VERSION, "sample_size": 128},
    "controlnet": {
        "_diffusers_version": VERSION,
        "caption_projection_dim": 2048,
        "force_zeros_for_pooled_projection": False,
        "joint_attention_dim": None,
        "pos_embed_max_size": None,
        "pos_embed_type": None,
    },
    "autoencoder": {
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "force_upcast": True,
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": 1024,
    },
    "clip_l": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "layer_norm_eps": 1e-5},
    "clip_g": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "layer_norm_eps": 1e-5},
    "clip_image": {"num_channels": 3, "layer_norm_eps": 1e-5},
    "t5": {
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    },
}


def write_model(
    module: Network,
    folder: Path,
    *,
    kind: str | None = None,
    max_bytes: int = 10_000_000_000,
) -> None:
    """Write one model and its config.json, with the file names of diffusers or transformers.

    Args:
        module: the model.
        folder: created if it does not exist.
        kind: see `Format.kind`; None infers it from the module.
        max_bytes: largest size of a shard.

    Raises:
        UserError: it has no public format, or an architecture that config.json cannot express.
    """
    kind = kind_of(module) if kind is None else kind
    if (ratio := describe(module).get("mlp_ratio", 4.0)) != 4.0:
        raise UserError(
            f"mlp_ratio {ratio} cannot be expressed in diffusers' layout, where it is always 4: "
            "use the single-file layout"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config: Config = {**REQUIRED_FIELDS[kind], **config_of(kind, module)}
    if "_class_name" not in config:  # transformers' equivalent
        config["architectures"] = [CLASSES[kind]]
        config["torch_dtype"] = str(module.compute_dtype).removeprefix("torch.")
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    tensors, metadata = dict(exported(module, "diffusers", kind=kind)), descriptions({kind: module})
    write_shards(folder, stem, tensors, metadata, max_bytes=max_bytes)
    write_json(folder / "config.json", config)


def write_folder(
    models: Mapping[str, Network], folder: Path, *, shift: float, tokenizers: Mapping[str, Any]
) -> None:
    """Write a whole pipeline: models, tokenizers, scheduler, and the index that names them.

    Args:
        models: the models by kind; an encoder that is missing here is left out in the folder, too.
        folder: created if it does not exist.
        shift: the shift of the timesteps, alpha in Eq. 23.
        tokenizers: the tokenizers by kind of their encoder; each has `save(folder)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    for kind, subfolder in SUBFOLDERS.items():
        library = "diffusers" if kind in ("mmdit", "autoencoder") else "transformers"
        present = kind in models
        index[subfolder] = [library, CLASSES[kind]] if present else [None, None]
        if present:
            write_model(models[kind], folder / subfolder, kind=kind)
        if library == "transformers":
            name = subfolder.replace("text_encoder", "tokenizer")
            fitting = "T5TokenizerFast" if kind == "t5" else "CLIPTokenizer"
            index[name] = ["transformers", fitting] if kind in tokenizers else [None, None]
            if kind in tokenizers:
                tokenizers[kind].save(folder / name)
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "shift": shift,
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys and indentation, as the libraries do."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
