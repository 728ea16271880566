"""Text arrives as typed; a user's mistake ends in one message and code 2, a bug in a traceback."""

import errno
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mmdit.cli import CONFIGS
from mmdit.cli.launch import Verbatim, launch, split_arguments
from mmdit.cli.messages import explain, nearest
from mmdit.cli.targets import check_targets
from mmdit.errors import UserError
from tests import ready_process

VERBATIM = ("prompt", "negative_prompt", "out")

FILES = {
    "app.yaml": """
        defaults: [quiet, model: toy, objective/path: rectified_flow, _self_]
        training: {steps: 10, root: "???", copy: "${.root}"}
        free: null
        optimizer: {_target_: targets.AdamW, _partial_: true, lr: 0.1}
        broken: "${nowhere.at_all}"
        action: nothing
        hydra: {help: {header: "Draws shapes. prompt=... is the text to draw."}}
        """,
    "model/toy.yaml": "{_target_: targets.Model, width: 6, num_heads: 2}",
    "model/small.yaml": "{_target_: targets.Model, width: 12, num_heads: 2}",
    "objective/path/rectified_flow.yaml": "{name: rectified_flow}",
    "experiment/row.yaml": "# @package _global_\ndefaults:\n  - override /model: smal\n",
    "targets.py": """
        from mmdit.errors import UserError
        class Model:
            def __init__(self, *, width, num_heads):
                if width % num_heads:
                    raise ValueError(f"width {width} must be divisible by num_heads {num_heads}")
                if width > 100:
                    raise UserError(f"width {width} is too large for this machine")
                if num_heads == 1:
                    dict(1)
        class AdamW:
            def __init__(self, params, *, lr):
                if lr < 0:
                    raise ValueError(f"lr {lr} must not be negative")
        """,
    "app.py": """
        import logging
        import sys
        from pathlib import Path
        from mmdit.cli.launch import launch
        log = logging.getLogger("mmdit.app")
        from mmdit.errors import UserError
        def job(config, text):
            if config.action == "mistake":
                raise UserError("the shapes ran out: draw fewer")
            if config.action == "bug":
                raise ZeroDivisionError("the sky fell")
            if config.action == "interrupt":
                raise KeyboardInterrupt
            if config.action == "log":
                name = Path("name\\x1b[2J\\nERROR: all is lost\\u202e\\udcff")
                log.warning("two\\nlines of %s and %s, %.2f", name, str(name), 1.5)
                log.warning("%(key)s", {"key": name})
                return
            sys.stdout.buffer.write(text.get("prompt", "none").encode())
        launch(job, config_name="app", verbatim=("prompt", "out"), config_dir=Path(__file__).parent)
        """,
}  # fmt: skip

NASTY_LINES = """
a red circle, a blue square
"quoted"
'single'
it's 5 o'clock
unclosed "quote
(parenthesis
) and ( again
[a, b]
[unclosed
{brace: 1}
}{
# not a comment
hey! stop!
a=b
=
==a
$HOME
$$
${oc.env:HOME}
${training.steps}
${unclosed
back\\slash\\
\\"escaped\\"
~tilde
1984
3.14
null
None
true
???
+a
--prompt
a:b, c:d
choice(a,b)
range(1,3)
*&^%@`|<>;
赤い丸、青い四角
🟥 next to 👩🏽‍🚀
nul\\0 as typed
key@package=value
"""
NASTY_TEXTS = [
    *NASTY_LINES.strip().splitlines(),
    "",
    " ",
    "  spaces around  ",
    "two\nlines\n",
    "tab\there",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory holding a tiny config folder, `targets` to build, and a script."""
    (tmp_path / "quiet.yaml").write_text((CONFIGS / "quiet.yaml").read_text())
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in content.splitlines()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:], root.level = handlers, level
    sys.modules.pop("targets", None)


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Launch in this process: `run(*arguments)` -> code, out, err, and what each job was given."""

    def run(
        *arguments: str, job: Callable[[DictConfig, Verbatim], None] = lambda config, text: None
    ) -> SimpleNamespace:
        calls: list[tuple[DictConfig, Verbatim]] = []
        trusted = () if any("imports=" in word for word in arguments) else ("imports=[targets]",)

        def recorded(config: DictConfig, text: Verbatim) -> None:
            calls.append((config, text))
            job(config, text)

        monkeypatch.setattr(sys, "argv", ["app.py", *trusted, *arguments])
        code: int | str | None = 0
        try:
            launch(recorded, config_name="app", verbatim=VERBATIM, config_dir=folder)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, calls=calls)

    return run


