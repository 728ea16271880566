"""Images in the layout that GenEval's evaluator reads (Ghosh et al. 2023).

<folder>/00000/metadata.jsonl         line 0 of evaluation_metadata.jsonl: the expected objects
<folder>/00000/samples/0000.png ...   images for its prompt

The evaluator is not a part of this project: it needs an object detector and the classes it knows.
"""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mmdit.atomic import claim, write_atomically
from mmdit.data.captions import RELATIONS, Scene, short_caption
from mmdit.errors import UserError

Metadata = dict[str, Any]  # tag, include, prompt, and other keys

TAGS = {"colours": "colors", "colour_attribution": "color_attr"}  # the others are the same
LARGEST = 1 << 24  # bytes; the official file has 0.1 MB


def scene_metadata(scene: Scene) -> Metadata:
    """The content of a toy scene's short caption in GenEval's format.

    All `include` clauses must be met, and no `exclude` clause. A position has the index of the
    clause it is relative to, so the second object comes first.
    """
    first, *rest = scene.objects
    coloured = scene.task in ("colours", "position", "colour_attribution")

    def clause(thing: Any, count: int = 1) -> dict[str, Any]:
        plain = {"class": thing.shape, "count": count}
        return {**plain, "color": thing.colour} if coloured else plain

    metadata: Metadata = {"tag": TAGS.get(scene.task, scene.task)}
    if scene.task == "counting":
        count = len(scene.objects)
        metadata["include"] = [clause(first, count)]
        metadata["exclude"] = [clause(first, count + 1)]
    elif scene.relation is not None:
        placed = {**clause(first), "position": [scene.relation, 0]}
        metadata["include"] = [clause(rest[0]), placed]
    else:
        metadata["include"] = [clause(thing) for thing in scene.objects]
    return {**metadata, "prompt": short_caption(scene)}


def read_metadata(path: Path) -> list[Metadata]:
    """The lines of an evaluation_metadata.jsonl.

    Raises:
        UserError: it does not exist, is empty, or has a line that the evaluator could not read.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"metadata={path} is larger than {LARGEST} bytes: it is not a metadata list"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"metadata={path} cannot be read as UTF-8 text: {error}") from error
    # Not splitlines: JSON may hold other line separators unescaped.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"metadata={path} is empty: it must have one JSON object a line")
    return [checked(line, f"metadata={path}, line {i}") for i, line in lines]


def checked(text: str, where: str) -> Metadata:
    """One line of metadata.

    Raises:
        UserError: it is not JSON, or not in the format that the evaluator reads.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(line, dict):
        raise UserError(f"{where} must be a JSON object with tag, include and prompt")
    for key in ("tag", "prompt"):
        if not isinstance(line.get(key), str) or not line[key].strip():
            raise UserError(f"{where}: {key} {line.get(key)!r} must be a text")
    include, exclude = line.get("include"), line.get("exclude", [])
    if not isinstance(include, list) or not include:
        raise UserError(f"{where}: include {include!r} must be a list of expected objects")
    if not isinstance(exclude, list):
        raise UserError(f"{where}: exclude {exclude!r} must be a list")
    for name, clauses in (("include", include), ("exclude", exclude)):
        for i, clause in enumerate(clauses):
            if fault := _fault(clause, i):
                raise UserError(f"{where}: {name}[{i}] {fault}")
    return line


def _fault(clause: Any, index: int) -> str | None:
    """The problem with a clause, or None; a position may only refer to an earlier clause."""
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
        return f"{clause!r} must be an object with a class"
    count = clause.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return f"has count {count!r}, which must be a whole number of at least 1"
    if "color" in clause and not isinstance(clause["color"], str):
        return f"has color {clause['color']!r}, which must be a text"
    if "position" in clause:
        position = clause["position"]
        pair = isinstance(position, list) and len(position) == 2
        if not pair or position[0] not in RELATIONS or position[1] not in range(index):
            return (
                f"has position {position!r}, which must be [relation, index]: one of "
                f"{', '.join(RELATIONS)}, and the index of a clause before it"
            )
    return None


class GenEvalFolder:
    """A folder in GenEval's layout, filled prompt by prompt; existing images are kept.

    Args:
        path: the folder, created if needed.
        settings: the settings that determine the images. They are stored in geneval.json, so that
            images of different models or seeds are never mixed.

    Raises:
        UserError: the folder has images with different settings, or other files.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        kept = path / "geneval.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            old = json.loads(kept.read_text()) if kept.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"out={path} cannot be used: {error}") from error
        wanted = json.loads(json.dumps(settings))
        if old is None:
            if any(re.fullmatch(r"\d+", item.name) for item in path.iterdir()):
                raise UserError(
                    f"out={path} has numbered folders but no geneval.json that describes them: "
                    "choose another out="
                )
            if claim(kept, json.dumps(wanted, indent=1).encode()):
                return
            old = json.loads(kept.read_text())  # written by a concurrent process
        if old != wanted:
            if not isinstance(old, dict):
                raise UserError(f"{kept} is damaged: choose another out=")
            key = next(key for key in (*wanted, *old) if old.get(key) != wanted.get(key))
            raise UserError(
                f"out={path} has images with {key} {old.get(key)!r}, not {wanted.get(key)!r}: "
                "choose another out=, or the same settings"
            )

    def missing(self, index: int, metadata: Metadata, samples: int) -> list[int]:
        """Create the folder of prompt `index`; return the numbers of its missing images.

        Raises:
            UserError: the folder is that of another prompt, or its metadata is damaged.
        """
        folder = self._folder(index)
        file = folder / "metadata.jsonl"
        if file.is_file():
            old = checked(file.read_text(encoding="utf-8", errors="replace"), str(file))
            if old != metadata:
                raise UserError(
                    f"{file} has the prompt {old['prompt']!r}, not {metadata['prompt']!r}: "
                    "choose another out="
                )
        else:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(metadata).encode())
        return [i for i in range(samples) if not self._image(index, i).is_file()]

    def write(self, index: int, sample: int, pixels: Tensor) -> None:
        """Write one image, uint8 (h, w, 3), atomically."""
        path = self._image(index, sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        Image.fromarray(pixels.cpu().numpy()).save(data, format="PNG")
        write_atomically(path, data.getvalue())

    def _folder(self, index: int) -> Path:
        return self.path / f"{index:05d}"

    def _image(self, index: int, sample: int) -> Path:
        return self._folder(index) / "samples" / f"{sample:04d}.png"
