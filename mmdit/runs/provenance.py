"""Version of the code that trains a run, for its manifests."""

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import torch


def code_version() -> dict[str, Any]:
    """Versions of the package and of PyTorch, and the git commit if the code is a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    version: dict[str, Any] = {"version": None, "torch": torch.__version__}
    with contextlib.suppress(
        importlib.metadata.PackageNotFoundError
    ):  # a checkout that is not installed
        version["version"] = importlib.metadata.version("sd3-mmdit")
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return {**version, "commit": None}  # installed inside another repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {**version, "commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {**version, "commit": None}
