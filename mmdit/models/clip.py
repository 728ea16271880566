"""CLIP's text tower as SD3 uses it: penultimate states and a pooled vector (App. B.2)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.checks import at_least_one, one_of, whole_number
from mmdit.errors import UserError
from mmdit.nn.attention import QKV, attention
from mmdit.nn.mlp import MLP
from mmdit.nn.network import Network
from mmdit.registry import register


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class CLIPOutput(NamedTuple):
    """Output of the text tower."""

    hidden: Tensor  # (b, n, d): penultimate layer, without the final LayerNorm
    pooled: Tensor  # (b, p): final state at the end-of-text token, projected if the model does so


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer; causal in the text tower."""

    causal = True

    def __init__(self, width: int, num_heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention_in = QKV(width, num_heads)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, activation)

    def forward(self, x: Tensor) -> Tensor:  # (b, n, d) -> (b, n, d)
        q, k, v = self.attention_in(self.norm1(x))
        x = x + self.attention_out(attention(q, k, v, causal=self.causal))
        return x + self.mlp(self.norm2(x))

    def reset_parameters(self, depth: int) -> None:
        """CLIP's initialization (Radford et al. 2021): residual branches shrink with depth."""
        width = self.attention_out.in_features
        branch = width**-0.5 * (2 * depth) ** -0.5
        for part in (self.attention_in.q, self.attention_in.k, self.attention_in.v):
            nn.init.normal_(part.weight, std=width**-0.5)
        nn.init.normal_(self.attention_out.weight, std=branch)
        nn.init.normal_(self.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.fc2.weight, std=branch)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


@register
class CLIPTextModel(Network):
    """Text tower of CLIP-L/14 (quick-GELU, unprojected) and OpenCLIP bigG/14 (GELU, projected).

    Args:
        vocabulary_size: the end-of-text token is its last id, which the pooling relies on.
        width, depth, num_heads: of the transformer.
        length: number of positions; every prompt is padded or cut to it.
        activation: 'quick_gelu' (CLIP-L) or 'gelu' (CLIP-G).
        projection_width: of the pooled vector; None leaves it unprojected.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int = 49408,
        width: int,
        depth: int,
        num_heads: int,
        length: int = 77,
        activation: str = "quick_gelu",
        projection_width: int | None = None,
    ) -> None:
        super().__init__()
        at_least_one("CLIP", vocabulary_size=vocabulary_size, width=width, num_heads=num_heads)
        at_least_one("CLIP", length=length)
        if width % num_heads:
            raise UserError(f"CLIP: width {width} must be divisible by num_heads {num_heads}")
        whole_number("CLIP: depth", depth, 2)  # so that there is a penultimate layer
        one_of("CLIP: activation", activation, ACTIVATIONS)
        self.vocabulary_size, self.width, self.length = vocabulary_size, width, length
        self.pooled_width = width if projection_width is None else projection_width
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.position_embedding = nn.Parameter(torch.empty(length, width))
        self.layers = nn.ModuleList(
            CLIPLayer(width, num_heads, ACTIVATIONS[activation]()) for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(width)
        self.projection: nn.Module = nn.Identity()
        if projection_width is not None:
            at_least_one("CLIP", projection_width=projection_width)
            self.projection = nn.Linear(width, projection_width, bias=False)
        if not self.position_embedding.is_meta:  # where there is nothing to fill
            self.reset_parameters()

    def forward(self, ids: Tensor) -> CLIPOutput:  # (b, n) int64
        tokens = self.token_embedding(ids).to(self.compute_dtype)
        x = tokens + self.position_embedding[: ids.shape[1]]
        for layer in self.layers[:-1]:
            x = layer(x)
        penultimate = x
        final = self.final_norm(self.layers[-1](x))
        # argmax finds the first end-of-text token, the highest id of the vocabulary.
        end = final[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return CLIPOutput(penultimate, self.projection(end))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`, in place, but layer by layer: all share one graph."""
        for layer in self.layers:
            layer.compile(*args, **kwargs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """CLIP's initialization (Radford et al. 2021)."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        for layer in self.layers:
            assert isinstance(layer, CLIPLayer)
            layer.reset_parameters(len(self.layers))
        self.final_norm.reset_parameters()
        if isinstance(self.projection, nn.Linear):
            nn.init.normal_(self.projection.weight, std=self.width**-0.5)
