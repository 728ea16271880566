"""Laws of the losses of post-training."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmdit
from mmdit.adapters import lora
from mmdit.alignment import (
    AdvantageWeightedMatching,
    BestOfN,
    DiffusionDPO,
    DiffusionIPO,
    DiffusionNFT,
    FlowGRPO,
    SDESampler,
)
from mmdit.alignment.algorithm import Algorithm
from mmdit.alignment.diffusion_nft import normalized_error
from mmdit.alignment.models import Models, Reference, conditioned, reference_of, without_gradient
from mmdit.alignment.prompts import Prompt
from mmdit.alignment.ratios import clipped
from mmdit.alignment.rollouts import Rollouts, Trajectory, best_and_worst
from mmdit.errors import UserError
from mmdit.flow.objective import Draw, squared_error
from mmdit.flow.transitions import CPS, Ancestral, FlowSDE, Transition

PROMPTS = ["a red circle", "two squares", "a dog"]
MEMBERS = 3
REWARDS = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.5, 0.5, 3.0, 1.0, 2.0], dtype=torch.float64)


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    pipe = mmdit.load_pipeline(tiny_published)
    pipe.requires_grad_(False)
    pipe.mmdit.requires_grad_(True)
    return pipe


def rollouts_of(pipe: mmdit.Pipeline, trajectory: Trajectory | None = None) -> Rollouts:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(9, pipe.mmdit.latent_channels, 8, 8, generator=generator)
    text = pipe.text.tokenize(PROMPTS)
    return Rollouts([Prompt(p) for p in PROMPTS], text, x_0, REWARDS, trajectory)


def draw_for(rollouts: Rollouts, count: int) -> Draw:
    generator = torch.Generator().manual_seed(1)
    epsilon = torch.randn(count, *rollouts.x_0.shape[1:], generator=generator)
    return Draw(torch.linspace(0.2, 0.9, count), epsilon)


@torch.no_grad()
def moved(pipe: mmdit.Pipeline, by: float = 0.1, seed: int = 2) -> mmdit.Pipeline:
    other = copy.deepcopy(pipe)
    generator = torch.Generator().manual_seed(seed)
    for weight in other.mmdit.parameters():
        weight.add_(
            by * weight.std().nan_to_num(0.1) * torch.randn(weight.shape, generator=generator)
        )
    return other


def models_of(
    policy: mmdit.Pipeline,
    old: mmdit.Pipeline,
    reference: mmdit.Pipeline,
    rollouts: Rollouts,
    rows: Tensor,
) -> Models:
    fixed = Reference(reference, without_gradient)
    return conditioned(policy, old, fixed, rollouts.text_of(rows), guidance=1.0)


def test_advantages_compare_within_a_group(pipe) -> None:
    rollouts = rollouts_of(pipe)
    groups = rollouts.advantages().view(3, MEMBERS)
    assert torch.allclose(groups.sum(1), torch.zeros(3), atol=1e-6)
    assert (groups[1] == 0).all()
    assert groups[0, 1] == groups[0, 2] > 0 > groups[0, 0]
    expected = (REWARDS[6] - 2.0) / (REWARDS.std() + 1e-4)
    assert groups[2, 0].item() == pytest.approx(expected.item())
    assert rollouts.advantages(most=0.5).abs().max() <= 0.5
    assert rollouts.informative.tolist() == [True] * 3 + [False] * 3 + [True] * 3


def test_pairs_are_a_best_and_a_worst_image_of_one_prompt(pipe) -> None:
    pairs = best_and_worst(rollouts_of(pipe))
    assert pairs.tolist() == [[1, 0], [2, 0], [6, 7]]


def test_best_of_n_reads_the_best_alone(pipe) -> None:
    assert BestOfN().select(rollouts_of(pipe)).flatten().tolist() == [1, 2, 6]


def test_without_differences_there_are_no_pairs(pipe) -> None:
    rollouts = rollouts_of(pipe)._replace(rewards=torch.ones(9, dtype=torch.float64))
    assert best_and_worst(rollouts).shape == (0, 2)
    assert len(AdvantageWeightedMatching().select(rollouts)) == 9
    assert (rollouts.advantages() == 0).all()


def test_dpo_is_log_2_at_the_reference(pipe) -> None:
    rollouts = rollouts_of(pipe)
    chosen = DiffusionDPO().select(rollouts)
    draw = draw_for(rollouts, len(chosen))
    result = DiffusionDPO()(
        models_of(pipe, pipe, pipe, rollouts, chosen[:, 0]), rollouts, chosen, draw
    )
    assert torch.allclose(result.losses, torch.full((3,), math.log(2)), atol=1e-7)
    assert (result.figures["implicit_accuracy"] == 0.5).all()


def test_ipo_is_a_quarter_at_the_reference_and_slopes_as_dpo_does(pipe) -> None:
    """There -log sigmoid(x) has the slope -1/2, and (x - 1/2)^2 the slope -1."""
    rollouts, found = rollouts_of(pipe), []
    for algorithm, level in ((DiffusionIPO(), 0.25), (DiffusionDPO(), math.log(2))):
        chosen = algorithm.select(rollouts)
        draw = draw_for(rollouts, len(chosen))
        compared = models_of(pipe, pipe, copy.deepcopy(pipe), rollouts, chosen[:, 0])
        losses = algorithm(compared, rollouts, chosen, draw).losses
        assert torch.allclose(losses, torch.full((3,), level), atol=1e-6)
        losses.mean().backward()
        found.append(gradients(pipe))
    assert torch.allclose(found[0], 2 * found[1], rtol=1e-3, atol=1e-6)
    assert found[0].abs().max() > 1e-4


def test_dpo_prefers_what_lowers_the_loss_of_the_better(pipe) -> None:
    """A step along the gradient lowers the loss of the preferred against that of the other."""
    rollouts = rollouts_of(pipe)
    dpo = DiffusionDPO(beta=100.0)
    chosen = dpo.select(rollouts)
    draw = draw_for(rollouts, len(chosen))
    reference = copy.deepcopy(pipe)
    compared = models_of(pipe, pipe, reference, rollouts, chosen[:, 0])
    dpo(compared, rollouts, chosen, draw).losses.mean().backward()
    with torch.no_grad():
        for weight in pipe.mmdit.parameters():
            if weight.grad is not None:
                weight -= 1e-4 * weight.grad
    after = dpo(models_of(pipe, pipe, reference, rollouts, chosen[:, 0]), rollouts, chosen, draw)
    assert after.losses.mean() < math.log(2)


def test_at_the_old_policy_the_ratio_is_one(pipe) -> None:
    rollouts = rollouts_of(pipe)
    algorithm = AdvantageWeightedMatching(kl=0.0)
    chosen = algorithm.select(rollouts)
    draw = draw_for(rollouts, len(chosen))
    compared = models_of(pipe, copy.deepcopy(pipe), pipe, rollouts, chosen[:, 0])
    result = algorithm(compared, rollouts, chosen, draw)
    assert result.figures["log_ratio_max"] == 0 and (result.figures["ratio"] == 1).all()
    assert (result.losses == -rollouts.advantages()[chosen[:, 0]]).all()


def test_awm_starts_as_the_flow_loss_weighted_by_advantages(pipe) -> None:
    """At the old policy the gradient is that of A |v - u|^2."""
    rollouts = rollouts_of(pipe)
    algorithm = AdvantageWeightedMatching(kl=0.0)
    chosen = algorithm.select(rollouts)
    draw = draw_for(rollouts, len(chosen))
    compared = models_of(pipe, copy.deepcopy(pipe), pipe, rollouts, chosen[:, 0])
    algorithm(compared, rollouts, chosen, draw).losses.sum().backward()
    found = gradients(pipe)
    x_0 = rollouts.x_0[chosen[:, 0]]
    output = compared.policy.output(x_0, draw)
    errors = squared_error(output, pipe.objective.target(x_0, draw))
    (rollouts.advantages()[chosen[:, 0]] * errors).sum().backward()
    assert torch.allclose(found, gradients(pipe), rtol=1e-3, atol=1e-6)
    assert found.abs().max() > 1e-4


def gradients(pipe: mmdit.Pipeline) -> Tensor:
    """All gradients, which are then forgotten."""
    found = [w.grad.flatten() for w in pipe.mmdit.parameters() if w.grad is not None]
    pipe.mmdit.zero_grad()
    return torch.cat(found)


def test_clipping_ends_the_gradient_of_what_has_moved_far_enough() -> None:
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0], requires_grad=True)
    losses, figures = clipped(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]), 0.2)
    losses.sum().backward()
    ratio = log_ratio.detach().exp()
    assert torch.allclose(losses.detach(), torch.tensor([-1.2, -ratio[1], ratio[2], 0.8, -1.0]))
    assert log_ratio.grad is not None
    assert torch.allclose(log_ratio.grad, torch.tensor([0.0, -ratio[1], ratio[2], 0.0, -1.0]))
    assert figures["clip_share"].tolist() == [1, 1, 1, 1, 0]


def test_nft_at_the_old_policy_has_the_gradient_of_the_contrast(pipe) -> None:
    """v = v_old: both sides have the same error, and 2 r - 1 decides the direction."""
    rollouts = rollouts_of(pipe)
    nft = DiffusionNFT(beta=1.0, kl=0.0)
    chosen = nft.select(rollouts)
    draw = draw_for(rollouts, len(chosen))
    compared = models_of(pipe, copy.deepcopy(pipe), pipe, rollouts, chosen[:, 0])
    result = nft(compared, rollouts, chosen, draw)
    assert (result.figures["distance_to_old"] == 0).all()
    result.losses.sum().backward()
    found = gradients(pipe)
    x_0 = rollouts.x_0[chosen[:, 0]]
    error = compared.policy.output(x_0, draw) - pipe.objective.target(x_0, draw)
    sides = normalized_error(error, draw.t)
    (rollouts.advantages() * sides).sum().backward()  # 5 (2 r - 1) = A
    assert torch.allclose(found, gradients(pipe), rtol=1e-3, atol=1e-6)
    assert found.abs().max() > 1e-4


def test_nft_does_not_move_for_groups_without_differences(pipe) -> None:
    rollouts = rollouts_of(pipe)._replace(rewards=torch.ones(9, dtype=torch.float64))
    nft = DiffusionNFT(kl=0.0)
    chosen = nft.select(rollouts)
    compared = models_of(pipe, copy.deepcopy(pipe), pipe, rollouts, chosen[:, 0])
    nft(compared, rollouts, chosen, draw_for(rollouts, 9)).losses.sum().backward()
    assert gradients(pipe).abs().max() < 1e-5


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "transition", [FlowSDE(), CPS(), Ancestral()], ids=lambda t: type(t).__name__
)
def test_the_first_ratio_of_flow_grpo_is_exactly_one(pipe, transition: Transition) -> None:
    rollouts = sampled(pipe, transition)
    grpo = FlowGRPO(transition=transition, kl=0.1)
    for step in range(3):  # the batch that was sampled, again
        chosen = torch.stack([torch.arange(9), torch.full((9,), step)], 1)
        compared = models_of(pipe, pipe, copy.deepcopy(pipe), rollouts, chosen[:, 0])
        result = grpo(compared, rollouts, chosen, draw_for(rollouts, 9))
        assert result.figures["log_ratio_max"] == 0
        assert (result.figures["kl"] == 0).all()
    chosen = grpo.select(rollouts)[::2]  # another batch: some of its steps and images
    compared = models_of(pipe, pipe, pipe, rollouts, chosen[:, 0])
    result = grpo(compared, rollouts, chosen, draw_for(rollouts, len(chosen)))
    assert result.figures["log_ratio_max"] < 1e-6


def sampled(pipe: mmdit.Pipeline, transition: Transition) -> Rollouts:
    rollouts = rollouts_of(pipe)
    compared = models_of(pipe, pipe, pipe, rollouts, torch.arange(9))
    sampler = SDESampler(transition=transition, steps=4)
    with without_gradient():
        x_0, trajectory = sampler(pipe, rollouts.x_0, compared.policy.condition)
    return rollouts._replace(x_0=x_0, trajectory=trajectory)


def test_flow_grpo_trains_all_steps_with_noise(pipe) -> None:
    rollouts = sampled(pipe, FlowSDE())
    chosen = FlowGRPO(transition=FlowSDE()).select(rollouts)
    assert sorted(map(tuple, chosen.tolist())) == [
        (r, s) for r in (0, 1, 2, 6, 7, 8) for s in range(3)
    ]


def test_flow_grpo_needs_stochastic_samples(pipe) -> None:
    with pytest.raises(UserError, match="sampler=sde"):
        FlowGRPO(transition=FlowSDE()).select(rollouts_of(pipe))


ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "nft": lambda: DiffusionNFT(beta=0.7, kl=0.1),
    "awm": lambda: AdvantageWeightedMatching(clip=0.9, kl=0.1),
    "grpo": lambda: FlowGRPO(transition=FlowSDE(), clip=0.9, kl=0.1),
    "dpo": lambda: DiffusionDPO(beta=10.0),
    "ipo": lambda: DiffusionIPO(beta=10.0),
    "best_of_n": BestOfN,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_equal_finite_differences(pipe, name: str, monkeypatch) -> None:
    """Along a direction in the weights of the last layer, in float64."""
    pipe = pipe.double()
    rollouts = sampled(moved(pipe, seed=5), FlowSDE())
    rollouts = rollouts._replace(x_0=rollouts.x_0.double())
    algorithm = ALGORITHMS[name]()
    chosen = algorithm.select(rollouts)[:6]
    draw = Draw(*(part.double() for part in draw_for(rollouts, len(chosen))))
    old, reference = moved(pipe, seed=3), moved(pipe, seed=4)
    weight = [w for w in pipe.mmdit.parameters() if w.ndim == 2][-1]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)).double()

    def loss() -> Tensor:
        compared = models_of(pipe, old, reference, rollouts, chosen[:, 0])
        return algorithm(compared, rollouts, chosen, draw).losses.double().mean()

    if name == "nft":  # the sizes that errors are divided by have no gradient
        keep_sizes(monkeypatch)
    loss().backward()
    assert weight.grad is not None
    slope = (weight.grad * direction).sum().item()
    step, ends = 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * step)
            ends.append(loss().item())
            weight.add_(direction, alpha=-sign * step)
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)
    assert abs(slope) > 1e-8


def keep_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let errors be divided by the sizes of the first two calls: those of the two sides."""
    sizes: list[Tensor] = []

    def error_over_kept_size(error: Tensor, scale: Tensor) -> Tensor:
        error = scale[:, None, None, None] * error
        sizes.append(error.detach().abs().flatten(1).mean(1))
        return error.square().flatten(1).mean(1) / sizes[(len(sizes) - 1) % 2]

    monkeypatch.setattr("mmdit.alignment.diffusion_nft.normalized_error", error_over_kept_size)


