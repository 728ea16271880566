"""Paint with a trained model or public weights: see `python sample.py --help`."""

import json
import math
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import mmdit
from mmdit.checks import MOST_STEPS
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.values import seed_of, whole
from mmdit.data.images import BadImage, decode, read_bytes
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.plots import LARGEST_GRID, Thumbnails, png
from mmdit.precision import autocast, chosen_dtype
from mmdit.printable import logger, printable, show
from mmdit.registry import describe
from mmdit.runs.checkpoint import find_weights, hash_of_weights, newest_finished
from mmdit.runs.files import NumberedFiles
from mmdit.runs.status import mend
from mmdit.text.conditioning import ENCODERS

log = logger("mmdit.sample")
MOST_IMAGES = 1_000_000  # per prompt
LONGEST_PROMPT_FILE = 50_000_000  # characters
VERBATIM = (
    *("prompt", "negative_prompt", "prompt_file", "checkpoint", "out", "image"),
    *("autoencoder", "text.encoders", "text.tokenizers"),
)


def job(config: DictConfig, text: Verbatim) -> None:
    """Compose, build, paint."""
    prompts = read_prompts(text)
    check_numbers(config)
    picture = open_picture(Path(text["image"])) if "image" in text else None
    if (picture is None) != (config.strength is None):
        raise UserError("image=<file> and strength=<0 to 1> belong together: give both or neither")
    out = make_folder(Path(text.get("out") or "samples"))
    device = available(config.device)
    source = find_source(text.get("checkpoint"), config)
    pipe = load(source, config, text, device)
    if config.compile:
        pipe.mmdit.compile()
    for remark in pipe.text.remarks(prompts):
        log.warning("note: %s", remark)

    image = None if picture is None else fitted(picture, pipe, config)
    size = (pipe.image_size, pipe.image_size) if image is None else image.shape[:2]
    settings: dict[str, Any] = {
        "negative_prompt": text.get("negative_prompt", ""),
        "steps": pipe.steps if config.steps is None else config.steps,
        "height": size[0] if config.height is None else config.height,
        "width": size[1] if config.width is None else config.width,
        "strength": config.strength,
    }
    if config.guidance is None:
        config.guidance = pipe.guidance
    guide, solver = instantiate(config.guide), instantiate(config.solver)
    grid = instantiate(config.grid) if config.get("grid") else pipe.objective.grid
    pipe.latent_size(settings["height"], settings["width"])
    facts = {
        **settings,
        "guidance": config.guidance,
        "guide": OmegaConf.to_container(config.guide, resolve=True),
        "solver": solver.func.__name__,
        "grid": describe(grid),
        "shift": pipe.objective.shift.alpha,
        "dtype": str(pipe.mmdit.dtype).removeprefix("torch."),
        "precision": config.precision,
        "batch_size": config.batch_size,
        "text": OmegaConf.to_container(config.text),
        "t5_length": pipe.text.t5.length,
        "given": {key: value for key, value in text.items() if "prompt" not in key},
        "weights": str(source),
        "weights_sha256": hash_of_weights(source) if isinstance(source, Path) else None,
        "versions": {"mmdit": mmdit.__version__, "torch": torch.__version__},
    }
    wishes = ((prompt, config.seed + i) for prompt in prompts for i in range(config.num_images))
    count = len(prompts) * config.num_images
    files, grid_of = NumberedFiles(out), Thumbnails() if count <= LARGEST_GRID else None
    strength = 1.0 if config.strength is None else config.strength
    steps = len(pipe.objective.times(settings["steps"], strength=strength, grid=grid)) - 1
    with tqdm(total=count * steps, unit="step", disable=None) as bar:
        while batch := list(islice(wishes, config.batch_size)):
            images = pipe(
                [prompt for prompt, _ in batch],
                seeds=[seed for _, seed in batch],
                image=image,
                guidance=guide,
                solver=solver,
                grid=grid,
                progress=lambda *_, batch=batch: bar.update(len(batch)),
                **settings,
            ).cpu()
            for (prompt, seed), pixels in zip(batch, images, strict=True):
                counted = {"function_evaluations": pipe.function_evaluations}
                data = described_png(pixels, prompt, {"seed": seed, **facts, **counted})
                tqdm.write(printable(files.add(f"{slug(prompt)}-seed{seed}.png", data)))
                if grid_of is not None:
                    grid_of.add(pixels, f"{prompt[:60]} ({seed})")
    if grid_of is None:
        show(f"no grid of {count} images: one of more than {LARGEST_GRID} could not be looked at")
    else:
        show(files.add("grid.png", png(grid_of.image()), first=files.first))


