"""Optimizers: what decays, what Muon turns, and how an interrupted run goes on with them."""

import copy
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmdit.data.order import Order, ShuffledOrder
from mmdit.engine.ema import EMA, ConstantDecay, HalfLife, PowerFunction, Profile
from mmdit.engine.loggers import NoLogger, read_metrics
from mmdit.engine.loop import train
from mmdit.engine.optimizers import adamw, adamw_8bit, by_kind, load_moments, moments, muon, set_lr
from mmdit.engine.posthoc import PostHoc, snapshots_in
from mmdit.engine.schedules import Schedule, WarmupConstant, WarmupCosine, WarmupStableDecay
from mmdit.engine.settings import Settings
from mmdit.engine.state import TrainState
from mmdit.engine.tasks import Work
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from mmdit.registry import register
from mmdit.runs.checkpoint import checkpoints_in
from mmdit.runs.folder import RunFolder
from mmdit.runs.native import load_tensors

Make = Callable[..., torch.optim.Optimizer]


def network() -> MMDiT:
    return MMDiT(
        depth=2,
        width=8,
        num_heads=2,
        latent_channels=2,
        patch_size=1,
        context_width=3,
        pooled_width=3,
        qk_norm=True,
        position_size=4,
        position_grid=4,
        position_base=4,
    )


def text_model() -> CLIPTextModel:
    return CLIPTextModel(
        vocabulary_size=8, width=4, depth=2, num_heads=1, length=3, projection_width=4
    )


def names_of(module: nn.Module, weights: Sequence[Tensor]) -> set[str]:
    chosen = {id(weight) for weight in weights}
    return {name for name, weight in module.named_parameters() if id(weight) in chosen}


@pytest.mark.parametrize("make", [network, text_model])
@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_every_trained_weight_is_in_one_group(make, optimizer: Make) -> None:
    module = make()
    frozen = next(module.parameters()).requires_grad_(False)
    weights = [w for g in optimizer(module, lr=0.1).param_groups for w in g["params"]]
    assert len({id(w) for w in weights}) == len(weights) == len(list(module.parameters())) - 1
    assert all(weight is not frozen for weight in weights)


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_decay_is_for_matrices(optimizer: Make) -> None:
    model = text_model()
    groups = optimizer(model, lr=0.1, weight_decay=0.5).param_groups
    decayed = [w for g in groups if g["weight_decay"] == 0.5 for w in g["params"]]
    others = [w for g in groups if g["weight_decay"] == 0.0 for w in g["params"]]
    assert len(decayed) + len(others) == len(list(model.parameters()))
    assert all(weight.ndim == 2 for weight in decayed)
    assert any(weight is model.token_embedding.weight for weight in others)
    assert all(
        w.ndim == 1
        for w in others
        if w is not model.token_embedding.weight and w is not model.position_embedding
    )


def test_kinds_follow_from_layers_and_dimensions() -> None:
    model = network()
    kinds = by_kind(model)
    hidden = names_of(model, kinds.hidden)
    assert all(weight.ndim == 2 for weight in kinds.hidden)
    assert all(name.startswith(("blocks.", "last_block.")) for name in hidden)
    assert any(name.startswith("last_block.") for name in hidden)
    outside = names_of(model, kinds.matrices)
    assert {"patch_embedding.proj.weight", "output.linear.weight"} <= outside
    assert not any(name.startswith(("blocks.", "last_block.")) for name in outside)
    assert all(weight.ndim == 1 for weight in kinds.others)


