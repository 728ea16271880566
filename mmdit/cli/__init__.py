"""Command lines: the only package that imports Hydra."""

import os
from pathlib import Path

# Must be set before torch starts its threads, whose long spinning slows down a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

PACKAGE = Path(__file__).resolve().parents[1]
# In the package if it is installed, next to it in a checkout.
CONFIGS = next(p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir())