def run_script(folder: Path, *arguments: str, **environment: str) -> SimpleNamespace:
    """Run the script in a process of its own."""
    trusted = () if any("imports=" in word for word in arguments) else ("imports=[targets]",)
    words = [str(folder / "app.py"), *trusted, *arguments]
    done = ready_process.run(words, cwd=folder, env={**os.environ, **environment})
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def run_python(folder: Path, *arguments: str | bytes) -> SimpleNamespace:
    """Run the script as a user would."""
    path = f"{CONFIGS.parent}{os.pathsep}{folder}"
    done = subprocess.run(
        [sys.executable, "app.py", "imports=[targets]", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    return SimpleNamespace(code=done.returncode, out=out, err=err)


def build_all(config: DictConfig, text: Verbatim) -> None:
    instantiate(config.model)
    instantiate(config.optimizer)([])


# --- text as typed ---


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_text_is_taken_exactly_as_typed(text: str) -> None:
    arguments = [f"prompt={text}", f"+out={text}", "training.steps=3", f"++negative_prompt={text}"]
    rest, given = split_arguments(arguments, VERBATIM)
    assert rest == ["training.steps=3"]
    assert given == {"prompt": text, "out": text, "negative_prompt": text}


def test_text_reaches_the_job_beside_the_config(run: Callable[..., SimpleNamespace]) -> None:
    text = "\0".join(NASTY_TEXTS)
    result = run("training.steps=3", f"prompt={text}", "model=small")
    [(config, given)] = result.calls
    assert (result.code, result.err, given) == (0, "", {"prompt": text})
    assert config.training.steps == 3 and config.model.width == 12 and "prompt" not in config


@pytest.mark.slow
def test_text_survives_a_real_process(folder: Path) -> None:
    text = " (a, \"b'#!=$ ${x} \\ 赤 🟥\n "
    result = run_python(folder, f"prompt={text}", "out=")
    assert (result.code, result.err, result.out) == (0, "", text)


@pytest.mark.slow
def test_undecodable_bytes_become_the_replacement_character(folder: Path) -> None:
    assert run_python(folder, b"prompt=a\xffb").out == "a\ufffdb"


def test_utf8_is_understood_in_an_ascii_locale() -> None:
    argument = "prompt=赤".encode().decode("ascii", "surrogateescape")
    assert split_arguments([argument], VERBATIM)[1] == {"prompt": "赤"}


def test_text_is_constant_in_a_multirun(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    result = run("-m", "prompt=a, b", "training.steps=1,2")
    assert [text for _, text in result.calls] == [{"prompt": "a, b"}] * 2
    assert [config.training.steps for config, _ in result.calls] == [1, 2]
    assert [path.name for path in (folder / "runs").rglob("*")] == ["multirun", "multirun.yaml"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prompt=a", "+prompt=b"], "prompt is given twice"),
        (["--prompt", "x"], 'write prompt="..."'),
        (["--prompt=x"], 'write prompt="..."'),
        (["-prompt", "x"], 'write prompt="..."'),
        (["--negative-prompt", "x"], 'write negative_prompt="..."'),
        (["prompt", "x"], 'write prompt="..."'),
        (["prompt", "=", "x"], 'write prompt="..."'),
        (["prompt=a", "red", "circle"], 'text with spaces needs quotes, prompt="a red ..."'),
        (["--steps", "3"], "write key=value, without dashes"),
        (["toy"], "unexpected 'toy': options are written key=value"),
    ],
)
def test_slips_in_the_command_line_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        split_arguments(arguments, VERBATIM)
    assert message in str(caught.value)


def test_flags_may_stand_anywhere() -> None:
    arguments = ["a=1", "-m", "b=2", "--package", "model", "prompt=x y", "~c", "--cfg=job"]
    rest, text = split_arguments(arguments, VERBATIM)
    assert rest == ["a=1", "b=2", "~c", "-m", "--package", "model", "--cfg=job"]
    assert text == {"prompt": "x y"}


# --- Hydra as its users know it ---


def test_overrides_of_every_kind(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    result = run("model=small", "+x=5", "++training.steps=${x}", "~optimizer", "+model.new=[a,b]")
    [(config, _)] = result.calls
    assert config.model.width == 12 and config.x == 5 and "optimizer" not in config
    assert config.training.steps == 5 and config.model.new == ["a", "b"]
    assert sorted(folder.rglob("*")) == before and Path.cwd() == folder


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "arguments, shown",
    [
        (["--cfg", "job", "prompt=(a", "training.steps=7"], "steps: 7"),
        (["--cfg", "hydra"], "output_subdir: null"),
        (["--cfg", "job", "-p", "model"], "# @package model"),
        (["--help"], "Draws shapes. prompt=... is the text to draw."),
        (["--help"], "model: small, toy"),
        (["--info", "defaults-tree"], "model: toy"),
        (["-sc", "install=bash"], "hydra_bash_completion"),
    ],
)
def test_printing_modes_print_and_run_nothing(
    arguments: list[str], shown: str, run: Callable[..., SimpleNamespace]
) -> None:
    result = run(*arguments)
    assert result.code == 0 and shown in result.out and result.calls == []


def test_shell_completion_reads_past_a_prompt(
    run: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", "python app.py prompt='a, (b' model=s")
    assert run("-sc", "query=bash").out.split() == ["model=small"]


def test_keys_that_something_reads_may_be_added(
    run: Callable[..., SimpleNamespace], folder: Path
) -> None:
    mine = folder / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "wide.yaml").write_text(
        "# @package _global_\nwidth: 24\nmodel: {width: '${width}', names: {a: 1}}\nfree: {b: 2}\n"
    )
    words = ("--config-dir", str(folder / "mine"), "+experiment=wide", "+hydra.job.env_set.A=1")
    [(config, _)] = run(*words, "+model.names.c=3", "+free.d=4").calls
    assert config.model == {"_target_": "targets.Model", "width": 24, "num_heads": 2,
                            "names": {"a": 1, "c": 3}}  # fmt: skip
    assert config.free == {"b": 2, "d": 4}
    (mine / "wide.yaml").write_text("# @package _global_\ntraining: {step: 24}\n")
    result = run(*words)
    assert result.code == 2 and "unknown key 'training.step'. Did you mean" in result.err


# --- what a config may build ---


EVIL = [
    *("os.system", "torch.load", "numpy.load", "builtins.eval", "subprocess.Popen"),
    *("mmdit.pipeline.torch.load", "mmdit.runs.folder.os.system", "targets.os.system"),
    *("mmdit.errors.UserError.__init__", "mmdit.runs.files.writing", "mmdit", "3", "os..system"),
    *("mmdit.runs.native.write_atomically", "mmdit.errors.first_line.__globals__.get"),
]


@pytest.mark.parametrize("target", EVIL)
@pytest.mark.parametrize("place", ["model", "hydra.callbacks.mine"])
def test_nothing_is_built_but_what_is_ours_or_trusted(
    target: str, place: str, folder: Path
) -> None:
    with (folder / "targets.py").open("a") as file:
        file.write("import os")
    config = OmegaConf.create()
    OmegaConf.update(config, f"{place}._target_", target)
    with pytest.raises(UserError, match=rf"^{place}\._target_(: |=)") as told:
        check_targets(config, ["targets"])
    assert "\n" not in str(told.value)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "word",
    [
        *("model._target_=os.system", "+model.nested={_target_: os.system}"),
        *("+free.a={_target_: os.system}", "+hydra.callbacks.mine={_target_: os.system}"),
        *("hydra.launcher._target_=os.system", "hydra.sweeper._target_=os.system"),
    ],
)
def test_a_target_of_the_command_line_is_checked_before_anything_is_built(
    word: str, run: Callable[..., SimpleNamespace]
) -> None:
    result = run(word, job=build_all)
    assert result.code == 2 and result.calls == []
    assert re.match(r"[\w.]+\._target_: 'os.system' is not part of mmdit", result.err)


@pytest.mark.few(1)
@pytest.mark.parametrize("place", ["lists", "interpolation", "created", "logging"])
def test_a_target_is_found_wherever_it_stands(
    place: str, run: Callable[..., SimpleNamespace], folder: Path
) -> None:
    written = {
        "lists": "free: [1, [{a: {_target_: os.system, command: touch pwned}}]]",
        "interpolation": "free: {_target_: '${word}', command: touch pwned}\nword: os.system",
        "created": "free: '${oc.create:\"{_target_: os.system, command: touch pwned}\"}'",
        "logging": "hydra: {job_logging: {handlers: {a: {'()': os.system, command: touch pwned}}}}",
    }
    (folder / "experiment/row.yaml").write_text(f"# @package _global_\n{written[place]}\n")
    for mode in ([], ["--cfg", "job"], ["-m", "model.width=6,12"]):
        result = run("+experiment=row", *mode)
        assert result.code == 2 and "'os.system' is not part of mmdit" in result.err
    assert not (folder / "pwned").exists()


def test_a_yaml_cannot_vouch_for_itself(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    (folder / "experiment/row.yaml").write_text("# @package _global_\nimports: [os, targets]\n")
    result = run("+experiment=row", "++imports=[mmdit]")
    assert result.code == 2 and "imports=[targets]" in result.err and result.calls == []
    result = run("imports=[targets, 3]")
    assert result.code == 2 and "must be a list of modules" in result.err


def test_a_pickled_config_is_not_run_again(run: Callable[..., SimpleNamespace]) -> None:
    result = run("--experimental-rerun=config.pickle")
    assert result.code == 2 and "unknown option '--experimental-rerun" in result.err


def test_all_that_this_project_ships_may_be_built() -> None:
    for file in CONFIGS.rglob("*.yaml"):
        config = OmegaConf.load(file)
        assert isinstance(config, DictConfig)
        config.pop("hydra", None)
        check_targets(config, [])


# --- mistakes ---


@pytest.mark.few(6)
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["training.step=3"], "unknown key 'training.step'. Did you mean training.steps?"),
        (["optimiser.lr=3"], "unknown key 'optimiser.lr'. Did you mean optimizer.lr?"),
        (["lr=3"], "Did you mean optimizer.lr?"),
        (["+trainng.steps=3"], "unknown key 'trainng'. Did you mean training? No code reads it"),
        (
            ["++training.step=3"],
            "unknown key 'training.step'. Did you mean training.steps? No code",
        ),
        (["+training.quixotically=1"], "unknown key 'training.quixotically'. No code"),
        (["+x=1"], "unknown key 'x'. No code reads it, so it would change nothing.\n"),
        (["+x=1", "+y=${x}"], "unknown key 'y'"),
        (["-m", "model.width=6,12", "+x=1"], "unknown key 'x'"),
        (["-m", "+x=1,2"], "unknown key 'x'"),
        (["+training._target_=targets.Model"], "unknown key 'training._target_'"),
        (["training={step: 3}"], "Could not override 'training'"),
        (["promt=a"], "Did you mean prompt?"),
        (["promt=a, (b"], 'Did you mean prompt="..."?'),
        (["model=null"], "model=null: to leave out a group, write ~model"),
        (["objective/pth=edm"], "Did you mean objective/path?"),
        (["-m", "training.step=1,2"], "Did you mean training.steps?"),
        (["model=tpy"], "model has no option 'tpy'. Did you mean model=toy? Available: small, toy"),
        (["objective/path=rectified"], "Did you mean objective/path=rectified_flow?"),
        (["-m", "model=toy,tpy"], "Did you mean model=toy?"),
        (["+experiment=row"], "row.yaml). Did you mean model=small?"),
        (["model=3"], "model=3"),
        (["training.steps=a("], "cannot read 'training.steps=a('"),
        (["training.steps=${"], "cannot read 'training.steps=${'"),
        (["training.steps=1,2"], "Ambiguous value for argument 'training.steps=1,2'"),
        (["hydra.job.chdir=perhaps"], "Value 'perhaps'"),
        (["-cn", "ap"], "Cannot find primary config 'ap'"),
        (["--resolve"], "--resolve"),
        (["--cfg", "job", "--resolve"], "nowhere.at_all"),
    ],
)
def test_mistakes_in_the_config_end_in_one_message(
    arguments: list[str], message: str, run: Callable[..., SimpleNamespace]
) -> None:
    result = run(*arguments)
    assert result.code == 2 and message in result.err and result.calls == []
    assert "Traceback" not in result.err and "hydra.cc" not in result.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model.width=7"], "model: width 7 must be divisible by num_heads 2\n"),
        (["model.width=200"], "model: width 200 is too large for this machine\n"),
        (["+model.num_head=7"], "model.num_head: targets.Model takes no such argument. "
         "Did you mean num_heads? It takes: width, num_heads\n"),
        (["~model.width"], "missing 1 required keyword-only argument: 'width'\n"),
        (["model._target_=targets.Modle"], "model._target_: cannot find 'targets.Modle'"),
        (["optimizer.lr=-1"], "optimizer: lr -1 must not be negative\n"),
        (["+optimizer.lrr=1"], "optimizer.lrr: targets.AdamW takes no such argument."),
    ],
)  # fmt: skip
def test_values_that_a_constructor_refuses_are_explained(
    arguments: list[str], message: str, run: Callable[..., SimpleNamespace]
) -> None:
    result = run(*arguments, job=build_all)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err


