"""Images of a command line: opening them, fitting them to a model, writing them with metadata."""

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
    """Open the image of `name`=<file>: uint8 (h, w, 3), decoded as by `mmdit.data.images`.

    Returns:
        The image, or None if the command line does not give one.

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
    """Fit an image to a size that the model accepts.

    It is scaled to height and width if they are given (approximately proportionally if only one
    is), and otherwise centre-cropped to the nearest smaller multiples of the model's unit.

    Args:
        name: the image's key on the command line, for messages.
        image: uint8 (h, w, 3).
        pipe: the model.
        height, width: size in pixels; None for the image's.

    Returns:
        uint8 (h', w', 3).

    Raises:
        UserError: the size is too small or too large for the model, or not a multiple of its unit.
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
            f"{name} is {opened.width} x {opened.height}: this model accepts sides from {unit} to "
            f"{largest} pixels; scale it with height= and width="
        )
    pipe.latent_size(height, width)
    if scaled:
        opened = opened.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (opened.width - width) // 2, (opened.height - height) // 2
    cropped = opened.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cropped))


def slug(prompt: str) -> str:
    """The beginning of a prompt, as part of a file name."""
    words = re.sub(r"[^\w]+", "-", prompt, flags=re.ASCII).strip("-").lower()
    return words[:40].strip("-") or "image"


def png_with_metadata(pixels: torch.Tensor, prompt: str, metadata: dict[str, Any]) -> bytes:
    """An image as PNG bytes, with its prompt and metadata in text chunks."""
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("mmdit", json.dumps({"prompt": prompt, **metadata}))
    return png(Image.fromarray(pixels.numpy()), pnginfo=info)
