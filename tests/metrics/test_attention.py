import math

import pytest
import torch
from torch import Tensor, nn

import mmdit.models.mmdit
import mmdit.nn.attention
from mmdit.metrics import attention as monitor
from mmdit.metrics.attention import attention_statistics, last_blocks, watched
from mmdit.models.clip import CLIPTextModel
from mmdit.models.cross_dit import CrossDiT
from mmdit.models.dit import DiT
from mmdit.models.mmdit import MMDiT
from mmdit.models.mmdit_three import MMDiTThree
from mmdit.models.t5 import T5Encoder
from mmdit.models.uvit import UViT

SIZE = {"depth": 3, "width": 32, "num_heads": 2, "context_width": 12, "pooled_width": 8}
TABLE = {"position_size": 8, "position_grid": 4, "position_base": 4}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[Tensor, ...]:
    return random(2, 16, 8, 8), torch.tensor([0.2, 0.9]), random(2, 8), random(2, 5, 12)


def figures(q: Tensor, k: Tensor, **options: object) -> tuple[float, float, float]:
    (greatest, entropy, normalized), count = attention_statistics(q, k, **options)
    return greatest.item(), entropy.item() / count, normalized.item() / count


def naive(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[float, float, float]:
    """One query at a time, in fp64."""
    greatest, entropies = -math.inf, []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                logits = scale * k[b, :, h].double() @ q[b, i, h].double() + mask[b, h, i]
                p = logits.softmax(0)
                greatest = max(greatest, logits.max().item())
                entropies.append(-sum(x * math.log(x) for x in p.tolist() if x > 0))
    mean = sum(entropies) / len(entropies)
    return greatest, mean, mean / math.log(k.shape[1])


@pytest.mark.parametrize("n", [2, 7, 64])
def test_uniform_attention_has_the_entropy_log_n(n):
    q, k = torch.zeros(2, n, 3, 4), random(2, n, 3, 4)
    assert figures(q, k) == pytest.approx((0.0, math.log(n), 1.0), rel=1e-5)


def test_attention_to_one_key_has_no_entropy():
    k = torch.eye(8)[None, :, None]  # the keys are orthogonal, each query is its own key
    greatest, entropy, normalized = figures(100 * k, k, scale=1.0)
    assert greatest == 100
    assert entropy == pytest.approx(0, abs=1e-30)
    assert normalized == pytest.approx(0, abs=1e-30)


def test_a_single_key_has_no_entropy():
    assert figures(torch.ones(1, 3, 1, 4), torch.ones(1, 1, 1, 4)) == (2.0, 0.0, 0.0)


@pytest.mark.parametrize("at_once", [1, 10, 40, 1 << 24])
@pytest.mark.parametrize("case", ["plain", "scale", "bias", "causal"])
def test_statistics_are_those_of_a_naive_computation_in_any_chunks(case, at_once, monkeypatch):
    monkeypatch.setattr(monitor, "LOGITS_AT_ONCE", at_once)
    q, k = 3 * random(2, 6, 3, 4), random(2, 6, 3, 4, seed=1)
    bias = random(1, 3, 6, 6, seed=2)
    options: dict[str, object] = {}
    mask, scale = torch.zeros(2, 3, 6, 6), 0.5
    if case == "scale":
        options["scale"] = scale = 1.0
    elif case == "bias":
        options["bias"], mask = bias, bias.expand(2, 3, 6, 6)
    elif case == "causal":
        options["causal"] = True
        mask = torch.full((6, 6), -math.inf).triu(1).expand(2, 3, 6, 6)
    assert figures(q, k, **options) == pytest.approx(naive(q, k, mask, scale), rel=1e-5)


def test_queries_and_keys_may_differ_in_number():
    q, k = random(2, 9, 3, 4), random(2, 5, 3, 4, seed=1)
    assert figures(q, k) == pytest.approx(naive(q, k, torch.zeros(2, 3, 9, 5), 0.5), rel=1e-5)


def test_bfloat16_under_autocast_is_measured_in_float32():
    q, k = random(1, 6, 2, 4).bfloat16(), random(1, 6, 2, 4, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = figures(q, k)
    assert seen == pytest.approx(naive(q, k, torch.zeros(1, 2, 6, 6), 0.5), rel=1e-5)


NETWORKS = {
    "MMDiT": lambda: (MMDiT(**SIZE, **TABLE), inputs()),
    "MMDiT with QK-norm": lambda: (MMDiT(**SIZE, **TABLE, qk_norm=True), inputs()),
    "MMDiT-X": lambda: (MMDiT(**SIZE, **TABLE, dual_attention=[0, 1]), inputs()),
    "DiT": lambda: (DiT(**SIZE, **TABLE), inputs()),
    "CrossDiT": lambda: (CrossDiT(**SIZE, **TABLE), inputs()),
    "UViT": lambda: (UViT(**SIZE, **TABLE), inputs()),
    "MMDiTThree": lambda: (MMDiTThree(**SIZE, **TABLE, clip_length=2), inputs()),
    "CLIP": lambda: (
        CLIPTextModel(vocabulary_size=20, width=16, depth=3, num_heads=2, length=6),
        (torch.arange(12).view(2, 6),),
    ),
    "T5": lambda: (
        T5Encoder(vocabulary_size=20, width=16, depth=3, num_heads=2, hidden=32),
        (torch.arange(12).view(2, 6),),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_watching_changes_no_output_and_no_gradient(name, randomize):
    network, arguments = NETWORKS[name]()
    randomize(network, 0)

    def outcome() -> list[Tensor]:
        network.zero_grad()
        output = network(*arguments)
        parts = output if isinstance(output, tuple) else (output,)
        sum(part.square().sum() for part in parts).backward()
        gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        return [*parts, *gradients]

    before = outcome()
    with watched(network) as record:
        during = outcome()
    after = outcome()
    for ours in (during, after):
        assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))
    blocks = record.blocks()
    names = [block.block for block in blocks]
    if name in ("MMDiT", "MMDiT with QK-norm", "MMDiT-X", "MMDiTThree"):
        assert names == ["blocks.0", "blocks.1", "last_block"]
    elif name in ("CLIP", "T5"):  # the last layer's states may not be asked for
        assert names[:2] == ["layers.0", "layers.1"]
    else:
        assert names[0] == "blocks.0"
        assert len(names) >= 3
    assert all(0 < block.normalized_entropy < 1 for block in blocks)


def test_figures_are_those_of_what_the_blocks_computed(randomize):
    """Recomputed from the queries and keys that forward hooks see."""
    network = randomize(MMDiT(**SIZE, **TABLE), 0)
    seen: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if name.endswith("attention_in"):
            module.register_forward_hook(lambda _, __, heads, name=name: seen.update({name: heads}))
    with torch.no_grad(), watched(network) as record:
        network(*inputs())
    for block in record.blocks():
        text, image = (seen[f"{block.block}.{stream}.attention_in"] for stream in ("text", "image"))
        q, k = torch.cat([text.q, image.q], 1), torch.cat([text.k, image.k], 1)
        expected = naive(q, k, torch.zeros(2, 2, 21, 21), 16**-0.5)
        assert block[1:] == pytest.approx(expected, rel=1e-4)


def test_both_attentions_of_a_block_count(randomize):
    """MMDiT-X: 21 tokens in the joint attention, 16 in that of the image alone."""
    network = randomize(MMDiT(**SIZE, **TABLE, dual_attention=[0]), 0)
    with torch.no_grad():
        for part in ("text", "image"):
            getattr(network.blocks[0], part).attention_in.q.weight.zero_()
            getattr(network.blocks[0], part).attention_in.q.bias.zero_()
        network.blocks[0].image.attention2_in.q.weight.zero_()
        network.blocks[0].image.attention2_in.q.bias.zero_()
        with watched(network) as record:
            network(*inputs())
    first = record.blocks()[0]
    mean = (21 * math.log(21) + 16 * math.log(16)) / 37
    assert first[1:] == pytest.approx((0.0, mean, 1.0), rel=1e-5)


def test_everything_is_as_before_even_after_an_error():
    network = MMDiT(**SIZE, **TABLE)
    door = mmdit.nn.attention.attention
    with pytest.raises(RuntimeError), watched(network):
        assert mmdit.models.mmdit.attention is not door
        network(*inputs()[:3], random(2, 5, 13))
    assert mmdit.models.mmdit.attention is mmdit.nn.attention.attention is door
    hooks = [h for m in network.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert hooks == []


def test_another_network_is_not_recorded_and_two_are_kept_apart():
    first, second = MMDiT(**SIZE, **TABLE), MMDiT(**{**SIZE, "depth": 2}, **TABLE)
    with torch.no_grad(), watched(first) as one:
        second(*inputs())
        with pytest.raises(ValueError, match="no attention"):
            one.blocks()
        with watched(second) as two:
            first(*inputs())
            second(*inputs())
    assert [len(record.blocks()) for record in (one, two)] == [3, 2]


def test_calls_add_up_to_the_batch_of_all(randomize):
    network = randomize(MMDiT(**SIZE, **TABLE), 0)
    whole = inputs()
    with torch.no_grad():
        with watched(network) as together:
            network(*whole)
        with watched(network) as one_by_one:
            for i in range(2):
                network(*(part[i : i + 1] for part in whole))
    for a, b in zip(together.blocks(), one_by_one.blocks(), strict=True):
        assert a.block == b.block
        assert a[1:] == pytest.approx(b[1:], rel=1e-5)


@pytest.mark.slow
def test_a_compiled_network_is_watched_too(randomize):
    network = randomize(MMDiT(**{**SIZE, "depth": 2}, **TABLE), 0)
    plain = network(*inputs())
    network.compile(backend="eager")
    network(*inputs())
    with watched(network) as record:
        during = network(*inputs())
    assert torch.equal(plain, during)
    assert [block.block for block in record.blocks()] == ["blocks.0", "last_block"]


def test_the_last_blocks_are_averaged():
    class Attending(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return mmdit.nn.attention.attention(self.factor * x, x, x).view_as(x)

    network = nn.Sequential(*(Attending(float(i)) for i in range(7)))
    with watched(network) as record:
        network(torch.ones(1, 4, 1, 1))
    blocks = record.blocks()
    assert [b.max_logit for b in blocks] == [0, 1, 2, 3, 4, 5, 6]
    assert last_blocks(blocks)[:2] == ("last 5", 4.0)
    assert last_blocks(blocks[:3])[:2] == ("last 3", 1.0)
