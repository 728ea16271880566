"""Whatever can be opened: runs of this project, and public weights, whole or part by part.

>>> source = open_source("runs/shapes-001")
>>> pipe, digest = source.pipeline(), source.sha256
>>> vae = open_source("sd3.5_medium.safetensors").part("autoencoder")
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mmdit.checkpoints.archive import split_part
from mmdit.checkpoints.folders import SUBFOLDERS, TOKENIZERS
from mmdit.checkpoints.hashes import content_of
from mmdit.checkpoints.locate import Place
from mmdit.checkpoints.public import find, own_description
from mmdit.devices import available
from mmdit.dtypes import expect_computable
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.backbone import Backbone
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.controlnet import ControlNet
from mmdit.models.t5 import T5Encoder
from mmdit.pipeline import Pipeline
from mmdit.published import load_published, models_of, with_tokenizers, without
from mmdit.runs.checkpoint import describes_module, is_run_folder, read_weights
from mmdit.text.conditioning import ENCODERS

M = TypeVar("M", bound=nn.Module)
PIPELINE = ("mmdit", "autoencoder", *ENCODERS)


class Source(ABC):
    """Weights that were found: read once, verified once, whatever is made of them.

    Attributes:
        name: what reports call it.
        path: file or folder of the weights.
    """

    name: str
    path: Path

    @property
    @abstractmethod
    def sha256(self) -> str:
        """What reports identify the weights by, in hexadecimal."""

    @abstractmethod
    def pipeline(
        self,
        *,
        dtype: torch.dtype | None = None,
        use_clip_l: bool = True,
        use_clip_g: bool = True,
        use_t5: bool = True,
        tokenizers: str | Path | None = None,
        **public: Any,
    ) -> Pipeline:
        """A text-to-image model, in eval mode on the CPU; arguments as of `load_pipeline`."""

    @abstractmethod
    def part(
        self, kind: str, expected: type[M], *, dtype: torch.dtype | None = None, **hints: Any
    ) -> M:
        """One model, in eval mode on the CPU.

        Args:
            kind: 'mmdit', 'autoencoder', 'clip_l', 'clip_g', 't5', 'controlnet' or 'clip_image'.
            expected: its class.
            dtype: of its weights; None keeps the file's.
            hints: what the shapes of public weights do not tell, as `num_heads`.

        Raises:
            UserError: there is none, or it is another kind of model.
        """

    @abstractmethod
    def only_clip(self) -> str:
        """The one CLIP text tower that is there, 'clip_l' or 'clip_g'.

        Raises:
            UserError: both are.
        """


class Run(Source):
    """Weights that this project trained: a run, a checkpoint, or a file exported from one.

    Args:
        source: its folder or file.
        weights: 'ema' or 'raw'.
    """

    def __init__(self, source: Path, weights: str) -> None:
        self.weights = read_weights(source, weights)
        self.path, self.name = self.weights.path, str(self.weights.path)
        self._given = source

    @property
    def sha256(self) -> str:
        """Hash of the tensors: the same for a checkpoint and what was exported from it."""
        return self.weights.sha256

    def module(self, tokenizers: str | Path | None = None) -> nn.Module:
        """What was trained: a pipeline, an autoencoder or another module.

        Args:
            tokenizers: their folder, where an older version noted no more than their paths; None
                looks beside the weights.
        """
        asked, beside = tokenizers is not None, self._given
        folder = Path(tokenizers or (beside if beside.is_dir() else beside.parent)).expanduser()
        return self.weights.module(
            lambda described: with_tokenizers(described, folder, asked=asked)
        )

    def pipeline(
        self,
        *,
        dtype: torch.dtype | None = None,
        use_clip_l: bool = True,
        use_clip_g: bool = True,
        use_t5: bool = True,
        tokenizers: str | Path | None = None,
        **public: Any,
    ) -> Pipeline:
        self._refuse(public)
        module = self.module(tokenizers)
        if not isinstance(module, Pipeline):
            raise self._another(module, "a text-to-image pipeline")
        used = zip(ENCODERS, (use_clip_l, use_clip_g, use_t5), strict=True)
        without(module, [kind for kind, use in used if not use])
        return module.to(dtype=dtype)

    def part(
        self, kind: str, expected: type[M], *, dtype: torch.dtype | None = None, **hints: Any
    ) -> M:
        self._refuse(hints)
        module = self.module()
        if isinstance(module, Pipeline):
            found = models_of(module).get(kind)
            if found is None:
                raise UserError(f"{self._given} was trained without {kind}")
            module = found
        if not isinstance(module, expected):
            name = expected.__name__
            raise self._another(module, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
        return module.to(dtype=dtype)

    def only_clip(self) -> str:
        module = self.module()
        found = [kind for kind in models_of(module) if kind in ("clip_l", "clip_g")]
        if len(found) > 1:
            raise _two_towers(str(self._given))
        if not found:
            raise UserError(f"{self._given} was trained without clip_l and clip_g")
        return found[0]

    def _another(self, module: nn.Module, asked: str) -> UserError:
        return UserError(f"{self.name} holds a {type(module).__name__}, not {asked}")

    def _refuse(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if value:
                raise _for_public_ones(self._given, name)


class Public(Source):
    """Weights of others: a file, a folder, a model on the hub, or a preset.

    Args:
        source: as in `Place`.
        kinds: the models that will be asked for; of a repository on the hub, no others are fetched.
        allow_pickle, verify: as in `load_mmdit`.
    """

    def __init__(
        self, source: str | Path, kinds: Sequence[str], *, allow_pickle: bool, verify: bool
    ) -> None:
        folders = [
            names[kind] for names in (SUBFOLDERS, TOKENIZERS) for kind in kinds if kind in names
        ]
        self.options = {"allow_pickle": allow_pickle, "verify": verify}
        self.place = Place(source, [*folders, "scheduler"], **self.options)
        self.path, self.name = self.place.path, str(source)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file; of a folder, of the names and hashes of its files."""
        path = split_part(self.path)[0]
        if path.is_file():
            return content_of(path)
        files = sorted(path.rglob("*.safetensors"))
        lines = [f"{content_of(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def pipeline(
        self,
        *,
        dtype: torch.dtype | None = None,
        use_clip_l: bool = True,
        use_clip_g: bool = True,
        use_t5: bool = True,
        tokenizers: str | Path | None = None,
        **public: Any,
    ) -> Pipeline:
        used = dict(zip(ENCODERS, (use_clip_l, use_clip_g, use_t5), strict=True))
        return load_published(
            self.place, self.name, used=used, dtype=dtype, tokenizers=tokenizers, **public
        )

    def part(
        self, kind: str, expected: type[M], *, dtype: torch.dtype | None = None, **hints: Any
    ) -> M:
        given = {name: hint for name, hint in hints.items() if hint is not None}
        module = self.place.load(kind, dtype=dtype, **given)
        assert isinstance(module, expected), type(module)
        return module

    def is_ours(self) -> bool:
        """Whether it is a file that was exported from a run."""
        file = self.path.suffix == ".safetensors" and self.path.is_file()
        return file and describes_module(self.place.opened(self.path))

    def only_clip(self) -> str:
        path = self.path
        both = all((path / SUBFOLDERS[kind]).is_dir() for kind in ("clip_l", "clip_g"))
        if split_part(path)[0].suffix == ".safetensors":
            archive = self.place.weights_of("clip_l")[0]
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
            raise _two_towers(self.name)
        return "clip_g" if (path / SUBFOLDERS["clip_g"]).is_dir() else "clip_l"


