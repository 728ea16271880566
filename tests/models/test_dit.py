import torch

from mmdit.models.dit import DiT, DiTBlock
from mmdit.models.mmdit import JointBlock

TINY = {"depth": 2, "width": 32, "num_heads": 2, "context_width": 12, "pooled_width": 10}


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))


def test_a_fresh_block_is_the_identity():
    x = tokens(2, 6, 0)
    assert torch.equal(DiT(**TINY, position_size=4).blocks[0](x, tokens(2, 1, 1)[:, 0]), x)


def test_a_block_treats_all_tokens_alike(randomize):
    """One set of weights: what is text and what is image does not matter to it."""
    block = randomize(DiTBlock(32, 2, 2.0, qk_norm=True), 0)
    x, y = tokens(2, 6, 0), tokens(2, 1, 1)[:, 0]
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    torch.testing.assert_close(block(x[:, order], y), block(x, y)[:, order], rtol=0, atol=1e-5)


def test_its_blocks_have_half_the_weights_of_a_joint_block():
    one, two = (
        sum(p.numel() for p in cls(32, 2, 2.0, qk_norm=False).parameters())
        for cls in (DiTBlock, JointBlock)
    )
    assert two == 2 * one
