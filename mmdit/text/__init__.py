"""From prompts to `c_vec` and `c_ctxt`: tokenizers, encoders, conditioning."""

from mmdit.text.clip_pair import CLIPPair, PlacedImageModel
from mmdit.text.conditioning import AbsentEncoder, TextConditioner, TextEncoder
from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer

__all__ = [
    "AbsentEncoder",
    "CLIPPair",
    "CLIPWordTokenizer",
    "PlacedImageModel",
    "T5WordTokenizer",
    "TextConditioner",
    "TextEncoder",
]
