"""Error messages for users' mistakes: what is wrong, where, and what to write instead."""

import functools
import inspect
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
import hydra.errors as hydra_errors
import omegaconf.errors as omegaconf_errors
import yaml
from omegaconf import OmegaConf

from mmdit.checks import did_you_mean, nearest
from mmdit.cli.keys import unknown_key
from mmdit.errors import UserError, first_line, path_trouble
from mmdit.out_of_memory import is_out_of_memory
from mmdit.printable import printable


def explain(
    error: BaseException, *, in_job: bool, verbatim: Sequence[str] = (), config_dir: Path
) -> str | None:
    """The message for a user's mistake; None if the error is a bug.

    Args:
        error: what was raised.
        in_job: whether the job had started; before, errors of OmegaConf and Hydra are mistakes.
        verbatim: keys whose values Hydra does not parse.
        config_dir: where the yaml files are.
    """
    match error:
        case UserError():
            return str(error)
        case RuntimeError() | MemoryError() | OSError() if is_out_of_memory(error):
            return (
                f"out of memory ({first_line(error)[:200]}). Try a smaller batch_size, image or "
                "model, fewer images or samples, or precision=bf16"
            )
        case hydra_errors.InstantiationException():
            return _explain_instantiation(error)
        case hydra_errors.MissingConfigException():
            return _explain_missing_config(error, config_dir)
        case hydra_errors.HydraException():
            return _explain_composition(error, verbatim, config_dir)
        case (
            omegaconf_errors.MissingMandatoryValue()
            | omegaconf_errors.InterpolationToMissingValueError()
        ):
            key = first_line(error).rpartition(": ")[2]
            return f"{key} has no value and needs one: give {key}=..."
        case omegaconf_errors.OmegaConfBaseException() if word := _left_out(error):
            return f"{word}: this script cannot do without {word[1:]}; choose an option of it"
        case (
            omegaconf_errors.InterpolationResolutionError()
            | omegaconf_errors.GrammarParseError()
            | omegaconf_errors.ValidationError()
        ):
            return f"{error.full_key or 'config'}: {first_line(error)}"
        case omegaconf_errors.OmegaConfBaseException() | yaml.YAMLError() if not in_job:
            return str(error)
        case ValueError() if not in_job:
            return _explain_value(error, config_dir)
        case OSError() if trouble := path_trouble(error):
            return trouble
    return _explain_partial(error)


def _left_out(error: omegaconf_errors.OmegaConfBaseException) -> str | None:
    """The word of the command line that took away the key which is missing, such as `~data`."""
    referred = re.search(r"Interpolation key '([^']+)' not found", str(error))
    missing = referred[1] if referred else str(error.full_key)
    words = (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("~"))
    return next((word for word in words if f"{missing}.".startswith(f"{word[1:]}.")), None)


def _explain_value(error: ValueError, config_dir: Path) -> str:
    """A message for a value that Hydra cannot read, such as `group=null`."""
    for word in sys.argv[1:]:
        group, _, value = word.partition("=")
        if value.strip().lower() == "null" and (config_dir / group.partition("@")[0]).is_dir():
            return f"{word}: to leave out a group, write ~{group}"
    return f"{error}\n(command line: {printable(' '.join(sys.argv[1:]))})"


def _explain_missing_config(error: hydra_errors.MissingConfigException, config_dir: Path) -> str:
    if not error.options:
        names = ", ".join(sorted(path.stem for path in config_dir.glob("*.yaml")))
        return f"{first_line(error)} Configs in {config_dir}: {names}"
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    asks = re.compile(rf"{re.escape(group)}(@\S+)?:\s*{re.escape(option)}\s*$", re.MULTILINE)
    files = [
        str(path) for path in config_dir.rglob("*.yaml") if asks.search(path.read_text("utf-8"))
    ]
    where = f" (requested in {', '.join(files)})" if files else ""
    near = nearest(option, error.options)
    hint = did_you_mean(f"{group}={near}" if near else None)
    return f"{group} has no option {option!r}{where}.{hint} Available: {', '.join(error.options)}"


