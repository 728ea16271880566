"""Stable Diffusion 3 from scratch, in pure PyTorch.

import mmdit
pipe = mmdit.load_pipeline("runs/shapes-001")
images = pipe("a red circle above a blue square", num_images=4, seed=0)

pipe = mmdit.load_pipeline("stabilityai/stable-diffusion-3.5-medium", dtype=torch.bfloat16)
"""

from pathlib import Path
from typing import Any

import torch

from mmdit.checkpoints import runs
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.public import find
from mmdit.checkpoints.runs import is_native
from mmdit.checkpoints.sources import load_model, local
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.backbone import Backbone
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.models.preview import latent_preview
from mmdit.models.t5 import T5Encoder
from mmdit.pipeline import Pipeline
from mmdit.published import load_published, save_diffusers, save_single_file, without

__version__ = "0.1.0"
__all__ = [
    "Pipeline",
    "UserError",
    "__version__",
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
    "save_single_file",
]


def load_pipeline(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    use_clip_l: bool = True,
    use_clip_g: bool = True,
    use_t5: bool = True,
    **published: Any,
) -> Pipeline:
    """All of a text-to-image model, in eval mode.

    Args:
        source: a run folder of this project, one of its checkpoint folders, or a file exported from
            one;
            a single file or a folder of public weights; a hub id; or the name of a preset, like
            'sd3.5-medium'.
        weights: 'ema' or 'raw', where `source` is a run.
        dtype: of the weights; None keeps the file's.
        device: where it goes; None is the CPU.
        use_clip_l, use_clip_g, use_t5: an encoder that is left out contributes zeros.
        published: of public weights: see `mmdit.published.load_published`.

    Raises:
        UserError: nothing of the kind is there, it is damaged, or it is another kind of model.
    """
    used = {"clip_l": use_clip_l, "clip_g": use_clip_g, "t5": use_t5}
    if is_native(source):
        if given := [name for name, value in published.items() if value and name != "verify"]:
            raise UserError(f"{source} is a model of this project: {given[0]} is for public ones")
        path = runs.find_weights(Path(source).expanduser(), weights)
        module = runs.load_model(path)
        if not isinstance(module, Pipeline):
            raise UserError(f"{path} holds a {type(module).__name__}, not a text-to-image pipeline")
        without(module, [kind for kind, use in used.items() if not use])
        module.to(dtype=dtype)
    else:
        flags: dict[str, Any] = {f"use_{kind}": use for kind, use in used.items()}
        module = load_published(source, dtype=dtype, **flags, **published)
    return module.to(device=device)


def load_mmdit(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    allow_pickle: bool = False,
    verify: bool = False,
) -> Backbone:
    """The transformer alone; its architecture is read from the file.

    An `MMDiT`, unless it is a run of this project that trained another backbone.

    Args:
        source, weights, dtype: as in `load_pipeline`.
        num_heads: where neither the file nor a config.json tells it.
        allow_pickle: read .ckpt and .pt files, tensors only.
        verify: compare files with the hashes that are known of them, and look for NaN in large ones
            too (seconds for gigabytes).
    """
    if is_native(source):
        return load_pipeline(source, weights=weights, dtype=dtype).mmdit
    hints = {} if num_heads is None else {"num_heads": num_heads}
    module = load_model(
        source, "mmdit", dtype=dtype, allow_pickle=allow_pickle, verify=verify, **hints
    )
    assert isinstance(module, MMDiT)
    return module


def load_autoencoder(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = False,
) -> Autoencoder:
    """The autoencoder alone, of a text-to-image model or of a run that trained one."""
    if is_native(source):
        path = runs.find_weights(Path(source).expanduser(), weights)
        module = runs.load_model(path)
        if isinstance(module, Pipeline):
            module = module.autoencoder
        if not isinstance(module, Autoencoder):
            raise UserError(f"{path} holds a {type(module).__name__}, not an autoencoder")
        return module.to(dtype=dtype)
    public = load_model(
        source, "autoencoder", dtype=dtype, allow_pickle=allow_pickle, verify=verify
    )
    assert isinstance(public, Autoencoder)
    return public


def load_clip(
    source: str | Path,
    which: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = False,
) -> CLIPTextModel:
    """A CLIP text tower: `clip(ids) -> (penultimate hidden (b, 77, d), pooled (b, p))`.

    Args:
        source: its own file or folder, or that of a whole model.
        which: 'clip_l' or 'clip_g', where the source holds both.

    Raises:
        UserError: the source holds both and `which` is not given, or as in `load_pipeline`.
    """
    if which not in (None, "clip_l", "clip_g"):
        raise UserError(f"which={which} must be clip_l or clip_g")
    if which is None:
        which = _only_clip(source)
    module = load_model(source, which, dtype=dtype, allow_pickle=allow_pickle, verify=verify)
    assert isinstance(module, CLIPTextModel)
    return module


def _only_clip(source: str | Path) -> str:
    path = local(source, ["text_encoder", "text_encoder_2"])
    both = path.is_dir() and (path / "text_encoder").is_dir() and (path / "text_encoder_2").is_dir()
    if path.is_file() and path.suffix == ".safetensors":
        matches = {kind: find(open_file(path), kind) for kind in ("clip_l", "clip_g")}
        prefixed = [kind for kind, match in matches.items() if match and match.prefix]
        if len(prefixed) == 1:
            return prefixed[0]
        both = len(prefixed) == 2
    if both:
        raise UserError(f"{source} holds two CLIP towers: say which='clip_l' or which='clip_g'")
    if path.is_dir() and (path / "text_encoder_2").is_dir():
        return "clip_g"
    return "clip_l"


def load_clip_image(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = False,
) -> CLIPImageModel:
    """CLIP's image tower, as in openai/clip-vit-large-patch14: `(b, 3, 224, 224) -> (b, p)`."""
    module = load_model(source, "clip_image", dtype=dtype, allow_pickle=allow_pickle, verify=verify)
    assert isinstance(module, CLIPImageModel)
    return module


def load_t5(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = False,
) -> T5Encoder:
    """The T5 encoder: `t5(ids) -> hidden (b, l, d)`."""
    module = load_model(source, "t5", dtype=dtype, allow_pickle=allow_pickle, verify=verify)
    assert isinstance(module, T5Encoder)
    return module


def load_controlnet(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    control_type: str | None = None,
    allow_pickle: bool = False,
    verify: bool = False,
) -> ControlNet:
    """A ControlNet of SD3.5 Large; `mmdit.models.controlnet.ControlledMMDiT` joins it to a base.

    Args:
        control_type: 'blur', 'canny' or 'depth'; None takes what the file tells.
    """
    hints = {} if control_type is None else {"control_type": control_type}
    module = load_model(
        source, "controlnet", dtype=dtype, allow_pickle=allow_pickle, verify=verify, **hints
    )
    assert isinstance(module, ControlNet)
    return module
