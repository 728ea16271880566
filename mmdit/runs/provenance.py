"""What code a run is made by."""

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import torch


def code_version() -> dict[str, Any]:
    """What is running: versions of the package and of PyTorch, and the commit, if it is one's."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return ended.stdout.strip()

    version: dict[str, Any] = {"version": None, "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout on the path
        version["version"] = importlib.metadata.version("sd3-mmdit")
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return {**version, "commit": None}  # a package installed inside somebody's repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {**version, "commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {**version, "commit": None}
