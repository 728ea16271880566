"""What fewer evaluations of the network cost, and path lengths (Table 6).

Protocol `efficiency-2`: the same prompts and noise with every setting. The reference is the most
steps; fewer steps are the control, which caches, guidance intervals and their combinations, all at
the most steps, have to beat at as many evaluations. An evaluation of some blocks counts as its
share of the operations of all.

The score is the CLIP score if clip= is given, and otherwise compositional accuracy; the relative
loss of a setting is (score of most steps - its score) / score of most steps, in percent. The
distance is ||z - z_most|| / ||z_most|| of the final latents, the median over images, since single
images become others altogether. The path length of an image is the sum of ||v dt|| over its steps,
with the norm over all values of its latent.
"""

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mmdit.checks import seed_number, whole_number
from mmdit.cli.eval.subject import (
    Prompts,
    generate,
    numbers,
    open_features,
    read_prompts,
    results_folder,
    sampling,
    scores,
    table,
    write_results,
)
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.subject import PARTS, Subject, open_subject
from mmdit.errors import UserError
from mmdit.flow.caches import Cache, FirstBlockCache, TaylorCache, expect_cacheable
from mmdit.flow.guidance import ClassifierFreeGuidance, Guidance, GuidanceInterval
from mmdit.metrics.path_length import MeasuredGuidance
from mmdit.pipeline import expect_cacheable_network
from mmdit.registry import describe
from mmdit.study.protocol import Features

PROTOCOL = "efficiency-2"
VERBATIM = ("checkpoint", "out", "prompts", "clip", *PARTS)
SCORES = {"clip": "CLIP score", "accuracy": "accuracy"}  # the first available one is used
CONTROL = "fewer steps"


class Setting(NamedTuple):
    """A way to sample."""

    family: str  # settings of one curve
    name: str
    steps: int
    cache: Cache | None = None
    interval: tuple[float, float] | None = None


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, build the model, sample with every setting, write the results."""
    for key, least in (("batch_size", 1), ("samples", 2)):
        whole_number(key, config[key], least)
    seed_number("seed", config.seed)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plot needs matplotlib: pip install -e '.[plots]'")
    settings = settings_of(config)
    subject = open_subject(config, text)
    if any(setting.cache for setting in settings):
        expect_caches(subject, config)
    prompts = read_prompts(subject, config, text)
    features, clip_facts = open_features(text, subject.pipe.device)
    if features is None and prompts.data is None:
        raise UserError("prompts=<file> needs clip=<CLIP>: accuracy is defined for shapes only")
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        **subject.facts,
        **clip_facts,
        "seed": config.seed,
        "samples": len(prompts.texts),
        **sampling(subject.pipe, config),
    }
    measure = Measure(subject, config, prompts, features)
    rows = [measure(setting) for setting in settings]  # the reference first
    control = [row for row in rows if row["family"] == CONTROL]
    report["rows"] = sorted(control, key=lambda row: row["steps"])
    report["others"] = [row for row in rows if row["family"] != CONTROL]
    add_losses(report)
    add_control(report)
    out = results_folder(text, subject.path, "efficiency")
    write_results(out, "efficiency", report, as_markdown(report), {".png": plot(report)})


def settings_of(config: DictConfig) -> list[Setting]:
    """All settings: the most steps first, then fewer, then what saves evaluations at the most.

    Raises:
        UserError: a value is not a list of what it should be, or out of range.
    """
    counts = numbers(config, "steps", "at least two whole numbers", low=0, high=float("inf"))
    if len(counts) < 2 or not all(isinstance(count, int) for count in counts):
        raise UserError(f"steps={config.steps} must be a list of at least two whole numbers")
    most, *fewer = sorted((int(count) for count in counts), reverse=True)
    caches: list[tuple[str, str, Cache]] = [
        ("first block", f"first block {threshold:g}", FirstBlockCache(threshold=threshold))
        for (threshold,) in several(config, "thresholds", "numbers from 0 to 1", 1)
    ]
    caches += [
        (f"taylor order {order}", f"taylor {n} order {order}", TaylorCache(interval=n, order=order))
        for n, order in several(config, "forecasts", "pairs of an interval and an order", 2)
    ]
    found = [Setting(CONTROL, f"{count} steps", count) for count in (most, *fewer)]
    found += [Setting(family, name, most, cache) for family, name, cache in caches]
    for low, high in several(config, "intervals", "pairs of noise levels", 2):
        GuidanceInterval(inner=ClassifierFreeGuidance(), low=low, high=high)  # checks them
        within = f"guidance {low:g}-{high:g}"
        found += [
            Setting(f"{within}, fewer steps", f"{within}, {count} steps", count, None, (low, high))
            for count in (most, *fewer)
        ]
        found += [
            Setting(f"{within}, {family}", f"{within}, {name}", most, cache, (low, high))
            for family, name, cache in caches
        ]
    return found


def several(config: DictConfig, key: str, expected: str, count: int) -> list[list[Any]]:
    """A list of numbers, or of tuples of so many numbers, as tuples; it may be empty.

    Raises:
        UserError: the value is not such a list, or has something twice.
    """
    value = config[key]
    given = OmegaConf.to_container(value) if OmegaConf.is_list(value) else None
    tuples = [[one] if count == 1 else one for one in given] if isinstance(given, list) else None
    if (
        tuples is None
        or not all(isinstance(one, list) and len(one) == count for one in tuples)
        or not all(isinstance(x, int | float) for one in tuples for x in one)
        or any(one in tuples[:i] for i, one in enumerate(tuples))
    ):
        raise UserError(f"{key}={value} must be a list of {expected}, none of them twice, or []")
    return tuples


def expect_caches(subject: Subject, config: DictConfig) -> None:
    """Check that caches work with the model and the solver.

    Raises:
        UserError: they do not.
    """
    try:
        expect_cacheable(instantiate(config.solver))
        expect_cacheable_network(subject.pipe.mmdit)
    except UserError as error:
        raise UserError(f"{error} (thresholds=[] forecasts=[])") from error


class FinalLatents:
    """Collects the latents in which sampling ends, over batches; called as its `progress`."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def __call__(self, i: int, t: float, z: Tensor) -> None:
        if i == 0:
            self._batches.append(z)
        self._batches[-1] = z

    def latents(self) -> Tensor:
        """The final latents of all images, (n, c, h, w), on the CPU."""
        return torch.cat([z.cpu() for z in self._batches])


