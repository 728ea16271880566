"""From a command line to a running job: compose the config with Hydra, explain the user's mistakes.

`launch` is `hydra.main` plus two things. Free text (prompts, paths) is taken from the command line
before Hydra parses it, because Hydra's grammar gives a meaning to commas, quotes, brackets, `$` and
more. And a user's mistake ends in one message and exit code 2, while a bug keeps its traceback.
"""

import difflib
import functools
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
import hydra.errors as hydra_errors
import omegaconf.errors as omegaconf_errors
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mmdit.errors import UserError

Verbatim = dict[str, str]
CONFIGS = Path(__file__).resolve().parent

FLAGS_ALONE = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--"),
}
FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--info", "-i", "--experimental-rerun"),
}


class _JobFailed(BaseException):
    """Carries a job's exception past Hydra, which prints its own line about any `Exception`."""


def launch(
    job: Callable[[DictConfig, Verbatim], None],
    *,
    config_name: str,
    verbatim: tuple[str, ...] = (),
    config_dir: Path = CONFIGS,
) -> None:
    """Run `job(config, text)` as the command line asks: once, or once per job of a multirun.

    `verbatim` names the keys whose values are taken as typed and stay out of the config: `text`
    holds those that were given. Exits with 2 after a user's mistake, with 130 after Ctrl-C, and
    raises any other exception of the job.
    """
    command_line, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR") == "1"
    started = False
    error: BaseException
    try:
        arguments, text = split_arguments(sys.argv[1:], verbatim)

        @functools.wraps(job)  # Hydra names the job after the file that defines it
        def task(config: DictConfig) -> None:
            nonlocal started
            started = True
            try:
                job(config, dict(text))
            except Exception as failure:
                if HydraConfig.get().mode == RunMode.RUN:
                    raise _JobFailed from failure
                _report_failed_job(failure)
                raise

        sys.argv = [sys.argv[0], *arguments]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
        if "COMP_LINE" in os.environ:
            os.environ["COMP_LINE"] = _without_verbatim(os.environ["COMP_LINE"], verbatim)
        hydra.main(config_path=str(config_dir), config_name=config_name, version_base="1.3")(task)()
        return
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except _JobFailed as stop:
        error = stop.__cause__ or stop
    except Exception as failure:  # raised again below, unless it is a user's mistake
        error = failure
    finally:
        sys.argv = command_line
        if not full_error:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    message = explain(error, in_job=started, verbatim=verbatim, config_dir=config_dir)
    if message is None:
        raise error  # outside the handlers above, so that its traceback has no "during handling of"
    if full_error:
        traceback.print_exception(error)
    print(message, file=sys.stderr)
    sys.exit(2)


def _report_failed_job(failure: Exception) -> None:
    """Say at once which job of a sweep failed: Hydra goes on, and raises the first at the end."""
    job = HydraConfig.get()
    which = f"job {job.job.num} ({' '.join(job.overrides.task)})"
    print(f"{which} failed: {type(failure).__name__}: {_first_line(failure)}", file=sys.stderr)


# --- the command line ---


def split_arguments(
    arguments: Sequence[str], verbatim: Sequence[str]
) -> tuple[list[str], Verbatim]:
    """Separate the verbatim `key=text` from what Hydra parses: overrides, then flags.

    argparse would refuse overrides on both sides of a flag. Bytes that are no valid text become
    U+FFFD. Raises UserError for a verbatim key given twice, an unknown flag, or a word that is
    neither `key=value` nor a flag.
    """
    text: Verbatim = {}
    overrides: list[str] = []
    flags: list[str] = []
    awaits_value = False
    for index, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        key = key.strip().lstrip("+")
        if equals and key in verbatim:
            if key in text:
                raise UserError(f"{key} is given twice: keep one {key}=...")
            undecoded = re.search("[\ud800-\udfff]", value)  # by the locale: try UTF-8
            text[key] = os.fsencode(value).decode("utf-8", "replace") if undecoded else value
        elif argument.startswith("-"):
            flags.append(_checked_flag(argument, verbatim))
        elif equals or argument.startswith("~"):
            overrides.append(argument)
        elif awaits_value:
            flags.append(argument)
        else:
            raise UserError(_describe_stray(arguments, index, verbatim))
        awaits_value = argument.startswith("-") and _is_flag(argument, FLAGS_WITH_VALUE)
    return overrides + flags, text


