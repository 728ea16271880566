"""The public formats: their keys, and how an architecture is read from a file.

There are two layouts. "original" is the layout of the published single files, where each model has
a prefix (`model.diffusion_model.`, `first_stage_model.`, ...), or none in a file of its own.
"diffusers" is the layout of folders with one subfolder per model. GGUF files have the keys of
"original" without a prefix, except those of T5: its layout "gguf" has the names of llama.cpp.
"""

from mmdit.checkpoints.formats import autoencoder, controlnet, text, transformer
from mmdit.checkpoints.formats.format import (
    ADAPTERS,
    WRAPPERS,
    Argument,
    Description,
    Format,
    Infos,
)

FORMATS: list[Format] = [
    *transformer.FORMATS,
    *autoencoder.FORMATS,
    *text.FORMATS,
    *controlnet.FORMATS,
]
__all__ = ["ADAPTERS", "FORMATS", "WRAPPERS", "Argument", "Description", "Format", "Infos"]