def test_the_reference_is_what_training_started_from(pipe) -> None:
    reference = reference_of(pipe)
    before = copy.deepcopy(pipe.mmdit.state_dict())
    with torch.no_grad():
        for weight in pipe.mmdit.parameters():
            weight.add_(1.0)
    after = reference.pipe.mmdit.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(weight.requires_grad for weight in reference.pipe.parameters())
    shared = zip(
        reference.pipe.autoencoder.parameters(), pipe.autoencoder.parameters(), strict=True
    )
    assert all(a is b for a, b in shared)


def test_with_an_adapter_the_reference_is_the_model_without_it(pipe) -> None:
    pipe.requires_grad_(False)
    rollouts = rollouts_of(pipe)
    rows = torch.arange(9)
    draw = draw_for(rollouts, 9)
    base = models_of(pipe, pipe, pipe, rollouts, rows).old.output(rollouts.x_0, draw)
    pipe.load_lora(lora(pipe, rank=2), name="adapter")
    with torch.no_grad():
        for name, weight in pipe.named_parameters():
            if ".changes." in name:
                weight.add_(0.1)
    compared = conditioned(pipe, pipe, reference_of(pipe), rollouts.text_of(rows), guidance=1.0)
    assert torch.equal(compared.reference.output(rollouts.x_0, draw), base)
    output = compared.policy.output(rollouts.x_0, draw)
    assert output.requires_grad and not torch.allclose(output, base)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusionNFT(beta=0.0), "algorithm.beta"),
        (lambda: DiffusionNFT(kl=-1.0), "algorithm.kl"),
        (lambda: AdvantageWeightedMatching(clip=0.0), "algorithm.clip"),
        (lambda: AdvantageWeightedMatching(clip=1.0), "algorithm.clip"),
        (lambda: FlowGRPO(transition=FlowSDE(), clip=float("nan")), "algorithm.clip"),
        (lambda: DiffusionDPO(beta=-1.0), "algorithm.beta"),
        (lambda: DiffusionIPO(beta=0.0), "algorithm.beta"),
        (lambda: SDESampler(transition=FlowSDE(), window=[0, 9]), "sampler.window"),
        (lambda: SDESampler(transition=FlowSDE(), steps=1), "sampler.steps"),
    ],
)
def test_values_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
