"""README, the pages of docs/, and the config reference that is made of the yaml files' comments."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

import mmdit
from tests.same_losses import difference

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
assert SPEC is not None and SPEC.loader is not None
pages = importlib.util.module_from_spec(SPEC)
sys.modules["pages"] = pages
SPEC.loader.exec_module(pages)

TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALONE = sorted(pages.CONFIGS.glob("*.yaml"))
GROUPS = pages.groups()


def test_readme_is_read_in_five_minutes():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120
    assert "pip install -e . && python train.py" in lines
    assert 'pip install -e ".[test]" && pytest' in lines


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert mmdit.__version__ == project["version"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.relative_to(ROOT).as_posix())
def test_links_lead_to_files(text):
    beside = {ROOT / "docs" / page for page in pages.BESIDE.values()}
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text.read_text("utf-8")):
        if "://" not in link:
            place = (text.parent / link).resolve()
            assert place.exists() or place in beside, f"{text.name} links to {link}"


@pytest.mark.parametrize("file", ALONE, ids=lambda file: file.stem)
def test_every_key_of_a_program_says_what_it_means(file):
    assert [key.name for key in pages.keys_of(file) if not key.meaning] == []


@pytest.mark.parametrize("group", sorted(set(GROUPS) - {"experiment"}))
def test_every_key_of_a_group_says_what_it_means(group):
    meanings = pages.meanings_of(sorted((pages.CONFIGS / group).glob("*.yaml")))
    assert [name for name, meaning in meanings.items() if not meaning] == []


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_says_what_it_is(group):
    files = sorted((pages.CONFIGS / group).glob("*.yaml"))
    assert [file.stem for file in files if not pages.description_of(file)] == []


def test_every_program_is_in_the_reference():
    text = "".join(file.read_text("utf-8") for file in TEXTS)
    assert {file.stem for file in ALONE} == set(re.findall(r"<!-- keys: (\S+) -->", text))


def test_a_comment_belongs_to_the_key_it_stands_by(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(
        "# the file\n# as a whole\na: 1   # one\nb:\n  # above\n  c: [1, 2]\n  d: ???   # two\n"
        "           # lines\n  e: {x: 1}\n"
    )
    assert pages.description_of(file) == "the file as a whole"
    assert [tuple(key) for key in pages.keys_of(file)] == [
        ("a", "1", "one"),
        ("b.c", "[1, 2]", "above"),
        ("b.d", "required", "two lines"),
        ("b.e", "{x: 1}", ""),
    ]


def test_losses_are_compared_record_by_record():
    assert difference([{"loss": 1.0}], [{"loss": 1.0}]) is None
    assert difference([{"loss": 1.0}], [{"loss": 1.5}]) == "record 1, loss: 1.0 and 1.5"
    assert difference([{"loss": 1.0}], []) == "1 records and 0"
