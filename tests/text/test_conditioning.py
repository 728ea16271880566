import pytest
import torch
from torch import Tensor

from mmdit.keys import generator_for
from mmdit.models.clip import CLIPTextModel
from mmdit.models.t5 import T5Encoder
from mmdit.text.conditioning import TextConditioner, TextEncoder, TokenIds
from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer

WORDS = ["a", "red", "blue", "circle", "square", "and"]
L_WIDTH, G_WIDTH, T5_WIDTH, LENGTH, T5_LENGTH = 8, 12, 32, 7, 9
PROMPTS = ["a red circle", "a blue square"]


def conditioner(*, dropout: float = 0.464, t5_width: int = T5_WIDTH) -> TextConditioner:
    def clip(width: int, *, pad_with_end: bool, projection_width: int | None) -> TextEncoder:
        return TextEncoder(
            tokenizer=CLIPWordTokenizer(words=WORDS, length=LENGTH, pad_with_end=pad_with_end),
            model=CLIPTextModel(
                vocabulary_size=12,
                width=width,
                depth=2,
                num_heads=2,
                length=LENGTH,
                projection_width=projection_width,
            ),
        )

    return TextConditioner(
        clip_l=clip(L_WIDTH, pad_with_end=True, projection_width=None),
        clip_g=clip(G_WIDTH, pad_with_end=False, projection_width=10),
        t5=TextEncoder(
            tokenizer=T5WordTokenizer(words=WORDS, length=T5_LENGTH),
            model=T5Encoder(vocabulary_size=12, width=t5_width, depth=1, num_heads=2, hidden=16),
        ),
        dropout=dropout,
    )


@pytest.fixture
def text(randomize) -> TextConditioner:
    return randomize(conditioner(), 0)