def _is_flag(argument: str, flags: Collection[str]) -> bool:
    """Whether argparse reads `argument` as one of `flags`; it accepts an unfinished `--multi`."""
    name = argument.partition("=")[0]
    unfinished = len(name) > 2 and any(flag.startswith(name) for flag in flags if flag[:2] == "--")
    return name in flags or unfinished


def _checked_flag(argument: str, verbatim: Sequence[str]) -> str:
    key = argument.lstrip("-").partition("=")[0].replace("-", "_")
    if key in verbatim:
        raise UserError(f'unknown option {argument!r}: write {key}="...", without dashes')
    value_attached = argument[:2] in ("-c", "-p", "-i") and len(argument) > 2
    if not value_attached and not _is_flag(argument, FLAGS_ALONE | FLAGS_WITH_VALUE):
        raise UserError(
            f"unknown option {argument!r}: write key=value, without dashes (see --help)"
        )
    return argument


def _describe_stray(arguments: Sequence[str], index: int, verbatim: Sequence[str]) -> str:
    word = arguments[index]
    if word in verbatim:
        return f'{word!r} has no value: write {word}="...", with no spaces around the equals sign'
    key, equals, value = arguments[index - 1].partition("=") if index else ("", "", "")
    if equals and key.strip().lstrip("+") in verbatim:
        quoted = f'{key}="{value} {word} ..."'
        return f"unexpected {word!r} after {key}={value}: text with spaces needs quotes, {quoted}"
    example = f'; text with spaces needs quotes, {verbatim[0]}="..."' if verbatim else ""
    return f"unexpected {word!r}: options are written key=value{example} (see --help)"


def _without_verbatim(command_line: str, verbatim: Sequence[str]) -> str:
    """Drop each finished `key=text` from a line under shell completion: Hydra would parse it."""
    keys = "|".join(map(re.escape, verbatim))
    value = r"""(?:"[^"]*"|'[^']*'|\\.|[^\s"'])*"""
    return re.sub(rf"\s\+*(?:{keys})={value}(?=\s)", "", command_line) if keys else command_line


# --- messages ---


