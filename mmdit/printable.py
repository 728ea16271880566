"""Escaping untrusted text, so that it can neither forge log lines nor control a terminal.

File names, keys, captions, prompts and values may contain anything. Before they are displayed, in
the message of a `UserError`, in a record of a `logger` or by `show`, they pass through `printable`.
"""

import logging
import re
from typing import TextIO

# Control characters (C0 with line breaks, DEL, C1), Unicode line breaks, bidirectional overrides,
# and lone surrogates, which stand for bytes that are not UTF-8.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""One line of text, with characters that are not printable escaped, as in \x1b and \u202e.

    Idempotent: applying it again changes nothing.
    """
    return UNSAFE.sub(_escape, str(text))


def printable_lines(text: str) -> str:
    """Text whose line breaks and indentation are intended; each line is made `printable`."""
    indented = re.sub("^\t+", lambda tabs: "  " * len(tabs[0]), text, flags=re.MULTILINE)
    return "\n".join(map(printable, indented.split("\n")))


def show(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, each made `printable`."""
    print(*map(printable, lines), sep="\n", file=file)


class Printable(logging.Filter):
    """Logging filter that makes the arguments of records `printable`.

    Only the message itself can contain line breaks. The filter is added to the loggers of this
    project, for any handler, and to the handlers of its scripts, for any logger.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = printable_lines(str(record.msg))
        if isinstance(record.args, tuple):
            record.args = tuple(map(_argument, record.args))
        elif record.args:
            record.args = {name: _argument(value) for name, value in record.args.items()}
        return True


PRINTABLE = Printable()


def logger(name: str) -> logging.Logger:
    """The logger of this name, whose records are printable with any handler."""
    log = logging.getLogger(name)
    log.addFilter(PRINTABLE)
    return log


def _argument(value: object) -> object:
    return value if isinstance(value, int | float) else printable(value)


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
