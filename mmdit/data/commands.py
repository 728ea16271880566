"""Options, messages and exit codes shared by the data commands."""

import argparse
import logging
import sys
from collections.abc import Callable

from mmdit.data.images import MAX_PIXELS, BadImage
from mmdit.errors import UserError, path_trouble
from mmdit.printable import show
from mmdit.streams import guarded


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all data commands share."""
    option = parser.add_argument
    option("--max-pixels", type=int, default=MAX_PIXELS, help="larger images are set aside")
    option("--max-bad-fraction", type=float, default=0.02, help="stop if more images are set aside")
    option("--threads", type=int, default=8, help="threads that decode images")


def command(body: Callable[[], None]) -> int:
    """Run a command; report a user error or a disk failure in one line, with exit code 2."""
    try:
        with guarded():
            logging.basicConfig(format="%(message)s")
            body()
    except (ValueError, OSError) as error:
        # UserError, or a plain ValueError about an argument; other subclasses are bugs.
        if isinstance(error, ValueError) and type(error) not in (UserError, BadImage, ValueError):
            raise
        trouble = path_trouble(error) if isinstance(error, OSError) else None
        show(f"error: {trouble or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: run the same command to continue", file=sys.stderr)
        return 130
    return 0
