"""Paint with a trained model: `python sample.py prompt="..."`, see `python sample.py --help`."""

import os

# Before torch starts its threads: ones that spin long while they wait starve a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


import json
import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import mmdit
from configs.launch import Verbatim, launch
from mmdit.checkpoints.native import file_hash
from mmdit.checkpoints.runs import newest_finished, weights_file
from mmdit.engine.pictures import save_grid
from mmdit.engine.precision import autocast, chosen_device, chosen_dtype
from mmdit.errors import UserError

log = logging.getLogger("mmdit.sample")
VERBATIM = (
    *("prompt", "negative_prompt", "prompt_file", "checkpoint", "out", "image"),
    *("autoencoder", "text.encoders", "text.tokenizers"),
)


def job(config: DictConfig, text: Verbatim) -> None:
    """Compose, build, paint."""
    prompts = read_prompts(text)
    check_numbers(config)
    out = Path(text.get("out") or "samples")
    if out.suffix.lower() == ".png" or out.is_file():
        raise UserError(f"out={out} must be a folder: each picture gets a name of its own in it")
    if ("image" in text) != (config.strength is not None):
        raise UserError("image=<file> and strength=<0 to 1> belong together: give both or neither")
    source = find_source(text.get("checkpoint"), config)
    device = chosen_device(config.device)
    pipe = load(source, config, text, device)
    if config.compile:
        pipe.mmdit.compile()
        pipe.autoencoder.compile()
    for remark in pipe.text.remarks(prompts):
        log.warning("note: %s", remark)

    image = read_image(Path(text["image"]), pipe, config) if "image" in text else None
    size = (pipe.image_size, pipe.image_size) if image is None else image.shape[:2]
    settings: dict[str, Any] = {
        "negative_prompt": text.get("negative_prompt", ""),
        "steps": pipe.steps if config.steps is None else config.steps,
        "height": size[0] if config.height is None else config.height,
        "width": size[1] if config.width is None else config.width,
        "strength": config.strength,
    }
    scale = pipe.guidance if config.guidance is None else config.guidance
    pipe.latent_size(settings["height"], settings["width"])
    facts = {
        **settings,
        "guidance": scale,
        "guide": OmegaConf.to_container(config.guide),
        "image": text.get("image"),
        "solver": instantiate(config.solver).func.__name__,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "text": OmegaConf.to_container(config.text),
        "weights": str(source),
        "weights_sha256": file_hash(source) if isinstance(source, Path) else None,
        "versions": {"mmdit": mmdit.__version__, "torch": torch.__version__},
    }
    wishes = [(prompt, config.seed + i) for prompt in prompts for i in range(config.num_images)]
    pictures = []
    strength = 1.0 if config.strength is None else config.strength
    steps = len(pipe.objective.shift.remaining(settings["steps"], strength=strength)) - 1
    with tqdm(total=len(wishes) * steps, unit="step", disable=None) as bar:
        for start in range(0, len(wishes), config.batch_size):
            batch = wishes[start : start + config.batch_size]
            pictures.append(
                pipe(
                    [prompt for prompt, _ in batch],
                    seeds=[seed for _, seed in batch],
                    image=image,
                    guidance=instantiate(config.guide, scale=scale),
                    solver=instantiate(config.solver),
                    progress=partial(bar.update, len(batch)),
                    **settings,
                ).cpu()
            )
    for path in write(torch.cat(pictures), wishes, facts, out):
        print(path)


def read_prompts(text: Verbatim) -> list[str]:
    """The prompts asked for, in order: `prompt`, or the lines of `prompt_file`."""
    if ("prompt" in text) == ("prompt_file" in text):
        raise UserError('give either prompt="..." or prompt_file=<file with one prompt a line>')
    if "prompt" in text:
        return [text["prompt"]]
    path = Path(text["prompt_file"])
    try:
        prompts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={path} cannot be read as UTF-8 text: {error}") from error
    if not prompts:
        raise UserError(f"prompt_file={path} is empty: write one prompt a line")
    return prompts


