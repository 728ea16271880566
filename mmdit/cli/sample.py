"""Sample with a trained model or public weights: see `python sample.py --help`."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

import mmdit
from mmdit.checks import flag, number, seed_number, whole_number
from mmdit.cli.adapters import load_adapters
from mmdit.cli.images import fitted, open_image, png_with_metadata, slug
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.subject import Subject, open_subject
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.flow.caches import Cache
from mmdit.flow.condition import Condition, concatenate
from mmdit.models.controlnet import ControlledMMDiT
from mmdit.models.mmdit import MMDiT
from mmdit.models.tabulated import expect_smaller, table_sizes
from mmdit.plots import LARGEST_GRID, Thumbnails, png
from mmdit.precision import Autocast
from mmdit.printable import logger, printable, show
from mmdit.registry import describe
from mmdit.request import Request
from mmdit.runs.files import NumberedFiles

log = logger("mmdit.sample")
MOST_IMAGES = 1_000_000  # per prompt
PROMPTS_KEPT = 100  # cached encodings, 1 to 5 MB each at the size of SD3
LONGEST_PROMPT_FILE = 50_000_000  # characters
VERBATIM = (
    *("prompt", "negative_prompt", "prompt_file", "checkpoint", "out", "image"),
    *("control", "controlnet", "lora"),
    *("autoencoder", "text.encoders", "text.tokenizers"),
)


def job(config: DictConfig, text: Verbatim) -> None:
    """Check, load, sample, write."""
    prompts = read_prompts(text)
    image, control = (open_image(text, name) for name in ("image", "control"))
    check(config, text, image)
    out = make_folder(Path(text.get("out") or "samples"))
    subject = open_subject(
        config,
        text,
        hash_public=False,
        t5_length=config.text.t5_length,
        allow_pickle=config.allow_pickle,
        verify=config.verify,
        keep_quantized=config.keep_quantized,
        network_waits=config.tables,
    )
    pipe, precision = subject.pipe, subject.autocast
    adapters = load_adapters(pipe, text["lora"]) if "lora" in text else []
    if "controlnet" in text:
        pipe.mmdit = controlled(pipe, config, text)
    for remark in pipe.text.remarks(prompts):
        log.warning("note: %s", remark)

    with precision():
        options = options_of(pipe, config, image, control)
    encode = encoder(pipe, precision, kept=None if config.tables else PROMPTS_KEPT)
    negative_prompt = text.get("negative_prompt", "")
    if config.tables:
        with precision():
            tabulate(pipe, prompts, negative_prompt, options, encode=encode)
        pipe.mmdit.to(available(config.device))
    if config.compile:
        pipe.mmdit.compile()
    metadata = {**metadata_of(subject, config, text, options), "lora": adapters}
    wanted = ((prompt, config.seed + i) for prompt in prompts for i in range(config.num_images))
    count = len(prompts) * config.num_images
    with tqdm(total=count * steps_of(pipe, options), unit="step", disable=None) as bar:
        samples = sampled(
            pipe,
            wanted,
            negative_prompt,
            options,
            batch_size=config.batch_size,
            encode=encode,
            precision=precision,
            bar=bar,
        )
        write(samples, count, out, metadata)


def check(config: DictConfig, text: Verbatim, image: torch.Tensor | None) -> None:
    """Reject invalid settings before any weights are read; null is the model's default.

    Raises:
        UserError: a value is invalid; the message names its key.
    """
    whole_number("num_images", config.num_images, most=MOST_IMAGES)
    whole_number("batch_size", config.batch_size)
    seed_number("seed", config.seed, images=config.num_images)
    if config.text.t5_length is not None:
        whole_number("text.t5_length", config.text.t5_length)
    numbers = {name: config[name] for name in ("height", "width", "steps", "guidance")}
    Request("", negative_prompt=text.get("negative_prompt"), **numbers)
    Request("", image=image, strength=config.strength)
    Request("", solver=instantiate(config.solver), cache=cache_of(config))
    if ("control" in text) != ("controlnet" in text):
        raise UserError(
            "control=<image> and controlnet=<file, folder or hub id> belong together: give both "
            "or neither"
        )
    number("control_strength", config.control_strength)
    names = ("compile", "tables", "verify", "allow_pickle", "keep_quantized")
    switches = {name: config[name] for name in names}
    switches |= {f"text.{name}": config.text[name] for name in config.text if name != "t5_length"}
    for name, value in switches.items():
        flag(name, value)


def options_of(
    pipe: mmdit.Pipeline,
    config: DictConfig,
    image: torch.Tensor | None,
    control: torch.Tensor | None,
) -> dict[str, Any]:
    """The options that all images share, as arguments of `mmdit.Request`."""
    if config.guidance is None:
        config.guidance = pipe.guidance  # the guide's arguments refer to it
    height, width = config.height, config.width
    if image is not None:
        image = fitted("image", image, pipe, height, width)
        height, width = image.shape[:2]
    if control is not None:
        control = fitted("control", control, pipe, height, width)
        height, width = control.shape[:2]
    options = {
        "steps": pipe.steps if config.steps is None else config.steps,
        "height": pipe.image_size if height is None else height,
        "width": pipe.image_size if width is None else width,
        "image": image,
        "strength": config.strength,
        "guidance": instantiate(config.guide),
        "solver": instantiate(config.solver),
        "grid": instantiate(config.grid) if config.get("grid") else pipe.objective.grid,
        "cache": cache_of(config),
    }
    pipe.latent_size(options["height"], options["width"])
    if control is not None:  # encoded once for all images
        options["extra"] = {"control": pipe.encode_control(control[None])}
    return options


def cache_of(config: DictConfig) -> Cache | None:
    """The cache of the config; None is full sampling.

    Raises:
        UserError: one of its values is out of range.
    """
    return instantiate(config.cache) if config.get("cache") else None


def metadata_of(
    subject: Subject, config: DictConfig, text: Verbatim, options: dict[str, Any]
) -> dict[str, Any]:
    """The metadata that all images share: what reproduces them, except for prompt and seed."""
    pipe = subject.pipe
    control = {"control_strength": config.control_strength} if "control" in text else {}
    return {
        "negative_prompt": text.get("negative_prompt", ""),
        **{name: options[name] for name in ("steps", "height", "width", "strength")},
        "guidance": scale_of(options["guidance"]),
        "guide": OmegaConf.to_container(config.guide, resolve=True),
        "solver": options["solver"].func.__name__,
        "grid": describe(options["grid"]),
        "cache": describe(options["cache"]) if options["cache"] is not None else None,
        "shift": pipe.objective.shift.alpha,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "precision": config.precision,
        "batch_size": config.batch_size,
        "tables": config.tables,
        "text": OmegaConf.to_container(config.text),
        "t5_length": pipe.text.t5.length,
        "given": {key: value for key, value in text.items() if "prompt" not in key},
        "weights": subject.facts["weights"],
        "weights_sha256": subject.facts["weights_sha256"],
        "versions": {"mmdit": mmdit.__version__, "torch": torch.__version__},
        **control,
    }


def scale_of(guide: Any) -> float | None:
    """The scale of the innermost guidance; None if it has no scale."""
    while hasattr(guide, "inner"):
        guide = guide.inner
    return getattr(guide, "scale", None)


def steps_of(pipe: mmdit.Pipeline, options: dict[str, Any]) -> int:
    """Solver steps per image: fewer than requested if sampling starts from an image."""
    strength = 1.0 if options["strength"] is None else options["strength"]
    return len(pipe.objective.times(options["steps"], strength=strength, grid=options["grid"])) - 1


Encode = Callable[[str], Condition]


def encoder(pipe: mmdit.Pipeline, precision: Autocast, *, kept: int | None) -> Encode:
    """A function that encodes a prompt alone, so that its encoding does not depend on others.

    Args:
        pipe: the model.
        precision: context that sets the model's precision.
        kept: how many encodings are cached, the latest; None is all.
    """

    @lru_cache(maxsize=kept)
    def encode(prompt: str) -> Condition:
        with precision():
            return pipe.encode([prompt])

    return encode


def tabulate(
    pipe: mmdit.Pipeline,
    prompts: Sequence[str],
    negative_prompt: str,
    options: dict[str, Any],
    *,
    encode: Encode,
) -> None:
    """Replace the network's modulation layers by tables for all prompts, computed where text is.

    Args:
        pipe, negative_prompt, options, encode: as in `sampled`.
        prompts: that will be sampled; some may be equal.

    Raises:
        UserError: the network has no such layers, or the tables would take more memory.
    """
    distinct = [*dict.fromkeys(prompts)]
    before = bytes_of(pipe.mmdit)
    # Encoding may take long: first what can be known without.
    expect_smaller(table_sizes(pipe.mmdit, max(1, steps_of(pipe, options)), len(distinct)))
    negative = encode(negative_prompt) if options["guidance"].reads_negative else None
    condition = concatenate([encode(prompt) for prompt in distinct])
    request = Request(condition, negative_prompt=negative, **options)
    pipe.tabulate(request, device=pipe.autoencoder.device)
    after = bytes_of(pipe.mmdit)
    log.info("tables: the network takes %.2f GB instead of %.2f GB", after / 1e9, before / 1e9)


def bytes_of(network: nn.Module) -> int:
    """The bytes of a network's parameters and buffers."""
    return sum(x.nbytes for x in chain(network.parameters(), network.buffers()))


