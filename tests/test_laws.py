"""The laws hold for whatever anybody adds: a wrong variant fails the suite, without an edit of it.

Variants of seven kinds are made up, rightly or with one wrong number each, and the suite is run on
them: from a folder and a module of somebody's own, and from a copy of the tree that has them.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

SOURCE = """
import torch
from itertools import pairwise
from mmdit.engine.schedules import Schedule
from mmdit.flow.grids import Grid
from mmdit.flow.paths import Path
from mmdit.flow.predictions import Coefficients, Prediction
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import TimestepDensity
from mmdit.registry import register


@register
class MadeUpDensity(TimestepDensity):
    def from_uniform(self, u):
        return u.sqrt()

    def pdf(self, t):
        return 2 * t  # 3


@register
class MadeUpPath(Path):
    def a(self, t):
        return 1 - t**2

    def b(self, t):
        return t**2

    def da(self, t):
        return -2 * t

    def db(self, t):
        return 2 * t  # 3

    def time_at(self, sigma):
        return sigma.sqrt()


@register
class MadeUpPrediction(Prediction):
    def coefficients(self, path, t):
        return Coefficients(2 * torch.ones_like(t), 3 * torch.ones_like(t))

    def target(self, path, x_0, epsilon, t):
        return 2 * x_0 + 3 * epsilon  # 2


@register
class MadeUpShift(Shift):
    def inverse(self, t):
        return 1 * super().inverse(t)  # 0.9


@register
class MadeUpGrid(Grid):
    def __call__(self, steps, shift, path):
        return shift(Shift().grid(steps) ** 2) + 0  # 0.1


def made_up_solver(velocity, z, grid, progress=None):
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        third = (t_next - t) / 3
        first = velocity(z, t)
        second = velocity(z + 2 * third * first, t + 2 * third)
        z = z + (t_next - t) * (first + 3 * second) / 4  # 5
        if progress is not None:
            progress(i, t_next, z)
    return z


class MadeUpSchedule(Schedule):
    def warmed_up(self, step):
        return 1  # 2
"""
VARIANTS = {
    "density": ("objective/timesteps", "MadeUpDensity"),
    "path": ("objective/path", "MadeUpPath"),
    "prediction": ("objective/prediction", "MadeUpPrediction"),
    "shift": ("objective/shift", "MadeUpShift"),
    "grid": ("grid", "MadeUpGrid"),
    "solver": ("solver", "made_up_solver\n_partial_: true"),
    "schedule": ("schedule", "MadeUpSchedule\nwarmup_steps: 10"),
}


def wrong(source: str) -> str:
    """The last number of each line with a remark is replaced by the one in the remark."""
    lines = []
    for line in source.splitlines():
        code, remark, number = line.partition("  # ")
        if remark:
            digit = max(i for i, character in enumerate(code) if character.isdigit())
            code = code[:digit] + number + code[digit + 1 :]
        lines.append(code)
    return "\n".join(lines)


def write_yamls(configs: Path, module: str) -> None:
    for kind, (group, target) in VARIANTS.items():
        (configs / group).mkdir(parents=True, exist_ok=True)
        (configs / group / f"made_up_{kind}.yaml").write_text(f"_target_: {module}.{target}\n")


def elsewhere(folder: Path, source: str) -> tuple[Path, list[str]]:
    """In a folder of somebody's own: the tree to test, and options of pytest."""
    (folder / "their_module.py").write_text(source)
    write_yamls(folder / "their_configs", "their_module")
    return ROOT, ["--config-dir", str(folder / "their_configs"), "--imports", "their_module"]


def in_the_tree(folder: Path, source: str) -> tuple[Path, list[str]]:
    """In a copy of the tree, which knows no other place."""
    tree = folder / "tree"
    for part in ("mmdit", "configs", "tests"):
        unneeded = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / part, tree / part, ignore=unneeded)
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "mmdit" / "flow" / "made_up.py").write_text(source)
    write_yamls(tree / "configs", "mmdit.flow.made_up")
    return tree, []


Place = Callable[[Path, str], tuple[Path, list[str]]]


def run(folder: Path, place: Place, source: str) -> dict[bool, list[set[str]]]:
    """Of the tests that passed, and of those that did not: the made-up variants in each."""
    tree, options = place(folder, source)
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *options]
    command += ["-k", "made_up", f"--junitxml={report}"]
    ended = subprocess.run(
        [*command, "tests/flow", "tests/engine/test_schedules.py"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(folder)])},
        capture_output=True,
        text=True,
    )
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    found: dict[bool, list[set[str]]] = {True: [], False: []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {kind for kind in VARIANTS if f"made_up_{kind}" in case.attrib["name"]}
        found[case.find("failure") is None].append(kinds)
    return found


@pytest.mark.parametrize("place", [elsewhere, in_the_tree])
def test_right_variants_pass(tmp_path: Path, place: Place) -> None:
    found = run(tmp_path, place, SOURCE)
    assert found[False] == []
    assert all({kind} in found[True] for kind in VARIANTS)


@pytest.mark.parametrize("place", [elsewhere, in_the_tree])
def test_each_wrong_variant_fails_by_itself(tmp_path: Path, place: Place) -> None:
    found = run(tmp_path, place, wrong(SOURCE))
    assert [kind for kind in VARIANTS if {kind} not in found[False]] == []
