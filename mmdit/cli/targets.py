"""Restricts what a config may build to classes of mmdit and of the modules in `imports=`.

A `_target_` can name any callable of any installed package, some of which load pickles or run a
shell, and a yaml may come from an untrusted source. All targets are therefore checked before the
first is built.
"""

import importlib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdit.checks import did_you_mean, nearest
from mmdit.cli import CONFIGS
from mmdit.errors import UserError, first_line

OWN = "mmdit"
HYDRA = ("hydra", "hydra_plugins")  # allowed below `hydra`: launchers, sweepers
LOGGING = (*HYDRA, "logging", "colorlog", "mmdit.printable")  # allowed in Hydra's logging
FACTORIES = ("()", "class")  # what `logging.config` builds
FUNCTION = "function"  # a key whose value may name one as module:name


def check_targets(config: DictConfig, imports: Collection[str]) -> None:
    """Reject a config with a target that is not allowed.

    Args:
        config: config of a job, with or without Hydra's own section `hydra`.
        imports: modules named on the command line, which are trusted; a yaml cannot add to them.

    Raises:
        UserError: a `_target_` is not allowed, or does not exist.
    """
    found = list(_targets(config, ""))
    for key, target in found:
        _check_name(key, target, _allowed(key, imports))
    for key, target in found:
        _check_object(key, target, imports)


def _allowed(key: str, imports: Iterable[str]) -> tuple[str, ...]:
    """Packages from which the target at `key` may come."""
    if not key.startswith("hydra."):
        return (OWN, *imports)
    return (*(HYDRA if key.endswith("._target_") else LOGGING), *imports)


def _targets(node: Any, place: str, above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Key and value of every `_target_` and function, and of what Hydra's logging builds."""
    if not OmegaConf.is_config(node) or id(node) in above:
        return
    logs = place.startswith("hydra.") and "logging" in place
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        where = f"{place}.{key}".lstrip(".")
        try:
            value = node[key]
        except OmegaConfBaseException as error:  # it has no value (yet)
            if key == "_target_":
                raise UserError(f"{where}: {first_line(error)}") from error
            continue
        if key == "_target_" or (logs and key in FACTORIES):
            yield where, value
        elif key == FUNCTION and isinstance(value, str):
            yield where, value.replace(":", ".", 1)
        else:
            yield from _targets(value, where, (*above, id(node)))


def _within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _check_name(key: str, target: Any, allowed: Collection[str]) -> None:
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        raise UserError(f"{key}={target!r} must be the dotted name of a class: <module>.<class>")
    if not _within(target, allowed):
        raise _refusal(key, target, target.rpartition(".")[0])


def _refusal(key: str, target: str, module: str) -> UserError:
    return UserError(
        f"{key}: {target!r} is not part of {OWN}, and a config may build nothing else. If you "
        f"trust {module}, name it on the command line: imports=[{module}]"
    )


def _check_object(key: str, target: str, imports: Collection[str]) -> None:
    """Check where the object was defined, because modules also contain what they import."""
    allowed = _allowed(key, imports)
    parts = target.split(".")
    found: Any = None
    for i, part in enumerate(parts):
        try:
            found = getattr(found, part) if i else _imported(key, target, part)
        except AttributeError as error:
            if not isinstance(found, ModuleType):
                raise UserError(f"{key}: cannot find {target!r}: {error}") from error
            if not hasattr(found, "__path__"):  # a file, which holds no further modules
                hint = did_you_mean(nearest(part, vars(found)))
                raise UserError(
                    f"{key}: cannot find {target!r}: {found.__name__} has no {part}.{hint}"
                ) from error
            found = _imported(key, target, ".".join(parts[: i + 1]))
        # Parent packages of an allowed module are allowed on the way to it.
        if isinstance(found, ModuleType) and not _leads_to(found.__name__, allowed):
            raise _refusal(key, target, found.__name__)
    module = getattr(found, "__module__", None) or type(found).__module__
    if not _within(module, allowed):
        raise _refusal(key, target, module)
    own = _within(module, [OWN]) and not _within(module, imports)
    if own and not (inspect.isclass(found) or _is_shipped(found, target)):
        raise UserError(f"{key}: {target!r} is neither a class nor a function that configs build")


def _imported(key: str, target: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}: cannot find {target!r}: {error}; Python must find a module of your own, for "
            "example by PYTHONPATH=<folder>"
        ) from error


def _leads_to(module: str, allowed: Iterable[str]) -> bool:
    return any(_within(module, [name]) or _within(name, [module]) for name in allowed)


def _is_shipped(found: Any, target: str) -> bool:
    """Whether a shipped config builds this object, under any module path."""
    name = target.rpartition(".")[2]
    return any(get_object(t) is found for t in _shipped() if t.rpartition(".")[2] == name)


@cache
def _shipped() -> frozenset[str]:
    """All targets in the configs of this project."""
    texts = (path.read_text("utf-8") for path in CONFIGS.rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"_target_:\s*([\w.]+)", text))
