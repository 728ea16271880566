"""How many operations a network takes, counted by running it on shapes alone."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmdit.models.backbone import Backbone


@torch.no_grad()
def counted_flops(
    network: Backbone, *, height: int, width: int, text_length: int, batch: int = 1
) -> int:
    """Operations of one forward pass, exactly: what `Backbone.flops` says in closed form.

    Products, convolutions and attention are counted, two operations for each multiply-add. Nothing
    is computed and no memory is used, however large the network: its tensors have shapes only.

    Args:
        network: on any device; it is left as it is. What else it reads has a latent's shape.
        height, width: of the latent.
        text_length: tokens of c_ctxt.
        batch: samples, on which the count is linear.
    """
    shapes = {name: tensor.to("meta") for name, tensor in tensors_of(network).items()}
    with torch.device("meta"):
        inputs = (
            torch.empty(batch, network.latent_channels, height, width),
            torch.empty(batch),
            torch.empty(batch, network.pooled_width),
            torch.empty(batch, text_length, network.context_width),
        )
        extra = {name: torch.empty_like(inputs[0]) for name in network.reads}
    # The counter does not see into the fused attention of a CPU: it would count nothing there.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional_call(network, shapes, inputs, extra)
    return int(counter.get_total_flops())


def tensors_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
