"""What measurements of a trained model share: opening it, its name, prompts, scores, results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from mmdit.checks import number, seed_number, whole_number
from mmdit.cli.eval.results import write_new
from mmdit.cli.launch import Verbatim
from mmdit.cli.subject import Subject
from mmdit.data.captions import Scene, short_caption
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.loading import open_source
from mmdit.metrics.compositional import judge
from mmdit.metrics.distances import clip_score
from mmdit.metrics.features import clip_features, in_batches
from mmdit.pipeline import Pipeline, Samples
from mmdit.printable import printable, show
from mmdit.request import Request
from mmdit.study.protocol import Features, scenes_of


def open_features(text: Verbatim, device: torch.device) -> tuple[Features | None, dict[str, Any]]:
    """CLIP as clip= names it, a run's or public, and how a report names it; None where it is not.

    Raises:
        UserError: it cannot be read, or is another kind of model.
    """
    if not text.get("clip"):
        return None, {"clip": None, "clip_sha256": None}
    source = open_source(text["clip"], ())
    features = clip_features(source, device=device)
    return features, {"clip": text["clip"], "clip_sha256": source.sha256}


def shapes_for(
    source: Path | None, config: DictConfig, split: str, *, image_size: int | None = None
) -> Shapes:
    """The shapes that a run was trained on, as its folder says; else those of the config.

    Args:
        source: weights of a run; None for other weights.
        image_size: of the images; None is that of the training, or of the config.

    Raises:
        UserError: the run was trained on something else, or shapes cannot be drawn at that size.
    """
    folders = source.parents[:3] if source is not None else ()
    described = [f / "config.json" for f in folders if (f / "config.json").is_file()]
    if described:
        arguments = json.loads(described[0].read_text())["data"]
    else:
        arguments = OmegaConf.to_container(config.data, resolve=True)
    if arguments.pop("_target_").rpartition(".")[2] != "Shapes":
        raise UserError(f"{source} was not trained on shapes: this measure knows no other data")
    if image_size is not None:
        arguments["image_size"] = image_size
    try:
        return Shapes(split=split, **arguments)
    except ValueError as error:
        raise UserError(f"data: {error}") from error


class Prompts(NamedTuple):
    """The prompts to sample; with their scenes and data if images can be scored."""

    texts: list[str]
    scenes: list[Scene]
    data: Shapes | None


def read_prompts(subject: Subject, config: DictConfig, text: Verbatim) -> Prompts:
    """The lines of prompts=<file>, or short captions of validation scenes, the tasks in turn.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    n = whole_number("samples", config.samples)
    if "prompts" not in text:
        data = shapes_for(subject.run, config, "validation")
        scenes = scenes_of(data, n)
        return Prompts([short_caption(scene) for scene in scenes], scenes, data)
    path = Path(text["prompts"])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read as UTF-8 text: {error}") from error
    if len(lines) < n:
        raise UserError(f"prompts={path} has {len(lines)} lines, but samples={n} are asked for")
    return Prompts(lines[:n], [], None)


def generate(
    pipe: Pipeline, prompts: Sequence[str], config: DictConfig, *, label: str, **options: Any
) -> Samples:
    """One image a prompt, on the CPU; image i starts from the noise of seed + i."""
    first, options["solver"] = (
        seed_number("seed", config.seed, images=len(prompts)),
        instantiate(config.solver),
    )
    seeds, images, evaluations = [first + i for i in range(len(prompts))], [], 0.0
    starts = range(0, len(prompts), config.batch_size)
    for start in tqdm(starts, desc=label, unit="batch", disable=None):
        batch = slice(start, start + config.batch_size)
        samples = pipe.sample(Request(prompts[batch], seeds=seeds[batch], **options))
        images.append(samples.images.cpu())
        evaluations = samples.function_evaluations
    return Samples(torch.cat(images), seeds, evaluations)


@torch.no_grad()
def scores(prompts: Prompts, images: Tensor, features: Features | None) -> dict[str, float]:
    """`clip`, the CLIP score, where there are features; `accuracy` where there are scenes."""
    found = {}
    if features is not None:
        seen = in_batches(features.image_features, images)
        found["clip"] = clip_score(seen, in_batches(features.text_features, prompts.texts))
    if prompts.data is not None:
        right = judge(prompts.data, prompts.scenes, images)
        found["accuracy"] = sum(right) / len(right)
    return found


def sampling(pipe: Pipeline, config: DictConfig) -> dict[str, Any]:
    """How images are sampled, for a report; null in the config is the model's default.

    Sets `config.guidance`, from which the guide's own arguments follow.

    Raises:
        UserError: the guidance is not a finite number.
    """
    if config.guidance is None:
        config.guidance = pipe.guidance
    number("guidance", config.guidance)
    instantiate(config.guide)  # whose own mistakes show before anything is sampled
    return {
        "guidance": config.guidance,
        "guide": OmegaConf.to_container(config.guide, resolve=True),
        "solver": instantiate(config.solver).func.__name__,
    }


def numbers(config: DictConfig, key: str, expected: str, *, low: float, high: float) -> list[float]:
    """A list of numbers of the config, low < x <= high, none twice.

    Raises:
        UserError: it is none, empty, or holds something else.
    """
    value = config[key]
    given = list(value) if OmegaConf.is_list(value) else []
    fits = all(
        isinstance(x, int | float) and not isinstance(x, bool) and low < x <= high for x in given
    )
    if not given or not fits or len(set(given)) < len(given):
        raise UserError(f"{key}={value} must be a list of {expected}, none of them twice")
    return given


def results_folder(text: Verbatim, source: Path, name: str) -> Path:
    """out=, or a place beside the checkpoint of a run, or one in results/.

    Raises:
        UserError: it cannot be made.
    """
    if text.get("out"):
        return made(Path(text["out"]))
    if (source.parent / "manifest.json").is_file():
        return made(source.parents[2] / name / source.parent.name)
    return made(Path("results") / f"{name}-{source.stem}")


def made(folder: Path, key: str = "out") -> Path:
    """A folder for results, asked for as `key`.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}={folder} cannot be made a folder: {error}") from error
    return folder


def write_results(
    out: Path,
    name: str,
    report: Mapping[str, Any],
    markdown: str,
    plots: Mapping[str, bytes] | None = None,
) -> None:
    """<name>.json, <name>.md and images; the table is printed, too, and where the files are.

    Args:
        plots: PNG files by ending, as '.png'.

    Raises:
        UserError: a metric is not finite; nothing is written then.
    """
    try:
        text = json.dumps(report, indent=1, allow_nan=False)
    except ValueError:
        problem = f"{report['weights']} gives metrics that are not finite: it may have diverged"
        raise UserError(problem, "", *markdown.split("\n")) from None
    files = {".json": text.encode(), ".md": markdown.encode(), **(plots or {})}
    show(*markdown.split("\n"), *write_new(out, name, files))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with four digits."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else cell(c) for c in row] for row in rows]
    lines = [list(header), ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(content: object) -> str:
    """Text from outside as a cell of a Markdown table: neither a border, nor a tag, nor a line."""
    return printable(content).replace("|", "\\|").replace("<", "&lt;")
