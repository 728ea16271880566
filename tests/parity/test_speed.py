import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mmdit.cli.eval import speed
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.parity.cases import (
    CASES,
    compiled,
    our_call,
    random_inputs,
    random_model,
    their_call,
    twin,
)

SMALLER = {
    "mmdit": {"depth": 3, "width": 64, "num_heads": 2, "qk_norm": True},
    "autoencoder": {"width": 32, "multipliers": [1, 2], "blocks": 1},
    "clip_l": {"width": 32, "depth": 3, "num_heads": 2},
    "clip_g": {"width": 32, "depth": 3, "num_heads": 2, "projection_width": 32},
    "t5": {"width": 32, "depth": 2, "num_heads": 2, "hidden": 64, "vocabulary_size": 1000},
}


def small(name: str):
    """A case with a model and inputs of a few numbers."""
    case = CASES[name]
    model = {**case.model, **SMALLER[case.kind]}
    pixels = 32 if case.pixels else 0
    return case._replace(model=model, batch=1, pixels=pixels)


@pytest.mark.parametrize("name", CASES)
def test_both_sides_of_every_case_compute_the_same(name):
    pytest.importorskip("diffusers")
    case = small(name)
    torch.manual_seed(0)
    model = random_model(case.model, torch.float32)
    peer = twin(case.kind, model)
    x = random_inputs(case, torch.float32, torch.Generator().manual_seed(0))
    if case.kind == "autoencoder":  # of two levels: the latent has half of the sides, not an eighth
        x["latent"] = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    before = next(peer.parameters()).clone()
    with torch.set_grad_enabled(case.use == "train"):
        ours, theirs = our_call(case, model, x)(), their_call(case, peer, x)()
    tolerance = 0.05 if case.use == "train" else 1e-4  # bfloat16 under autocast
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())
    trained = not torch.equal(next(peer.parameters()), before)
    assert trained is (case.use == "train")
    assert next(model.parameters()).data_ptr() != next(peer.parameters()).data_ptr()


@pytest.mark.parametrize(
    ("kind", "cls", "parts"),
    [
        ("mmdit", MMDiT, 4),  # two blocks, the last, the output
        ("autoencoder", Autoencoder, 2),
        ("clip_l", CLIPTextModel, 3),
        ("t5", T5Encoder, 2),
    ],
)
def test_compiling_shares_the_weights_and_leaves_the_model_as_it_was(kind, cls, parts):
    name = next(name for name, case in CASES.items() if case.kind == kind)
    model = random_model(small(name).model, torch.float32)
    assert isinstance(model, cls)
    copy = compiled(kind, model, ours=True)
    assert [m._compiled_call_impl is not None for m in copy.modules()].count(True) == parts
    assert all(m._compiled_call_impl is None for m in model.modules())
    assert copy.state_dict().keys() == model.state_dict().keys()
    pairs = zip(copy.parameters(), model.parameters(), strict=True)
    assert all(mine is its for mine, its in pairs)


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """`run(*words)`: exit code, stdout and stderr of the command."""

    def command(*words: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["speed.py", *words])
        code = 0
        try:
            speed.main()
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return command


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("cases=[small]", "cases=['small'] must be a list of some of small_forward, "),
        ("cases=t5", "cases=t5 must be a list"),
        ("modes=[]", "modes=[] must be a list of some of eager, compiled"),
        ("dtype=int8", "dtype='int8' must be one of bf16, fp32"),
        ("repeats=0", "repeats=0 must be a whole number of at least 1"),
        ("threads=two", "threads='two' must be a whole number"),
    ],
)
def test_a_mistake_ends_in_one_line(run, argument, message):
    pytest.importorskip("diffusers")
    done = run(argument)
    assert done.code == 2
    assert done.err.startswith(message)
    assert len(done.err.splitlines()) == 1


@pytest.mark.slow
def test_the_report_names_what_was_measured(run, tmp_path):
    pytest.importorskip("diffusers")
    words = "cases=[clip_l]", "modes=[eager]", "repeats=1", "threads=1", "dtype=fp32"
    done = run(*words, f"out={tmp_path}")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["protocol"] == "speed-1" and report["threads"] == 1
    (row,) = report["rows"]
    assert row["case"] == "clip_l"
    # 12 layers of 12 w^2 weights for 154 tokens, and attention; a product and a sum for each.
    products = 2 * 154 * 12 * 12 * 768**2
    assert products < row["flops"] < 1.1 * products
    assert row["ours"]["eager"] > 0 and row["theirs"]["eager"] > 0
    assert (tmp_path / "speed.md").read_text() in done.out