def check_numbers(config: DictConfig) -> None:
    """Refuse numbers that make no sense, by name; None stands for the model's default."""
    least = {"num_images": 1, "steps": 1, "height": 1, "width": 1, "batch_size": 1, "seed": 0}
    for name, low in least.items():
        value = config[name]
        if value is None and name in ("steps", "height", "width"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise UserError(f"{name}={value} must be a whole number, at least {low}")
    for name in ("guidance", "strength"):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(f"{name}={value} must be a number")


def find_source(checkpoint: str | None, config: DictConfig) -> Path | str:
    """What to paint with: a weight file of this project, or the name of public weights."""
    if checkpoint and not mmdit.is_native(checkpoint):
        if Path(checkpoint).is_dir() and not any(Path(checkpoint).rglob("*.safetensors")):
            return weights_file(Path(checkpoint), config.weights)  # which says what it lacks
        return checkpoint
    source = Path(checkpoint) if checkpoint else newest_finished(Path(config.runs))
    if source is None:
        raise UserError(
            f"there is no finished run in {config.runs}/: train one with `python train.py`, "
            "or give checkpoint=<run folder, file or hub id>"
        )
    return weights_file(source, config.weights)


def load(
    source: Path | str, config: DictConfig, text: Verbatim, device: torch.device
) -> mmdit.Pipeline:
    """The pipeline on its device. Public weights are cast; those of a run compute in autocast."""
    flags = {f"use_{kind}": config.text[f"use_{kind}"] for kind in ("clip_l", "clip_g", "t5")}
    public = {
        "preset": config.preset,
        "t5_length": config.text.t5_length,
        "autoencoder": text.get("autoencoder"),
        "encoders": text.get("text.encoders"),
        "tokenizers": text.get("text.tokenizers"),
        "allow_pickle": config.allow_pickle,
    }
    if isinstance(source, Path):
        pipe = mmdit.load_pipeline(source, device=device, **flags, **public)
        pipe.autocast = autocast(device, config.precision)
        return pipe
    dtype = chosen_dtype(device, config.precision)
    public["verify"] = config.verify
    return mmdit.load_pipeline(source, device=device, dtype=dtype, **flags, **public)


def read_image(path: Path, pipe: mmdit.Pipeline, config: DictConfig) -> torch.Tensor:
    """The picture to start from, uint8 (h, w, 3): upright, on white, of a size that fits.

    It is scaled to height and width where they are given, and cut at its edges to multiples of
    what the model needs where not.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            layer = picture.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image={path} cannot be read as a picture: {error}") from error
    flat = Image.new("RGBA", layer.size, "white")
    flat.alpha_composite(layer)
    unit = pipe.autoencoder.factor * pipe.mmdit.patch_size
    height = config.height or flat.height // unit * unit
    width = config.width or flat.width // unit * unit
    pipe.latent_size(height, width)
    if config.height or config.width:
        flat = flat.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (flat.width - width) // 2, (flat.height - height) // 2
    cut = flat.convert("RGB").crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cut))


def write(
    pictures: torch.Tensor, wishes: Sequence[tuple[str, int]], facts: dict[str, Any], out: Path
) -> list[Path]:
    """Write each picture with its facts as metadata, and a grid of them all; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    taken = [int(m[0]) for path in out.glob("*.png") if (m := re.match(r"\d+", path.name))]
    number = max(taken, default=0) + 1
    paths = []
    for i, ((prompt, seed), pixels) in enumerate(zip(wishes, pictures, strict=True)):
        words = re.sub(r"[^\w]+", "-", prompt, flags=re.ASCII).strip("-").lower()[:40].strip("-")
        path = out / f"{number + i:05d}-{words or 'picture'}-seed{seed}.png"
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        info.add_itxt("mmdit", json.dumps({"prompt": prompt, "seed": seed, **facts}))
        Image.fromarray(pixels.numpy()).save(path, pnginfo=info)
        paths.append(path)
    captions = [f"{prompt[:60]} ({seed})" for prompt, seed in wishes]
    paths.append(save_grid(pictures, captions, path=out / f"{number:05d}-grid.png"))
    return paths


if __name__ == "__main__":
    launch(job, config_name="sample", verbatim=VERBATIM)
