"""Reconstruction quality of an autoencoder (Table 3).

Protocol `autoencoder-1`: images are encoded to the mean of their posterior and decoded. Reported
are PSNR and SSIM between image and reconstruction, averaged over images; with clip=, also the
Frechet distance between CLIP's image features of all images and of all reconstructions. Images are
the validation split of shapes, or the files of a folder in the order of their names, of which the
central square is scaled to image_size.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from mmdit.checks import whole_number
from mmdit.cli.eval.subject import open_features, results_folder, shapes_for, table, write_results
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.subject import computing, facts_of, open_named
from mmdit.data.images import BadImage, decode, read_bytes
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.loading import Run
from mmdit.metrics.distances import frechet_distance
from mmdit.metrics.reconstruction import psnr, ssim
from mmdit.models.autoencoder import Autoencoder
from mmdit.pipeline import to_latents, to_pixels
from mmdit.plots import grid_image, png
from mmdit.precision import Autocast
from mmdit.study.protocol import Features

PROTOCOL = "autoencoder-1"
VERBATIM = ("checkpoint", "out", "images", "clip")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHOWN = 8  # images in the grid, each above its reconstruction

Images = Callable[[Sequence[int]], Tensor]  # indices -> uint8 (b, h, w, 3)


class Opened(NamedTuple):
    """An autoencoder, the location of its weights, and its precision."""

    module: Autoencoder
    path: Path
    run: Path | None
    autocast: Autocast
    facts: dict[str, Any]


class Measured(NamedTuple):
    """Metrics of each image, and the first images for the grid."""

    psnr: list[float]
    ssim: list[float]
    features: tuple[Tensor, Tensor] | None  # of the images and of their reconstructions
    shown: tuple[Tensor, Tensor]


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, build the model, reconstruct images, write the results."""
    for key, least in (("samples", 2), ("batch_size", 1)):
        whole_number(key, config[key], least)
    size = None if config.image_size is None else whole_number("image_size", config.image_size)
    opened = open_autoencoder(config, text)
    images, count, data_facts = find_images(opened, config, text, size)
    features, clip_facts = open_features(text, available(config.device))
    out = results_folder(text, opened.path, "autoencoder")
    measured = measure(opened, images, features, range(count), config.batch_size)
    mean_psnr = sum(measured.psnr) / count
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        **opened.facts,
        **clip_facts,
        **data_facts,
        "samples": count,
        "seed": None,  # nothing is drawn: the latents are the means of the posterior
        "latent_channels": opened.module.latent_channels,
        "factor": opened.module.factor,
        "psnr": mean_psnr if math.isfinite(mean_psnr) else None,  # infinite where all are equal
        "ssim": sum(measured.ssim) / count,
    }
    if measured.features is not None:
        report["fd"] = frechet_distance(*measured.features)
    captions = ["image"] * len(measured.shown[0]) + ["reconstruction"] * len(measured.shown[1])
    grid = grid_image(torch.cat(measured.shown), captions, columns=SHOWN)
    write_results(out, "autoencoder", report, as_markdown(report), {".png": png(grid)})


def open_autoencoder(config: DictConfig, text: Verbatim) -> Opened:
    """Open the autoencoder of a run or of public weights.

    Raises:
        UserError: checkpoint= is not given, or cannot be read.
    """
    if not text.get("checkpoint"):
        raise UserError("give checkpoint=<run, file, folder or hub id> of an autoencoder")
    device = available(config.device)
    source = open_named(config, text, ["autoencoder"])
    compute, dtype = computing(source, device, config.precision)
    module = source.part("autoencoder", Autoencoder, dtype=dtype).to(device)
    run = source.path if isinstance(source, Run) else None
    return Opened(module, source.path, run, compute, facts_of(source))


def find_images(
    opened: Opened, config: DictConfig, text: Verbatim, size: int | None
) -> tuple[Images, int, dict[str, Any]]:
    """The images to reconstruct, their number, and their description for the report.

    Raises:
        UserError: there are fewer images than requested, or they do not fit the model.
    """
    factor = opened.module.factor
    if "images" not in text:
        source = opened.run
        data = shapes_for(source, config, "validation", image_size=size)
        facts = {"images": "shapes, validation", "image_size": data.image_size}
        return lambda indices: data.batch(indices).images, config.samples, facts
    folder, side = Path(text["images"]), 256 if size is None else size
    if side % factor:
        raise UserError(f"image_size={side} must be a multiple of {factor}, the model's factor")
    if not folder.is_dir():
        raise UserError(f"images={folder}: there is no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < config.samples:
        raise UserError(
            f"images={folder} contains {len(files)} images ({', '.join(SUFFIXES)}), but "
            f"samples={config.samples} are requested"
        )

    def read(indices: Sequence[int]) -> Tensor:
        return torch.stack([open_image(files[i], side) for i in indices])

    return read, config.samples, {"images": str(folder), "image_size": side}


def open_image(path: Path, side: int) -> Tensor:
    """The central square of an image, decoded as by `mmdit.data.images`: uint8 (side, side, 3).

    Raises:
        UserError: it is not an image, or cannot be read.
    """
    try:
        image = Image.fromarray(decode(read_bytes(path)))
    except (BadImage, OSError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square))


@torch.no_grad()
def measure(
    opened: Opened,
    images: Images,
    features: Features | None,
    indices: Sequence[int],
    batch_size: int,
) -> Measured:
    """Encode, decode and compare images, batch by batch."""
    levels: list[float] = []
    similarities: list[float] = []
    seen: list[tuple[Tensor, Tensor]] = []
    shown: list[tuple[Tensor, Tensor]] = []
    starts = range(0, len(indices), batch_size)
    for start in tqdm(starts, desc="reconstructing", unit="batch", disable=None):
        truth = images(indices[start : start + batch_size])
        with opened.autocast():
            again = to_pixels(opened.module.decode(to_latents(opened.module, truth))).cpu()
        pairs = list(zip(again.split(1), truth.split(1), strict=True))
        levels += [psnr(*pair) for pair in pairs]
        similarities += [ssim(*pair) for pair in pairs]
        if features is not None:
            two = (features.image_embeddings(truth), features.image_embeddings(again))
            seen.append((two[0].cpu(), two[1].cpu()))
        shown.append((truth[:SHOWN], again[:SHOWN]))
    first = tuple(torch.cat(side)[:SHOWN] for side in zip(*shown, strict=True))
    both = tuple(torch.cat(side) for side in zip(*seen, strict=True)) if seen else None
    return Measured(levels, similarities, both, first)  # type: ignore[arg-type]


def as_markdown(report: dict[str, Any]) -> str:
    """A table with one row, as in Table 3."""
    figures = {"psnr": "PSNR, dB", "ssim": "SSIM", "fd": "Frechet distance"}
    shown = {key: name for key, name in figures.items() if key in report}
    head = (
        f"{report['protocol']}: {report['weights']}, sha256 {report['weights_sha256'][:16]}, "
        f"{report['samples']} images of {report['images']}, {report['image_size']} px\n"
    )
    row = [report["latent_channels"], report["factor"]]
    row += ["∞" if report[key] is None else report[key] for key in shown]
    return f"{head}\n{table(('channels', 'factor', *shown.values()), [row])}"


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="evaluate_autoencoder", verbatim=VERBATIM)