def test_a_failed_job_of_a_multirun_is_reported_with_its_mistake(
    run: Callable[..., SimpleNamespace],
) -> None:
    result = run("-m", "model.width=7,9", job=build_all)
    assert result.code == 2
    for number, width in enumerate((7, 9)):
        mistake = f"model: width {width} must be divisible by num_heads 2"
        job = f"job {number} (imports=[targets] model.width={width})"
        assert f"{job} failed: {mistake}\n" in result.err


def test_a_class_that_a_module_lacks_is_named_with_the_nearest() -> None:
    config = OmegaConf.create({"path": {"_target_": "mmdit.flow.paths.Cosin"}})
    with pytest.raises(UserError, match=r"mmdit.flow.paths has no Cosin. Did you mean Cosine\?"):
        check_targets(config, [])
    config = OmegaConf.create({"path": {"_target_": "no_such_module.Cosine"}})
    with pytest.raises(UserError, match="No module named 'no_such_module'; Python must find"):
        check_targets(config, ["no_such_module"])


@pytest.mark.slow
def test_ctrl_c_while_torch_is_imported_gives_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    result = subprocess.run(
        [sys.executable, "-c", "from mmdit.cli.train import main"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(CONFIGS.parent)])},
        check=False,
    )
    assert result.returncode and result.stderr == "interrupted\n"