def explain(
    error: BaseException, *, in_job: bool, verbatim: Sequence[str] = (), config_dir: Path = CONFIGS
) -> str | None:
    """What to tell the user about `error`, None if it is no user's mistake; has a job begun?"""
    match error:
        case UserError():
            return str(error)
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
            key = _first_line(error).rpartition(": ")[2]
            return f"{key} has no value and needs one: give {key}=..."
        case (
            omegaconf_errors.InterpolationResolutionError()
            | omegaconf_errors.GrammarParseError()
            | omegaconf_errors.ValidationError()
        ):
            return f"{error.full_key or 'config'}: {_first_line(error)}"
        case omegaconf_errors.OmegaConfBaseException() | yaml.YAMLError() if not in_job:
            return str(error)
        case ValueError() if not in_job:
            return f"{error}\n(command line: {' '.join(sys.argv[1:])})"
    return _explain_partial(error)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The name in `known` most like `word`, as a whole or in its last part; None if none is."""

    def likeness(name: str) -> tuple[float, float]:
        last, last_known = re.split(r"[./]", word)[-1], re.split(r"[./]", name)[-1]
        whole = difflib.SequenceMatcher(None, word, name).ratio()
        return max(whole, 0.9 * difflib.SequenceMatcher(None, last, last_known).ratio()), whole

    best = max(sorted(known), key=likeness, default="")
    return best if best and likeness(best)[0] > 0.65 else None


def _did_you_mean(name: str | None) -> str:
    return f" Did you mean {name}?" if name else ""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _dotted_keys(node: Any, prefix: str = "") -> Iterable[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted_keys(value, f"{prefix}{key}.")


def _explain_missing_config(error: hydra_errors.MissingConfigException, config_dir: Path) -> str:
    if not error.options:
        names = ", ".join(sorted(path.stem for path in config_dir.glob("*.yaml")))
        return f"{_first_line(error)} Configs in {config_dir}: {names}"
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    asks = re.compile(rf"{re.escape(group)}(@\S+)?:\s*{re.escape(option)}\s*$", re.MULTILINE)
    files = [
        str(path) for path in config_dir.rglob("*.yaml") if asks.search(path.read_text("utf-8"))
    ]
    where = f" (asked for in {', '.join(files)})" if files else ""
    near = nearest(option, error.options)
    hint = _did_you_mean(f"{group}={near}" if near else None)
    return f"{group} has no option {option!r}{where}.{hint} Available: {', '.join(error.options)}"


def _explain_composition(
    error: hydra_errors.HydraException, verbatim: Sequence[str], config_dir: Path
) -> str:
    """Mistakes in overrides and defaults lists; finds the key nearest to an unknown one."""
    cause = error.__cause__
    message = re.sub(r"\s*See https://\S+ for details", "", str(error)).strip()
    unknown = re.match(r"Could not override '(.+?)'", message)
    node = getattr(cause, "parent_node", None)
    if unknown and node is not None:
        key = unknown[1]
        known = {*_dotted_keys(OmegaConf.to_container(node._get_root())), *verbatim}
        known |= {p.relative_to(config_dir).as_posix() for p in config_dir.rglob("*") if p.is_dir()}
        known = {name for name in known if key.startswith("hydra") or not name.startswith("hydra")}
        hint = _did_you_mean(nearest(key, known))
        return f"unknown key {key!r}.{hint} (+{key}=... adds a new key)"
    if isinstance(error, hydra_errors.OverrideParseException):
        quoted = f"""'{error.override.partition("=")[0]}="..."'"""
        advice = f"special characters need quotes inside the shell's quotes, {quoted}"
        message = f"cannot read {error.override!r}: {message.splitlines()[-1]}; {advice}"
    elif isinstance(cause, omegaconf_errors.OmegaConfBaseException):
        message = f"{message}\n{_first_line(cause)}".strip()
    written = re.search(r"'\+*([^'=]+)=", message)
    close = difflib.get_close_matches(written[1], verbatim, 1, 0.75) if written else []
    return message + _did_you_mean(f'{close[0]}="..."' if close else None)


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
    """The job calls a `_partial_` node itself, and Hydra wraps no exception: see the traceback."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        partial = frame.f_locals.get("self")
        if isinstance(partial, functools.partial) and hasattr(partial, "_hydra_full_key"):
            from_config = any(repr(name) in str(error) for name in partial.keywords)
            if from_config or not isinstance(error, TypeError):
                name = f"{partial.func.__module__}.{partial.func.__qualname__}"
                return _explain_call(error, partial._hydra_full_key, name)
    return None


def _explain_call(cause: BaseException, key: str, target: str) -> str | None:
    """`target`, named by the config node `key`, raised `cause`: was it handed something wrong?"""
    if isinstance(cause, UserError):
        return f"{key}: {cause}"
    if isinstance(cause, ValueError):
        return f"{key}: {cause}\n(HYDRA_FULL_ERROR=1 shows where this was raised)"
    frames = traceback.extract_tb(cause.__traceback__)
    by_hydra = frames and Path(hydra.__file__).parent in Path(frames[-1].filename).parents
    if not isinstance(cause, TypeError) or not by_hydra:  # raised inside `target`: a bug
        return None
    unexpected = re.search(r"unexpected keyword argument '(.+?)'", str(cause))
    if not unexpected:
        return f"{key}: {cause}"
    try:
        taken = list(inspect.signature(hydra.utils.get_object(target)).parameters)
    except (ImportError, TypeError, ValueError):  # a decorated or built-in target
        taken = []
    hint = _did_you_mean(nearest(unexpected[1], taken))
    hint += f" It takes: {', '.join(taken)}" if taken else ""
    return f"{key}.{unexpected[1]}: {target} takes no such argument.{hint}"