def _for_public_ones(source: str | Path, argument: str) -> UserError:
    return UserError(f"{source} is a model of this project: {argument} is for public ones")


def _two_towers(name: str) -> UserError:
    return UserError(f"{name} holds two CLIP towers: say which='clip_l' or which='clip_g'")


def open_source(
    source: str | Path,
    kinds: Sequence[str] = PIPELINE,
    *,
    weights: str = "ema",
    allow_pickle: bool = False,
    verify: bool = True,
) -> Source:
    """Find weights, whoever wrote them.

    Args:
        source: as in `load_pipeline`.
        kinds: the models that will be asked for; of a repository on the hub, no others are fetched.
        weights: 'ema' or 'raw', of a run.
        allow_pickle, verify: of public weights, as in `load_mmdit`. A run's are always verified.

    Raises:
        UserError: nothing is there, it is damaged, or an argument does not apply to it.
    """
    path = Path(source).expanduser()
    public = None
    if not is_run_folder(path):
        public = Public(source, kinds, allow_pickle=allow_pickle, verify=verify)
    if public is None or public.is_ours():
        if allow_pickle:
            raise _for_public_ones(source, "allow_pickle")
        return Run(path, weights)
    if weights != "ema":
        raise UserError(f"{source} is not a run of this project: it has no weights={weights}")
    return public


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
        preset: of public weights, how they are sampled; told from the architecture and the
            source's name when None.
        t5_length: of public weights, tokens that T5 reads; the preset's when None.
        autoencoder, encoders: of public weights, where these are, when not in `source`.
        tokenizers: folder of `tokenizer/`, `tokenizer_2/` and `tokenizer_3/`, when not in `source`;
            for a run, too, where an older version noted no more than their paths.
        allow_pickle, verify: of public weights, as in `load_mmdit`. A run's are always verified.

    Raises:
        UserError: nothing of the kind is there, it is damaged, or it is another kind of model; an
            argument does not apply to it; there is no such device here.
    """
    place = None if device is None else available(device)  # before gigabytes are read
    expect_computable(dtype)
    used = dict(zip(ENCODERS, (use_clip_l, use_clip_g, use_t5), strict=True))
    for kind, use in used.items():
        if not isinstance(use, bool):
            raise UserError(f"use_{kind}={use!r} must be True or False")
    kinds = ["mmdit", "autoencoder", *(kind for kind, use in used.items() if use)]
    opened = open_source(source, kinds, weights=weights, allow_pickle=allow_pickle, verify=verify)
    pipeline = opened.pipeline(
        dtype=dtype,
        **{f"use_{kind}": use for kind, use in used.items()},
        tokenizers=tokenizers,
        preset=preset,
        t5_length=t5_length,
        autoencoder=autoencoder,
        encoders=encoders,
    )
    return pipeline.to(device=place)


def _part(
    source: str | Path,
    kind: str,
    expected: type[M],
    dtype: torch.dtype | None,
    rules: dict[str, Any],
    **hints: Any,
) -> M:
    expect_computable(dtype)  # before anything is looked for
    return open_source(source, [kind], **rules).part(kind, expected, dtype=dtype, **hints)


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
    rules = {"weights": weights, "allow_pickle": allow_pickle, "verify": verify}
    backbone: type[Any] = Backbone  # abstract: a run may have trained any
    return _part(source, "mmdit", backbone, dtype, rules, num_heads=num_heads)


def load_autoencoder(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
) -> Autoencoder:
    """The autoencoder alone, of a text-to-image model or of a run that trained one."""
    rules = {"weights": weights, "allow_pickle": allow_pickle, "verify": verify}
    return _part(source, "autoencoder", Autoencoder, dtype, rules)


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
    expect_computable(dtype)
    kinds = ["clip_l", "clip_g"] if which is None else [which]
    opened = open_source(source, kinds, weights=weights, allow_pickle=allow_pickle, verify=verify)
    kind = opened.only_clip() if which is None else which
    return opened.part(kind, CLIPTextModel, dtype=dtype)


def load_clip_image(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
) -> CLIPImageModel:
    """CLIP's image tower, as in openai/clip-vit-large-patch14: `(b, 3, 224, 224) -> (b, p)`."""
    rules = {"allow_pickle": allow_pickle, "verify": verify}
    return _part(source, "clip_image", CLIPImageModel, dtype, rules)


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
    opened = open_source(source, ["t5"], weights=weights, allow_pickle=allow_pickle, verify=verify)
    return opened.part("t5", T5Encoder, dtype=dtype)


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
    rules = {"allow_pickle": allow_pickle, "verify": verify}
    return _part(source, "controlnet", ControlNet, dtype, rules, control_type=control_type)