def parts(c_vec: Tensor, c_ctxt: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What each encoder contributes, by the layout of App. B.2."""
    return {
        "clip_l": (c_vec[:, :L_WIDTH], c_ctxt[:, :LENGTH, :L_WIDTH]),
        "clip_g": (c_vec[:, L_WIDTH:], c_ctxt[:, :LENGTH, L_WIDTH : L_WIDTH + G_WIDTH]),
        "t5": (c_ctxt[:, LENGTH:],),
    }


@torch.no_grad()
def test_layout(text):
    ids = text.tokenize(PROMPTS)
    c_vec, c_ctxt = text(ids)
    assert c_vec.shape == (2, L_WIDTH + 10) == (2, text.pooled_width)
    assert c_ctxt.shape == (2, LENGTH + T5_LENGTH, T5_WIDTH)
    assert text.context_width == T5_WIDTH
    spoken = parts(c_vec, c_ctxt)
    for name in ("clip_l", "clip_g"):
        output = getattr(text, name).model(getattr(ids, name))
        assert torch.equal(spoken[name][0], output.pooled)
        assert torch.equal(spoken[name][1], output.hidden)
    assert torch.equal(spoken["t5"][0], text.t5.model(ids.t5))
    assert not c_ctxt[:, :LENGTH, L_WIDTH + G_WIDTH :].any()


@pytest.mark.parametrize("dropped", ["clip_l", "clip_g", "t5"])
@torch.no_grad()
def test_a_dropped_encoder_contributes_zeros_and_the_others_are_unmoved(text, dropped):
    ids = text.tokenize(PROMPTS)
    names = ["clip_l", "clip_g", "t5"]
    kept = torch.tensor([[name != dropped for name in names], [True] * 3])
    before, after = parts(*text(ids)), parts(*text(ids, kept))
    for name in names:
        for whole, part in zip(before[name], after[name], strict=True):
            assert torch.equal(part[1], whole[1])  # the other sample keeps all
            if name == dropped:
                assert whole[0].any() and not part[0].any()
            else:
                assert torch.equal(part[0], whole[0])


def test_a_dropped_encoder_gets_no_gradient(text):
    kept = torch.tensor([[True, False, True]] * 2)
    c_vec, c_ctxt = text(text.tokenize(PROMPTS), kept)
    (c_vec.square().sum() + c_ctxt.square().sum()).backward()
    grads = {
        name: [p.grad for p in getattr(text, name).parameters() if p.grad is not None]
        for name in ("clip_l", "clip_g", "t5")
    }
    assert not any(grad.any() for grad in grads["clip_g"])
    assert any(grad.any() for grad in grads["clip_l"])
    assert any(grad.any() for grad in grads["t5"])


@pytest.mark.parametrize("empty", ["", "  \n"])
@torch.no_grad()
def test_an_empty_prompt_is_all_zeros_and_leaves_the_others_alone(text, empty):
    c_vec, c_ctxt = text.encode([empty, PROMPTS[0]])
    assert not c_vec[0].any() and not c_ctxt[0].any()
    alone = text.encode(PROMPTS[:1])
    torch.testing.assert_close(c_vec[1:], alone.c_vec)
    torch.testing.assert_close(c_ctxt[1:], alone.c_ctxt)


@torch.no_grad()
def test_encode_says_what_the_encoders_say(text):
    for one, other in zip(text.encode(PROMPTS), text(text.tokenize(PROMPTS)), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_all_dropped_in_training_equals_the_empty_prompt(text):
    dropped = text(text.tokenize(PROMPTS), torch.zeros(2, 3, dtype=torch.bool))
    for one, other in zip(dropped, text.encode(["", ""]), strict=True):
        assert torch.equal(one, other)


def test_the_reader_is_told_once_of_unknown_words_and_of_text_cut_off():
    text = conditioner()
    assert text.remarks(["", *PROMPTS]) == []
    (unknown,) = text.remarks(["a zebra and a lion"] * 2)
    assert "2 of the words: zebra, lion" in unknown
    (cut,) = text.remarks(["a " * 10])
    assert f"its last 5 tokens exceed the {LENGTH}" in cut
    many = text.remarks([" ".join(f"x{i}" for i in range(8))])[0]
    assert many.endswith("x6, x7")


def generators(*indices: int) -> list[torch.Generator]:
    return [generator_for(0, "text", index) for index in indices]


def test_what_a_sample_keeps_does_not_depend_on_its_batch():
    text = conditioner()
    together = text.draw_kept(generators(*range(20)))
    assert together.dtype == torch.bool and together.shape == (20, 3)
    assert torch.equal(text.draw_kept(generators(7, 3)), together[[7, 3]])
    assert together.any() and not together.all()


def test_encoders_are_dropped_independently_at_the_papers_rate():
    """Sec. 5.1: 46.4 % each, so that 10 % of samples are unconditional."""
    n = 4000
    dropped = ~conditioner().draw_kept(generators(*range(n)))
    for rate in dropped.float().mean(0).tolist():
        assert rate == pytest.approx(0.464, abs=4 * 0.5 / n**0.5)
    assert dropped.all(1).float().mean().item() == pytest.approx(0.1, abs=4 * 0.3 / n**0.5)
    correlation = torch.corrcoef(dropped.float().T) - torch.eye(3)
    assert correlation.abs().max() < 4 / n**0.5


def test_dropout_zero_keeps_all_and_one_drops_all():
    assert conditioner(dropout=0.0).draw_kept(generators(*range(50))).all()
    assert not conditioner(dropout=1.0).draw_kept(generators(*range(50))).any()


@pytest.mark.parametrize("dropout", [-0.1, 1.1])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(ValueError, match=rf"dropout {dropout} must lie in \[0, 1\]"):
        conditioner(dropout=dropout)


def test_clip_must_fit_beside_itself_into_the_context():
    with pytest.raises(ValueError, match=r"8 \+ 12 must not exceed the width of T5, 16"):
        conditioner(t5_width=16)


def test_a_vocabulary_smaller_than_its_tokenizers_is_refused():
    tokenizer = T5WordTokenizer(words=WORDS, length=5)
    with pytest.raises(ValueError, match="vocabulary_size 8 of T5Encoder must be at least 9"):
        TextEncoder(
            tokenizer=tokenizer,
            model=T5Encoder(vocabulary_size=8, width=8, depth=1, num_heads=2, hidden=8),
        )


@torch.no_grad()
def test_condition_matches_the_reference(golden, load_original):
    case = golden("conditioning")
    theirs = case.config["model"]

    def encoder(name: str, model: CLIPTextModel | T5Encoder) -> TextEncoder:
        prefix = f"{name}.transformer."
        weights = {k: v for k, v in case.weights.items() if k.startswith(prefix)}
        load_original(model, {k.removeprefix(prefix): v for k, v in weights.items()})
        return TextEncoder(tokenizer=T5WordTokenizer(words=WORDS, length=77), model=model)

    def clip(name: str) -> TextEncoder:
        sizes = theirs[name]
        width = sizes["hidden_size"]
        model = CLIPTextModel(
            vocabulary_size=sizes["vocab_size"],
            width=width,
            depth=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            activation=sizes["hidden_act"],
            projection_width=width if sizes["text_projection"] else None,
        )
        return encoder(name, model)

    sizes = theirs["t5"]
    t5 = T5Encoder(
        vocabulary_size=sizes["vocab_size"],
        width=sizes["d_model"],
        depth=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        head_width=sizes["d_kv"],
        hidden=sizes["d_ff"],
    )
    text = TextConditioner(clip_l=clip("clip_l"), clip_g=clip("clip_g"), t5=encoder("t5xxl", t5))
    clip_ids = case.inputs["tokens_l"], case.inputs["tokens_g"]
    short = TokenIds(*clip_ids, case.inputs["tokens_t5_77"])
    long = TokenIds(*clip_ids, case.inputs["tokens_t5_256"])
    case.check("pooled", text(short).c_vec)
    case.check("context_154", text(short).c_ctxt)
    case.check("context_333", text(long).c_ctxt)
    without_t5 = torch.tensor([[True, True, False]] * 2)
    case.check("context_no_t5_333", text(long, without_t5).c_ctxt)
