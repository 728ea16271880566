import time

import pytest
import torch
from torch import Tensor

from mmdit.errors import UserError
from mmdit.flow.condition import Condition
from mmdit.keys import generator_for
from mmdit.models.clip import CLIPTextModel
from mmdit.models.t5 import T5Encoder
from mmdit.registry import build, describe
from mmdit.text.clip_tokenizer import clip_tokenizer_in
from mmdit.text.conditioning import (
    ENCODERS,
    AbsentEncoder,
    TextConditioner,
    TextEncoder,
    TokenIds,
)
from mmdit.text.t5_tokenizer import t5_tokenizer_in
from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer

WORDS = ["a", "red", "blue", "circle", "square", "and"]
L_WIDTH, G_WIDTH, T5_WIDTH, LENGTH, T5_LENGTH = 8, 12, 32, 7, 9
PROMPTS = ["a red circle", "a blue square"]

ABSENT = {
    "clip_l": {"width": L_WIDTH, "pooled_width": L_WIDTH, "length": LENGTH},
    "clip_g": {"width": G_WIDTH, "pooled_width": 10, "length": LENGTH},
    "t5": {"width": T5_WIDTH, "length": T5_LENGTH},
}


def without(text: TextConditioner, *names: str) -> TextConditioner:
    """The same encoders, but for those named."""
    parts = {name: getattr(text, name) for name in ENCODERS}
    absent = {name: AbsentEncoder(**ABSENT[name]) for name in names}
    return TextConditioner(**{**parts, **absent})


def conditioner(
    *, dropout: float = 0.464, t5_width: int = T5_WIDTH, empty_prompt: str = "zeros"
) -> TextConditioner:
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
        empty_prompt=empty_prompt,
    )


@pytest.fixture
def text(randomize) -> TextConditioner:
    return randomize(conditioner(), 0)


def parts(condition: Condition) -> dict[str, tuple[Tensor, ...]]:
    """What each encoder contributes, by the layout of App. B.2."""
    c_vec, c_ctxt, _ = condition
    return {
        "clip_l": (c_vec[:, :L_WIDTH], c_ctxt[:, :LENGTH, :L_WIDTH]),
        "clip_g": (c_vec[:, L_WIDTH:], c_ctxt[:, :LENGTH, L_WIDTH : L_WIDTH + G_WIDTH]),
        "t5": (c_ctxt[:, LENGTH:],),
    }


@torch.no_grad()
def test_layout(text):
    ids = text.tokenize(PROMPTS)
    condition = c_vec, c_ctxt, _ = text(ids)
    assert c_vec.shape == (2, L_WIDTH + 10) == (2, text.pooled_width)
    assert c_ctxt.shape == (2, LENGTH + T5_LENGTH, T5_WIDTH)
    assert text.context_width == T5_WIDTH
    spoken = parts(condition)
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
    kept = torch.tensor([[name != dropped for name in ENCODERS], [True] * 3])
    before, after = parts(text(ids)), parts(text(ids, kept))
    for name in ENCODERS:
        for whole, part in zip(before[name], after[name], strict=True):
            assert torch.equal(part[1], whole[1])  # the other sample keeps all
            if name == dropped:
                assert whole[0].any() and not part[0].any()
            else:
                assert torch.equal(part[0], whole[0])


def test_a_dropped_encoder_gets_no_gradient(text):
    kept = torch.tensor([[True, False, True]] * 2)
    c_vec, c_ctxt, _ = text(text.tokenize(PROMPTS), kept)
    (c_vec.square().sum() + c_ctxt.square().sum()).backward()
    grads = {
        name: [p.grad for p in getattr(text, name).parameters() if p.grad is not None]
        for name in ENCODERS
    }
    assert not any(grad.any() for grad in grads["clip_g"])
    assert any(grad.any() for grad in grads["clip_l"])
    assert any(grad.any() for grad in grads["t5"])


@torch.no_grad()
def test_what_encoders_said_can_be_joined_later_and_dropped_then(text):
    ids = text.tokenize(PROMPTS)
    said = text.encodings(ids)
    for kept in (None, torch.tensor([[True, False, True], [False, True, False]])):
        for one, other in zip(text.join(said, kept)[:2], text(ids, kept)[:2], strict=True):
            assert torch.equal(one, other)


