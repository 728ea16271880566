"""Numerical comparison with diffusers and transformers on the same weights and inputs.

Each model is run on random inputs, ours first, then the peer's. The outputs of corresponding parts
are compared in the order of computation, so that the first departure locates a bug. Peers load
single files with their own converters, except for a ControlNet, for which there is none: its keys
are renamed by our table.
"""

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from tqdm import tqdm

from mmdit.checkpoints.diagnosis import KIND_NAMES
from mmdit.checkpoints.folders import REQUIRED_FIELDS, SUBFOLDERS, config_of, read_config
from mmdit.checkpoints.locate import Place, layout_of
from mmdit.checkpoints.public import find
from mmdit.checks import flag, number, one_of, seed_number, whole_number
from mmdit.cli.eval.results import write_new
from mmdit.cli.eval.subject import made
from mmdit.cli.launch import Verbatim, launch
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.parity.load_time import measure_loading
from mmdit.parity.peers import SIDES, Config, Inputs, Stages, compute_in, parts
from mmdit.parity.random_weights import FULL_SIZE, SIZES, models_of_size, size_of, write_random
from mmdit.printable import logger, show

log = logger("mmdit.parity")
VERBATIM = ("checkpoint", "out", "keep")
KINDS = tuple(SIDES)
UNITS = {"height": 16, "width": 16, "text_length": 1, "batch_size": 1, "load_rounds": 1}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


class Row(NamedTuple):
    """One compared stage."""

    component: str
    stage: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float  # largest difference over largest value of the peer
    ok: bool


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, write random weights if requested, compare, write the results."""
    check(config, text)
    name = config.random or Path(text["checkpoint"]).name
    out = made(Path(text.get("out") or Path("results") / f"parity-{name}"))
    with tempfile.TemporaryDirectory(prefix="mmdit-parity-") as temporary:
        scratch = Path(temporary)
        if config.random:
            folder = made(Path(text["keep"]), "keep") if "keep" in text else scratch
            sources = random_sources(config, folder)
            fate = "kept" if "keep" in text else "deleted afterwards, unless keep=<folder> is given"
            files = ", ".join(str(path) for path in dict.fromkeys(sources.values()))
            log.info("random weights: %s (%s)", files, fate)
        else:
            sources = given_sources(text["checkpoint"], config.components)
        loads = []
        if "mmdit" in sources and (bool(config.random) if config.load is None else config.load):
            loads = measure_loading(sources["mmdit"], scratch, rounds=config.load_rounds)
        rows = [row for kind, source in sources.items() for row in compare(kind, source, config)]
    report = {
        "source": text.get("checkpoint") or f"random weights, {config.random}",
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")},
        **{key: config[key] for key in ("dtype", "tolerance", "seed", "batch_size")},
        **{key: config[key] for key in ("height", "width", "text_length", "load_rounds")},
        "loading": loads,
        "stages": [row._asdict() for row in rows],
        "verdict": verdict(rows, config.tolerance),
    }
    markdown = as_markdown(report, rows)
    text_of = {".json": json.dumps(report, indent=1).encode(), ".md": markdown.encode()}
    show(*markdown.split("\n"), *write_new(out, "parity", text_of))
    show(report["verdict"])
    if not all(row.ok for row in rows):
        sys.exit(1)


def check(config: DictConfig, text: Verbatim) -> None:
    """Raise UserError for an invalid config, before anything is read or written."""
    if bool(text.get("checkpoint")) == bool(config.random):
        raise UserError("give either checkpoint=<file, folder or hub id> or random=<size>")
    if config.random:
        one_of("random", config.random, SIZES)
    if "keep" in text and not config.random:
        raise UserError("keep= keeps random weights: give random=, or leave keep out")
    if config.against != "diffusers":
        raise UserError(f"against={config.against} must be diffusers: there is no other peer")
    for peer in ("diffusers", "transformers"):
        if importlib.util.find_spec(peer) is None:
            raise UserError(f"{peer} is not installed: pip install 'sd3-mmdit[test]'")
    one_of("dtype", config.dtype, DTYPES)
    if config.load is not None:
        flag("load", config.load)
    for key, unit in UNITS.items():
        if whole_number(key, config[key]) % unit:
            raise UserError(f"{key}={config[key]} must be a multiple of {unit}")
    seed_number("seed", config.seed)
    number("tolerance", config.tolerance, above=0)
    wanted(config.components)


def wanted(components: object) -> tuple[str, ...]:
    """The requested kinds of models; all of them if `components` is null or all."""
    if components is None or components == "all":
        return KINDS
    named = list(components) if isinstance(components, ListConfig) else [components]
    if strange := [name for name in named if name not in KINDS]:
        raise UserError(f"components: {strange[0]} must be all, or of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in named)


def given_sources(source: str, components: object) -> dict[str, Path]:
    """The locations of a checkpoint's models, by kind: the requested ones, or all in it.

    Raises:
        UserError: it lacks a model that is requested by name, contains none, or is damaged.
    """
    kinds = wanted(components)
    place = Place(source, [SUBFOLDERS[kind] for kind in kinds if kind in SUBFOLDERS])
    path = place.path
    found: dict[tuple[str, str], str] = {}
    for kind in kinds:
        try:
            archive, folder = place.weights_of(kind)
        except UserError:
            places = ("config.json", SUBFOLDERS.get(kind, "config.json"))
            if path.is_file() or any((path / place).exists() for place in places):
                raise  # it exists, but is damaged
            continue
        if match := find(archive, kind, layout=layout_of(archive, folder)):
            # A tower in its own folder matches both CLIPs, and is compared once.
            found.setdefault((str(archive.name), match.prefix), kind)
    refuse_absent(found.values(), components, source)
    return dict.fromkeys(found.values(), path)


def refuse_absent(found: Collection[str], components: object, source: str) -> None:
    """Raise UserError if a source lacks a model that is requested by name, or has none at all."""
    named = () if components in (None, "all") else wanted(components)
    lacking = [kind for kind in named or KINDS if kind not in found]
    if lacking and (named or not found):
        raise UserError(
            f"components: {source} has no {', '.join(KIND_NAMES[kind] for kind in lacking)}"
        )


# Comparing


def compare(kind: str, source: Path, config: DictConfig) -> list[Row]:
    """Compare every stage of one model with the peer's; only one of the two is in memory."""
    inputs, peer_config, ours = run_ours(kind, source, config)
    theirs = run_theirs(kind, source, config, inputs, peer_config)
    return differences(kind, ours, theirs, config.tolerance)