class Sampled(NamedTuple):
    """An image and the metadata that is specific to it."""

    pixels: torch.Tensor  # uint8 (h, w, 3), on the CPU
    prompt: str
    seed: int
    function_evaluations: float


def sampled(
    pipe: mmdit.Pipeline,
    wanted: Iterator[tuple[str, int]],
    negative_prompt: str,
    options: dict[str, Any],
    *,
    batch_size: int,
    encode: Encode,
    precision: Autocast,
    bar: Any,
) -> Iterator[Sampled]:
    """Sample images batch by batch.

    Each prompt is encoded once for all its images. Only the latest encodings are cached, as a rule,
    as there may be a million.

    Args:
        pipe: the model.
        wanted: prompt and seed of each image.
        negative_prompt: encoded only if the guidance uses it.
        options: arguments of `mmdit.Request` that all images share.
        batch_size: images per batch.
        encode: encodes a prompt; see `encoder`.
        precision: context that sets the model's precision.
        bar: tqdm progress bar, advanced by every solver step of each image.
    """
    negative = encode(negative_prompt) if options["guidance"].reads_negative else None
    while batch := list(islice(wanted, batch_size)):
        prompts, seeds = [prompt for prompt, _ in batch], [seed for _, seed in batch]
        condition = concatenate([encode(prompt) for prompt in prompts])
        request = Request(condition, negative_prompt=negative, seeds=seeds, **options)
        with precision():
            samples = pipe.sample(request, lambda *_, n=request.count: bar.update(n))
        for pixels, prompt, seed in zip(samples.images.cpu(), prompts, seeds, strict=True):
            yield Sampled(pixels, prompt, seed, samples.function_evaluations)


