"""T5's unigram tokenizer (Kudo & Richardson 2018, Raffel et al. 2020)."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mmdit.errors import UserError
from mmdit.registry import register
from mmdit.text.tokenizers import PromptTokenizer
from mmdit.text.vocabularies import VocabularyFile, expect_file, write_json

PAD, END, UNKNOWN = SPECIAL = ["<pad>", "</s>", "<unk>"]  # ids 0, 1, 2
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]  # ids follow all others
ORIGIN = "`tokenizer_3/` of a diffusers folder of SD3, and in google/t5-v1_1-xxl on the hub"


class Unigrams(NamedTuple):
    """Contents of a sentencepiece model."""

    pieces: list[tuple[str, float]]  # with their scores; the index is the id
    character_map: bytes  # normalization of characters, in sentencepiece's compiled form


@register
class T5Tokenizer(PromptTokenizer):
    """The tokenizer of T5 v1.1.

    It reads sentencepiece's file but splits text with the `tokenizers` library, like the reference;
    the two differ for stacked accents and for the names of special tokens. A prompt is tokenized
    as one string and truncated to `length`; the reference interprets (word:1.3) as a weight, drops
    such brackets, and truncates after 226 characters instead.

    Args:
        model: spiece.model, or a tokenizer.json.
        length: number of ids per prompt, end token and padding included. The weights do not
            determine it: SD3 and the reference use 77, diffusers 256.

    Raises:
        UserError: the file is damaged, or belongs to another tokenizer.
    """

    def __init__(self, *, model: VocabularyFile, length: int) -> None:
        expect_file(model)
        in_json = model.name.endswith(".json")
        read = _read_tokenizer_json if in_json else _read_sentencepiece
        pieces, character_map = read(model)
        if [piece for piece, _ in pieces[:3]] != SPECIAL:
            raise model.unfit(f"its first three pieces are not {', '.join(SPECIAL)}", ORIGIN)
        try:
            tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
            tokenizer.normalizer = normalizers.Precompiled(character_map)
        except Exception as error:  # the library raises nothing narrower
            raise model.unfit(str(error), ORIGIN) from error
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            ]
        )
        tokenizer.add_special_tokens([*SPECIAL, *SENTINELS])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, 1)]
        )
        self._sentencepiece = None if in_json else model.data
        super().__init__(tokenizer, pad=PAD, length=length)

    def unknown_words(self, text: str) -> list[str]:
        words = dict.fromkeys(text.split())
        return [word for word in words if 2 in self._tokenizer.encode(word).ids]

    def save(self, folder: Path) -> None:
        """Write a `tokenizer_3/` folder that transformers opens as T5TokenizerFast.

        It has no spiece.model if this tokenizer was read from a tokenizer.json.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self._sentencepiece is not None:
            (folder / "spiece.model").write_bytes(self._sentencepiece)
        # Whoever reads the file chooses the length.
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.save(str(folder / "tokenizer.json"))
        special = {
            "eos_token": END,
            "unk_token": UNKNOWN,
            "pad_token": PAD,
            "additional_special_tokens": SENTINELS[::-1],
        }
        write_json(folder / "special_tokens_map.json", special)
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "T5Tokenizer", "model_max_length": self.length, **special},
        )


def t5_tokenizer_in(folder: str | Path, *, length: int) -> T5Tokenizer:
    """Read the tokenizer in a folder with spiece.model, or only a tokenizer.json.

    Raises:
        UserError: both files are missing, or the one that is present is damaged.
    """
    for path in (Path(folder) / name for name in ("spiece.model", "tokenizer.json")):
        if path.is_file():
            return T5Tokenizer(model=VocabularyFile.read(path, ORIGIN), length=length)
    raise UserError(
        f"{folder} contains no T5 tokenizer: spiece.model and tokenizer.json are both missing. "
        f"Such files are in {ORIGIN}"
    )


def _read_sentencepiece(file: VocabularyFile) -> Unigrams:
    data = file.bytes(ORIGIN)
    try:
        model = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise file.unfit("it is not a sentencepiece model", ORIGIN) from error
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    # The library does not expose the map: it is field 2 of the normalizer, field 3 of the model.
    normalizer = dict(_fields(data)).get(3, b"")
    character_map = dict(_fields(normalizer)).get(2)
    if not character_map:
        raise file.unfit("it ends before the character map", ORIGIN)
    return Unigrams(pieces, character_map)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the length-delimited fields of a Protocol Buffers message."""
    position = 0

    def varint() -> int:  # seven bits a byte, the lowest first; the last byte is below 128
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            varint()
            continue
        size = {1: 8, 2: 0, 5: 4}[kind] or varint()
        if kind == 2:
            yield number, message[position : position + size]
        position += size


def _read_tokenizer_json(file: VocabularyFile) -> Unigrams:
    content = file.json(ORIGIN)
    try:
        pieces = [(str(piece), float(score)) for piece, score in content["model"]["vocab"]]
        normalizer = content["normalizer"]
        steps = normalizer.get("normalizers", [normalizer])
        (precompiled,) = [step for step in steps if step["type"] == "Precompiled"]
        return Unigrams(pieces, base64.b64decode(precompiled["precompiled_charsmap"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise file.unfit("it is not a T5 tokenizer.json", ORIGIN) from error