@pytest.mark.parametrize(
    "key, message",
    [
        ("root", "training.root has no value and needs one: give training.root=...\n"),
        ("copy", "training.root has no value and needs one: give training.root=...\n"),
        ("broken", "broken: Interpolation key 'nowhere.at_all' not found\n"),
    ],
)
def test_values_without_a_value_are_explained(
    key: str, message: str, run: Callable[..., SimpleNamespace]
) -> None:
    result = run(job=lambda config, text: (config if key == "broken" else config.training)[key])
    assert (result.code, result.err) == (2, message)


def test_broken_yaml_names_the_file(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    (folder / "model/toy.yaml").write_text("{width: 3")
    result = run()
    assert result.code == 2 and "toy.yaml" in result.err


@pytest.mark.slow
def test_user_error_of_the_job_is_printed_as_is(folder: Path) -> None:
    result = run_script(folder, "action=mistake")
    assert (result.code, result.err) == (2, "the shapes ran out: draw fewer\n")


FORGED = "name\x1b[2J\nERROR: all is lost\u202e\udcff"
SHOWN = r"name\x1b[2J\nERROR: all is lost\u202e\udcff"


@pytest.mark.parametrize("words", [(), ("-m", "training.steps=1,2")])
def test_text_from_outside_forges_no_line(
    run: Callable[..., SimpleNamespace], words: tuple[str, ...]
) -> None:
    def fail(config: DictConfig, text: Verbatim) -> None:
        raise UserError(f"{FORGED} is not there")

    result = run(*words, job=fail)
    assert result.code == 2 and result.err.endswith(f"{SHOWN} is not there\n")
    assert "\nERROR" not in result.err and "\x1b" not in result.err


def test_values_on_the_command_line_forge_no_line(run: Callable[..., SimpleNamespace]) -> None:
    for words in (["training.steps=\x1b[2J\nERROR"], ["model=\x1b\nERROR"], ["\x1b\nERROR=1"]):
        result = run(*words)
        assert result.code == 2 and "\x1b" not in result.err and "\nERROR" not in result.err


@pytest.mark.slow
def test_log_records_of_a_script_forge_no_line(folder: Path) -> None:
    result = run_script(folder, "action=log")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"two\nlines of {SHOWN} and {SHOWN}, 1.50\n{SHOWN}\n"


@pytest.mark.slow
def test_full_traceback_on_request(folder: Path) -> None:
    result = run_script(folder, "action=mistake", HYDRA_FULL_ERROR="1")
    assert result.code == 2 and "Traceback" in result.err and 'raise UserError("the' in result.err


def test_user_error_in_a_multirun_ends_with_code_2(run: Callable[..., SimpleNamespace]) -> None:
    def fail_at_first(config: DictConfig, text: Verbatim) -> None:
        if config.training.steps == 1:
            raise UserError("one step is too few")

    result = run("-m", "training.steps=1,2", job=fail_at_first)
    assert result.code == 2 and len(result.calls) == 2 and "Traceback" not in result.err
    assert re.search(r"job 0 \(.*training.steps=1\) failed", result.err)
    assert result.err.endswith("\none step is too few\n")


def test_interruption_ends_with_code_130(folder: Path) -> None:
    result = run_script(folder, "action=interrupt")
    assert (result.code, result.err) == (130, "interrupted\n")


def test_exit_codes_of_the_job_pass_through(run: Callable[..., SimpleNamespace]) -> None:
    assert run(job=lambda config, text: sys.exit(7)).code == 7


# --- bugs ---


def test_bug_keeps_its_traceback(folder: Path) -> None:
    result = run_script(folder, "action=bug")
    assert result.code == 1 and result.err.startswith("Traceback (most recent call last)")
    assert 'raise ZeroDivisionError("the sky fell")' in result.err
    assert "During handling" not in result.err and "Error executing job" not in result.err


@pytest.mark.parametrize("bug", [ValueError, TypeError])
def test_bug_in_the_job_is_raised(
    bug: type[Exception], run: Callable[..., SimpleNamespace]
) -> None:
    def fail(config: DictConfig, text: Verbatim) -> None:
        raise bug("unexpected keyword argument 'x'")

    with pytest.raises(bug):
        run(job=fail)
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_bug_in_a_multirun_is_raised(run: Callable[..., SimpleNamespace]) -> None:
    with pytest.raises(KeyError):
        run("-m", "training.steps=1", job=lambda config, text: {}["missing"])


def test_type_error_inside_a_constructor_is_a_bug(run: Callable[..., SimpleNamespace]) -> None:
    with pytest.raises(Exception, match="'int' object is not iterable"):
        run("model.num_heads=1", job=build_all)


def test_wrong_key_in_the_script_is_a_bug(run: Callable[..., SimpleNamespace]) -> None:
    with pytest.raises(AttributeError):
        run(job=lambda config, text: config.no_such_key)


# --- parts ---


@pytest.mark.parametrize("error", [RuntimeError("x"), ValueError("x"), AssertionError()])
def test_only_known_mistakes_are_explained(error: Exception) -> None:
    assert explain(error, in_job=True, config_dir=CONFIGS) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "c"), "c: no space left on device"),
        (OSError(errno.EIO, "Input/output error", "c"), "c: input/output error"),
        (OSError(errno.ESTALE, "Stale file handle", "c", None, "d"), "c -> d: stale file handle"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", b"c"), "c: disk quota exceeded"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), None),
    ],
)
def test_what_a_file_system_says_of_a_path_is_no_bug(error: Exception, message: str | None) -> None:
    assert explain(error, in_job=True, config_dir=CONFIGS) == message


