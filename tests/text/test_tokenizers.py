import pytest
import torch

from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer

WORDS = ["a", "red", "blue", "circle", "square", "and"]


def clip(*, length: int = 7, pad_with_end: bool = True) -> CLIPWordTokenizer:
    return CLIPWordTokenizer(words=WORDS, length=length, pad_with_end=pad_with_end)


def t5(*, length: int = 7) -> T5WordTokenizer:
    return T5WordTokenizer(words=WORDS, length=length)


# CLIP: pad 0, unknown 1, words from 2, start 8, end 9. T5: pad 0, end 1, unknown 2, words from 3.
CLIP_A_RED_CIRCLE = [8, 2, 3, 5, 9]
T5_A_RED_CIRCLE = [3, 4, 6, 1]


def test_clip_layouts():
    prompts = ["a red circle", ""]
    assert clip()(prompts).tolist() == [[*CLIP_A_RED_CIRCLE, 9, 9], [8, 9, 9, 9, 9, 9, 9]]
    padded = clip(pad_with_end=False)(prompts).tolist()
    assert padded == [[*CLIP_A_RED_CIRCLE, 0, 0], [8, 9, 0, 0, 0, 0, 0]]


def test_t5_layout():
    assert t5()(["a red circle", ""]).tolist() == [
        [*T5_A_RED_CIRCLE, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("tokenizer", [clip(), clip(pad_with_end=False), t5()])
def test_ids_lie_in_the_vocabulary_and_rows_have_the_length(tokenizer):
    ids = tokenizer(["a red circle", "", "zebra " * 50])
    assert ids.dtype == torch.int64 and ids.shape == (3, 7)
    assert ids.min() >= 0 and ids.max() < tokenizer.vocabulary_size


def test_the_end_token_of_clip_has_the_highest_id():
    """CLIPTextModel pools at the highest id."""
    tokenizer = clip()
    ids = tokenizer(["a red circle and a square", "zebra"])
    assert ids.max() == tokenizer.vocabulary_size - 1
    assert ids.argmax(1).tolist() == [6, 2]


@pytest.mark.parametrize("tokenizer", [clip(length=5), t5(length=4)])
def test_truncation_keeps_the_end_token(tokenizer):
    kept, cut = tokenizer(["a red circle", "a red circle and a blue square"])
    assert torch.equal(cut, kept)
    assert cut.tolist() in (CLIP_A_RED_CIRCLE, T5_A_RED_CIRCLE)


@pytest.mark.parametrize("tokenizer", [clip(length=5), t5(length=4)])
def test_excess_counts_the_words_that_were_cut(tokenizer):
    assert tokenizer.excess("") == 0
    assert tokenizer.excess("a red circle") == 0
    assert tokenizer.excess("a red circle and") == 1
    assert tokenizer.excess("a red circle and a blue square") == 4
    assert tokenizer.excess("a " * 30) == 27


@pytest.mark.parametrize("tokenizer", [clip(), t5()])
def test_case_width_and_space_do_not_matter(tokenizer):
    plain, *others = tokenizer(
        [
            "a red circle",
            "A Red CIRCLE",
            "  a\tred \n circle ",
            "a\N{NO-BREAK SPACE}\N{FULLWIDTH LATIN SMALL LETTER R}ed circle",
        ]
    )
    assert all(torch.equal(other, plain) for other in others)


def test_punctuation_stands_alone():
    assert clip()(["red,circle!"]).tolist() == [[8, 3, 1, 5, 1, 9, 9]]
    assert t5()(["red,circle!"]).tolist() == [[4, 2, 6, 2, 1, 0, 0]]


def test_unknown_words_become_the_unknown_id_and_are_told():
    assert clip()(["a zebra circle"]).tolist() == [[8, 2, 1, 5, 9, 9, 9]]
    assert t5()(["a zebra circle"]).tolist() == [[3, 2, 6, 1, 0, 0, 0]]
    assert clip().unknown_words("A Zebra, a red zebra and a Lion") == ["zebra", ",", "lion"]
    assert clip().unknown_words("a red circle") == []


@pytest.mark.parametrize("token", ["[END]", "[START]", "[PAD]"])
@pytest.mark.parametrize("tokenizer", [clip(length=9), t5(length=9)])
def test_a_prompt_cannot_write_special_tokens(tokenizer, token):
    # Three unknown words: a bracket, a name, a bracket.
    assert torch.equal(*tokenizer([f"red {token} circle", "red x y z circle"]))


def test_a_prompt_does_not_depend_on_its_batch():
    prompts = ["a red circle and a blue square", "a", "zebra"]
    together = t5()(prompts)
    assert all(
        torch.equal(t5()([text])[0], row) for text, row in zip(prompts, together, strict=True)
    )


def test_a_length_without_room_for_a_word_is_refused():
    with pytest.raises(ValueError, match="length 2 must be from 3 to 4096"):
        clip(length=2)
