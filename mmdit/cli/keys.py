"""Finds config keys that no code reads, which would otherwise be ignored silently."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from mmdit.checks import did_you_mean, nearest
from mmdit.engine.settings import Settings
from mmdit.errors import UserError

Tree = dict[str, Any]

# Read if given, although the yaml of a stage omits them.
OPTIONAL = {
    f"{stage}.training": dict.fromkeys(sorted(Settings._field_defaults.keys() - {"section"}))
    for stage in ("autoencoder", "clip")
}
REFERENCE = re.compile(r"\$\{(\.*)([^${}:]+)\}")


def known_keys(config_name: str, config_dir: Path) -> Tree:
    """The sections and keys that a script may read.

    These are the keys of its default config, and of all options of the groups that this config
    selects from, because options may have different keys. An option that has values of several
    sections may have one of its own, whoever selects it.
    """
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        base = compose(config_name, return_hydra_config=True)
    choices = base.hydra.runtime.choices
    known: Tree = OmegaConf.to_container(base)  # type: ignore[assignment]
    for file in sorted(config_dir.glob("*/*.yaml")):
        group = file.parent.name
        option = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(option, dict)
        if "@package" in file.read_text("utf-8"):
            option = option.get(group)
        elif group not in choices:
            continue
        if option is not None:
            known[group] = _merged(known.get(group), option)
    for place, names in OPTIONAL.items():
        section, name = place.split(".")
        if isinstance(known.get(section), dict) and name in known[section]:
            known[section][name] = {**names, **known[section][name]}
    return known


def _merged(one: Any, other: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other if one is None else one
    return one | {key: _merged(one.get(key), value) for key, value in other.items()}


def check_keys(
    config: DictConfig, known: Mapping[str, Any], verbatim: Sequence[str], config_dir: Path
) -> None:
    """Reject keys that no code reads, whether from the command line or from a yaml.

    Keys next to a `_target_` are its arguments, which are checked when it is called. Other keys are
    read by the script or by an interpolation.

    Raises:
        UserError: there is such a key.
    """
    plain: Tree = OmegaConf.to_container(config)  # type: ignore[assignment]
    plain.pop("hydra", None)  # checked by Hydra
    used = set(_references(plain, ()))
    for key in _unread(plain, known, ()):
        if not any(key == name[: len(key)] or name == key[: len(name)] for name in used):
            message = unknown_key(".".join(key), config, verbatim, config_dir)
            raise UserError(f"{message} No code reads it, so it would change nothing.")


def _unread(
    section: Mapping[str, Any], known: Mapping[str, Any], place: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    if "_target_" in section and (not known or "_target_" in known):
        return
    for key, value in section.items():
        if key not in known:
            yield (*place, str(key))
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from _unread(value, known[key], (*place, key))


def _references(node: Any, place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The keys that a config's interpolations refer to."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _references(value, (*place, str(key)))
    elif isinstance(node, str):
        for dots, path in REFERENCE.findall(node):
            parts = tuple(re.findall(r"[^.\[\]]+", path))
            yield (place[: len(place) - len(dots)] if dots else ()) + parts


# --- suggestions for messages ---


def unknown_key(key: str, config: DictConfig, verbatim: Sequence[str], config_dir: Path) -> str:
    """The message for a key that is not in `config`, or that no code reads."""
    plain = OmegaConf.to_container(config)
    known = {*_dotted_keys(plain), *verbatim}
    known |= {p.relative_to(config_dir).as_posix() for p in config_dir.rglob("*") if p.is_dir()}
    known = {name for name in known if key.startswith("hydra") or not name.startswith("hydra")}
    # Exclude the key itself, its parents and its children.
    known = {name for name in known if not f"{key}.".startswith(f"{name}.")}
    known = {name for name in known if not name.startswith(f"{key}.")}
    section, _, last = key.rpartition(".")
    target = OmegaConf.select(config, f"{section}._target_") if section else None
    if last in OPTIONAL.get(section, ()) or _takes(target, last):
        return f"unknown key {key!r}: its yaml does not set it, so write +{key}=..."
    return f"unknown key {key!r}.{did_you_mean(nearest(key, known))}"


def _takes(target: Any, argument: str) -> bool:
    """Whether a `_target_` in this project has such an argument."""
    if not isinstance(target, str) or not target.startswith("mmdit."):
        return False
    try:
        return argument in inspect.signature(get_object(target)).parameters
    except (ImportError, TypeError, ValueError):
        return False


def _dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted_keys(value, f"{prefix}{key}.")
