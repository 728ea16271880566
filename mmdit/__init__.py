"""Stable Diffusion 3 from scratch, in pure PyTorch.

Example:
    import mmdit

    pipe = mmdit.load_pipeline("runs/shapes-001")
    images = pipe("a red circle above a blue square", num_images=4, seed=0)

    pipe = mmdit.load_pipeline("stabilityai/stable-diffusion-3.5-medium", dtype=torch.bfloat16)

Names are imported when they are first used, so that a command line can set up the process before
torch starts its threads (`mmdit/cli/__init__.py`).
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from mmdit.errors import UserError
    from mmdit.loading import (
        load_autoencoder,
        load_clip,
        load_clip_image,
        load_controlnet,
        load_mmdit,
        load_pipeline,
        load_t5,
    )
    from mmdit.models.preview import latent_preview
    from mmdit.pipeline import Pipeline
    from mmdit.published import frozen_text, save_diffusers, save_gguf, save_single_file
    from mmdit.request import Request
    from mmdit.runs.checkpoint import is_native

__all__ = [
    "Pipeline",
    "Request",
    "UserError",
    "__version__",
    "frozen_text",
    "is_native",
    "latent_preview",
    "load_autoencoder",
    "load_clip",
    "load_clip_image",
    "load_controlnet",
    "load_mmdit",
    "load_pipeline",
    "load_t5",
    "save_diffusers",
    "save_gguf",
    "save_single_file",
]

_HOME = {
    "Pipeline": "mmdit.pipeline",
    "Request": "mmdit.request",
    "UserError": "mmdit.errors",
    "frozen_text": "mmdit.published",
    "is_native": "mmdit.runs.checkpoint",
    "latent_preview": "mmdit.models.preview",
    "save_diffusers": "mmdit.published",
    "save_gguf": "mmdit.published",
    "save_single_file": "mmdit.published",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return version("sd3-mmdit")
    return getattr(import_module(_HOME.get(name, "mmdit.loading")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