@torch.no_grad()
def run_ours(kind: str, source: Path, config: DictConfig) -> tuple[Inputs, Config, Stages]:
    """The inputs, the peer's config.json, and the stages of our model."""
    side, dtype = SIDES[kind], DTYPES[config.dtype]
    place = Place(source)
    model = place.load(kind)
    peer_config = {**REQUIRED_FIELDS[kind], **config_of(kind, model)}
    if source.is_dir():
        peer_config |= read_config(place.weights_of(kind)[1])
    drawn = side.inputs(model, config, generator_for(config.seed, "inputs", kind))
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in drawn.items()}
    compute_in(dtype, model, parts(model, side.our_blocks))
    model.compute_dtype = dtype
    with tqdm(desc=f"{kind}, ours", unit="stage", disable=None) as bar:
        stages = Stages(bar)
        side.ours(model, inputs, stages)
    return inputs, peer_config, stages


@torch.no_grad()
def run_theirs(
    kind: str, source: Path, config: DictConfig, inputs: Inputs, peer_config: Config
) -> Stages:
    """The stages of the peer's model on the same inputs."""
    archive, folder = Place(source).weights_of(kind)
    match = find(archive, kind, layout=layout_of(archive, folder))
    assert match is not None
    side = SIDES[kind]
    model = side.peer(match, peer_config).eval()
    compute_in(DTYPES[config.dtype], model, parts(model, side.their_blocks))
    with tqdm(desc=f"{kind}, theirs", unit="stage", disable=None) as bar:
        stages = Stages(bar)
        side.theirs(model, inputs, stages)
    return stages


def differences(
    kind: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float
) -> list[Row]:
    """One row per stage, in the order of our model's computation."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    rows = []
    for stage, a in ours.items():
        b = theirs[stage].double()
        difference = (a.double() - b).abs().max().item()
        relative = difference / max(b.abs().max().item(), 1e-30)
        # NaN counts as a departure.
        rows.append(Row(kind, stage, tuple(a.shape), difference, relative, relative <= tolerance))
    return rows


# Random weights


def random_sources(config: DictConfig, folder: Path) -> dict[str, Path]:
    """Write random weights, and return their files by kind.

    Raises:
        UserError: the disk has too little space, or there is no such component at this size.
    """
    asked = FULL_SIZE if config.components is None else wanted(config.components)
    if config.components is None and config.random == "tiny":
        asked = KINDS
    models = models_of_size(config.random, asked)
    refuse_absent(models, config.components, config.random)
    folder.mkdir(parents=True, exist_ok=True)
    loading = "mmdit" in models and config.load is not False
    needed = sum(map(size_of, models.values())) + (size_of(models["mmdit"]) if loading else 0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed: give "
            "keep=<folder on another disk>, fewer components=, or load=false"
        )
    return write_random(models, folder, seed=config.seed, name=config.random)


# Reporting


def verdict(rows: Sequence[Row], tolerance: float) -> str:
    """One line: agreement of all stages, or the first departure."""
    departing = [row for row in rows if not row.ok]
    if not departing:
        worst = max(row.relative for row in rows)
        return f"parity: all {len(rows)} stages within {tolerance:g} (worst {worst:.1e})"
    first = departing[0]
    return (
        f"first departure: {first.stage} of {first.component} (relative {first.relative:.1e}, "
        f"tolerance {tolerance:g}); {len(departing)} of {len(rows)} stages depart"
    )


def as_markdown(report: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Tables of the setting, the cost of loading, and all stages."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"parity of {report['source']}: {versions}",
        f"{report['dtype']}, {report['height']} x {report['width']} pixels, "
        f"{report['text_length']} tokens of text, batch {report['batch_size']}, "
        f"seed {report['seed']}",
        "",
    ]
    if report["loading"]:
        first = report["loading"][0]
        what = f"loading the transformer, {first['bytes'] / 1e9:.2f} GB of {first['dtype']}"
        lines += [
            f"| {what}, best of {report['load_rounds']} | seconds | GB anonymous |",
            "|---|---|---|",
        ]
        for load in report["loading"]:
            extra = "?" if load["anonymous"] is None else f"{load['anonymous'] / 1e9:.2f}"
            lines.append(f"| {load['what']} | {load['seconds']:.2f} | {extra} |")
        lines.append("")
    lines += [
        f"| {'component':<11} | {'stage':<16} | {'shape':<19} | max abs | relative | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        lines.append(
            f"| {row.component:<11} | {row.stage:<16} | {shape:<19} | {row.max_abs:.1e} | "
            f"{row.relative:8.1e} | {'ok' if row.ok else 'DEPARTS'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="parity", verbatim=VERBATIM)
