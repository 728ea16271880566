"""Stable Diffusion 3 from scratch, in pure PyTorch.

import mmdit
pipe = mmdit.load_pipeline("runs/shapes-001")
images = pipe("a red circle above a blue square", num_images=4, seed=0)
"""

from pathlib import Path

from mmdit.checkpoints.native import load_module
from mmdit.checkpoints.runs import weights_file
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load_autoencoder", "load_mmdit", "load_pipeline"]


def load_pipeline(source: str | Path, *, weights: str = "ema") -> Pipeline:
    """All of a text-to-image model, in eval mode on the CPU.

    Args:
        source: a run folder, one of its checkpoint folders, or one of their weight files.
        weights: 'ema' or 'raw', where `source` is a folder.

    Raises:
        UserError: nothing of the kind is there, it is damaged, or it is another kind of model.
    """
    path = weights_file(Path(source), weights)
    module = load_module(path)
    if not isinstance(module, Pipeline):
        raise UserError(f"{path} holds a {type(module).__name__}, not a text-to-image pipeline")
    return module


def load_mmdit(source: str | Path, *, weights: str = "ema") -> MMDiT:
    """The network of a text-to-image model; `source` as in `load_pipeline`."""
    return load_pipeline(source, weights=weights).mmdit


def load_autoencoder(source: str | Path, *, weights: str = "ema") -> Autoencoder:
    """The autoencoder of a text-to-image model, or of a run that trained one alone."""
    path = weights_file(Path(source), weights)
    module = load_module(path)
    if isinstance(module, Pipeline):
        module = module.autoencoder
    if not isinstance(module, Autoencoder):
        raise UserError(f"{path} holds a {type(module).__name__}, not an autoencoder")
    return module
