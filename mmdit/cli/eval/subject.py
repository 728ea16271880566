"""Common parts of the evaluations of a trained model: features, prompts, scores and results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from mmdit.checks import number, one_of, seed_number, whole_number
from mmdit.cli.eval.results import write_new
from mmdit.cli.launch import Verbatim
from mmdit.cli.subject import Subject
from mmdit.data.captions import Scene, short_caption
from mmdit.data.drawing import SHAPES, TEXTURES
from mmdit.data.shapes import Shapes
from mmdit.errors import UserError
from mmdit.flow.solvers import Progress
from mmdit.loading import open_source
from mmdit.metrics.compositional import judge
from mmdit.metrics.distances import clip_score
from mmdit.metrics.features import clip_features, in_batches
from mmdit.pipeline import Pipeline, Samples
from mmdit.printable import printable, show
from mmdit.request import Request
from mmdit.runs.checkpoint import config_beside
from mmdit.study.protocol import Features, scenes_of


def open_features(text: Verbatim, device: torch.device) -> tuple[Features | None, dict[str, Any]]:
    """The CLIP of clip=, of a run or public, and its facts for the report; None if not given.

    Raises:
        UserError: it cannot be read, or is another kind of model.
    """
    if not text.get("clip"):
        return None, {"clip": None, "clip_sha256": None}
    source = open_source(text["clip"], ())
    features = clip_features(source, device=device)
    return features, {"clip": text["clip"], "clip_sha256": source.sha256}


def shapes_for(
    source: Path | None,
    config: DictConfig,
    split: str,
    *,
    image_size: int | None = None,
    word: str | None = None,
) -> Shapes:
    """The shapes that a run was trained on, by its config.json, or else those of the config.

    Args:
        source: weights of a run; None for public weights.
        config: config of the evaluation, with `data`.
        split: 'validation' or 'held_out', for example.
        image_size: side in pixels; None for that of training, or of the config.
        word: a shape or texture that all scenes are to contain, whether training knew it or not.

    Raises:
        UserError: the run was trained on other data, or shapes cannot be rendered at that size.
    """
    if word is not None:
        one_of("word", word, (*SHAPES, *TEXTURES))
    described = {} if source is None else config_beside(source)
    if described:
        arguments = described["data"]
    else:
        arguments = OmegaConf.to_container(config.data, resolve=True)
    if "parts" in arguments:  # of a mixture, the first part is validated on
        arguments = next(iter(arguments["parts"].values()))
    if arguments.pop("_target_").rpartition(".")[2] != "Shapes":
        raise UserError(f"{source} was not trained on shapes, which this evaluation requires")
    if image_size is not None:
        arguments["image_size"] = image_size
    try:
        data = Shapes(split=split, **arguments)
        return data if word is None else data.with_word(word)
    except ValueError as error:
        raise UserError(f"data: {error}") from error


class Prompts(NamedTuple):
    """The prompts to sample; with scenes and data if compositional accuracy can be computed."""

    texts: list[str]
    scenes: list[Scene]
    data: Shapes | None


def read_prompts(subject: Subject, config: DictConfig, text: Verbatim) -> Prompts:
    """The first lines of prompts=<file>, or short captions of validation scenes of all tasks.

    Raises:
        UserError: the file cannot be read, or has too few lines.
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
        raise UserError(f"prompts={path} has {len(lines)} lines, but samples={n} are requested")
    return Prompts(lines[:n], [], None)


def generate(
    pipe: Pipeline,
    prompts: Sequence[str],
    config: DictConfig,
    *,
    label: str,
    progress: Progress | None = None,
    **options: Any,
) -> Samples:
    """One image per prompt, on the CPU; image i starts from the noise of seed + i."""
    first, options["solver"] = (
        seed_number("seed", config.seed, images=len(prompts)),
        instantiate(config.solver),
    )
    seeds, images, evaluations = [first + i for i in range(len(prompts))], [], 0.0
    starts = range(0, len(prompts), config.batch_size)
    for start in tqdm(starts, desc=label, unit="batch", disable=None):
        batch = slice(start, start + config.batch_size)
        samples = pipe.sample(Request(prompts[batch], seeds=seeds[batch], **options), progress)
        images.append(samples.images.cpu())
        evaluations += samples.function_evaluations * len(samples.images)
    return Samples(torch.cat(images), seeds, evaluations / len(prompts))


@torch.no_grad()
def scores(prompts: Prompts, images: Tensor, features: Features | None) -> dict[str, float]:
    """`clip`, the CLIP score, if there are features; `accuracy` if there are scenes."""
    found = {}
    if features is not None:
        seen = in_batches(features.image_features, images)
        found["clip"] = clip_score(seen, in_batches(features.text_features, prompts.texts))
    if prompts.data is not None:
        right = judge(prompts.data, prompts.scenes, images)
        found["accuracy"] = sum(right) / len(right)
    return found


def sampling(pipe: Pipeline, config: DictConfig) -> dict[str, Any]:
    """The sampler's settings for the report; null in the config is the model's default.

    Sets `config.guidance`, to which the guide's arguments refer.

    Raises:
        UserError: the guidance is not a finite number.
    """
    if config.guidance is None:
        config.guidance = pipe.guidance
    number("guidance", config.guidance)
    instantiate(config.guide)  # raises errors in its arguments before anything is sampled
    return {
        "guidance": config.guidance,
        "guide": OmegaConf.to_container(config.guide, resolve=True),
        "solver": instantiate(config.solver).func.__name__,
    }


def numbers(config: DictConfig, key: str, expected: str, *, low: float, high: float) -> list[float]:
    """A list of distinct numbers of the config, low < x <= high.

    Args:
        expected: what the list should contain, for the message.

    Raises:
        UserError: the value is not such a list, or is empty.
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
    """The folder for results: out=, or one in the run's folder, or one in results/.

    Raises:
        UserError: it cannot be created.
    """
    if text.get("out"):
        return made(Path(text["out"]))
    if (source.parent / "manifest.json").is_file():
        return made(source.parents[2] / name / source.parent.name)
    return made(Path("results") / f"{name}-{source.stem}")


def made(folder: Path, key: str = "out") -> Path:
    """Create a folder for results, given on the command line as `key`.

    Raises:
        UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}={folder}: the folder cannot be created: {error}") from error
    return folder


def write_results(
    out: Path,
    name: str,
    report: Mapping[str, Any],
    markdown: str,
    plots: Mapping[str, bytes] | None = None,
) -> None:
    """Write <name>.json, <name>.md and plots, and print the table and the files' paths.

    Args:
        out: an existing folder.
        name: first part of the files' names.
        report: content of the JSON file.
        markdown: content of the Markdown file.
        plots: PNG files by ending, such as '.png'.

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
    """A Markdown table; floats have four significant digits."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else cell(c) for c in row] for row in rows]
    lines = [list(header), ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(content: object) -> str:
    """Untrusted text as a cell of a Markdown table, with borders, tags and newlines escaped."""
    return printable(content).replace("|", "\\|").replace("<", "&lt;")
