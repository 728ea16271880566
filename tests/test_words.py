"""The vocabulary of code and docs: plain English, one word for one thing."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Finished so far: a room joins the list when its prose has been revised.
ROOMS = (
    *(
        "mmdit/checkpoints",
        "mmdit/data",
        "mmdit/latents",
        "mmdit/metrics",
        "mmdit/study",
        "mmdit/text",
        "mmdit/flow",
    ),
    *(
        "mmdit/cli/eval",
        "mmdit/cli/memory",
        "docs",
        "configs",
        "README.md",
        "CONTRIBUTING.md",
        "notebooks",
    ),
    *("mmdit/runs", "mmdit/checkpoints/locate.py", "mmdit/cli/subject.py", "tests/runs"),
    *("mmdit/loading.py", "mmdit/published.py", "mmdit/pipeline.py", "mmdit/request.py"),
    *("mmdit/export.py", "mmdit/atomic.py", "mmdit/bounds.py", "mmdit/devices.py"),
    *("mmdit/dtypes.py", "mmdit/errors.py", "mmdit/keys.py", "mmdit/out_of_memory.py"),
    *("mmdit/plots.py", "mmdit/precision.py", "mmdit/printable.py", "mmdit/processes.py"),
    *("mmdit/registry.py", "mmdit/streams.py", "tests/test_pipeline.py", "tests/test_published.py"),
    *("mmdit/parity", "mmdit/cli/commands.py", "mmdit/cli/formulations.py"),
    *("mmdit/cli/images.py", "mmdit/cli/keys.py", "mmdit/cli/launch.py", "mmdit/cli/messages.py"),
    *("mmdit/cli/sample.py", "mmdit/cli/scores.py", "mmdit/cli/stages.py", "mmdit/cli/targets.py"),
)
WORDS = {
    r"[Pp]ictures?": "image",
    r"[Pp]aint(s|ed|ing)?": "sample, generate or draw",
    r"[Ii]s no (JSON|number|file|folder|list|index|image|time|text|directory|model)": "is not a",
    r'"""Of [a-z]+': "what the thing is, before what it belongs to",
    r"dear(er|est)?": "expensive",
    r"wishes": "options",
    r"[Tt]old": "reported or logged",
    r"(says?|speaks?) of": "contains, predicts or reports",
    r"makes? no sense": "is invalid",
    r"as the command line asks": "according to the command line",
    r"as people call": "name",
    r"(tasks|sides) in turn": "cycling through, or alternating",
    r"evaluations? a step": "per step",
    r"one prompt a line": "per line",
    r"[Nn]obody('s)?": "no one, or the thing itself",
}


@pytest.mark.parametrize("room", ROOMS)
def test_words_are_those_of_the_field(room: str) -> None:
    place = ROOT / room
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    assert files, room
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match.group()!r}: write {preferred}"
        for file in files
        if file.suffix in (".py", ".md", ".yaml") and file != Path(__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for pattern, preferred in WORDS.items()
        for match in re.finditer(rf"(?<![\w]){pattern}(?![\w])", line)
    ]
    assert not found, "\n" + "\n".join(found)
