"""Backbones of equal size, for a fair comparison of architectures (Fig. 4).

Depth and heads are kept. The width is chosen so that the cost comes nearest to the reference's;
since widths come in coarse steps, the hidden width of the MLPs makes up the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mmdit.checks import one_of
from mmdit.errors import UserError
from mmdit.models.backbone import PatchBackbone
from mmdit.registry import build, describe

MEASURES = ("params", "flops")
TOLERANCE = 0.02  # largest relative difference from the reference's cost


class Match(NamedTuple):
    """The sizes at which a network costs as much as another.

    Attributes:
        width, mlp_ratio: what to build it with.
        cost, reference_cost: parameters, or operations of one forward pass of one sample.
    """

    width: int
    mlp_ratio: float
    cost: int
    reference_cost: int


def matched(
    network: PatchBackbone,
    reference: PatchBackbone,
    *,
    by: str,
    height: int,
    width: int,
    text_length: int,
) -> Match:
    """Find the width and `mlp_ratio` at which `network` costs as much as `reference`.

    Args:
        network: all else about it is kept; half to twice its `mlp_ratio` is tried. Neither network
            is changed; both may be on the meta device, where all the trials are.
        reference: the network to be matched.
        by: 'params', or 'flops' as `Backbone.flops` counts them.
        height, width: of the latents at which operations are compared.
        text_length: tokens of c_ctxt, likewise.

    Raises:
        UserError: `by` is something else; no size comes within 2 % of the reference.
    """
    one_of("match", by, MEASURES)
    description = describe(network)
    unit = network.width_unit(description["num_heads"])

    def cost_of(model: PatchBackbone) -> int:
        if by == "params":
            return sum(weight.numel() for weight in model.parameters())
        return model.flops(height=height, width=width, text_length=text_length)

    def cost(wide: int, mlp_ratio: float) -> int:
        with torch.device("meta"):
            return cost_of(build({**description, "width": wide, "mlp_ratio": mlp_ratio}))

    target, configured = cost_of(reference), description["mlp_ratio"]
    wide = unit * nearest(lambda units: cost(units * unit, configured), target)
    mlp_ratio = fitted_ratio(lambda r: cost(wide, r), wide, configured, target)
    match = Match(wide, mlp_ratio, cost(wide, mlp_ratio), target)
    if abs(match.cost / target - 1) > TOLERANCE:
        raise UserError(
            f"match={by}: the reference costs {target:,}, and {type(network).__name__} comes no "
            f"nearer than {match.cost:,}, at width={wide} and mlp_ratio={mlp_ratio}; change its "
            "depth or num_heads"
        )
    return match


def nearest(cost: Callable[[int], int], target: int) -> int:
    """The argument, from 1, at which a growing function is nearest to `target`."""
    above = 1
    while cost(above) < target:
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if cost(middle) < target else (below, middle)
    return min(range(max(1, below), above + 1), key=lambda units: abs(cost(units) - target))


def fitted_ratio(cost: Callable[[float], int], width: int, configured: float, target: int) -> float:
    """The `mlp_ratio`, from half to twice the configured one, at which the cost is `target`.

    The cost grows by the same amount with each hidden unit. Four digits distinguish all hidden
    widths of networks up to a width of five thousand.
    """
    hidden = round(configured * width)
    now = cost(hidden / width)
    change = round((target - now) / (cost((hidden + 1) / width) - now))
    hidden = min(max(hidden + change, -(-hidden // 2)), 2 * hidden)
    return round(hidden / width, 4)
