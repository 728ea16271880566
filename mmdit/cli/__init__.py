"""Command lines: the only room that knows Hydra."""

import os
from pathlib import Path

# Before torch starts its threads: ones that spin long while they wait starve a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

PACKAGE = Path(__file__).resolve().parents[1]
# Inside the package where it was installed; beside it in a checkout.
CONFIGS = next(p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir())
