"""What PEFT and diffusers state beside the weights of an adapter: ranks, alphas and variants.

PEFT writes it into a file of its own, diffusers into the header of the weights.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.bounds import LONGEST_JSON, parse_json, read_bounded
from mmdit.checkpoints.archive import Archive
from mmdit.errors import UserError

CONFIG = "adapter_config.json"  # of PEFT, beside adapter_model.safetensors
WEIGHTS = "adapter_model.safetensors"
HEADER = "lora_adapter_metadata"  # of diffusers, in the header
# Parts of a pipeline by the beginnings of diffusers' keys.
PARTS = {"transformer": "mmdit", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}

LARGEST = 1_000_000  # rank or alpha; trainers use up to a thousand
MOST_PATTERNS = 10  # regular expressions in a table; names without any are not counted
# Settings of PEFT that change what the weights mean, or say that there are others beside them.
UNSUPPORTED = (
    *("fan_in_fan_out", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora"),
    *("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Initial values that leave the weights of the base as they are.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

Patterns = Sequence[tuple[Callable[[str], bool], Any]]


class Scaling(NamedTuple):
    """Ranks and alphas of a part of a pipeline.

    Attributes:
        rank, alpha: of all layers but those below.
        ranks, alphas: of the layers whose names, without a prefix, pass a test.
        by_root: whether alpha is divided by the root of the rank (rsLoRA).
        normed: whether the layers have norms of their own (DoRA); None if that is not stated.
    """

    rank: int | None
    alpha: float
    ranks: Patterns = ()
    alphas: Patterns = ()
    by_root: bool = False
    normed: bool | None = None

    def of(self, stem: str, rank: int, where: str) -> float:
        """The alpha of a layer, as if divided by its rank.

        Raises:
            UserError: the weights have another rank than is stated.
        """
        stated = _matching(self.ranks, stem, self.rank)
        if stated is not None and stated != rank:
            raise UserError(f"{where}: its weights have rank {rank}, but {stated} is stated")
        alpha: float = _matching(self.alphas, stem, self.alpha)
        return alpha * math.sqrt(rank) if self.by_root else alpha


def _matching(table: Patterns, stem: str, default: Any) -> Any:
    return next((value for matches, value in table if matches(stem)), default)


def peft_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        UserError: it is missing or damaged.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} is not an adapter: a folder of PEFT holds {CONFIG} and {WEIGHTS}"
        )
    try:
        config = parse_json(read_bounded(folder / CONFIG, LONGEST_JSON))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(
            f"{folder / CONFIG} is not a description of an adapter: it has no peft_type"
        )
    return config


def scaling_of(archive: Archive, config: Mapping[str, Any], name: str) -> dict[str, Scaling]:
    """What is stated about each part of a pipeline.

    Args:
        archive: the weights, with diffusers' description in their header.
        config: PEFT's adapter_config.json, of the network; empty if there is none.
        name: of the file, for messages.

    Raises:
        UserError: what is stated makes no sense.
    """
    stated: dict[str, dict[str, Any]] = {"mmdit": dict(config)} if config else {}
    if text := archive.metadata.get(HEADER):
        try:
            entries = parse_json(text.encode())
        except ValueError as error:
            raise UserError(f"{name}: its header's {HEADER} is not JSON ({error})") from None
        if not isinstance(entries, dict):
            raise UserError(f"{name}: its header's {HEADER} is not a table of settings")
        for key, value in entries.items():
            start, dot, rest = key.partition(".")
            if not dot:  # of a network that was saved alone
                stated.setdefault("mmdit", {})[key] = value
            elif start in PARTS:
                stated.setdefault(PARTS[start], {})[rest] = value
    return {part: scaling(entries, f"{name}, {part}") for part, entries in stated.items()}


def scaling(entries: Mapping[str, Any], where: str) -> Scaling:
    """PEFT's ranks and alphas, from the arguments of its LoraConfig.

    Raises:
        UserError: one is not a positive number; or a setting is not supported.
    """
    if (kind := entries.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{where}: peft_type is {kind!r}: only LORA is read. Nothing was loaded")
    for key in UNSUPPORTED:
        if entries.get(key):
            raise UserError(f"{where}: {key}={entries[key]} is not supported. Nothing was loaded")
    if (bias := entries.get("bias", "none")) != "none":
        raise UserError(f"{where}: bias={bias} is not supported. Nothing was loaded")
    if (start := entries.get("init_lora_weights")) not in STARTS:
        raise UserError(
            f"{where}: init_lora_weights={start} is not supported, as it may have changed the "
            "weights of the model itself: save it in PEFT with "
            "path_initial_model_for_weight_conversion. Nothing was loaded"
        )
    if "lora_alpha" not in entries:
        raise UserError(f"{where}: lora_alpha is missing, so that its strength is not known")
    rank, normed = entries.get("r"), entries.get("use_dora")
    return Scaling(
        rank=None if rank is None else _positive(where, "r", rank, int),
        alpha=_positive(where, "lora_alpha", entries["lora_alpha"], int | float),
        ranks=_table(entries, where, "rank_pattern", int),
        alphas=_table(entries, where, "alpha_pattern", int | float),
        by_root=bool(entries.get("use_rslora")),
        normed=None if normed is None else bool(normed),
    )


def _positive(where: str, key: str, value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= LARGEST:
        what = "whole number" if kind is int else "number"
        raise UserError(
            f"{where}: {key} is {value!r}, not a positive {what} up to {LARGEST:,}. Nothing was "
            "loaded"
        )
    return value


def _table(entries: Mapping[str, Any], where: str, key: str, kind: Any) -> Patterns:
    table = entries.get(key) or {}
    if not isinstance(table, dict):
        raise UserError(f"{where}: {key} is {table!r}, not a table")
    if sum(_name_in(pattern) is None for pattern in table) > MOST_PATTERNS:
        raise UserError(f"{where}: {key} has more than {MOST_PATTERNS} regular expressions")
    return [
        (_test(pattern, f"{where}: {key}"), _positive(where, f"{key} of {pattern}", value, kind))
        for pattern, value in table.items()
    ]


def _name_in(pattern: str) -> str | None:
    """The name that a pattern consists of; None where it is a regular expression."""
    name = pattern.removeprefix("^").replace("\\.", ".")
    return name if re.fullmatch(r"[\w.]+", name) else None


def _test(pattern: str, where: str) -> Callable[[str], bool]:
    """Whether PEFT takes a pattern for that of a layer: it must match the end of the name.

    Raises:
        UserError: it is not a regular expression, or one that may take very long.
    """
    if (name := _name_in(pattern)) is not None:
        if pattern.startswith("^"):
            return lambda stem: stem == name
        return lambda stem: stem == name or stem.endswith(f".{name}")
    repeats = len(re.findall(r"[*+{]", pattern))
    try:
        if repeats > 3 or re.search(r"\)[*+{]|\(\?|\\[1-9]", pattern) or len(pattern) > 1000:
            raise re.error("it is too intricate")
        compiled = re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError) as error:
        raise UserError(f"{where}: {pattern!r} is not a pattern of names ({error})") from None
    return lambda stem: compiled.match(stem) is not None