def test_a_tied_embedding_stands_once_and_does_not_decay() -> None:
    module = nn.ModuleDict({"in": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    module["out"].weight = module["in"].weight
    decayed, others = adamw(module, lr=0.1, weight_decay=0.5).param_groups
    assert decayed["params"] == []
    assert len(others["params"]) == 1


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        *(("lr", value, "lr=.* must be") for value in ("x", None, -1, math.nan, [1], True)),
        *(("eps", value, "eps=.* must be") for value in ("x", -1, math.nan)),
        *(("weight_decay", value, "weight_decay=.* must be") for value in ("x", -1, math.nan)),
        *(
            ("betas", value, "betas.* must be")
            for value in ("x", 0.9, [0.9], [0.9, 1.0], [0.9, "x"])
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    field: str, value: object, told: str
) -> None:
    with pytest.raises(UserError, match=rf"^optimizer\.{told}"):
        adamw(nn.Linear(2, 2), **{"lr": 0.1, field: value})  # type: ignore[arg-type]


def test_muon_without_transformer_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"Linear has none to train: choose optimizer=adamw"):
        muon(nn.Linear(2, 2), lr=0.1)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_muon_turns_every_direction_alike_whatever_the_gradients_scale(scale: float) -> None:
    model = network()
    weight = model.blocks[0].image.mlp.fc1.weight
    before = weight.detach().clone()
    optimizer = muon(model, lr=0.01)
    weight.grad = scale * torch.randn(weight.shape, generator=generator_for("gradient"))
    weight.grad[:, 0] *= 5
    optimizer.step()
    step = weight.detach() - before
    # Liu et al. 2025: 0.2 lr sqrt(max(m, n)) times a matrix whose singular values are about 1.
    values = torch.linalg.svdvals(step) / (0.01 * 0.2 * max(step.shape) ** 0.5)
    assert 0.5 < values.min() < values.max() < 1.5


def test_both_parts_of_muon_follow_the_learning_rate() -> None:
    model = network()
    optimizer = muon(model, lr=0.1)
    set_lr(optimizer, [0.0] * len(optimizer.param_groups))
    before = [weight.detach().clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    set_lr(optimizer, [0.1] * len(optimizer.param_groups))
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_state_dict_goes_back_and_forth(optimizer: Make) -> None:
    def stepped(twin: MMDiT, made: torch.optim.Optimizer, seed: int) -> None:
        for i, weight in enumerate(twin.parameters()):
            weight.grad = torch.randn(weight.shape, generator=generator_for(seed, i))
        made.step()

    one, two = network(), network()
    first, second = optimizer(one, lr=0.1), optimizer(two, lr=0.1)
    stepped(one, first, 0)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(one, first, 1)
    stepped(two, second, 1)
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_8_bit_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match="pip install torchao, or choose optimizer=adamw"):
        adamw_8bit(nn.Linear(2, 2), lr=0.1)


@pytest.mark.slow  # it compiles
def test_8_bit_moments_come_back_from_their_parts() -> None:
    def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        for i, weight in enumerate(module.parameters()):
            weight.grad = torch.randn(weight.shape, generator=generator_for(seed, i))
        set_lr(optimizer, [0.01] * len(optimizer.param_groups))
        optimizer.step()

    one, two = nn.Linear(64, 64), nn.Linear(64, 64)
    first, second = adamw_8bit(one, lr=0.1), adamw_8bit(two, lr=0.1)
    stepped(one, first, 0)
    saved = {key: value.clone() for key, value in moments(one, first).items()}
    assert saved["weight:exp_avg.codes"].dtype == torch.uint8
    assert saved["bias:exp_avg"].dtype == torch.float32  # too short for blocks
    two.load_state_dict(one.state_dict())
    load_moments(two, second, saved)
    stepped(one, first, 1)
    stepped(two, second, 1)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


# --- an interrupted run ---


@register
class Reader(nn.Module):
    """A tiny text model: it has all kinds of weights."""

    def __init__(self, *, width: int = 4) -> None:
        super().__init__()
        self.model = CLIPTextModel(
            vocabulary_size=8, width=width, depth=2, num_heads=1, length=3, projection_width=2
        )


class Reading:
    """Learns a number of each sample, keyed by (step, sample)."""

    protocol: ClassVar[dict[str, str | int]] = {"protocol": "reading"}
    higher_is_better: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = Reader()

    def order(self, *, batch_size: int, seed: int) -> Order:
        return ShuffledOrder(size=10, seed=seed)

    def example(self, step: int, indices: Sequence[int]) -> Tensor:
        return torch.stack(
            [torch.randint(8, (3,), generator=generator_for("x", step, i)) for i in indices]
        )

    def times(self, ids: Tensor) -> None:
        return None

    def figures(self) -> dict[str, float]:
        return {}

    def work(self, ids: Tensor) -> Work:
        return Work()

    def loss(self, ids: Tensor) -> Tensor:
        return (self.module.model(ids).pooled.sum(1) - ids.float().mean(1)).square()

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        return {"loss": sum(float(weight.detach().sum()) for weight in module.parameters())}

    def picture(self, module: nn.Module) -> tuple[Tensor, list[str]]:
        return torch.zeros(1, 32, 32, 3, dtype=torch.uint8), ["nothing"]


def go(folder: Path, steps: int, optimizer: Make, schedule: Schedule, profile: Profile) -> Reading:
    task = Reading()
    run = RunFolder(folder)
    train(
        task,
        TrainState(
            task.module,
            ema=EMA(task.module, profile=profile),
            optimizer=optimizer(task.module, lr=0.05, weight_decay=0.1),
            schedule=schedule,
            posthoc=PostHoc(task.module, sigma_rels=[0.05, 0.1], snapshot_every=4),
        ),
        run=run,
        settings=Settings(
            steps=steps,
            batch_size=2,
            clip=1.0,
            log_every=1,
            evaluate_every=100,
            save_every=100,
            keep=1,
        ),
        seed=0,
        logger=NoLogger(),
    )
    run.close()
    return task


def content(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors of the newest checkpoint and of the snapshots."""
    newest = checkpoints_in(folder)[-1]
    found = {name: newest.read(name).tensors for name in ("raw", "ema", "optimizer")}
    return found | {s.path.name: load_tensors(s.path)[0] for s in snapshots_in(folder)}


@pytest.mark.parametrize(
    ("optimizer", "schedule", "profile"),
    [
        (adamw, WarmupCosine(warmup_steps=2, steps=9), HalfLife(half_life=8, batch_size=2)),
        (muon, WarmupConstant(warmup_steps=2), ConstantDecay(decay=0.9, every=2)),
        (
            muon,
            WarmupStableDecay(warmup_steps=2, steps=9, decay_steps=4),
            PowerFunction(sigma_rel=0.2),
        ),
    ],
    ids=["adamw-cosine-half_life", "muon-constant-decay", "muon-stable_decay-power"],
)
@pytest.mark.parametrize("stop", [1, 6])
def test_a_run_in_two_parts_equals_an_unbroken_one(
    tmp_path: Path, stop: int, optimizer: Make, schedule: Schedule, profile: Profile
) -> None:
    go(tmp_path / "whole", 9, optimizer, schedule, profile)
    go(tmp_path / "parts", stop, optimizer, schedule, profile)
    go(tmp_path / "parts", 9, optimizer, schedule, profile)
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert {"optimizer", "step_00000008.safetensors"} <= whole.keys() <= parts.keys()
    for name, tensors in whole.items():
        assert tensors.keys() == parts[name].keys()
        assert all(torch.equal(tensors[key], parts[name][key]) for key in tensors), name
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / part / "metrics.jsonl") if "loss" in row]
        for part in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_muon_saves_by_weight_name_what_each_part_needs(tmp_path: Path) -> None:
    go(tmp_path, 2, muon, WarmupConstant(warmup_steps=1), ConstantDecay(decay=0.9, every=1))
    saved = content(tmp_path)["optimizer"]
    found: dict[str, set[str]] = {}
    for key in saved:
        name, _, moment = key.rpartition(":")
        if not re.fullmatch(r"power_[\d.]+", moment):
            found.setdefault(name, set()).add(moment)
    of_muon, of_adamw = {"momentum_buffer"}, {"exp_avg", "exp_avg_sq", "step"}
    assert found["model.layers.0.attention_in.q.weight"] == of_muon
    assert found["model.token_embedding.weight"] == of_adamw
    assert all(kind in (of_muon, of_adamw) for kind in found.values())
