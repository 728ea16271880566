import pytest
import torch

from mmdit.errors import UserError
from mmdit.models.t5 import T5Encoder, relative_buckets

TINY = {
    "vocabulary_size": 50,
    "width": 32,
    "depth": 2,
    "num_heads": 4,
    "head_width": 6,
    "hidden": 48,
}


def test_parameters_of_the_public_encoder():
    """T5-v1.1-XXL, its embedding counted once."""
    with torch.device("meta"):
        model = T5Encoder(width=4096, depth=24, num_heads=64, hidden=10240)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_762_310_656


def test_buckets_are_exact_when_near_and_saturate_when_far():
    offsets = torch.tensor([0, -1, -7, -8, -127, -128, -10_000, 1, 7, 8, 128, 10_000])
    expected = [0, 1, 7, 8, 15, 15, 15, 17, 23, 24, 31, 31]
    assert relative_buckets(offsets).tolist() == expected


def test_buckets_grow_with_distance_and_tell_the_directions_apart():
    after = relative_buckets(torch.arange(1, 300))
    before = relative_buckets(-torch.arange(1, 300))
    assert (after.diff() >= 0).all()
    assert torch.equal(after, before + 16)
    assert after.unique().tolist() == list(range(17, 32))


@torch.no_grad()
def test_every_token_sees_every_other_padding_included(randomize):
    model = randomize(T5Encoder(**TINY), 0)
    one, other = (model(torch.tensor([[5, 6, 1, last]])) for last in (0, 7))
    assert (one - other).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_order_matters_though_there_is_no_position_embedding(randomize):
    model = randomize(T5Encoder(**TINY), 0)
    ids = torch.tensor([[5, 6, 7, 1]])
    straight, reversed_ = model(ids), model(ids.flip(1)).flip(1)
    assert (straight - reversed_).abs().max() > 1e-3


def test_any_length_is_read():
    model = T5Encoder(**TINY)
    for length in (1, 200):
        assert model(torch.zeros(1, length, dtype=torch.int64)).shape == (1, length, 32)


@pytest.mark.parametrize("name", ["depth", "num_heads", "width", "hidden", "head_width"])
def test_every_size_is_at_least_one(name):
    with pytest.raises(UserError, match=f"{name}=0 must be a whole number"):
        T5Encoder(**{**TINY, name: 0})


# Parity


@torch.no_grad()
def test_encoder_matches_the_reference(golden, load_original):
    case = golden("t5")
    theirs = case.config["model"]
    model = T5Encoder(
        vocabulary_size=theirs["vocab_size"],
        width=theirs["d_model"],
        depth=theirs["num_layers"],
        num_heads=theirs["num_heads"],
        head_width=theirs["d_kv"],
        hidden=theirs["d_ff"],
    )
    load_original(model, case.weights)
    for n in range(len(case.config["call"]["sequence_lengths"])):
        case.check(f"hidden_{n}", model(case.inputs[f"tokens_{n}"]))
    case.check("position_bias_24", model.position_bias(torch.arange(24)))


def test_buckets_match_the_reference(golden):
    case = golden("t5")
    buckets = relative_buckets(case.inputs["relative_positions"])
    assert torch.equal(buckets, case.outputs["buckets"])


@torch.no_grad()
def test_encoder_matches_transformers(load_original, randomize):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    peer = transformers.T5EncoderModel(config)
    randomize(peer, 0)
    model = T5Encoder(**TINY)
    load_original(model, peer.state_dict())
    ids = torch.randint(0, 50, (2, 150), generator=torch.Generator().manual_seed(0))
    theirs = peer(ids).last_hidden_state
    torch.testing.assert_close(model(ids), theirs, rtol=0, atol=5e-5)