class Measure:
    """Samples all prompts with a setting and measures the result, the first as the reference.

    Args:
        subject: the model.
        config: config of the program.
        prompts: what is sampled.
        features: CLIP; None if there is none.
    """

    def __init__(
        self, subject: Subject, config: DictConfig, prompts: Prompts, features: Features | None
    ) -> None:
        self.subject, self.config, self.prompts = subject, config, prompts
        self.features = features
        self._reference: Tensor | None = None

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """The row of a setting for the report."""
        inner: Guidance = instantiate(self.config.guide)
        if setting.interval is not None:
            low, high = setting.interval
            inner = GuidanceInterval(inner=inner, low=low, high=high)
        guidance, final = MeasuredGuidance(inner=inner), FinalLatents()
        with self.subject.autocast():
            samples = generate(
                self.subject.pipe,
                self.prompts.texts,
                self.config,
                label=setting.name,
                progress=final,
                steps=setting.steps,
                guidance=guidance,
                cache=setting.cache,
            )
        latents, lengths = final.latents(), guidance.lengths().double()
        reference = self._reference = latents if self._reference is None else self._reference
        apart = relative_distances(latents, reference)
        found = scores(self.prompts, samples.images, self.features)
        row = {
            "setting": setting.name,
            "family": setting.family,
            "steps": setting.steps,
            "cache": None if setting.cache is None else describe(setting.cache),
            "guidance_interval": setting.interval,
            "function_evaluations": samples.function_evaluations,
            "path_length": lengths.mean().item(),
            "path_length_standard_error": lengths.std().item() / len(lengths) ** 0.5,
            "distance": apart.quantile(0.5).item(),
            "mean_distance": apart.mean().item(),
            **found,
        }
        if "accuracy" in found:
            p = found["accuracy"]
            row["accuracy_standard_error"] = (p * (1 - p) / len(latents)) ** 0.5
        return row


def relative_distances(latents: Tensor, reference: Tensor) -> Tensor:
    """||z - z_reference|| / ||z_reference|| of each latent (n, c, h, w): (n,)."""
    apart, whole = (
        part.double().flatten(1).norm(dim=1) for part in (latents - reference, reference)
    )
    return apart / whole


