"""Limits for files from elsewhere: a file that exceeds one is rejected before it is read.

Each limit is several times what any public model needs, and small enough that a malicious file
within the limits is rejected within a second and 200 MB.
"""

import json
import stat
from pathlib import Path
from typing import Any

from mmdit.errors import UserError

# Public single files contain at most 1,668 tensors (five models), a training run's optimizer twice
# as many; their headers have at most 0.3 MB. Metadata (workflows, vocabularies) may be longer.
MOST_TENSORS = 10_000
MOST_ENTRIES = 1_000  # of the metadata; trainers write about 100
LONGEST_JSON = 8 << 20  # bytes
LONGEST_KEY = 500  # characters of a tensor's name; the longest public one has 100
# An empty object of two bytes occupies 64 in memory, so a limit on the length is not enough.
MOST_BRACKETS = 100_000
DEEPEST = 32  # nesting levels of a description; ours have six
MOST_BLOCKS = 128  # the largest public model has 38
MOST_BUILT = 6_000  # tensors built from a description; an 8B pipeline has 2,800
MOST_SHARDS = 1_000  # the largest public model has three
MOST_OPCODES = 300_000  # of a pickle, which needs about 30 per tensor
LARGEST_VOCABULARY = 16 << 20  # bytes; T5's file is the largest, with 2.4 MB
MOST_WORDS = 100_000  # of a vocabulary; T5's has 32,128, CLIP's 49,408
LONGEST_PROMPT = 4096  # tokens; T5 was trained on 512


def read_bounded(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        UserError: it is not a regular file (but a device, a pipe, a folder), or is larger.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path} is not a regular file, and is not read")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} is larger than {most:,} bytes, and is not what it should be")
    return content


def parse_json(text: bytes) -> Any:
    """Parse JSON from elsewhere, if it is not larger than any model could need.

    Raises:
        ValueError: it is not JSON, or is too long or too deeply nested.
    """
    if len(text) > LONGEST_JSON:
        raise ValueError(f"it is longer than {LONGEST_JSON:,} bytes")
    if text.count(b"{") + text.count(b"[") > MOST_BRACKETS:
        raise ValueError(f"it consists of more than {MOST_BRACKETS:,} parts")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
