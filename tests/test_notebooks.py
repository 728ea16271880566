"""The notebooks: a readable script each, a paired .ipynb without outputs, and both run."""

import ast
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NEEDS = {"4_parity": ("diffusers", "transformers")}  # beside matplotlib

each_notebook = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_as_many_notebooks_as_scripts():
    assert [p.stem for p in sorted(FOLDER.glob("*.ipynb"))] == [p.stem for p in SCRIPTS] != []


@each_notebook
def test_script_and_notebook_are_a_pair(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    again = f"{script.name} and its .ipynb differ: jupytext --sync notebooks/{script.name}"
    assert cells(notebook) == cells(jupytext.read(script)), again


@each_notebook
def test_no_output_is_stored(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@each_notebook
def test_a_notebook_defines_nothing(script):
    """What it computes belongs into the package, where it is tested."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.While)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, logic)]


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_in_a_minute(script, tmp_path, monkeypatch):
    for package in ("matplotlib", *NEEDS.get(script.stem, ())):
        pytest.importorskip(package)
    # Pictures are drawn without a display, and nothing is found in or left beside the notebook.
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = jupytext.read(script)
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=60,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert list(tmp_path.iterdir()) == []
