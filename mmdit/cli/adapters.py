"""The adapters of a command line: `lora=style.safetensors:0.8,face.safetensors`."""

import re
from pathlib import Path
from typing import Any

from mmdit.adapters.adapter import adapter_in
from mmdit.errors import UserError
from mmdit.pipeline import Pipeline
from mmdit.runs.native import weights_hash


def sources(words: str) -> list[tuple[str, float]]:
    """The sources that `lora=` names, with their scales; a name that is there may have commas.

    Raises:
        UserError: one is empty, or its scale is not a number.
    """
    found = []
    for word in [words] if Path(words).exists() else words.split(","):
        match = re.fullmatch(r"(.+):([^:/\\]*)", word.strip())
        if match is None or Path(word.strip()).exists():
            found.append((word.strip(), 1.0))
            continue
        try:
            found.append((match[1], float(match[2])))
        except ValueError:
            raise UserError(
                f"lora={word}: the scale {match[2]!r} must be a number, as in style.safetensors:0.8"
            ) from None
    if not all(source for source, _ in found):
        raise UserError("lora= must name a file, a folder of PEFT or a run: lora=a.safetensors:0.8")
    return found


def load_adapters(pipe: Pipeline, words: str) -> list[dict[str, Any]]:
    """Attach the adapters that `lora=` names.

    Returns:
        What images state about each: source, scale and the hash of its weights.

    Raises:
        UserError: one cannot be read, or is for another model.
    """
    facts = []
    for source, scale in sources(words):
        try:
            name = pipe.load_lora(source, scale)
        except UserError as error:
            raise UserError(f"lora={source}: {error}") from error
        digest = weights_hash(adapter_in(pipe, name))
        facts.append({"source": source, "scale": scale, "sha256": digest})
    return facts