def add_losses(report: dict[str, Any]) -> None:
    """Add each row's relative loss in percent against that of the most steps.

    The loss is None if the score of the most steps is not positive.
    """
    rows = report["rows"]
    score = next(name for name in SCORES if name in rows[-1])
    best = rows[-1][score]
    report["score"] = score
    for row in (*rows, *report["others"]):
        row["relative_loss_percent"] = 100 * (best - row[score]) / best if best > 0 else None


def add_control(report: dict[str, Any]) -> None:
    """Add to the other rows what fewer steps reach with as many evaluations.

    Between two numbers of steps, score and distance are interpolated linearly in 1 / evaluations,
    since the error of a first-order solver is. They are None below the fewest.
    """
    rows, score = report["rows"], report["score"]
    whole = rows[-1]["function_evaluations"]
    for row in rows:
        row["saved"] = 1 - row["function_evaluations"] / whole
    for row in report["others"]:
        row["saved"] = 1 - row["function_evaluations"] / whole
        for name in (score, "distance"):
            points = [(r["function_evaluations"], r[name]) for r in rows]
            row[f"fewer_steps_{name}"] = between(points, row["function_evaluations"])


def between(points: Sequence[tuple[float, float]], evaluations: float) -> float | None:
    """Interpolate (evaluations, value) linearly in 1 / evaluations; None outside the points.

    Args:
        points: by increasing evaluations.
        evaluations: where to interpolate.
    """
    for (fewer, low), (more, high) in pairwise(points):
        if fewer <= evaluations <= more:
            part = (1 / fewer - 1 / evaluations) / (1 / fewer - 1 / more)
            return low + part * (high - low)
    return None


def as_markdown(report: dict[str, Any]) -> str:
    """Table 6, one row for each number of steps; and a table of all other settings."""
    score, most = report["score"], report["rows"][-1]["steps"]
    name = SCORES[score]
    header = ("", "evaluations", "saved", name, f"loss of {most} steps' {name}", "distance")
    head = (
        f"{report['protocol']}: {report['weights']}, sha256 {report['weights_sha256'][:16]}, "
        f"{report['samples']} samples, guidance {report['guidance']:g}, seed {report['seed']}\n"
    )
    steps = [(*figures(row, score), path_length(row)) for row in report["rows"]]
    parts = [head, table((*header, "path length"), steps)]
    if report["others"]:
        others = [
            (
                *figures(row, score),
                *(or_dash(row[f"fewer_steps_{key}"]) for key in (score, "distance")),
                path_length(row),
            )
            for row in report["others"]
        ]
        control = (f"fewer steps' {name}", "fewer steps' distance")
        parts += [
            f"At {most} steps, beside fewer steps with as many evaluations (interpolated):\n",
            table((*header, *control, "path length"), others),
        ]
    return "\n".join(parts)


def figures(row: dict[str, Any], score: str) -> tuple[object, ...]:
    """The first cells of a row."""
    loss, error = row["relative_loss_percent"], row.get(f"{score}_standard_error")
    return (
        row["setting"],
        row["function_evaluations"],
        f"{100 * row['saved']:.0f} %",
        row[score] if error is None else f"{row[score]:.3f} ± {error:.3f}",
        "none" if loss is None else f"{loss:.2f} %",
        row["distance"],
    )


def path_length(row: dict[str, Any]) -> str:
    """The cell of the path length."""
    return f"{row['path_length']:.2f} ± {row['path_length_standard_error']:.2f}"


def or_dash(value: float | None) -> object:
    """A number, or a dash for none."""
    return "-" if value is None else value


def plot(report: dict[str, Any]) -> bytes:
    """Score and distance of every family of settings against evaluations, as PNG."""
    from mmdit.study.efficiency_plots import Measured, against_evaluations  # needs matplotlib

    score = report["score"]
    curves: dict[str, list[Measured]] = {}
    for row in (*report["rows"], *report["others"]):
        error = row.get(f"{score}_standard_error", 0.0)
        point = Measured(row["function_evaluations"], row[score], error, row["distance"])
        curves.setdefault(row["family"], []).append(point)
    return against_evaluations(curves, SCORES[score])


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="efficiency", verbatim=VERBATIM)