def test_a_conditioner_is_frozen_when_all_of_its_weights_are(text):
    assert not text.frozen
    text.clip_l.requires_grad_(False)
    text.clip_g.requires_grad_(False)
    assert not text.frozen
    text.t5.requires_grad_(False)
    assert text.frozen and without(text, *ENCODERS).frozen


@pytest.mark.parametrize("empty", ["", "  \n"])
@torch.no_grad()
def test_an_empty_prompt_is_all_zeros_and_leaves_the_others_alone(text, empty):
    c_vec, c_ctxt, _ = text.encode([empty, PROMPTS[0]])
    assert not c_vec[0].any() and not c_ctxt[0].any()
    alone = text.encode(PROMPTS[:1])
    torch.testing.assert_close(c_vec[1:], alone.c_vec)
    torch.testing.assert_close(c_ctxt[1:], alone.c_ctxt)


SUBSETS = [
    [name for i, name in enumerate(ENCODERS) if mask >> i & 1] for mask in range(2 ** len(ENCODERS))
]


@pytest.mark.parametrize("absent", SUBSETS, ids=" ".join)
@torch.no_grad()
def test_an_absent_encoder_is_one_that_is_always_dropped(text, absent):
    fewer = without(text, *absent)
    kept = torch.tensor([[name not in absent for name in ENCODERS]] * 2)
    dropped = text(text.tokenize(PROMPTS), kept)
    for one, other in zip(fewer.encode(PROMPTS)[:2], dropped[:2], strict=True):
        assert torch.equal(one, other)
    assert (fewer.context_width, fewer.pooled_width) == (text.context_width, text.pooled_width)
    assert set(fewer.state_dict()) == {
        key for key in text.state_dict() if key.split(".")[0] not in absent
    }


def test_an_encoder_is_replaced_by_zeros_of_its_shape_on_its_device(text):
    for encoder, sizes in zip(text.encoders, ABSENT.values(), strict=True):
        absent = AbsentEncoder.instead_of(encoder.to("meta"))
        assert describe(absent) == describe(AbsentEncoder(**sizes))
        assert absent.device == torch.device("meta")


@torch.no_grad()
def test_absent_encoders_are_described_and_built_again(text):
    fewer = without(text, "clip_g", "t5")
    again = build(describe(fewer))
    again.load_state_dict(fewer.state_dict())
    for one, other in zip(again.encode(PROMPTS)[:2], fewer.encode(PROMPTS)[:2], strict=True):
        assert torch.equal(one, other)


def test_only_present_encoders_remark_on_prompts():
    text = conditioner()
    long = "zebra " * 8  # with one end token, the length of T5; two tokens too many for CLIP
    assert len(text.remarks([long])) == 2
    assert len(without(text, "clip_l", "clip_g").remarks([long])) == 1
    assert without(text, *ENCODERS).remarks([long]) == []
    unknown, cut = text.remarks_on_captions(["a red circle", "a dog and a cat", "a dog", long])
    assert "3 of 4 captions contain words" in unknown and ": 'dog', 'cat', 'zebra'." in unknown
    assert "1 of 4 captions are too long" in cut
    assert cut.endswith(f": CLIP-L reads {LENGTH} tokens, CLIP-G reads {LENGTH} tokens")
    assert without(text, *ENCODERS).remarks_on_captions([long]) == []


def test_a_prompt_that_only_t5_cuts_is_remarked_on():
    text = conditioner()
    text.t5.tokenizer = T5WordTokenizer(words=WORDS, length=4)
    text.t5.length = 4
    (cut,) = text.remarks(["a red circle and"])  # with an end token one too many
    assert cut.endswith("is truncated: T5 reads 4 tokens and ignores the last 1")


def test_a_word_that_one_encoder_knows_is_known(clip_files):
    text = conditioner()
    assert "zoo" in text.remarks(["a zoo"])[0]
    spelling = clip_tokenizer_in(clip_files, pad_with_end=True, length=LENGTH)
    text.clip_l.tokenizer = spelling
    assert text.remarks(["a zoo"]) == []


@pytest.mark.parametrize("empty", ["", "  \n"])
@torch.no_grad()
def test_an_empty_prompt_can_be_encoded_like_any_other(randomize, empty):
    text = randomize(conditioner(empty_prompt="encoded"), 0)
    encoded = text.encode([empty, PROMPTS[0]])
    for one, other in zip(encoded[:2], text(text.tokenize(["", PROMPTS[0]]))[:2], strict=True):
        assert torch.equal(one, other)
    # CLIP's contexts, its pooled vectors and T5's states all speak.
    assert all(part.any() for part in (*encoded.c_vec[0].split([L_WIDTH, 10]), *encoded.c_ctxt[0]))


