"""An MM-DiT that predicts average velocities over intervals of time, for sampling in few steps."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mmdit.errors import UserError
from mmdit.models.backbone import Backbone
from mmdit.models.mmdit import MMDiT
from mmdit.nn.embeddings import TimestepEmbedding
from mmdit.registry import build, describe, register


@register
class IntervalMMDiT(MMDiT):
    """An `MMDiT` with a second time r <= t: the average velocity between r and t (MeanFlow).

    u(z_t, r, t) = 1/(t - r) int_r^t v(z_s, s) ds (Geng et al. 2025, Eq. 3), so that z_r = z_t -
    (t - r) u(z_t, r, t) is one step, however long. At r = t this is the velocity itself: without
    r the network is an ordinary flow. The length t - r of the interval has an embedding of its
    own, which is added to that of t.

    Args: those of `MMDiT`.

    Example:
        network = with_intervals(pipe.mmdit)  # its outputs are those of before, whatever r is
        z_0 = z_1 - network(z_1, t=ones, c_vec=c_vec, c_ctxt=c_ctxt, r=zeros)
    """

    def __init__(self, **own: Any) -> None:
        super().__init__(**own)
        self.interval_embedding = TimestepEmbedding(self.width)
        if not self.positions.is_meta:
            self.reset_parameters()

    def forward(
        self, z_t: Tensor, t: Tensor, c_vec: Tensor, c_ctxt: Tensor, r: Tensor | None = None
    ) -> Tensor:
        """`MMDiT.forward` with the time r (b,) at which the interval ends; None is t."""
        y = self.vector(t, c_vec, r)
        c = self.text_tokens(c_ctxt)
        x = self.image_tokens(z_t)
        for block in self.blocks:
            c, x = block(c, x, y)
        x = self.last_block(c, x, y)
        return self.prediction(x, y, *z_t.shape[-2:])

    def vector(self, t: Tensor, c_vec: Tensor, r: Tensor | None = None) -> Tensor:
        """`PatchBackbone.vector`, and the embedding of the length t - r."""
        length = torch.zeros_like(t) if r is None else t - r
        return super().vector(t, c_vec) + self.interval_embedding(length, self.cast)

    def flops(self, *, height: int, width: int, text_length: int) -> int:
        embedding = 2 * (256 * self.width + self.width**2)
        return super().flops(height=height, width=width, text_length=text_length) + embedding


def with_intervals(model: Backbone) -> IntervalMMDiT:
    """Copy a model and let it read the end of an interval, which it ignores until it is trained.

    The last layer of the new embedding is zero, so that outputs are those of before bit for bit. A
    model that reads intervals already is copied as it is.

    Raises:
        UserError: the model is not an `MMDiT`.
    """
    if type(model) not in (MMDiT, IntervalMMDiT):
        raise UserError(
            f"only an MMDiT can learn average velocities, not a {type(model).__name__}: its "
            "embedding of time would need a second one"
        )
    with torch.device("meta"):
        described = {**describe(model), "class": "IntervalMMDiT"}
        network = cast(IntervalMMDiT, build(described))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if type(model) is MMDiT:
        new = TimestepEmbedding(network.width)
        nn.init.normal_(new.fc1.weight, std=0.02)
        nn.init.zeros_(new.fc1.bias)
        nn.init.zeros_(new.fc2.weight)
        nn.init.zeros_(new.fc2.bias)
        weights |= {f"interval_embedding.{n}": model.cast(w) for n, w in new.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    network.compute_dtype = model.compute_dtype
    return network.train(model.training)
