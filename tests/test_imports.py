"""Who may import whom: strictly downward, or inside one room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmdit"
FILES = sorted(PACKAGE.rglob("*.py"))

# Ground first. Rooms of one floor do not know each other.
FLOORS = [
    {"printable", "programs", "recipes"},
    {"errors"},
    {"atomic", "bounds", "checks", "devices", "dtypes", "keys", "streams"},
    {"out_of_memory", "plots", "precision", "processes", "registry"},
    {"flow", "nn", "data"},
    {"models"},
    {"text", "checkpoints", "request"},
    {"runs"},
    {"adapters"},
    {"pipeline"},
    {"published"},
    {"loading"},
    {"metrics", "latents"},
    {"engine"},
    {"alignment"},
    {"study", "parity", "export", "fewsteps"},
    {"mmdit"},  # the package's own __init__.py: what users import
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

each_file = pytest.mark.parametrize(
    "file", FILES, ids=lambda file: str(file.relative_to(PACKAGE.parent))
)


def room_of(module: str) -> str:
    """`mmdit.flow.paths` -> `flow`, `mmdit` -> `mmdit`."""
    return [*module.split("."), "mmdit"][1]


def module_of(file: Path) -> str:
    names = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(source: str) -> Iterator[str]:
    """Absolute names of all that is imported, in functions and under conditions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room they enter"
            if node.module == "mmdit":  # from mmdit import flow
                yield from (f"mmdit.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def breaches(module: str, source: str) -> list[str]:
    """The imports that climb, or cross to another room of their floor."""
    mine = room_of(module)
    entered = {room_of(name) for name in imports(source) if name.split(".")[0] == "mmdit"}
    return sorted(room for room in entered - {mine} if FLOOR_OF[room] >= FLOOR_OF[mine])


def test_every_room_has_a_floor():
    rooms = {room_of(module_of(file)) for file in FILES}
    assert rooms == FLOOR_OF.keys()


@each_file
def test_imports_run_strictly_downward_or_inside_one_room(file):
    assert breaches(module_of(file), file.read_text()) == []


@each_file
def test_hydra_is_known_by_the_command_line_alone(file):
    roots = {name.split(".")[0] for name in imports(file.read_text())}
    assert room_of(module_of(file)) == "cli" or not roots & {"hydra", "omegaconf"}


def test_wandb_lives_in_one_file():
    users = {
        module_of(file)
        for file in FILES
        if "wandb" in {name.split(".")[0] for name in imports(file.read_text())}
    }
    assert users == {"mmdit.engine.wandb_logger"}


@pytest.mark.parametrize(
    ("module", "source", "entered"),
    [
        ("mmdit.flow.paths", "from mmdit.models.mmdit import MMDiT", ["models"]),
        ("mmdit.flow.paths", "import mmdit.nn.mlp as mlp", ["nn"]),
        ("mmdit.flow.paths", "def f():\n    from mmdit import engine", ["engine"]),
        ("mmdit.flow.paths", "import mmdit", ["mmdit"]),
        ("mmdit.text.conditioning", "from mmdit.checkpoints import archive", ["checkpoints"]),
        ("mmdit.flow.paths", "from mmdit.flow.solvers import euler", []),
        ("mmdit.engine.loop", "from mmdit.flow.paths import Path\nimport torch", []),
    ],
)
def test_the_rule_itself(module, source, entered):
    assert breaches(module, source) == entered
