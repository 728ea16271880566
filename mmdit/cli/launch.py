"""From a command line to a running job: composes the config with Hydra, explains users' mistakes.

`launch` is `hydra.main` with three additions. Free text (prompts, paths) is taken from the command
line before Hydra parses it, because commas, quotes, brackets, `$` and more have a meaning in
Hydra's grammar. A config is checked before anything is built from it: keys that no code reads, and
targets that are not allowed, are errors. And a user's mistake ends in one message and exit code 2,
while a bug keeps its traceback.
"""

import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig

from mmdit.cli import CONFIGS
from mmdit.cli.keys import check_keys, known_keys
from mmdit.cli.messages import explain
from mmdit.cli.targets import check_targets
from mmdit.errors import UserError, first_line
from mmdit.printable import printable_lines, show
from mmdit.processes import report_to_torchrun, restart_remarks, wait_for_report
from mmdit.programs import as_started
from mmdit.streams import guarded

Verbatim = dict[str, str]

FLAGS_ALONE = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--"),
}
FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--info", "-i"),
}


class _JobFailed(BaseException):
    """Carries a job's exception past Hydra, which prints its own line about any `Exception`."""


def launch(
    job: Callable[[DictConfig, Verbatim], None],
    *,
    config_name: str,
    verbatim: tuple[str, ...] = (),
    describe: Callable[[DictConfig], Iterable[str]] | None = None,
    config_dir: Path = CONFIGS,
    outlives_output: bool = False,
) -> None:
    """Run `job(config, text)` according to the command line: once, or per job of a multirun.

    Exits with 2 after a user's mistake, with 130 after Ctrl-C, and with 141 if the reader of the
    output has gone (`| head -1`); raises any other exception of the job.

    Args:
        job: called with the config and the free text that was given, by key.
        config_name: the yaml in `config_dir`, without its extension.
        verbatim: keys of free text: their values are taken as typed and are not in the config.
        describe: gives lines that `--cfg job` prints as comments above the config.
        config_dir: where the yaml files are.
        outlives_output: whether a job runs to its end after the reader of its output has gone.
    """
    with guarded(lambda: outlives_output and HydraConfig.initialized()):
        _launch(job, config_name, verbatim, describe, config_dir)


def _launch(
    job: Callable[[DictConfig, Verbatim], None],
    config_name: str,
    verbatim: tuple[str, ...],
    describe: Callable[[DictConfig], Iterable[str]] | None,
    config_dir: Path,
) -> None:
    arguments = sys.argv[1:]
    command_line, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR") == "1"
    started = False
    failed: list[str] = []
    error: BaseException
    try:
        arguments, text = split_arguments(sys.argv[1:], verbatim)
        imports = imports_in(arguments)
        known = known_keys(config_name, config_dir) if _may_add(arguments) else None

        def check(config: DictConfig) -> None:
            if known is not None:
                check_keys(config, known, verbatim, config_dir)
            check_targets(config, imports)
            config.hydra.help.header = as_started(config.hydra.help.header)

        @functools.wraps(job)  # Hydra names the job after the file that defines it
        def task(config: DictConfig) -> None:
            nonlocal started
            started = True
            sys.argv = [sys.argv[0], *arguments]  # in a worker of a launcher, too
            try:
                check_targets(config, imports)
                import_modules(config.get("imports"))
                job(config, dict(text))
            except Exception as failure:
                if HydraConfig.get().mode == RunMode.RUN:
                    raise _JobFailed from failure
                failed.append(_report_failed_job(failure, verbatim, config_dir))
                raise

        sys.argv = [sys.argv[0], *arguments]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
        if "COMP_LINE" in os.environ:
            os.environ["COMP_LINE"] = _without_verbatim(os.environ["COMP_LINE"], verbatim)
        with checked_compositions(check):
            if describe is not None and _shows_config(arguments):
                _print_description(describe, config_name, config_dir, arguments)
            hydra.main(config_path=str(config_dir), config_name=config_name, version_base="1.3")(
                task
            )()
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
    _list_failed(failed)
    message = explain(error, in_job=started, verbatim=verbatim, config_dir=config_dir)
    _end(error, message, arguments, full_error=full_error)


def _print_description(
    describe: Callable[[DictConfig], Iterable[str]],
    config_name: str,
    config_dir: Path,
    arguments: Sequence[str],
) -> None:
    """Print the lines of `describe` for the config of a command line, as comments."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        overrides = [word for word in arguments if "=" in word or word.startswith("~")]
        for line in describe(compose(config_name, overrides + _search_path(arguments))):
            print(f"# {line}")


def _end(
    error: BaseException, message: str | None, arguments: Sequence[str], *, full_error: bool
) -> NoReturn:
    """End the program after an error: with its message, or with a traceback if it has none.

    Args:
        message: of a user's mistake; None is a bug.
        arguments: command line of the job.
        full_error: whether a mistake is to be printed with its traceback, too.
    """
    wait_for_report(error, mistake=message is not None)
    remarks = restart_remarks(arguments)
    summary = message or f"{type(error).__name__}: {first_line(error)}"
    report_to_torchrun("\n".join([summary, *remarks]))
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    if message is None:
        raise error  # outside of all handlers: its traceback has no "during handling of"
    if full_error:
        traceback.print_exception(error)
    print(printable_lines(message), file=sys.stderr)
    sys.exit(2)


@contextmanager
def checked_compositions(check: Callable[[DictConfig], None]) -> Iterator[None]:
    """Call `check` for every config that Hydra composes, including Hydra's own section.

    Hydra itself builds launchers, callbacks and logging handlers before the job begins, and
    composes a new config for each job of a multirun.
    """
    compose_one = ConfigLoaderImpl.load_configuration

    def load_configuration(self: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
        config = compose_one(self, *args, **options)
        check(config)
        return config

    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = compose_one  # type: ignore[method-assign]


def _may_add(arguments: Sequence[str]) -> bool:
    """Whether a command line adds keys, or reads the user's configs, which may add keys."""
    flags = ("--config", "-cd", "-cn", "-cp")
    return any(word.startswith(("+", *flags)) or "searchpath" in word for word in arguments)


