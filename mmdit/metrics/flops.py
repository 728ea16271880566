"""The number of floating-point operations of a network, counted by running it on meta tensors."""

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
    """Operations of one forward pass, counted exactly; `Backbone.flops` is the closed form.

    Counts matrix products, convolutions and attention, with two operations per multiply-add.
    Nothing is computed and no memory is used, since the tensors have shapes only.

    Args:
        network: the network, on any device; it is not modified. Its further inputs (`reads`) are
            assumed to have the shape of the latent.
        height, width: size of the latent.
        text_length: number of tokens in c_ctxt.
        batch: batch size; the count is proportional to it.
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
    # The counter cannot see into a CPU's fused attention and would count zero for it.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional_call(network, shapes, inputs, extra)
    return int(counter.get_total_flops())


def tensors_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
