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

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import mmdit
from configs.launch import Verbatim, launch
from mmdit.checkpoints.native import file_hash
from mmdit.checkpoints.runs import newest_finished, weights_file
from mmdit.engine.pictures import save_grid
from mmdit.engine.precision import autocast, chosen_device
from mmdit.errors import UserError

log = logging.getLogger("mmdit.sample")
VERBATIM = ("prompt", "negative_prompt", "prompt_file", "checkpoint", "out")


def job(config: DictConfig, text: Verbatim) -> None:
    """Compose, build, paint."""
    prompts = read_prompts(text)
    check_numbers(config)
    out = Path(text.get("out") or "samples")
    if out.suffix.lower() == ".png" or out.is_file():
        raise UserError(f"out={out} must be a folder: each picture gets a name of its own in it")
    weights = find_weights(text.get("checkpoint"), config)
    device = chosen_device(config.device)
    pipe = mmdit.load_pipeline(weights).to(device)
    pipe.autocast = autocast(device, config.precision)
    for remark in pipe.text.remarks(prompts):
        log.warning("note: %s", remark)

    settings: dict[str, Any] = {
        "negative_prompt": text.get("negative_prompt", ""),
        "steps": pipe.steps if config.steps is None else config.steps,
        "guidance": pipe.guidance if config.guidance is None else config.guidance,
        "height": pipe.image_size if config.height is None else config.height,
        "width": pipe.image_size if config.width is None else config.width,
    }
    pipe.latent_size(settings["height"], settings["width"])
    facts = {
        **settings,
        "solver": instantiate(config.solver).func.__name__,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "weights": str(weights),
        "weights_sha256": file_hash(weights),
        "versions": {"mmdit": mmdit.__version__, "torch": torch.__version__},
    }
    wishes = [(prompt, config.seed + i) for prompt in prompts for i in range(config.num_images)]
    pictures = []
    with tqdm(total=len(wishes) * settings["steps"], unit="step", disable=None) as bar:
        for start in range(0, len(wishes), config.batch_size):
            batch = wishes[start : start + config.batch_size]
            pictures.append(
                pipe(
                    [prompt for prompt, _ in batch],
                    seeds=[seed for _, seed in batch],
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
    guidance = config.guidance
    if guidance is not None and (
        isinstance(guidance, bool) or not isinstance(guidance, int | float)
    ):
        raise UserError(f"guidance={guidance} must be a number")


def find_weights(checkpoint: str | None, config: DictConfig) -> Path:
    """The file to paint with: of `checkpoint`, or of the newest finished run."""
    source = Path(checkpoint) if checkpoint else newest_finished(Path(config.runs))
    if source is None:
        raise UserError(
            f"there is no finished run in {config.runs}/: train one with `python train.py`, "
            "or give checkpoint=<run folder or file>"
        )
    return weights_file(source, config.weights)


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
