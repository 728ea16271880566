"""The published vocabularies, where they are at hand."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of the real vocabularies and of ids, or a skipped test where it is absent."""
    folder = Path(__file__).resolve().parents[3] / "shared"
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"no tokenizers in {folder}")
    return folder
