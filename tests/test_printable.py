"""What is shown of text from outside keeps to its line, and steers no terminal."""

import pickle
import tarfile
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mmdit
from mmdit.cli.eval.subject import cell, table
from mmdit.data.images import BadImage
from mmdit.data.shards import tar_shards
from mmdit.errors import UserError
from mmdit.printable import UNSAFE, logger, printable, printable_lines, show

FORGED = "a\x1b[2J\nERROR: b\r\x9b\x7f\u2028\u202e\u2066\udcff"
SHOWN = r"a\x1b[2J\nERROR: b\r\x9b\x7f\u2028\u202e\u2066\udcff"
ROOMS = ("mmdit", "configs", "eval")


def test_only_what_is_not_printable_is_escaped() -> None:
    assert printable(FORGED) == printable(SHOWN) == SHOWN
    plain = "C:\\new 'it' \u00e9 \u6c49\u3000 \u05e9 \U0001f469\u200d\U0001f467 \u0e48"
    assert printable(plain) == plain
    assert printable_lines(f"{plain}\n\x1b") == plain + "\n\\x1b"
    assert printable_lines("one\n\ttwo\tthree") == "one\n  two\\tthree"
    every = "".join(map(chr, range(0x3000))) + "\ud800\udfff"
    left = {unicodedata.category(each) for each in printable(every)}
    assert not left & {"Cc", "Zl", "Zp", "Cs"}


@pytest.mark.parametrize("kind", [UserError, BadImage])
def test_the_message_of_a_mistake_is_one_line_for_each_argument(kind: type[UserError]) -> None:
    assert str(kind(FORGED)) == SHOWN
    error = kind("first", FORGED, 3)
    assert str(error) == f"first\n{SHOWN}\n3"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(kind(f"{kind(FORGED)}: again")) == f"{SHOWN}: again"


def test_what_is_logged_is_printable_whoever_handles_it(caplog: pytest.LogCaptureFixture) -> None:
    log = logger("mmdit.test")
    assert logger("mmdit.test") is log
    log.warning("two\nlines: %s", FORGED)
    log.warning("%s %d %.1f", OSError(FORGED), 3, 0.5)
    log.warning("100 %\x1b")
    log.warning("%(name)s", {"name": FORGED})
    told = [f"two\nlines: {SHOWN}", f"{SHOWN} 3 0.5", "100 %\\x1b", SHOWN]
    assert caplog.messages == told


def test_every_logger_of_the_project_is_of_this_kind() -> None:
    root = Path(mmdit.__file__).parent.parent
    files = [*root.glob("*.py"), *(f for d in ROOMS for f in (root / d).rglob("*.py"))]
    made = [f"{f}: {n}" for f in files for n in f.read_text().splitlines() if "getLogger(" in n]
    allowed = ("log = logging.getLogger(name)", ".setLevel(")
    assert len(files) > 100
    assert [line for line in made if not any(part in line for part in allowed)] == []


def test_what_is_printed_has_one_line_for_each_argument(capsys: pytest.CaptureFixture) -> None:
    show("a", FORGED)
    assert capsys.readouterr().out == f"a\n{SHOWN}\n"


def test_keys_of_a_checkpoint_forge_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J.safetensors"
    save_file({f"{FORGED[:-1]}{i}": torch.zeros(1) for i in range(3)}, path)
    with pytest.raises(UserError) as refusal:
        mmdit.load_pipeline(path)
    assert SHOWN[:-6] in str(refusal.value)
    assert not UNSAFE.search(str(refusal.value))


def test_members_of_a_shard_forge_no_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for suffix in (".png", ".txt"):
            tar.addfile(tarfile.TarInfo(f"a\x1b[2J\nERROR: b{suffix}"))
    with pytest.raises(UserError, match=r"0\.tar/a\\x1b\[2J\\nERROR: b: is empty") as refusal:
        tar_shards(root=str(tmp_path), image_size=16)
    assert not UNSAFE.search(str(refusal.value))


def test_a_cell_of_a_table_is_neither_a_border_nor_a_tag() -> None:
    assert cell("a|b <script>\nx") == r"a\|b &lt;script>\nx"
    assert table(["word"], [["|<b>\n"]]).splitlines()[2] == r"| \|&lt;b>\n |"


def test_a_message_with_a_value_of_any_length_keeps_its_beginning_and_end():
    message = str(UserError("a", f"depth {'x' * 10**6!r} must be a whole number"))
    assert message.startswith("a\ndepth 'xxx") and message.endswith("x' must be a whole number")
    assert len(message) < 6000
