"""Command lines: the only package that imports Hydra."""

import os
import sys
from pathlib import Path
from types import TracebackType

# Must be set before torch starts its threads, whose long spinning slows down a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

PACKAGE = Path(__file__).resolve().parents[1]
# In the package if it is installed, next to it in a checkout.
CONFIGS = next(p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir())


def _end_quietly(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, tb)


# Ctrl-C while a program imports torch, for seconds, ends in a word and not in a traceback.
sys.excepthook = _end_quietly