@pytest.mark.parametrize("narrow", ENCODERS)
@torch.no_grad()
def test_the_condition_has_the_widest_dtype_and_rounds_no_encoder(text, narrow):
    getattr(text, narrow).bfloat16()
    condition = text.encode(PROMPTS)
    assert condition.c_vec.dtype == condition.c_ctxt.dtype == torch.float32
    ids = text.tokenize(PROMPTS)
    for name, spoken in parts(condition).items():
        own = getattr(text, name)(getattr(ids, name))
        assert own.hidden.dtype == (torch.bfloat16 if name == narrow else torch.float32)
        assert torch.equal(spoken[-1], own.hidden.float())


@torch.no_grad()
def test_a_condition_of_narrow_encoders_is_narrow(text):
    for part in (text, without(text, "t5"), without(text, *ENCODERS)):
        c_vec, c_ctxt, _ = part.bfloat16().encode(PROMPTS)
        assert c_vec.dtype == c_ctxt.dtype == torch.bfloat16


@torch.no_grad()
def test_ids_are_made_on_the_cpu_and_clip_l_gathers_the_condition(text):
    apart = without(text, "clip_l")
    apart.clip_l.to("meta")
    assert {ids.device.type for ids in apart.tokenize(PROMPTS)} == {"cpu"}
    assert all(part.device.type == "meta" for part in apart.encode(PROMPTS)[:2])