def read_prompts(text: Verbatim) -> list[str]:
    """The prompts asked for, in order: `prompt`, or the lines of `prompt_file`."""
    if ("prompt" in text) == ("prompt_file" in text):
        raise UserError('give either prompt="..." or prompt_file=<file with one prompt a line>')
    if "prompt" in text:
        return [text["prompt"]]
    path = Path(text["prompt_file"])
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors begin with a mark
            content = file.read(LONGEST_PROMPT_FILE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={path} cannot be read as UTF-8 text: {error}") from error
    if len(content) > LONGEST_PROMPT_FILE:
        raise UserError(
            f"prompt_file={path} is longer than {LONGEST_PROMPT_FILE:,} characters: give "
            "its prompts in several files"
        )
    if not content:
        raise UserError(f"prompt_file={path} is empty: write one prompt a line")
    # Lines alone end a prompt, not the other marks at which `splitlines` cuts.
    return content.removesuffix("\n").split("\n")


def check_numbers(config: DictConfig) -> None:
    """Refuse values that make no sense, by name; None stands for the model's default."""
    whole(config, "num_images", most=MOST_IMAGES)
    whole(config, "batch_size")
    seed_of(config, images=config.num_images)
    if config.steps is not None:
        whole(config, "steps", most=MOST_STEPS)
    for name in ("height", "width", "text.t5_length"):
        if OmegaConf.select(config, name) is not None:
            whole(config, name)
    for name in ("guidance", "strength"):
        value = config[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise UserError(f"{name}={value} must be a number")
    if config.strength is not None and not 0 <= config.strength <= 1:
        raise UserError(f"strength={config.strength} must lie in [0, 1]")
    switches = {name: config[name] for name in ("compile", "verify", "allow_pickle")}
    switches |= {f"text.{name}": config.text[name] for name in config.text if name != "t5_length"}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise UserError(f"{name}={value} must be true or false")


def make_folder(out: Path) -> Path:
    """The folder of the pictures, made before any of them is painted."""
    if out.suffix.lower() == ".png" or out.is_file():
        raise UserError(f"out={out} must be a folder: each picture gets a name of its own in it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made a folder: {error}") from error
    return out


def find_source(checkpoint: str | None, config: DictConfig) -> Path | str:
    """What to paint with: weights of this project, or the name of public weights."""
    path = Path(checkpoint).expanduser() if checkpoint else newest_finished(Path(config.runs))
    if path is None:
        raise UserError(
            f"there is no finished run in {config.runs}/: train one with `python train.py`, "
            "or give checkpoint=<run folder, file or hub id>"
        )
    looked_for = ("*.safetensors", "adapter_config.json")  # of a LoRA, which is named as such
    places = [
        f"{folder}{name}" for name in looked_for for folder in ("", "*/")
    ]  # not all of a disk
    holds_none = path.is_dir() and not any(any(path.glob(place)) for place in places)
    if checkpoint and not mmdit.is_native(path) and not holds_none:
        return checkpoint
    mend(path)
    return find_weights(path, config.weights)  # which says what a folder without weights lacks


def load(
    source: Path | str, config: DictConfig, text: Verbatim, device: torch.device
) -> mmdit.Pipeline:
    """The pipeline on its device. Public weights are cast; those of a run compute in autocast."""
    flags = {f"use_{kind}": config.text[f"use_{kind}"] for kind in ENCODERS}
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


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB, by the policies of `mmdit.data.images`.

    Raises:
        UserError: it is none, or cannot be read.
    """
    try:
        return Image.fromarray(decode(read_bytes(path)))
    except (BadImage, OSError) as error:
        raise UserError(f"image={path} cannot be read as a picture: {error}") from error


def fitted(picture: Image.Image, pipe: mmdit.Pipeline, config: DictConfig) -> torch.Tensor:
    """The picture as uint8 (h, w, 3), of a size that the model takes.

    Scaled to height and width where they are given (one alone keeps the proportions, nearly), and
    cut at its edges to multiples of what the model needs where not.
    """
    unit = pipe.autoencoder.factor * pipe.mmdit.patch_size
    scale = 1.0
    if config.height or config.width:
        wide, high = picture.size
        scale = (config.height or config.width) / (high if config.height else wide)
    width = config.width or int(picture.width * scale) // unit * unit
    height = config.height or int(picture.height * scale) // unit * unit
    largest = unit * pipe.mmdit.positions.shape[0]
    if not (unit <= height <= largest and unit <= width <= largest):
        raise UserError(
            f"image is {picture.width} x {picture.height}: this model takes sides from {unit} to "
            f"{largest} pixels; height= and width= scale it"
        )
    pipe.latent_size(height, width)
    if config.height or config.width:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    cut = picture.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cut))


def slug(prompt: str) -> str:
    """The beginning of a prompt, as part of a file's name."""
    words = re.sub(r"[^\w]+", "-", prompt, flags=re.ASCII).strip("-").lower()
    return words[:40].strip("-") or "picture"


def described_png(pixels: torch.Tensor, prompt: str, facts: dict[str, Any]) -> bytes:
    """An image as a PNG, with its prompt and its facts as metadata."""
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("mmdit", json.dumps({"prompt": prompt, **facts}))
    return png(Image.fromarray(pixels.numpy()), pnginfo=info)


def main() -> None:
    """Generate images, as the command line asks."""
    launch(job, config_name="sample", verbatim=VERBATIM)
