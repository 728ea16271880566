"""Prior preservation (Ruiz et al. 2023, DreamBooth): images of a class against forgetting it.

The model that training starts from makes them first. They are kept in `runs/class-images-<hash>/`,
named by what determines them, and used again by every run of the same recipe. A generation that was
stopped goes on with the missing images.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from mmdit.atomic import write_atomically
from mmdit.checks import MOST_STEPS, number, seed_number, whole_number
from mmdit.cli.images import png_with_metadata
from mmdit.cli.reading import TrainingRequest
from mmdit.data import CaptionedImages, Constant, Mixture, image_folder
from mmdit.data.dataset import Data
from mmdit.engine.preservation import OwnPrediction, changed_layers
from mmdit.errors import UserError
from mmdit.nn.stored import compute_in_float32
from mmdit.out_of_memory import enough_memory
from mmdit.pipeline import Pipeline
from mmdit.printable import logger
from mmdit.recipes import config_hash
from mmdit.registry import describe
from mmdit.request import Request
from mmdit.runs.folder import RunFolder
from mmdit.text.waiting import remember

log = logger("mmdit.train")
RECIPE = "recipe.json"


def with_class_images(request: TrainingRequest) -> TrainingRequest:
    """The request with class images mixed into its data, if its config asks for them.

    The data of the config are then the part 'instance', whose images are validated on.

    Raises:
        UserError: a value of `prior` makes no sense, or the images cannot be made.
    """
    prior = request.config.get("prior")
    if prior is None or prior.prompt is None or "_target_" in prior:
        return request
    check(prior)
    if request.initial is None:
        raise UserError("prior= needs the model that makes the class images: initial=<source>")
    check_square(request.data, request.config.image_size)
    if request.config.get("adapter") is not None:  # a mistake in it shows before images are made
        instantiate(request.config.adapter)(request.initial.pipeline)
    folder = generated(request, prior)
    images = request.processes.once(lambda: opened(folder, request.config, prior.prompt))
    data = Mixture(
        parts={"instance": request.data, "class": images},  # type: ignore[dict-item]
        shares={"instance": 1 - prior.share, "class": prior.share},
    )
    plain = {**request.plain, "data": {**request.plain["data"], "found": data.fingerprint()}}
    return request._replace(data=data, validation=data.view("validation"), plain=plain)


def own_prediction(config: DictConfig, pipeline: Pipeline) -> OwnPrediction | None:
    """The form of `prior` that needs no class images, if the config asks for it.

    Raises:
        UserError: a value makes no sense, or no adapter changes a layer of the model.
    """
    prior = config.get("prior")
    if prior is None or "_target_" not in prior:
        return None
    if prior.prompt is None:
        raise UserError('prior=prediction needs what the model is to keep: class_prompt="a dog"')
    changed_layers(pipeline)
    found: OwnPrediction = instantiate(prior)
    return found


def check(prior: DictConfig) -> None:
    """Raise UserError, naming the key, if a value of the section `prior` makes no sense."""
    whole_number("prior.images", prior.images)
    number("prior.share", prior.share, above=0, below=1)
    whole_number("prior.steps", prior.steps, most=MOST_STEPS)
    number("prior.guidance", prior.guidance)
    seed_number("prior.seed", prior.seed, images=prior.images)
    whole_number("prior.batch_size", prior.batch_size)


def check_square(data: Data, side: int) -> None:
    """Raise UserError unless all images are squares of this side, as the class images are."""
    sizes = {data.size_of(index) for index in range(len(data))}  # type: ignore[attr-defined]
    if other := sizes - {(side, side)}:
        height, width = min(other)
        raise UserError(
            f"prior=class_images: its images are {side} x {side} pixels, but data has some of "
            f"{width} x {height}: data.max_ratio=1 crops to squares"
        )


def generated(request: TrainingRequest, prior: DictConfig) -> Path:
    """The folder of the class images, of which the missing ones are made now, by all processes."""
    assert request.initial is not None
    pipeline, processes = request.initial.pipeline, request.processes
    recipe = {
        "weights_sha256": request.initial.sha256,
        "prompt": prior.prompt,
        **{key: prior[key] for key in ("images", "steps", "guidance", "seed")},
        "image_size": pipeline.image_size,
        "objective": describe(pipeline.objective),
    }
    folder = Path(request.config.runs) / f"class-images-{config_hash(recipe)}"
    with held(folder, recipe, write=processes.main and bool(missing(folder, prior.images))):
        numbers = processes.broadcast(missing(folder, prior.images))
        if not numbers:
            log.info("reusing the %d class images of %s", prior.images, folder)
            return folder
        log.info("making %d of %d class images in %s", len(numbers), prior.images, folder)
        if request.dtype == torch.float32:
            compute_in_float32(pipeline.requires_grad_(False))
        pipeline.to(request.device)
        if request.text_device is not None:
            pipeline.text.to(request.text_device)
        own = numbers[processes.rank :: processes.world_size]
        hidden = None if processes.main else True  # None hides it where there is no terminal
        with tqdm(total=len(own), desc="class images", unit="image", disable=hidden) as bar:
            for n, pixels in sampled(pipeline, own, request, prior):
                metadata = {**recipe, "seed": prior.seed + n}
                data = png_with_metadata(pixels, prior.prompt, metadata)
                write_atomically(folder / name_of(n), data)
                bar.update()
        processes.barrier()
    return folder


def sampled(
    pipeline: Pipeline, numbers: Sequence[int], request: TrainingRequest, prior: DictConfig
) -> Iterator[tuple[int, Tensor]]:
    """The images of these numbers, uint8 (h, w, 3); image i starts from the noise of seed + i."""
    with request.precision():
        remember(pipeline.text, [prior.prompt, ""], shown=False)
        condition = pipeline.encode([prior.prompt])
    for start in range(0, len(numbers), prior.batch_size):
        batch = numbers[start : start + prior.batch_size]
        wanted = Request(
            condition,
            num_images=len(batch),
            seeds=[prior.seed + number for number in batch],
            steps=prior.steps,
            guidance=prior.guidance,
        )
        doing = f"making {len(batch)} class images at a time"
        with enough_memory(doing, "a smaller prior.batch_size"), request.precision():
            images = pipeline.sample(wanted).images.cpu()
        yield from zip(batch, images, strict=True)


@contextmanager
def held(folder: Path, recipe: dict[str, Any], *, write: bool) -> Iterator[None]:
    """Hold a folder of class images while the block writes to it; otherwise it is only read."""
    if not write:
        yield
        return
    run = RunFolder(folder, wait=True)  # another run may be making the same images
    try:
        write_atomically(folder / RECIPE, json.dumps(recipe, indent=1).encode())
        yield
    finally:
        run.close()


def missing(folder: Path, images: int) -> list[int]:
    """The numbers of the images that are not there yet."""
    return [number for number in range(images) if not (folder / name_of(number)).is_file()]


def name_of(number: int) -> str:
    """The file name of a class image."""
    return f"{number:06d}.png"


def opened(folder: Path, config: DictConfig, prompt: str) -> CaptionedImages:
    """The class images as a data set of square images, each with the prompt as its caption."""
    images: CaptionedImages = image_folder(
        root=str(folder),
        captions=Constant(caption=prompt),
        image_size=config.image_size,
        unit=config.image_size,
        crop="centre",
        validation_fraction=None,
        max_bad_fraction=0.0,
        seed=config.seed,
    )
    return images
