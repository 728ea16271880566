"""Whatever can be opened: runs of this project, and public weights, whole or part by part."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmdit.checkpoints.archive import open_file, split_part
from mmdit.checkpoints.locate import load_model, local
from mmdit.checkpoints.public import find, own_description
from mmdit.devices import available
from mmdit.dtypes import expect_computable
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.backbone import Backbone
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.pipeline import Pipeline
from mmdit.published import (
    load_published,
    with_tokenizers,
    without,
)
from mmdit.runs import checkpoint as runs
from mmdit.runs.checkpoint import is_native
from mmdit.runs.native import Change
from mmdit.text.conditioning import TextEncoder


def load_pipeline(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    use_clip_l: bool = True,
    use_clip_g: bool = True,
    use_t5: bool = True,
    preset: str | None = None,
    t5_length: int | None = None,
    autoencoder: str | Path | None = None,
    encoders: str | Path | None = None,
    tokenizers: str | Path | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
) -> Pipeline:
    """All of a text-to-image model, in eval mode.

    Args:
        source: a run folder of this project, one of its checkpoint folders, or a file exported from
            one;
            a single file or a folder of public weights; a hub id; or the name of a preset, like
            'sd3.5-medium'. Of a file that holds a model several times, or of a pickle of several
            state dicts, 'file.pt:ema' is what stands under that prefix or name.
        weights: 'ema' or 'raw', where `source` is a run.
        dtype: of the weights; None keeps the file's.
        device: where it goes, as 'cuda' or 'auto'; None is the CPU.
        use_clip_l, use_clip_g, use_t5: an encoder that is left out contributes zeros.
        preset, t5_length, autoencoder, encoders, tokenizers, allow_pickle, verify: of public
            weights: see `mmdit.published.load_published`. A run's are always verified. `tokenizers`
            can be given for a run, too, where an older version noted no more than their paths.

    Raises:
        UserError: nothing of the kind is there, it is damaged, or it is another kind of model; an
            argument does not apply to it; there is no such device here.
    """
    place = None if device is None else available(device)  # before gigabytes are read
    expect_computable(dtype)
    used: dict[str, Any] = {"use_clip_l": use_clip_l, "use_clip_g": use_clip_g, "use_t5": use_t5}
    for name, use in used.items():
        if not isinstance(use, bool):
            raise UserError(f"{name}={use!r} must be True or False")
    public: dict[str, Any] = {"preset": preset, "t5_length": t5_length, "autoencoder": autoencoder}
    public |= {"encoders": encoders, "allow_pickle": allow_pickle}
    if is_native(source):
        _not_for_runs(source, **public)
        path = runs.find_weights(Path(source).expanduser(), weights)
        module = runs.load_model(path, _tokenizers_from(Path(source).expanduser(), tokenizers))
        if not isinstance(module, Pipeline):
            raise UserError(f"{path} holds a {type(module).__name__}, not a text-to-image pipeline")
        without(module, [name.removeprefix("use_") for name, use in used.items() if not use])
        module.to(dtype=dtype)
    else:
        _not_for_public(source, weights)
        module = load_published(
            source, dtype=dtype, tokenizers=tokenizers, verify=verify, **used, **public
        )
    return module.to(device=place)


def _tokenizers_from(source: Path, named: str | Path | None) -> Change:
    """What to do for a run that lacks its tokenizers: take them from beside it, or as named."""
    own = source if source.is_dir() else source.parent
    folder = own if named is None else Path(named).expanduser()
    return lambda description: with_tokenizers(description, folder, asked=named is not None)


def _not_for_runs(source: str | Path, **given: Any) -> None:
    for name, value in given.items():
        if value:
            raise UserError(f"{source} is a model of this project: {name} is for public ones")


def _not_for_public(source: str | Path, weights: str) -> None:
    if weights != "ema":
        raise UserError(f"{source} is no run of this project: it has no weights={weights}")


def load_mmdit(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
) -> Backbone:
    """The transformer alone; its architecture is read from the file.

    An `MMDiT`, unless it is a run of this project that trained another backbone.

    Args:
        source, weights, dtype: as in `load_pipeline`.
        num_heads: where neither the file nor a config.json tells it.
        allow_pickle: read .ckpt and .pt files, tensors only.
        verify: compare files with the hashes that are known of them, and look for NaN in large ones
            too. False opens 10 GB some ten seconds sooner, and damage unseen.
    """
    if is_native(source):
        _not_for_runs(source, num_heads=num_heads, allow_pickle=allow_pickle)
        return load_pipeline(source, weights=weights, dtype=dtype).mmdit
    _not_for_public(source, weights)
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
    verify: bool = True,
) -> Autoencoder:
    """The autoencoder alone, of a text-to-image model or of a run that trained one."""
    expect_computable(dtype)
    if is_native(source):
        _not_for_runs(source, allow_pickle=allow_pickle)
        path = runs.find_weights(Path(source).expanduser(), weights)
        module = runs.load_model(path, _tokenizers_from(Path(source).expanduser(), None))
        if isinstance(module, Pipeline):
            module = module.autoencoder
        if not isinstance(module, Autoencoder):
            raise UserError(f"{path} holds a {type(module).__name__}, not an autoencoder")
        return module.to(dtype=dtype)
    _not_for_public(source, weights)
    public = load_model(
        source, "autoencoder", dtype=dtype, allow_pickle=allow_pickle, verify=verify
    )
    assert isinstance(public, Autoencoder)
    return public


def load_clip(
    source: str | Path,
    which: str | None = None,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
) -> CLIPTextModel:
    """A CLIP text tower: `clip(ids) -> (penultimate hidden (b, 77, d), pooled (b, p))`.

    Args:
        source: its own file or folder, or that of a whole model.
        which: 'clip_l' or 'clip_g', where the source holds both.
        weights, dtype, allow_pickle, verify: as in `load_mmdit`.

    Raises:
        UserError: the source holds both and `which` is not given, or as in `load_pipeline`.
    """
    if which not in (None, "clip_l", "clip_g"):
        raise UserError(f"which={which} must be clip_l or clip_g")
    if is_native(source):
        _not_for_runs(source, allow_pickle=allow_pickle)
        kinds = ["clip_l", "clip_g"] if which is None else [which]
        towers = _encoders_of_run(source, kinds, weights=weights, dtype=dtype)
        if len(towers) > 1:
            raise UserError(f"{source} holds two CLIP towers: say which='clip_l' or which='clip_g'")
        assert isinstance(towers[0], CLIPTextModel)
        return towers[0]
    _not_for_public(source, weights)
    if which is None:
        which = _only_clip(source)
    module = load_model(source, which, dtype=dtype, allow_pickle=allow_pickle, verify=verify)
    assert isinstance(module, CLIPTextModel)
    return module


def _encoders_of_run(
    source: str | Path, kinds: Sequence[str], *, weights: str, dtype: torch.dtype | None
) -> list[CLIPTextModel | T5Encoder]:
    text = load_pipeline(source, weights=weights, dtype=dtype).text
    found = [getattr(text, kind) for kind in kinds]
    models = [encoder.model for encoder in found if isinstance(encoder, TextEncoder)]
    if not models:
        raise UserError(f"{source} was trained without {' and '.join(kinds)}")
    return models


def _only_clip(source: str | Path) -> str:
    path = local(source, ["text_encoder", "text_encoder_2"])
    both = path.is_dir() and (path / "text_encoder").is_dir() and (path / "text_encoder_2").is_dir()
    if split_part(path)[0].suffix == ".safetensors":
        archive = open_file(path)
        matches = {kind: find(archive, kind) for kind in ("clip_l", "clip_g")}
        prefixed = [kind for kind, match in matches.items() if match and match.prefix]
        if len(prefixed) == 1:
            return prefixed[0]
        both = len(prefixed) == 2
        # In a file of its own: by its width, or by what our header says.
        bare = [kind for kind, match in matches.items() if match and not match.prefix]
        own = [kind for kind in bare if own_description(archive, kind)]
        if not prefixed and len(one := own or bare) == 1:
            return one[0]
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
    verify: bool = True,
) -> CLIPImageModel:
    """CLIP's image tower, as in openai/clip-vit-large-patch14: `(b, 3, 224, 224) -> (b, p)`."""
    module = load_model(source, "clip_image", dtype=dtype, allow_pickle=allow_pickle, verify=verify)
    assert isinstance(module, CLIPImageModel)
    return module


def load_t5(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
) -> T5Encoder:
    """The T5 encoder: `t5(ids) -> hidden (b, l, d)`.

    Args:
        source, weights, dtype, allow_pickle, verify: as in `load_mmdit`.
    """
    if is_native(source):
        _not_for_runs(source, allow_pickle=allow_pickle)
        (t5,) = _encoders_of_run(source, ["t5"], weights=weights, dtype=dtype)
        assert isinstance(t5, T5Encoder)
        return t5
    _not_for_public(source, weights)
    module = load_model(source, "t5", dtype=dtype, allow_pickle=allow_pickle, verify=verify)
    assert isinstance(module, T5Encoder)
    return module


def load_controlnet(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    control_type: str | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
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