def write(samples: Iterator[Sampled], count: int, out: Path, metadata: dict[str, Any]) -> None:
    """Write each image as a PNG as soon as it is sampled, then a grid unless there are too many.

    With a cache, the number of network evaluations per image is printed, too.

    Args:
        samples: the images.
        count: number of images.
        out: an existing folder.
        metadata: the metadata that all images share.
    """
    files, grid = NumberedFiles(out), Thumbnails() if count <= LARGEST_GRID else None
    total = 0.0
    for pixels, prompt, seed, evaluations in samples:
        total += evaluations
        of_image = {"seed": seed, **metadata, "function_evaluations": evaluations}
        name = f"{slug(prompt)}-seed{seed}.png"
        tqdm.write(printable(files.add(name, png_with_metadata(pixels, prompt, of_image))))
        if grid is not None:
            grid.add(pixels, f"{prompt[:60]} ({seed})")
    if metadata.get("cache"):
        show(f"{total / count:.4g} evaluations of the whole network per image")
    if grid is None:
        show(f"no grid is written for {count} images: the limit is {LARGEST_GRID}")
    else:
        show(files.add("grid.png", png(grid.image()), first=files.first))


def read_prompts(text: Verbatim) -> list[str]:
    """The requested prompts, in order: `prompt`, or the lines of `prompt_file`.

    Raises:
        UserError: not exactly one of the two is given, or the file is unreadable, empty or too
            long.
    """
    if ("prompt" in text) == ("prompt_file" in text):
        raise UserError('give either prompt="..." or prompt_file=<file with one prompt per line>')
    if "prompt" in text:
        return [text["prompt"]]
    path = Path(text["prompt_file"])
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors write a BOM
            content = file.read(LONGEST_PROMPT_FILE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={path} cannot be read as UTF-8 text: {error}") from error
    if len(content) > LONGEST_PROMPT_FILE:
        raise UserError(
            f"prompt_file={path} is longer than {LONGEST_PROMPT_FILE:,} characters: split it "
            "into several files"
        )
    if not content:
        raise UserError(f"prompt_file={path} is empty: write one prompt per line")
    # Only a newline ends a prompt, not the other separators of `splitlines`.
    return content.removesuffix("\n").split("\n")


def make_folder(out: Path) -> Path:
    """Create the output folder, before sampling starts.

    Raises:
        UserError: it is not a folder, or cannot be created.
    """
    if out.suffix.lower() == ".png" or out.is_file():
        raise UserError(f"out={out} must be a folder, in which each image gets its own name")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out}: the folder cannot be created: {error}") from error
    return out


def controlled(pipe: mmdit.Pipeline, config: DictConfig, text: Verbatim) -> ControlledMMDiT:
    """The pipeline's network with the ControlNet of controlnet=.

    Raises:
        UserError: there is no such file, it contains another kind of model, or its ControlNet does
            not fit the network.
    """
    if not isinstance(pipe.mmdit, MMDiT):
        raise UserError(
            f"controlnet={text['controlnet']}: a ControlNet needs an MMDiT, but the network of "
            f"this model is a {type(pipe.mmdit).__name__}"
        )
    flags = {"allow_pickle": config.allow_pickle, "verify": config.verify}
    net = mmdit.load_controlnet(text["controlnet"], dtype=pipe.dtype, **flags)
    try:
        return ControlledMMDiT(
            base=pipe.mmdit,
            control_net=net.to(pipe.device).eval(),
            strength=config.control_strength,
        )
    except UserError as error:
        raise UserError(f"controlnet={text['controlnet']}: {error}") from error


def main() -> None:
    """Generate images according to the command line."""
    launch(job, config_name="sample", verbatim=VERBATIM)