def imports_in(arguments: Sequence[str]) -> list[str]:
    """The modules named on the command line: `imports=[a,b]`.

    Raises:
        UserError: the value is not a list of module names.
    """
    words = [word for word in arguments if word.lstrip("+").partition("=")[0].strip() == "imports"]
    given = [override.value() for override in OverridesParser.create().parse_overrides(words)]
    return [name for value in given for name in module_names(value)]


def module_names(value: Any) -> list[str]:
    """The module names in `imports`, a list or a single name.

    Raises:
        UserError: a value is not the name of a module.
    """
    names = value if isinstance(value, list | ListConfig) else [value]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            raise UserError(f"imports={value} must be a list of modules: imports=[my_module]")
    return list(names)


def import_modules(value: Any) -> None:
    """Import the user's modules, which register classes that checkpoints refer to.

    Raises:
        UserError: there is no such module.
    """
    for name in module_names(value) if value else ():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"imports: {error}; Python must find the module, for example by PYTHONPATH=<folder>"
            ) from error


def _search_path(arguments: Sequence[str]) -> list[str]:
    """The override that replaces `--config-dir <folder>` outside of `hydra.main`."""
    for flag, value in pairwise([*arguments, ""]):
        name, _, attached = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            return [f"hydra.searchpath=[file://{Path(attached or value).resolve()}]"]
    return []


def sweep_label() -> str | None:
    """The overrides that distinguish this job of a multirun, without the seed: `model=toy_dit`.

    These are keys that the sweeper varies, or for which several values were typed. The label is
    'default' if only seeds vary, and None outside of a multirun.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return None
    typed = (word.partition("=") for word in sys.argv[1:])
    varied = {key.strip() for key, _, value in typed if "," in value or "(" in value}
    varied |= set(hydra_config.sweeper.get("params") or {})
    parts = [part for part in hydra_config.overrides.task if part.partition("=")[0] in varied]
    return ",".join(part for part in parts if not part.startswith("seed=")) or "default"


def _shows_config(arguments: Sequence[str]) -> bool:
    """Whether Hydra is to print the full config of the job: `--cfg job` without `-p`."""
    shown = any(pair in (("--cfg", "job"), ("-c", "job")) for pair in pairwise(arguments))
    return shown and not {"-p", "--package"} & set(arguments)


def _list_failed(failed: Sequence[str]) -> None:
    """List the failed jobs of a multirun: most were reported long before."""
    if len(failed) > 1:
        lines = (f"  {line}" for line in failed)
        show(f"{len(failed)} jobs of this multirun failed:", *lines, file=sys.stderr)


def _report_failed_job(failure: Exception, verbatim: tuple[str, ...], config_dir: Path) -> str:
    """Print immediately which job of a sweep failed: Hydra raises the first error at the end."""
    message = explain(failure, in_job=True, verbatim=verbatim, config_dir=config_dir)
    job = HydraConfig.get()
    which = f"job {job.job.num} ({' '.join(job.overrides.task)})"
    why = message or f"{type(failure).__name__}: {first_line(failure)}"
    line = f"{which} failed: {why.splitlines()[0]}"
    show(line, file=sys.stderr)
    return line


# --- the command line ---


def split_arguments(
    arguments: Sequence[str], verbatim: Sequence[str]
) -> tuple[list[str], Verbatim]:
    """Separate verbatim `key=text` from what Hydra parses, with overrides before flags.

    argparse does not accept overrides on both sides of a flag. Invalid bytes become U+FFFD.

    Raises:
        UserError: a verbatim key is given twice, a flag is unknown, or a word is neither
            `key=value` nor a flag.
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
            undecoded = re.search("[\ud800-\udfff]", value)  # not in the locale: try UTF-8
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
    """Whether argparse reads `argument` as one of `flags`; it accepts prefixes like `--multi`."""
    name = argument.partition("=")[0]
    is_prefix = len(name) > 2 and any(flag.startswith(name) for flag in flags if flag[:2] == "--")
    return name in flags or is_prefix


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
    """Remove complete `key=text` words from a line being completed: Hydra cannot parse them."""
    keys = "|".join(map(re.escape, verbatim))
    value = r"""(?:"[^"]*"|'[^']*'|\\.|[^\s"'])*"""
    return re.sub(rf"\s\+*(?:{keys})={value}(?=\s)", "", command_line) if keys else command_line