@torch.no_grad()
def test_encode_says_what_the_encoders_say(text):
    for one, other in zip(text.encode(PROMPTS)[:2], text(text.tokenize(PROMPTS))[:2], strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_all_dropped_in_training_equals_the_empty_prompt(text):
    dropped = text(text.tokenize(PROMPTS), torch.zeros(2, 3, dtype=torch.bool))
    for one, other in zip(dropped[:2], text.encode(["", ""])[:2], strict=True):
        assert torch.equal(one, other)


def test_the_reader_is_told_once_of_unknown_words_and_of_text_cut_off():
    text = conditioner()
    assert text.remarks(["", *PROMPTS]) == []
    (unknown,) = text.remarks(["a zebra and a lion"] * 2)
    assert "words unknown to this model (2): 'zebra', 'lion'" in unknown
    (cut,) = text.remarks(["a " * 10])
    assert cut.endswith(
        f"is truncated: CLIP-L reads {LENGTH} tokens and ignores the last 5; CLIP-G reads {LENGTH} "
        f"tokens and ignores the last 5; T5 reads {T5_LENGTH} tokens and ignores the last 2"
    )
    many = text.remarks([" ".join(f"x{i}" for i in range(8))])[0]
    assert many.endswith("'x6', 'x7'")


def test_remarks_on_long_prompts_are_short_and_made_in_linear_time():
    text = conditioner()
    many = " ".join(f"x{i}" for i in range(30_000))
    start = time.process_time()
    assert "(30000): 'x0', 'x1'" in text.remarks([many])[0]
    assert time.process_time() - start < 5  # about 0.3 s; comparing all with all took 20 s
    assert f": '{'y' * 40}...';" in text.remarks(["y" * 100_000])[0] + ";"
    assert f": '{'y' * 40}...'" in text.remarks_on_captions(["y" * 100_000])[0]
    assert len(text.remarks(["y" * 100_000])[0]) < 200


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
    with pytest.raises(ValueError, match=rf"dropout={dropout} must be a finite number"):
        conditioner(dropout=dropout)


def test_clip_must_fit_beside_itself_into_the_context():
    with pytest.raises(ValueError, match=r"8 \+ 12 must not exceed the width of T5, 16"):
        conditioner(t5_width=16)


def test_encoders_in_the_wrong_place_are_refused(text):
    with pytest.raises(UserError, match=r"t5 a T5Encoder.* pooled_width are 8, 10, 10"):
        TextConditioner(clip_l=text.clip_l, clip_g=text.clip_g, t5=text.clip_g)
    with pytest.raises(UserError, match=r"must hold a CLIPTextModel.* pooled_width are 0, 10, 0"):
        TextConditioner(clip_l=text.t5, clip_g=text.clip_g, t5=text.t5)


def test_clips_of_unequal_length_are_refused(text):
    shorter = AbsentEncoder(width=G_WIDTH, pooled_width=10, length=LENGTH - 1)
    with pytest.raises(UserError, match=r"length 7 of text.clip_l and 6 of text.clip_g"):
        TextConditioner(clip_l=text.clip_l, clip_g=shorter, t5=text.t5)


def test_an_unknown_reading_of_the_empty_prompt_is_refused():
    with pytest.raises(UserError, match=r"empty_prompt='empty' must be one of zeros"):
        conditioner(empty_prompt="empty")


def test_more_tokens_than_clip_has_positions_are_refused():
    tokenizer = CLIPWordTokenizer(words=WORDS, length=LENGTH + 1, pad_with_end=True)
    with pytest.raises(UserError, match="length 7 of CLIPTextModel must be at least 8"):
        TextEncoder(tokenizer=tokenizer, model=conditioner().clip_l.model)


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
    absent = AbsentEncoder(width=sizes["d_model"], length=256)
    fewer = TextConditioner(clip_l=text.clip_l, clip_g=text.clip_g, t5=absent)
    case.check("context_no_t5_333", fewer(long).c_ctxt)


@pytest.mark.parametrize("with_t5", [True, False])
@torch.no_grad()
def test_condition_matches_diffusers(
    load_original, randomize, clip_files, t5_files, tmp_path, with_t5
):
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    prompts = ["a photo of a red cat", "", "the dog's red ball " * 9]
    length, t5_length, width = 20, 30, 48
    peers = {}

    def clip(i: int, activation: str, *, pad_with_end: bool, projection: int) -> TextEncoder:
        tokenizer = clip_tokenizer_in(clip_files, pad_with_end=pad_with_end, length=length)
        tokenizer.save(tmp_path / f"tokenizer{i}")
        peer = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=tokenizer.vocabulary_size,
                hidden_size=16,
                intermediate_size=64,
                projection_dim=projection,
                num_hidden_layers=2 + i,
                num_attention_heads=2,
                max_position_embeddings=length,
                hidden_act=activation,
                bos_token_id=tokenizer.vocabulary_size - 2,
                eos_token_id=tokenizer.vocabulary_size - 1,
            )
        )
        model = CLIPTextModel(
            vocabulary_size=tokenizer.vocabulary_size,
            width=16,
            depth=2 + i,
            num_heads=2,
            length=length,
            activation=activation,
            projection_width=projection,
        )
        load_original(model, randomize(peer, i).state_dict())
        suffix = f"_{i}" if i > 1 else ""
        peers[f"text_encoder{suffix}"] = peer
        peers[f"tokenizer{suffix}"] = transformers.CLIPTokenizer.from_pretrained(
            tmp_path / f"tokenizer{i}"
        )
        return TextEncoder(tokenizer=tokenizer, model=model)

    def t5() -> TextEncoder:
        tokenizer = t5_tokenizer_in(t5_files, length=t5_length)
        tokenizer.save(tmp_path / "tokenizer3")
        peer = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=tokenizer.vocabulary_size,
                d_model=width,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        )
        model = T5Encoder(
            vocabulary_size=tokenizer.vocabulary_size,
            width=width,
            depth=2,
            num_heads=2,
            head_width=8,
            hidden=64,
        )
        load_original(model, randomize(peer, 3).state_dict())
        peers["text_encoder_3"] = peer
        peers["tokenizer_3"] = transformers.T5TokenizerFast.from_pretrained(tmp_path / "tokenizer3")
        return TextEncoder(tokenizer=tokenizer, model=model)

    text = TextConditioner(
        clip_l=clip(1, "quick_gelu", pad_with_end=True, projection=16),
        clip_g=clip(2, "gelu", pad_with_end=False, projection=12),
        t5=t5() if with_t5 else AbsentEncoder(width=width, length=t5_length),
        empty_prompt="encoded",
    )
    transformer = diffusers.SD3Transformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=width
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(norm_num_groups=1, block_out_channels=(4,)),
        **{"text_encoder_3": None, "tokenizer_3": None, **peers},
    )
    theirs = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=t5_length
    )
    c_vec, c_ctxt, _ = text.encode(prompts)
    assert relative_error(c_ctxt, theirs[0]) <= 1e-5
    assert relative_error(c_vec, theirs[2]) <= 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()
