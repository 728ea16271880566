"""Adapters: small trainable changes of linear layers, or new words, added to a model from outside.

>>> adapter = lora(pipe, rank=16, targets="attention")  # all changes are zero
>>> pipe.load_lora(adapter, scale=0.8)
"""

from mmdit.adapters.adapter import Adapter
from mmdit.adapters.layers import DoRA, LoKr, LoRA
from mmdit.adapters.reading import read_adapter
from mmdit.adapters.recipes import dora, lokr, lora, textual_inversion
from mmdit.adapters.words import NewWords
from mmdit.adapters.writing import DIALECTS, write_adapter

__all__ = [
    "DIALECTS",
    "Adapter",
    "DoRA",
    "LoKr",
    "LoRA",
    "NewWords",
    "dora",
    "lokr",
    "lora",
    "read_adapter",
    "textual_inversion",
    "write_adapter",
]
