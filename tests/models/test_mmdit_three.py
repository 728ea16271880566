import pytest
import torch
from torch import Tensor

from mmdit.errors import UserError
from mmdit.models.mmdit import MMDiT
from mmdit.models.mmdit_three import MMDiTThree

TINY = {
    "depth": 3,
    "width": 32,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "latent_channels": 4,
    "context_width": 12,
    "pooled_width": 10,
    "position_size": 4,
}


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    z_t, c_vec, c_ctxt = (
        torch.randn(s, generator=generator) for s in ((2, 4, 6, 4), (2, 10), (2, 5, 12))
    )
    return z_t, torch.tensor([0.3, 0.8]), c_vec, c_ctxt


def test_every_fresh_block_is_the_identity():
    model = MMDiTThree(**TINY, clip_length=3)
    generator = torch.Generator().manual_seed(0)
    clip, t5, x, y = (
        torch.randn(s, generator=generator) for s in ((2, 3, 32), (2, 2, 32), (2, 6, 32), (2, 32))
    )
    for block in model.blocks:
        for before, after in zip((clip, t5, x), block(clip, t5, x, y), strict=True):
            assert torch.equal(after, before)
    assert torch.equal(model.last_block(clip, t5, x, y), x)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_with_the_same_weights_for_both_texts_it_is_the_mmdit(randomize, qk_norm):
    two = randomize(MMDiT(**TINY, qk_norm=qk_norm), 0)
    three = MMDiTThree(**TINY, qk_norm=qk_norm, clip_length=3)
    weights = {}
    for name, tensor in two.state_dict().items():
        weights[name.replace(".text.", ".clip.")] = tensor
        weights[name.replace(".text.", ".t5.").replace("context", "t5")] = tensor
    three.load_state_dict(weights)
    torch.testing.assert_close(three(*inputs()), two(*inputs()), rtol=0, atol=1e-5)


def test_the_first_tokens_are_clips(randomize):
    model = randomize(MMDiTThree(**TINY, clip_length=3), 0)
    z_t, t, c_vec, c_ctxt = inputs()
    clip, t5 = model.texts(c_ctxt)
    assert torch.equal(clip, model.context_embedding(c_ctxt[:, :3]))
    assert torch.equal(t5, model.t5_embedding(c_ctxt[:, 3:]))
    turned = model(z_t, t, c_vec, c_ctxt.flip(1))
    assert (turned - model(z_t, t, c_vec, c_ctxt)).abs().max() > 1e-3


def test_a_text_without_t5_and_an_impossible_length_are_named():
    model = MMDiTThree(**TINY, clip_length=5)
    with pytest.raises(UserError, match="c_ctxt has 5 tokens, of which clip_length 5 are CLIP's"):
        model(*inputs())
    with pytest.raises(UserError, match="clip_length=0 must be a whole number of at least 1"):
        MMDiTThree(**TINY, clip_length=0)
