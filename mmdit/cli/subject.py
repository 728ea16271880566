"""Open the model that a command line names, to sample from it or to evaluate it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from mmdit.checks import expanded, flag, one_of
from mmdit.cli.launch import Verbatim
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.loading import PIPELINE, Run, Source, open_source
from mmdit.pipeline import Pipeline
from mmdit.precision import Autocast, autocast, chosen_dtype
from mmdit.printable import logger
from mmdit.programs import command
from mmdit.runs.checkpoint import WEIGHTS, newest_finished
from mmdit.runs.status import clean_up_if_killed
from mmdit.text.conditioning import ENCODERS

log = logger(__name__)
RULES = ("allow_pickle", "verify", "keep_quantized")  # how public files are opened
PARTS = ("autoencoder", "text.encoders", "text.tokenizers")  # paths, as typed

# Files by which a folder of weights, or one of its subfolders, is recognized. Adapters are included
# because they are rejected with a message of their own.
NAMES = ("*.safetensors", "*.gguf", "adapter_config.json")
WEIGHT_FILES = tuple(f"{folder}{name}" for folder in ("", "*/", "*/*/*/") for name in NAMES)


class Subject(NamedTuple):
    """A pipeline on its device, and how reports identify it."""

    pipe: Pipeline
    autocast: Autocast  # makes the context to compute in
    path: Path  # file or folder of its weights
    run: Path | None  # the same, if this project trained it
    facts: dict[str, Any]  # entries of reports: weights, weights_sha256, text encoders used


def open_subject(
    config: DictConfig,
    text: Verbatim,
    *,
    hash_public: bool = True,
    network_waits: bool = False,
    **public: Any,
) -> Subject:
    """Open what checkpoint= names, or else the newest finished run, on the device of the config.

    Args:
        config: config of the program.
        text: options as typed, where Hydra would reinterpret them.
        hash_public: also hash public weights, which reads all their bytes; a run's hash is known.
        network_waits: leave the network alone on the CPU, until it has become smaller.
        public: further options for public weights, such as `allow_pickle`.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    device = available(config.device)
    used = {f"use_{kind}": config.text[f"use_{kind}"] for kind in ENCODERS}
    for key, value in used.items():
        flag(f"text.{key}", value)
    rules = {name: public.pop(name) for name in RULES if name in public}
    left_out = [kind for kind in ENCODERS if not used[f"use_{kind}"]]
    kinds = [kind for kind in PIPELINE if kind not in left_out]
    source = open_named(config, text, kinds, **rules)
    for key in PARTS:
        public[key.removeprefix("text.")] = text.get(key)
    compute, dtype = computing(source, device, config.precision)
    options = {"preset": config.preset, **public}
    pipe = source.pipeline(dtype=dtype, left_out=left_out, **options)
    for part in (pipe.text, pipe.autoencoder) if network_waits else (pipe,):
        part.to(device)
    run = source.path if isinstance(source, Run) else None
    facts = facts_of(source, hashed=run is not None or hash_public)
    return Subject(pipe, compute, source.path, run, {**facts, "text": used})


def open_named(
    config: DictConfig, text: Mapping[str, str], kinds: list[str], **rules: Any
) -> Source:
    """Open the weights that checkpoint= names, or else those of the newest finished run.

    Raises:
        UserError: there are no weights, or they cannot be read.
    """
    one_of("weights", config.weights, WEIGHTS)  # before any file is searched for
    given: str | Path | None = text.get("checkpoint")
    if not given:
        given = newest_finished(Path(config.runs))
        if given is None:
            raise UserError(
                f"there is no finished run in {config.runs}/: train one with "
                f"`{command('train')}`, or give checkpoint=<run folder, file or hub id>"
            )
        log.info("the newest finished run is %s", given)
    path = expanded(given)
    if path.is_dir() and not any(any(path.glob(name)) for name in WEIGHT_FILES):
        raise UserError(
            f"checkpoint={given}: this folder has neither a complete checkpoint nor other weights"
        )
    clean_up_if_killed(path)
    return open_source(given, kinds, weights=config.weights, **rules)


def computing(
    source: Source, device: torch.device, precision: str
) -> tuple[Autocast, torch.dtype | None]:
    """The autocast to compute in, and the dtype to load: only public weights are cast to it."""
    if isinstance(source, Run):
        return autocast(device, precision), None
    return autocast(device, "fp32"), chosen_dtype(device, precision)


def facts_of(source: Source, *, hashed: bool = True) -> dict[str, Any]:
    """Entries that identify weights in a report."""
    return {"weights": source.name, "weights_sha256": source.sha256 if hashed else None}