def test_an_error_of_an_open_file_names_the_file(tmp_path: Path) -> None:
    def failing(path: Path) -> None:
        with path.open("w"):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError) as caught:
        failing(tmp_path / "x")
    told = explain(caught.value, in_job=True, config_dir=CONFIGS)
    assert told == f"{tmp_path / 'x'}: input/output error"


def test_what_a_file_system_says_while_a_node_is_built_names_its_key(tmp_path: Path) -> None:
    config = OmegaConf.create({"data": {"_target_": "os.listdir", "path": str(tmp_path) * 200}})
    with pytest.raises(Exception) as caught:
        instantiate(config.data)
    told = explain(caught.value, in_job=True, config_dir=CONFIGS)
    assert told is not None and told.startswith(f"data: {tmp_path}")
    assert told.endswith(": file name too long")


@pytest.mark.slow
def test_output_that_nobody_reads_ends_quietly(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for words in (["--cfg", "job"], ["--help"]):
        ended = subprocess.run(
            [sys.executable, "app.py", "imports=[targets]", *words],
            cwd=folder,
            stdout=writer,
            stderr=subprocess.PIPE,
        )
        assert (ended.returncode, ended.stderr) == (141, b"")
    os.close(writer)


def test_a_word_far_too_long_for_a_name_is_compared_with_none() -> None:
    began = time.process_time()
    assert nearest("training.step" * 10_000, ["training.steps"] * 100) is None
    assert time.process_time() - began < 1


def test_nearest() -> None:
    known = ["training.steps", "optimizer.lr", "scheduler.lr", "objective/path", "model"]
    assert nearest("optimiser.lr", known) == "optimizer.lr"
    assert nearest("step", known) == "training.steps"
    assert nearest("modle", known) == "model"
    assert nearest("zebra", known) is None
    assert nearest("a", []) is None


def test_modules_of_the_user_are_imported_before_the_job(folder: Path) -> None:
    (folder / "mine.py").write_text("print('here am I')")
    found = run_script(folder, "training.root=1", "imports=[mine,targets]")
    assert found.code == 0 and "here am I" in found.out
    lost = run_script(folder, "training.root=1", "imports=[lost,targets]")
    assert lost.code == 2
    assert "imports: No module named 'lost'" in lost.err and "Traceback" not in lost.err