def _explain_composition(
    error: hydra_errors.HydraException, verbatim: Sequence[str], config_dir: Path
) -> str:
    """A message for mistakes in overrides and defaults lists; suggests similar keys."""
    cause = error.__cause__
    message = re.sub(r"\s*See https://\S+ for details", "", str(error)).strip()
    unknown = re.match(r"Could not override '(.+?)'", message)
    node = getattr(cause, "parent_node", None)
    root = None if node is None else node._get_root()
    if unknown and root is not None and OmegaConf.select(root, unknown[1]) is None:
        return unknown_key(unknown[1], root, verbatim, config_dir)
    if isinstance(error, hydra_errors.OverrideParseException):
        quoted = f"""'{printable(error.override.partition("=")[0])}="..."'"""
        advice = f"special characters need quotes inside the shell's quotes, {quoted}"
        lines = [line for line in message.splitlines() if line.strip(" ^")]
        why = "" if lines[-1].startswith("Lexer") else f": {lines[-1]}"  # the lexer names no reason
        message = f"cannot read {error.override!r}{why}; {advice}"
    elif isinstance(cause, omegaconf_errors.OmegaConfBaseException):
        message = f"{message}\n{first_line(cause)}".strip()
    written = re.search(r"'\+*([^'=]+)=", message)
    near = nearest(written[1], verbatim) if written else None
    return message + did_you_mean(f'{near}="..."' if near else None)


def _explain_instantiation(error: hydra_errors.InstantiationException) -> str | None:
    text, cause = str(error), error.__cause__
    if isinstance(cause, hydra_errors.InstantiationException):
        return _explain_instantiation(cause)
    where = re.search(r"full_key: (.+)", text)
    key = where[1] if where else "config"
    if cause is None:
        return f"{key}: {text.partition(chr(10) + 'full_key')[0]}"
    if called := re.match(r"Error in call to target '(.+?)'", text):
        return _explain_call(cause, key, called[1])
    located, reason = re.match(r"Error locating target '(.+?)'", text), cause.__cause__
    if located and (reason is None or isinstance(reason, AttributeError | ModuleNotFoundError)):
        return f"{key}._target_: cannot find {located[1]!r}: {reason or cause}"
    return None


def _explain_partial(error: BaseException) -> str | None:
    """A message for errors of `_partial_` nodes, which the job calls and Hydra does not wrap."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        partial = frame.f_locals.get("self")
        if isinstance(partial, functools.partial) and hasattr(partial, "_hydra_full_key"):
            from_config = any(repr(name) in str(error) for name in partial.keywords)
            if from_config or not isinstance(error, TypeError) or _raised_by_hydra(error):
                name = f"{partial.func.__module__}.{partial.func.__qualname__}"
                return _explain_call(error, partial._hydra_full_key, name)
    return None


def _raised_by_hydra(error: BaseException) -> bool:
    """Whether the call itself failed, for example because the arguments do not match."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(hydra.__file__).parent in Path(frames[-1].filename).parents


def _explain_call(cause: BaseException, key: str, target: str) -> str | None:
    """A message for an error `cause` of `target` at config key `key`; None if it is a bug."""
    if isinstance(cause, UserError):
        return f"{key}: {cause}"
    if isinstance(cause, OSError) and (trouble := path_trouble(cause)):
        return f"{key}: {trouble}"
    if isinstance(cause, ValueError):
        return f"{key}: {printable(cause)}\n(HYDRA_FULL_ERROR=1 shows where this was raised)"
    if not isinstance(cause, TypeError) or not _raised_by_hydra(cause):  # inside `target`: a bug
        return None
    unexpected = re.search(r"unexpected keyword argument '(.+?)'", str(cause))
    if not unexpected:
        return f"{key}: {cause}"
    try:
        accepted = list(inspect.signature(hydra.utils.get_object(target)).parameters)
    except (ImportError, TypeError, ValueError):  # a decorated or built-in target
        accepted = []
    hint = did_you_mean(nearest(unexpected[1], accepted))
    hint += f" It takes: {', '.join(accepted)}" if accepted else ""
    return f"{key}.{unexpected[1]}: {target} takes no such argument.{hint}"
