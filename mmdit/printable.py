"""Text from outside as it is shown: it cannot forge lines, nor steer a terminal.

Names of files and keys, captions, prompts and values may hold anything. What is shown of them goes
through `printable`: in the message of a `UserError`, in a record of a `logger`, on standard output
through `show`.
"""

import logging
import re
from typing import TextIO

# Controls (C0 with line breaks, DEL, C1), Unicode's line breaks, overrides of the direction of
# writing, and halves of surrogate pairs, which stand for bytes that are not UTF-8.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""One line of text, in which escapes such as \x1b and \u202e stand for what is not printable.

    Applied again it changes nothing.
    """
    return UNSAFE.sub(_escape, str(text))


def printable_lines(text: str) -> str:
    """Text whose line breaks are meant, each line `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def show(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, each `printable`."""
    print(*map(printable, lines), sep="\n", file=file)


class Printable(logging.Filter):
    """Makes the arguments of records `printable`: only the message itself can break lines.

    On the loggers of this project, whoever handles what they log, and on the handlers of its
    scripts, whoever logs.
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
    """The logger of this name; what it logs is printable, whoever handles it."""
    log = logging.getLogger(name)
    log.addFilter(PRINTABLE)
    return log


def _argument(value: object) -> object:
    return value if isinstance(value, int | float) else printable(value)


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
