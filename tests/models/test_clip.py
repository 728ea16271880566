import pytest
import torch

from mmdit.errors import UserError
from mmdit.models.clip import CLIPTextModel, QuickGELU

TINY = {"vocabulary_size": 50, "width": 32, "depth": 3, "num_heads": 4, "length": 11}
END = 49


def prompt(*words: int, pad: int = END) -> list[int]:
    return [48, *words, END, *[pad] * (9 - len(words))]


def parameters(**arguments) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CLIPTextModel(**arguments).parameters())


def test_parameters_of_the_public_towers():
    assert parameters(width=768, depth=12, num_heads=12) == 123_060_480
    clip_g = {
        "width": 1280,
        "depth": 32,
        "num_heads": 20,
        "activation": "gelu",
        "projection_width": 1280,
    }
    assert parameters(**clip_g) == 694_659_840


@pytest.mark.parametrize("projection_width", [None, 24])
def test_shapes(projection_width):
    model = CLIPTextModel(**TINY, projection_width=projection_width)
    hidden, pooled = model(torch.tensor([prompt(1, 2), prompt()]))
    assert hidden.shape == (2, 11, 32)
    assert pooled.shape == (2, projection_width or 32) == (2, model.pooled_width)


@torch.no_grad()
def test_no_token_sees_what_follows_it(randomize):
    model = randomize(CLIPTextModel(**TINY), 0)
    one, other = (model(torch.tensor([ids])).hidden for ids in (prompt(1, 2, 3), prompt(1, 2, 4)))
    torch.testing.assert_close(one[:, :3], other[:, :3], rtol=0, atol=1e-6)
    assert (one[:, 3:] - other[:, 3:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_pooled_is_read_at_the_first_end_token_and_padding_does_not_reach_it(randomize):
    model = randomize(CLIPTextModel(**TINY), 0)
    (with_end, with_zero), longer = (
        [model(torch.tensor([prompt(1, 2, pad=pad)])).pooled for pad in (END, 0)],
        model(torch.tensor([prompt(1, 2, 3)])).pooled,
    )
    torch.testing.assert_close(with_end, with_zero, rtol=0, atol=1e-6)
    assert (with_end - longer).abs().max() > 1e-3


@torch.no_grad()
def test_hidden_comes_before_the_last_layer_and_pooled_after_it(randomize):
    model = randomize(CLIPTextModel(**TINY), 0)
    ids = torch.tensor([prompt(1, 2)])
    before = model(ids)
    model.layers[-1].mlp.fc2.bias.add_(torch.arange(32.0))
    model.final_norm.weight.mul_(2)
    after = model(ids)
    assert torch.equal(after.hidden, before.hidden)
    assert not torch.allclose(after.pooled, before.pooled)


def test_quick_gelu_is_not_gelu():
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))


def test_initialization_shrinks_residual_branches_with_depth():
    torch.manual_seed(0)
    layer = CLIPTextModel(vocabulary_size=5, width=64, depth=8, num_heads=4).layers[0]
    assert layer.attention_in.q.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert layer.attention_out.weight.std().item() == pytest.approx(1 / 8 / 4, rel=0.05)
    assert not layer.attention_in.q.bias.any()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"num_heads": 5}, "width 32 must be divisible by num_heads 5"),
        ({"num_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
        ({"length": 0}, "length=0 must be a whole number of at least 1"),
        ({"projection_width": 0}, "projection_width=0 must be a whole number of at least 1"),
        ({"depth": 1}, "depth=1 must be a whole number of at least 2"),
        ({"activation": "relu"}, "activation='relu' must be one of"),
    ],
)
def test_impossible_arguments_are_named(mistake, message):
    with pytest.raises(UserError, match=message):
        CLIPTextModel(**{**TINY, **mistake})


# Parity


@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
@torch.no_grad()
def test_tower_matches_the_reference(golden, load_original, name):
    case = golden(name)
    theirs = case.config["model"]
    model = CLIPTextModel(
        vocabulary_size=theirs["vocab_size"],
        width=theirs["hidden_size"],
        depth=theirs["num_hidden_layers"],
        num_heads=theirs["num_attention_heads"],
        length=theirs["max_positions"],
        activation=theirs["hidden_act"],
        projection_width=theirs["hidden_size"] if theirs["text_projection"] else None,
    )
    load_original(model, case.weights)
    hidden, pooled = model(case.inputs["tokens"])
    case.check("hidden", hidden)
    case.check("pooled", pooled)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_tower_matches_transformers(load_original, randomize, activation):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=128,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=11,
        hidden_act=activation,
        bos_token_id=48,
        eos_token_id=END,
        pad_token_id=END,
    )
    peer = transformers.CLIPTextModelWithProjection(config)
    randomize(peer, 0)
    model = CLIPTextModel(**TINY, activation=activation, projection_width=24)
    load_original(model, peer.state_dict())
    ids = torch.tensor([prompt(1, 2, 3), prompt(), prompt(*range(9))])
    theirs = peer(ids, output_hidden_states=True)
    hidden, pooled = model(ids)
    torch.testing.assert_close(hidden, theirs.hidden_states[-2], rtol=0, atol=2e-5)
    torch.testing.assert_close(pooled, theirs.text_embeds, rtol=0, atol=2e-5)
