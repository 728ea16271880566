"""Images as a command line names and writes them: opened, fitted to a model, described."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmdit.cli.launch import Verbatim
from mmdit.data.images import BadImage, decode, read_bytes
from mmdit.errors import UserError
from mmdit.pipeline import Pipeline
from mmdit.plots import png


def open_image(text: Verbatim, name: str) -> torch.Tensor | None:
    """The image that `name`= gives as uint8 (h, w, 3), by the policies of `mmdit.data.images`.

    Raises:
        UserError: it is not an image, or cannot be read.
    """
    if name not in text:
        return None
    try:
        return torch.from_numpy(decode(read_bytes(Path(text[name]))))
    except (BadImage, OSError) as error:
        raise UserError(f"{name}={text[name]} cannot be read as an image: {error}") from error


def fitted(
    name: str, image: torch.Tensor, pipe: Pipeline, height: int | None, width: int | None
) -> torch.Tensor:
    """An image (h, w, 3) at a size that the model takes.

    Scaled to height and width where they are given (one alone keeps the proportions, nearly), and
    cut at its edges to multiples of what the model needs where not.
    """
    opened = Image.fromarray(image.numpy())
    unit = pipe.autoencoder.factor * pipe.mmdit.patch_size
    scale = 1.0
    scaled = height is not None or width is not None
    if height is not None:
        scale = height / opened.height
    elif width is not None:
        scale = width / opened.width
    width = width or int(opened.width * scale) // unit * unit
    height = height or int(opened.height * scale) // unit * unit
    largest = pipe.autoencoder.factor * pipe.mmdit.longest_side
    if not (unit <= height <= largest and unit <= width <= largest):
        raise UserError(
            f"{name} is {opened.width} x {opened.height}: this model takes sides from {unit} to "
            f"{largest} pixels; height= and width= scale it"
        )
    pipe.latent_size(height, width)
    if scaled:
        opened = opened.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (opened.width - width) // 2, (opened.height - height) // 2
    cut = opened.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cut))


def slug(prompt: str) -> str:
    """The beginning of a prompt, as part of a file's name."""
    words = re.sub(r"[^\w]+", "-", prompt, flags=re.ASCII).strip("-").lower()
    return words[:40].strip("-") or "image"


def described_png(pixels: torch.Tensor, prompt: str, facts: dict[str, Any]) -> bytes:
    """An image as a PNG, with its prompt and its facts as metadata."""
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("mmdit", json.dumps({"prompt": prompt, **facts}))
    return png(Image.fromarray(pixels.numpy()), pnginfo=info)
