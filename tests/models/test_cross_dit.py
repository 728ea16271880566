import pytest
import torch
from torch import Tensor

from mmdit.models.cross_dit import CrossBlock, CrossDiT
from mmdit.nn.attention import attention

TINY = {
    "depth": 2,
    "width": 32,
    "num_heads": 2,
    "latent_channels": 4,
    "context_width": 12,
    "pooled_width": 10,
    "position_size": 4,
}


def tokens(batch: int, length: int, seed: int) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))


def test_a_fresh_block_is_the_identity():
    x = tokens(2, 6, 0)
    block = CrossDiT(**TINY).blocks[0]
    assert torch.equal(block(x, tokens(2, 5, 1), tokens(2, 1, 2)[:, 0]), x)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_asks_with_the_image_and_reads_the_text(randomize, qk_norm):
    """The same as attention of the concatenated sequence of which only the rest is a key."""
    block = randomize(CrossBlock(32, 2, 2.0, qk_norm=qk_norm), 0)
    x, c = tokens(2, 6, 0), tokens(2, 5, 1)
    q, k, v = block.cross_in(x, c)
    assert (q.shape, k.shape, v.shape) == ((2, 6, 2, 16), (2, 5, 2, 16), (2, 5, 2, 16))
    of_both = super(type(block.cross_in), block.cross_in).forward(torch.cat([x, c], dim=1))
    expected = attention(of_both.q[:, :6], of_both.k[:, 6:], of_both.v[:, 6:])
    torch.testing.assert_close(attention(q, k, v), expected, rtol=0, atol=1e-6)


def test_text_said_twice_is_the_same_text(randomize):
    """Attention weighs the keys of the text among themselves, whatever the size of the image."""
    model = randomize(CrossDiT(**TINY), 0)
    generator = torch.Generator().manual_seed(0)
    z_t, c_ctxt = (torch.randn(s, generator=generator) for s in ((2, 4, 6, 4), (2, 5, 12)))
    rest = (z_t, torch.tensor([0.3, 0.8]), torch.randn(2, 10, generator=generator))
    torch.testing.assert_close(
        model(*rest, torch.cat([c_ctxt, c_ctxt], dim=1)), model(*rest, c_ctxt), rtol=0, atol=1e-5
    )
