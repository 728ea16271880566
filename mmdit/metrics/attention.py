"""Attention statistics: the largest logit and the entropy of each block's attention (Fig. 5).

Logits that grow and entropies that collapse, in the last blocks first, announce the divergence of
finetuning at high resolution in bfloat16 that QK-normalization prevents (Sec. 5.3.2). All networks
here attend through one function, `mmdit.nn.attention.attention`. While a network is watched, that
function is replaced by one that records statistics and calls the original.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.dtypes import wide
from mmdit.flow.objective import Draw
from mmdit.keys import generator_for
from mmdit.nn import attention as room
from mmdit.pipeline import Pipeline

LOGITS_AT_ONCE = 1 << 24  # 64 MiB of float32


class BlockAttention(NamedTuple):
    """Statistics of one block over all heads, queries, samples and calls.

    Attributes:
        block: name of the module whose forward pass called attention, as in `named_modules`.
        max_logit: the largest input of the softmax, with scale and bias.
        entropy: mean, in nats: 0 if each query attends to one key, log n if to all n keys equally.
        normalized_entropy: mean of entropy / log n, in [0, 1]; 0 if there is only one key.
    """

    block: str
    max_logit: float
    entropy: float
    normalized_entropy: float


class AttentionRecord:
    """Attention statistics of a watched network, by block."""

    def __init__(self) -> None:
        # (largest logit, sum of entropies, sum of normalized ones) and query count of each call.
        # They stay on their device until they are needed, to avoid synchronizing a GPU.
        self._calls: dict[str, list[tuple[Tensor, int]]] = {}

    def add(self, block: str, statistics: Tensor, queries: int) -> None:
        """Record a call: (max, sum of entropies, sum of normalized ones) over its queries."""
        self._calls.setdefault(block, []).append((statistics, queries))

    def blocks(self) -> list[BlockAttention]:
        """The statistics of each block, in order of their first call.

        Raises:
            ValueError: the network has not run yet.
        """
        if not self._calls:
            raise ValueError("no attention was seen: run the watched network first")
        return [_combined(block, calls) for block, calls in self._calls.items()]


def last_blocks(blocks: Sequence[BlockAttention], count: int = 5) -> BlockAttention:
    """Statistics averaged over the last blocks; the paper averages over five (Fig. 5).

    A network with fewer blocks is averaged over all. The result's name has the number of blocks.
    """
    last = blocks[-count:]
    means = (sum(b[i] for b in last) / len(last) for i in (1, 2, 3))  # type: ignore[misc]
    return BlockAttention(f"last {len(last)}", *means)


@contextmanager
def watched(network: nn.Module) -> Iterator[AttentionRecord]:
    """Record the attention statistics of `network`, without changing its outputs.

    A compiled network runs eagerly meanwhile, since a graph cannot be observed.

    Example:
        with watched(pipeline.mmdit) as record:
            pipeline("a red circle")
        last_blocks(record.blocks())
    """
    record = AttentionRecord()
    running: list[str] = []
    door = room.attention

    def watched_door(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if running:  # else the call comes from another network
            record.add(running[-1], *attention_statistics(q, k, **options))
        return door(q, k, v, **options)

    handles = []
    for name, module in network.named_modules():

        def enter(_: nn.Module, __: object, name: str = name) -> None:
            running.append(name)

        def leave(*_: object) -> None:
            running.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    # Modules that did `from mmdit.nn.attention import attention` have their own reference to it.
    held = [
        (names, name)
        for names in [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
        for name, value in list(names.items())
        if value is door
    ]
    # Importing the compiler takes seconds; if it is not imported, nothing is compiled.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None
    try:
        for names, name in held:
            names[name] = watched_door
        with eager or nullcontext():
            yield record
    finally:
        for names, name in held:
            names[name] = door
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, int]:
    """(largest logit, sum of entropies, sum of normalized ones) and the number of queries.

    Computed in at least float32 whatever the dtype of q and k, in chunks of queries.

    Args:
        q, k: (b, n, h, d), as in `mmdit.nn.attention.attention`.
        bias, causal, scale: as in `mmdit.nn.attention.attention`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        bias = bias.expand(len(q), q.shape[2], q.shape[1], k.shape[1]).flatten(0, 1)
    q, k = (rearrange(part, "b n h d -> (b h) n d") for part in (q, k))
    (sequences, queries, _), keys = q.shape, k.shape[1]
    rows = max(1, LOGITS_AT_ONCE // keys)
    together = max(1, rows // queries)
    greatest, entropies = [], []
    with torch.autocast(q.device.type, enabled=False):
        for s in range(0, sequences, together):
            some = slice(s, s + together)
            for row in range(0, queries, rows):
                part = slice(row, row + rows)
                logits = scale * (wide(q[some, part]) @ wide(k[some]).transpose(1, 2))
                if bias is not None:
                    logits += bias[some, part]
                if causal:
                    future = torch.ones_like(logits[0], dtype=torch.bool).triu(1 + row)
                    logits.masked_fill_(future, -math.inf)
                greatest.append(logits.amax())
                entropies.append(torch.special.entr(logits.softmax(dim=-1)).sum())
    entropy = torch.stack(entropies).sum()
    normalized = entropy / math.log(keys) if keys > 1 else torch.zeros_like(entropy)
    return torch.stack([torch.stack(greatest).amax(), entropy, normalized]), sequences * queries


@torch.no_grad()
def attention_at(
    pipeline: Pipeline,
    latents: Tensor,
    captions: Sequence[str],
    *,
    levels: Sequence[float],
    seed: int,
    extra: Mapping[str, Tensor] = {},
    batch_size: int = 64,
) -> list[BlockAttention]:
    """Attention statistics of each block of the transformer on noised images at several times t.

    The noise is that of `validation_loss`, so two evaluations differ only by the weights.

    Args:
        pipeline: the pipeline with the transformer.
        latents: normalized latents (n, c, h, w).
        captions: their n captions.
        levels: values of t in [0, 1].
        seed: seed of the noise.
        extra: as in `validation_loss`.
        batch_size: number of samples per batch.
    """
    shape, device = tuple(latents.shape[1:]), latents.device
    with watched(pipeline.mmdit) as record:
        for start in range(0, len(latents), batch_size):
            x_0 = latents[start : start + batch_size]
            keys = range(start, start + len(x_0))
            noises = [
                torch.randn(shape, generator=generator_for(seed, "validation", i)) for i in keys
            ]
            rows = slice(start, start + batch_size)
            condition = pipeline.text.encode(captions[rows])
            condition = condition._replace(extra={name: part[rows] for name, part in extra.items()})
            for level in levels:
                t = torch.full((len(x_0),), level, device=device)
                draw = Draw(t, torch.stack(noises).to(device))
                pipeline.objective(pipeline.mmdit, x_0, condition, draw)
    return record.blocks()


def _combined(block: str, calls: Sequence[tuple[Tensor, int]]) -> BlockAttention:
    statistics = torch.stack([s for s, _ in calls]).double().cpu()
    queries = sum(count for _, count in calls)
    entropy, normalized = (statistics[:, 1:].sum(dim=0) / queries).tolist()
    return BlockAttention(block, statistics[:, 0].max().item(), entropy, normalized)
