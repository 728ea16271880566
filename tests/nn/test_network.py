"""The dtype that a network states, and the rule that nobody asks a weight for it."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdit.nn.network import Network, set_compute_dtype

PACKAGE = Path(__file__).parents[2] / "mmdit"
# `parity` is left out: there, models of other projects are asked. And `nn/stored.py` is about
# weights in another dtype than the network computes in.
FILES = [
    file
    for where in ("models", "nn", "text", "flow", "latents", "engine", "runs", ".")
    for file in sorted((PACKAGE / where).glob("*.py"))
    if file.name != "stored.py"
]


class Doubling(Network):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return 2 * self.linear(self.cast(x))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda net: net, torch.float32),
        (lambda net: net.to(torch.bfloat16), torch.bfloat16),
        (lambda net: net.to(dtype=torch.float64, device="cpu"), torch.float64),
        (lambda net: net.half(), torch.float16),
        (lambda net: net.bfloat16().float(), torch.float32),
        (lambda net: net.double().cpu(), torch.float64),
        (lambda net: net.to(dtype=None), torch.float32),
        (lambda net: net.bfloat16().to("meta").to_empty(device="cpu"), torch.bfloat16),
        (lambda net: nn.ModuleList([net]).bfloat16()[0], torch.bfloat16),
        (lambda net: copy.deepcopy(net.bfloat16()), torch.bfloat16),
    ],
)
def test_the_dtype_follows_the_weights(change, expected):
    network = change(Doubling())
    assert network.compute_dtype == network.linear.weight.dtype == expected
    assert network(torch.ones(1, 3, dtype=torch.float64)).dtype == expected


def test_the_dtype_is_the_default_one_at_first():
    try:
        torch.set_default_dtype(torch.float64)
        assert Doubling().compute_dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert Doubling().compute_dtype == torch.float32


def test_the_dtype_of_all_networks_in_a_module_is_set_at_once():
    whole = nn.ModuleDict({"a": Doubling(), "b": nn.Sequential(Doubling(), nn.Linear(3, 3))})
    set_compute_dtype(whole, torch.bfloat16)
    assert whole["a"].compute_dtype == whole["b"][0].compute_dtype == torch.bfloat16


def test_a_whole_network_compiles_into_one_graph():
    network = Doubling()
    expected = network(torch.ones(1, 3).double())
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(1, 3).double()), expected)


def asked(source: str) -> list[str]:
    """Where a program takes a dtype from a weight."""
    found = []
    for node in ast.walk(ast.parse(source)):
        taken: ast.expr | None = None
        if isinstance(node, ast.Attribute) and node.attr == "dtype":
            taken = node.value  # linear.weight.dtype, next(module.parameters()).dtype
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            casts = node.func.attr in ("to", "type_as")
            taken = node.args[0] if casts and node.args else None  # x.to(linear.weight)
        if taken is None:
            continue
        weight = isinstance(taken, ast.Attribute) and taken.attr in ("weight", "bias")
        first = isinstance(taken, ast.Call) and "parameters()" in ast.unparse(taken)
        if weight or first:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nobody_asks_a_weight_for_its_dtype(file):
    assert asked(file.read_text()) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("self.fc1.weight.dtype", 1),
        ("x.to(self.fc1.weight)", 1),
        ("x.type_as(self.fc1.bias)", 1),
        ("next(model.parameters()).dtype", 1),
        ("x.to(next(iter(model.parameters())))", 1),
        ("next(model.parameters()).device", 0),
        ("x.to(self.compute_dtype)", 0),
        ("x.to(y.dtype)", 0),
    ],
)
def test_the_rule_itself(source, count):
    assert len(asked(source)) == count
