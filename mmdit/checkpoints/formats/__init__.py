"""The public formats: what their keys are called, and how an architecture is read from a file.

Two families. "original" is the layout of the published single files, where each model has its
prefix (`model.diffusion_model.`, `first_stage_model.`, ...) or stands bare in a file of its own.
"diffusers" is the layout of folders with one subfolder per model.
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
