"""Functions fit on a screen, and constructors take what a reader can keep in mind."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "mmdit"
LONGEST = 60  # lines of code: without docstrings, comments and empty lines
WIDEST = 12  # arguments of a constructor

# What is longer is better so:
LONG = {
    # One table of fields for each kind of model, which is read beside the file that it writes.
    "checkpoints/folders.py:config_of",
}
WIDE = {
    # The arguments of a pipeline's call, checked together; all but the prompt are optional.
    "request.py:Request",
    # A data set's whole recipe, which is kept in configs and checkpoints.
    "data/shapes.py:Shapes",
}


class Function(NamedTuple):
    """A function of the package, by its full name."""

    name: str  # file:Class.method
    lines: int
    arguments: int


def functions(file: Path) -> Iterator[Function]:
    """All functions of a file, methods and inner functions among them."""
    source = file.read_text()
    code = [line.strip() for line in source.splitlines()]

    def look(node: ast.AST, names: list[str]) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            inner = [*names, child.name] if hasattr(child, "name") else names
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                first = child.body[0]
                documented = ast.get_docstring(child) is not None
                left_out = range(first.lineno - 1, first.end_lineno or 0) if documented else ()
                lines = [
                    code[i]
                    for i in range(child.lineno - 1, child.end_lineno or 0)
                    if i not in left_out and code[i] and not code[i].startswith("#")
                ]
                given = child.args
                count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
                where = file.relative_to(PACKAGE).as_posix()
                yield Function(f"{where}:{'.'.join(map(str, inner))}", len(lines), count)
            yield from look(child, inner)

    yield from look(ast.parse(source), [])


ALL = [function for file in sorted(PACKAGE.rglob("*.py")) for function in functions(file)]


def test_functions_are_short() -> None:
    long = {function.name for function in ALL if function.lines > LONGEST}
    assert long == LONG, "split them, or list what is better long, with the reason"


def test_constructors_are_narrow() -> None:
    wide = {
        function.name.removesuffix(".__init__")
        for function in ALL
        if function.name.endswith(".__init__") and function.arguments - 1 > WIDEST
    }
    assert wide == WIDE, "give what belongs together as one argument, or list why not"


def test_lines_are_counted_without_docstrings_and_comments() -> None:
    file = PACKAGE / "checks.py"
    (expect,) = [function for function in functions(file) if function.name.endswith(":expect")]
    assert (expect.lines, expect.arguments) == (3, 4)
