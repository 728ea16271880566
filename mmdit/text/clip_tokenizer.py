"""CLIP's byte-level BPE, as CLIP-L and CLIP-G read prompts (Radford et al. 2021)."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from mmdit.errors import UserError
from mmdit.registry import register
from mmdit.text.tokenizers import PromptTokenizer
from mmdit.text.vocabularies import VocabularyFile, expect_file, write_json

START, END, ZERO = "<|startoftext|>", "<|endoftext|>", "!"
# Contractions, runs of letters, single digits, runs of anything else except whitespace.
WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
ORIGIN = (
    "`tokenizer/` and `tokenizer_2/` of a diffusers folder of SD3, "
    "and in openai/clip-vit-large-patch14 on the hub"
)

Merges = list[tuple[str, str]]


@register
class CLIPTokenizer(PromptTokenizer):
    """The tokenizer of the public CLIP-L and CLIP-G.

    A prompt is tokenized as one string. The reference first splits it at spaces, interprets
    (word:1.3) as a weight, drops such brackets, and truncates a long prompt between words instead
    of tokens; otherwise the ids are the same. As in the reference, CLIP-G tokenizes an exclamation
    mark literally; diffusers treats it as padding there, so that its id becomes 0. The text
    <|endoftext|> in a prompt is the end token in all three.

    Args:
        vocabulary: vocab.json, or a tokenizer.json, which holds the merges as well.
        merges: merges.txt; None with a tokenizer.json.
        length: number of ids per prompt, special tokens and padding included.
        pad_with_end: pad with the end token (CLIP-L) or with id 0 (CLIP-G).

    Raises:
        UserError: a file is damaged, or belongs to another tokenizer.
    """

    def __init__(
        self,
        *,
        vocabulary: VocabularyFile,
        merges: VocabularyFile | None,
        length: int = 77,
        pad_with_end: bool,
    ) -> None:
        expect_file(vocabulary)
        if merges is None:
            self._vocabulary, self._merges = _read_tokenizer_json(vocabulary)
        else:
            expect_file(merges)
            self._vocabulary = vocabulary.json(ORIGIN)
            self._merges = _read_merges(merges)
        _check_vocabulary(self._vocabulary, vocabulary)
        # Tokens: each byte, within and at the end of a word; one for each merge; start and end.
        needed = len(self._vocabulary) - 2 * 256 - 2
        if len(self._merges) != needed:
            fault = (
                f"it holds {len(self._merges)} merges, but the {len(self._vocabulary)} tokens of "
                f"{vocabulary.place} need {needed}"
            )
            raise (merges or vocabulary).unfit(fault, ORIGIN)
        try:
            model = models.BPE(self._vocabulary, self._merges, end_of_word_suffix="</w>")
        except Exception as error:  # the library raises nothing narrower
            raise (merges or vocabulary).unfit(str(error), ORIGIN) from error

        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.add_special_tokens([START, END])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}",
            special_tokens=[(token, self._vocabulary[token]) for token in (START, END)],
        )
        self._pad = END if pad_with_end else ZERO
        super().__init__(tokenizer, pad=self._pad, length=length)

    def unknown_words(self, text: str) -> list[str]:
        return []  # every byte has a token

    def save(self, folder: Path) -> None:
        """Write a `tokenizer/` folder that transformers opens as CLIPTokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self._pad}
        write_json(folder / "vocab.json", self._vocabulary)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self._merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(folder / "special_tokens_map.json", special)
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, **special},
        )


def clip_tokenizer_in(folder: str | Path, *, pad_with_end: bool, length: int = 77) -> CLIPTokenizer:
    """Read the tokenizer in a folder with vocab.json and merges.txt, or only a tokenizer.json.

    Raises:
        UserError: files are missing or damaged.
    """
    vocabulary, merges, both = (
        Path(folder) / name for name in ("vocab.json", "merges.txt", "tokenizer.json")
    )
    missing = [file.name for file in (vocabulary, merges) if not file.is_file()]
    if not missing:
        return CLIPTokenizer(
            vocabulary=VocabularyFile.read(vocabulary, ORIGIN),
            merges=VocabularyFile.read(merges, ORIGIN),
            length=length,
            pad_with_end=pad_with_end,
        )
    if both.is_file():
        return CLIPTokenizer(
            vocabulary=VocabularyFile.read(both, ORIGIN),
            merges=None,
            length=length,
            pad_with_end=pad_with_end,
        )
    raise UserError(
        f"{folder} contains no CLIP tokenizer: {' and '.join(missing)} missing, and there is no "
        f"tokenizer.json to replace them. Such files are in {ORIGIN}"
    )


def _read_merges(file: VocabularyFile) -> Merges:
    lines = [line for line in file.text(ORIGIN).split("\n") if line.strip()]
    return _pairs([line for line in lines if not line.startswith("#version")], file)


def _read_tokenizer_json(file: VocabularyFile) -> tuple[dict[str, int], Merges]:
    model = file.json(ORIGIN).get("model")
    match model:
        case {"vocab": dict(vocabulary), "merges": list(merges)}:
            return vocabulary, _pairs(merges, file)
    raise file.unfit("it is not a CLIP tokenizer.json: it has no BPE merges", ORIGIN)


def _pairs(merges: Sequence[str | Sequence[str]], file: VocabularyFile) -> Merges:
    pairs: Merges = []
    for merge in merges:
        match merge.split() if isinstance(merge, str) else merge:
            case [str(left), str(right)]:
                pairs.append((left, right))
            case _:
                raise file.unfit(f"the merge {merge!r} is not a pair of symbols", ORIGIN)
    return pairs


def _check_vocabulary(ids: dict[str, int], file: VocabularyFile) -> None:
    absent = [token for token in (START, END, ZERO) if token not in ids]
    if absent:
        raise file.unfit(f"it is not a CLIP vocabulary: it lacks {', '.join(absent)}", ORIGIN)
    symbols = pre_tokenizers.ByteLevel.alphabet()
    if any(symbol not in ids or f"{symbol}</w>" not in ids for symbol in symbols):
        raise file.unfit("it is not a CLIP vocabulary: it lacks some bytes", ORIGIN)
    last = len(ids) - 1
    numbers = [number for number in ids.values() if isinstance(number, int)]
    if sorted(numbers) != list(range(len(ids))) or ids[ZERO] != 0 or ids[END] != last:
        raise file.unfit(f"its ids must run from 0 ({ZERO}) to {last} ({END}), each once", ORIGIN)
