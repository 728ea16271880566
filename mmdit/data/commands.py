"""What the commands of this room have in common: options, messages and exit codes."""

import argparse
import logging
import sys
from collections.abc import Callable

from mmdit.data.images import MAX_PIXELS, BadImage
from mmdit.errors import UserError, path_trouble
from mmdit.printable import show
from mmdit.streams import guarded


def add_options(parser: argparse.ArgumentParser) -> None:
    """What decides which images are set aside, and how many decode at once."""
    option = parser.add_argument
    option("--max-pixels", type=int, default=MAX_PIXELS, help="larger images are set aside")
    option("--max-bad-fraction", type=float, default=0.02, help="of images set aside; above, stop")
    option("--threads", type=int, default=8, help="that decode at once")


def command(body: Callable[[], None]) -> int:
    """Run a command; a user's mistake or a failing disk is reported in a line, with exit code 2."""
    try:
        with guarded():
            logging.basicConfig(format="%(message)s")
            body()
    except (ValueError, OSError) as error:
        # UserError, or the plain ValueError of an argument; its other kinds are faults of the code.
        if isinstance(error, ValueError) and type(error) not in (UserError, BadImage, ValueError):
            raise
        trouble = path_trouble(error) if isinstance(error, OSError) else None
        show(f"error: {trouble or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0
