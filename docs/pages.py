"""What mkdocs fills into pages: config keys, modules, and files that lie beside `docs/`.

A line of a page that is `<!-- keys: train -->` becomes the table of the keys of
`configs/train.yaml`, `<!-- groups -->` a section for every group of options,
`<!-- include: README.md -->` the file of that name, and `<!-- room: flow -->` the API reference of
`mmdit/flow/`. Meanings of keys are the comments of the yaml files, and modules are those that are
there, so that no page goes stale.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
MARKER = re.compile(r"^<!-- (keys|include|groups|room)(?:: (\S+))? -->$", re.MULTILINE)
BESIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OWN = ("hydra", "_target_", "_partial_")  # read by Hydra, not by the program


class Key(NamedTuple):
    """A key of a yaml file, as somebody writes it on a command line."""

    name: str
    default: str
    meaning: str  # its comment; empty where it has none


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page."""
    return MARKER.sub(lambda marker: _filled(*marker.groups()), markdown)


def _filled(what: str, name: str | None) -> str:
    if what == "groups":
        return "\n\n".join(group_section(group) for group in groups())
    if what == "include":
        return included(ROOT / str(name))
    if what == "room":
        return room(str(name))
    return keys_table(keys_of(CONFIGS / f"{name}.yaml"))


def included(file: Path) -> str:
    """A file beside `docs/`, with its links as they must be inside."""
    text = file.read_text("utf-8").replace("](docs/", "](")
    for name, page in BESIDE.items():
        text = text.replace(f"]({name})", f"]({page})")
    return text


def room(name: str) -> str:
    """What a room is for, and then each of its modules, as mkdocstrings directives."""
    files = sorted((ROOT / "mmdit" / name).glob("[!_]*.py"))
    head = f"::: mmdit.{name}\n    options: {{members: false, show_root_heading: false}}"
    return "\n\n".join([head, *(f"::: mmdit.{name}.{file.stem}" for file in files)])


def groups() -> list[str]:
    """The groups of options, `model` and `objective/path` alike; experiments set keys of others."""
    folders = {file.parent for file in CONFIGS.rglob("*.yaml")} - {CONFIGS}
    return sorted(folder.relative_to(CONFIGS).as_posix() for folder in folders)


# --- keys and comments of one file ---


def keys_of(file: Path) -> list[Key]:
    """The keys of a yaml file, sections written with dots, and the options that it chooses."""
    text = file.read_text("utf-8")
    root = yaml.compose(text)
    return list(_keys(root, text, "")) if isinstance(root, yaml.MappingNode) else []


def description_of(file: Path) -> str:
    """What the comment at the head of a yaml file says."""
    lines = [line for line in file.read_text("utf-8").splitlines() if "@package" not in line]
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    return " ".join(head)


def target_of(file: Path) -> str | None:
    """The class or function that a yaml file builds."""
    found = re.search(r"^_target_: (\S+)", file.read_text("utf-8"), re.MULTILINE)
    return found and found[1]


def _keys(section: yaml.MappingNode, text: str, prefix: str) -> Iterator[Key]:
    for key, value in section.value:
        if key.value == "defaults" and not prefix:
            yield from _choices(value, text)
        elif key.value in OWN:
            continue
        elif isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _keys(value, text, f"{prefix}{key.value}.")
        else:
            written = " ".join(text[value.start_mark.index : value.end_mark.index].split())
            default = "required" if written == "???" else written
            yield Key(prefix + key.value, default, _comment(text, key, value))


def _choices(defaults: yaml.SequenceNode, text: str) -> Iterator[Key]:
    """The options that a file chooses: `- model: toy`."""
    for entry in defaults.value:
        if isinstance(entry, yaml.MappingNode):
            key, value = entry.value[0]
            name = key.value.removeprefix("override ").lstrip("/")
            if name.startswith("hydra/"):
                continue
            yield Key(name, value.value, _comment(text, key, value))


def _comment(text: str, key: yaml.Node, value: yaml.Node) -> str:
    """The comment behind a value, with the lines below that continue it, or that above its key."""
    lines = text.splitlines()
    last = value.end_mark.line
    behind = lines[last][value.end_mark.column :].strip() if last < len(lines) else ""
    if behind.startswith("#"):
        column = lines[last].index("#", value.end_mark.column)
        below = []
        for line in lines[last + 1 :]:
            if line[:column].strip() or not line[column:].startswith("#"):
                break
            below.append(line)
        return " ".join(part.strip().lstrip("# ") for part in (behind, *below))
    above: list[str] = []
    i = key.start_mark.line - 1
    while i >= 0 and lines[i].startswith(" " * key.start_mark.column + "#"):
        above.insert(0, lines[i].strip().lstrip("# "))
        i -= 1
    return " ".join(above) if i >= 0 else ""  # what begins a file describes all of it


# --- tables ---


def keys_table(keys: list[Key]) -> str:
    """A table of the keys of one file."""
    if not keys:
        return ""
    rows = [f"| `{key.name}` | {_code(key.default)} | {_cell(key.meaning)} |" for key in keys]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def group_section(group: str) -> str:
    """The options of a group, and the keys that they have, each with its value in every option."""
    files = sorted((CONFIGS / group).glob("*.yaml"))
    options = ["| option | builds | |", "|---|---|---|"]
    for file in files:
        target = target_of(file)
        built = f"`{target}`" if target else ""
        options.append(f"| `{file.stem}` | {built} | {_cell(description_of(file))} |")
    rows = [] if group == "experiment" else group_rows(files)
    table = ["| key | default | meaning |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"## {group}", "", *options, "", *table])


def group_rows(files: list[Path]) -> list[str]:
    """The table rows of the keys of a group."""
    values: dict[str, dict[str, list[str]]] = {}  # key -> value -> options
    meanings = meanings_of(files)
    for file in files:
        for key in keys_of(file):
            values.setdefault(key.name, {}).setdefault(key.default, []).append(file.stem)
    rows = []
    for name, by_value in values.items():
        if len(by_value) == 1:
            default = _code(next(iter(by_value)))
        else:
            default = "<br>".join(
                f"{_code(value)}: {', '.join(names)}" for value, names in by_value.items()
            )
        rows.append(f"| `{name}` | {default} | {_cell(meanings[name])} |")
    return rows


def meanings_of(files: list[Path]) -> dict[str, str]:
    """What each key of a group means: said once, in any of its options."""
    meanings: dict[str, str] = {}
    for file in files:
        for key in keys_of(file):
            meanings[key.name] = meanings.get(key.name) or key.meaning
    return meanings


def _code(value: str) -> str:
    return value if value == "required" else "`" + value.replace("|", "\\|") + "`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
