"""Open weights: runs of this project and public models, as a whole pipeline or one model at a time.

>>> source = open_source("runs/shapes-001")
>>> pipe, digest = source.pipeline(), source.sha256
>>> vae = open_source("sd3.5_medium.safetensors").part("autoencoder", Autoencoder)
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mmdit.adapters.adapter import Adapter
from mmdit.checkpoints.archive import split_part
from mmdit.checkpoints.folders import SUBFOLDERS, TOKENIZERS
from mmdit.checkpoints.hashes import content_of
from mmdit.checkpoints.locate import SUFFIXES, Place
from mmdit.checkpoints.public import find, own_description
from mmdit.checks import expanded, flag, number, whole_number
from mmdit.devices import available
from mmdit.dtypes import expect_computable
from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.backbone import Backbone
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.controlnet import ControlNet
from mmdit.models.t5 import T5Encoder
from mmdit.nn.stored import CodedWeight
from mmdit.pipeline import Pipeline
from mmdit.published import load_published, models_of, with_tokenizers, without
from mmdit.runs.checkpoint import describes_module, is_run_folder, read_weights
from mmdit.text.conditioning import ENCODERS

M = TypeVar("M", bound=nn.Module)
PIPELINE = ("mmdit", "autoencoder", *ENCODERS)


class Source(ABC):
    """Weights that have been located; made by `open_source`.

    Their files are read and verified once, however many models are loaded from them: `pipeline`
    loads the whole text-to-image model, `part` one of its models, and `sha256` identifies the
    weights in reports.

    Attributes:
        name: the source as reports name it.
        path: the file or folder that holds the weights.
    """

    name: str
    path: Path

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash that identifies the weights in reports, in hexadecimal."""

    @abstractmethod
    def pipeline(
        self,
        *,
        dtype: torch.dtype | None = None,
        left_out: Collection[str] = (),
        tokenizers: str | Path | None = None,
        **public: Any,
    ) -> Pipeline:
        """The text-to-image model, in eval mode on the CPU; arguments as in `load_pipeline`.

        Args:
            left_out: text encoders of `ENCODERS` that contribute zeros instead.

        Raises:
            UserError: the source holds something else, or an argument does not apply to it.
        """

    @abstractmethod
    def part(
        self, kind: str, expected: type[M], *, dtype: torch.dtype | None = None, **hints: Any
    ) -> M:
        """One model, in eval mode on the CPU.

        Args:
            kind: 'mmdit', 'autoencoder', 'clip_l', 'clip_g', 't5', 'controlnet' or 'clip_image'.
            expected: the class it must be an instance of.
            dtype: dtype of the weights; None keeps the file's.
            hints: for public weights, what their shapes do not determine, such as `num_heads`.

        Raises:
            UserError: the source has no such model, or holds another kind.
        """

    @abstractmethod
    def only_clip(self) -> str:
        """Which CLIP text tower the source holds: 'clip_l' or 'clip_g'.

        Raises:
            UserError: it holds both; or it is a run that holds neither.
        """


class Run(Source):
    """Weights trained by this project: a run, a checkpoint, or a file exported from one.

    Args:
        source: run folder, checkpoint folder or exported file.
        weights: 'ema' (averaged) or 'raw' (as trained).
    """

    def __init__(self, source: Path, weights: str) -> None:
        self.weights = read_weights(source, weights)
        self.path, self.name = self.weights.path, str(self.weights.path)
        self._given = source

    @property
    def sha256(self) -> str:
        """Hash of the tensors: the same for a checkpoint and for a file exported from it."""
        return self.weights.sha256

    def module(self, tokenizers: str | Path | None = None) -> nn.Module:
        """The trained module: a pipeline, an autoencoder or something else.

        Args:
            tokenizers: folder of the tokenizers, for checkpoints of older versions, which stored
                only their paths; None looks beside the weights.
        """
        asked, beside = tokenizers is not None, self._given
        folder = expanded(tokenizers or (beside if beside.is_dir() else beside.parent))
        return self.weights.module(
            lambda described: with_tokenizers(described, folder, asked=asked)
        )

    def pipeline(
        self,
        *,
        dtype: torch.dtype | None = None,
        left_out: Collection[str] = (),
        tokenizers: str | Path | None = None,
        **public: Any,
    ) -> Pipeline:
        self._refuse(public)
        module = self.module(tokenizers)
        if isinstance(module, Adapter):
            return self._adapted(module, dtype=dtype, left_out=left_out)
        if not isinstance(module, Pipeline):
            raise self._wrong_kind(module, "a text-to-image pipeline")
        without(module, list(left_out))
        return module.to(dtype=dtype)

    def part(
        self, kind: str, expected: type[M], *, dtype: torch.dtype | None = None, **hints: Any
    ) -> M:
        self._refuse(hints)
        module = self.module()
        if isinstance(module, Adapter):
            module = self._adapted(module, dtype=None, left_out=())
        if isinstance(module, Pipeline):
            found = models_of(module).get(kind)
            if found is None:
                raise UserError(f"{self._given} was trained without {kind}")
            module = found
        if not isinstance(module, expected):
            name = expected.__name__
            raise self._wrong_kind(module, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
        return module.to(dtype=dtype)

    def _adapted(
        self, adapter: Adapter, *, dtype: torch.dtype | None, left_out: Collection[str]
    ) -> Pipeline:
        """The model that an adapter was trained on, with the adapter attached."""
        base = adapter.base
        if not base:
            raise UserError(
                f"{self.name} is an adapter of an unknown model: attach it with lora={self._given}"
            )
        try:
            source = open_source(base["source"])
        except UserError as error:
            raise UserError(f"{self.name} is an adapter of {base['source']}: {error}") from error
        if source.sha256 != base["sha256"]:
            raise UserError(
                f"{self.name} is an adapter of {base['source']}, whose weights have changed since: "
                f"their SHA-256 was {base['sha256'][:16]}... and is {source.sha256[:16]}..."
            )
        pipeline = source.pipeline(dtype=dtype, left_out=left_out)
        pipeline.load_lora(adapter)
        # As it was trained; adapters of older versions do not say.
        for name in ("image_size", "steps"):
            setattr(pipeline, name, whole_number(name, base.get(name, getattr(pipeline, name))))
        pipeline.guidance = number("guidance", base.get("guidance", pipeline.guidance))
        return pipeline.eval()

    def only_clip(self) -> str:
        module = self.module()
        found = [kind for kind in models_of(module) if kind in ("clip_l", "clip_g")]
        if len(found) > 1:
            raise _two_towers(str(self._given))
        if not found:
            raise UserError(f"{self._given} was trained without clip_l and clip_g")
        return found[0]

    def _wrong_kind(self, module: nn.Module, asked: str) -> UserError:
        return UserError(f"{self.name} holds a {type(module).__name__}, not {asked}")

    def _refuse(self, given: dict[str, Any]) -> None:
        """Reject arguments that apply only to public weights."""
        for name, value in given.items():
            if value:
                raise _only_for_public(self._given, name)


class Public(Source):
    """Public weights: a file, a folder, a model on the hub, or a preset.

    Args:
        source: as in `Place`.
        kinds: the models that will be loaded; from a repository on the hub, only these are
            downloaded.
        allow_pickle, verify, keep_quantized: as in `load_mmdit`.
    """

    def __init__(
        self,
        source: str | Path,
        kinds: Sequence[str],
        *,
        allow_pickle: bool,
        verify: bool,
        keep_quantized: bool = False,
    ) -> None:
        folders = [
            names[kind] for names in (SUBFOLDERS, TOKENIZERS) for kind in kinds if kind in names
        ]
        folders.append("scheduler")
        self.place = Place(
            source,
            folders,
            allow_pickle=allow_pickle,
            verify=verify,
            keep_quantized=keep_quantized,
        )
        self.path, self.name = self.place.path, str(source)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file; for a folder, hash of the names and hashes of its files."""
        path = split_part(self.path)[0]
        if path.is_file():
            return content_of(path)
        files = sorted(file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}"))
        lines = [f"{content_of(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def pipeline(
        self,
        *,
        dtype: torch.dtype | None = None,
        left_out: Collection[str] = (),
        tokenizers: str | Path | None = None,
        **public: Any,
    ) -> Pipeline:
        used = {kind: kind not in left_out for kind in ENCODERS}
        pipeline = load_published(
            self.place, self.name, used=used, dtype=dtype, tokenizers=tokenizers, **public
        )
        self._expect_kept(pipeline)
        return pipeline

    def part(
        self, kind: str, expected: type[M], *, dtype: torch.dtype | None = None, **hints: Any
    ) -> M:
        given = {name: hint for name, hint in hints.items() if hint is not None}
        module = self.place.load(kind, dtype=dtype, **given)
        assert isinstance(module, expected), type(module)
        self._expect_kept(module)
        return module

    def _expect_kept(self, module: nn.Module) -> None:
        """Raise UserError if weights were to be kept in codes, and there are none."""
        kept = any(isinstance(weight, CodedWeight) for weight in module.parameters())
        if self.place.keep_quantized and not kept:
            raise UserError(
                f"{self.name}: keep_quantized is for GGUF and fp8 files, but no matrix of this "
                "model is stored in codes that layers can keep: leave it out"
            )

    def is_ours(self) -> bool:
        """Whether this is a file exported from a run of this project."""
        file = self.path.suffix == ".safetensors" and self.path.is_file()
        return file and describes_module(self.place.opened(self.path))

    def only_clip(self) -> str:
        path = self.path
        both = all((path / SUBFOLDERS[kind]).is_dir() for kind in ("clip_l", "clip_g"))
        if split_part(path)[0].suffix in SUFFIXES:
            archive = self.place.weights_of("clip_l")[0]
            matches = {kind: find(archive, kind) for kind in ("clip_l", "clip_g")}
            prefixed = [kind for kind, match in matches.items() if match and match.prefix]
            if len(prefixed) == 1:
                return prefixed[0]
            both = len(prefixed) == 2
            # A tower in a file of its own is recognized by its width, or by our header.
            bare = [kind for kind, match in matches.items() if match and not match.prefix]
            own = [kind for kind in bare if own_description(archive, kind)]
            if not prefixed and len(one := own or bare) == 1:
                return one[0]
        if both:
            raise _two_towers(self.name)
        return "clip_g" if (path / SUBFOLDERS["clip_g"]).is_dir() else "clip_l"


def _only_for_public(source: str | Path, argument: str) -> UserError:
    return UserError(
        f"{source} is a model of this project: {argument} applies only to public weights, leave it "
        "out"
    )


def _two_towers(name: str) -> UserError:
    return UserError(f"{name} holds two CLIP towers: give which='clip_l' or which='clip_g'")


def open_source(
    source: str | Path,
    kinds: Sequence[str] = PIPELINE,
    *,
    weights: str = "ema",
    allow_pickle: bool = False,
    verify: bool = True,
    keep_quantized: bool = False,
) -> Source:
    """Locate weights, whether this project trained them or they are public.

    Use it instead of `load_pipeline` and the other `load_*` functions when several things are
    needed from one source: its files are read and verified once. The `Source` that is returned
    gives

    - `pipeline(...)`: the whole text-to-image model,
    - `part(kind, expected)`: one model, checked to be an instance of the expected class,
    - `only_clip()`: which CLIP text tower it holds,
    - `sha256`, `name`, `path`: how reports identify the weights.

    It is a `Run` for a run, a checkpoint or a file exported from one, and `Public` otherwise.

    Example:
        source = open_source("runs/shapes-001")
        pipe = source.pipeline()
        print(source.name, source.sha256)

        vae = open_source("sd3.5_medium.safetensors", ["autoencoder"]).part(
            "autoencoder", Autoencoder, dtype=torch.float32
        )

    Args:
        source: as in `load_pipeline`.
        kinds: the models that will be loaded; from a repository on the hub, only these are
            downloaded.
        weights: 'ema' or 'raw', for a run.
        allow_pickle, verify, keep_quantized: for public weights, as in `load_mmdit`. A run is
            always verified.

    Raises:
        UserError: the source does not exist, is damaged, or an argument does not apply to it.
    """
    path = expanded(source)
    public = None
    rules = {"allow_pickle": allow_pickle, "keep_quantized": keep_quantized}
    if not is_run_folder(path):
        _expect_one_run(path)
        public = Public(source, kinds, verify=verify, **rules)
    if public is None or public.is_ours():
        for name in [name for name, given in rules.items() if given]:
            raise _only_for_public(source, name)
        return Run(path, weights)
    if weights != "ema":
        raise UserError(f"{source} is not a run of this project: it has no weights={weights}")
    return public


def _expect_one_run(path: Path) -> None:
    """Reject a folder of runs, and a folder of checkpoints."""
    if path.is_dir() and not any(any(path.glob(f"*{suffix}")) for suffix in SUFFIXES):
        runs = sorted(child for child in path.iterdir() if is_run_folder(child))
        if runs:
            raise UserError(f"{path} holds several runs or checkpoints: name one, as {runs[-1]}")


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
    keep_quantized: bool = False,
) -> Pipeline:
    """Load a complete text-to-image model, in eval mode, ready to sample from.

    Example:
        pipe = load_pipeline("stabilityai/stable-diffusion-3.5-medium", dtype=torch.bfloat16,
                             device="cuda")
        images = pipe("a photo of a cat", num_images=4)  # uint8 (4, 1024, 1024, 3)

    Args:
        source: a run folder of this project, one of its checkpoint folders, or a file exported
            from one; a single file or a folder of public weights; a hub id; or the name of a
            preset, like 'sd3.5-medium'. For a file that holds several copies of a model under
            different prefixes, or a pickle of several state dicts, 'file.pt:ema' selects the
            prefix or name.
        weights: 'ema' or 'raw', if `source` is a run.
        dtype: dtype of the weights; None keeps the file's.
        device: target device, such as 'cuda' or 'auto'; None is the CPU.
        use_clip_l, use_clip_g, use_t5: load this text encoder; one that is left out contributes
            zeros, and its memory is saved.
        preset: sampling defaults for public weights; None infers them from the architecture and
            the source's name.
        t5_length: number of tokens T5 reads, for public weights; None takes the preset's.
        autoencoder, encoders: location of the autoencoder and of the text encoders, for public
            weights whose `source` does not include them.
        tokenizers: folder with `tokenizer/`, `tokenizer_2/` and `tokenizer_3/`, if `source` does
            not include them; also for runs of older versions, which stored only their paths.
        allow_pickle, verify, keep_quantized: for public weights, as in `load_mmdit`. A run is
            always verified.

    Raises:
        UserError: the source does not exist, is damaged or holds another kind of model; an
            argument does not apply to it; the device is not available.
    """
    place = None if device is None else available(device)  # before gigabytes are read
    expect_computable(dtype)
    used = dict(zip(ENCODERS, (use_clip_l, use_clip_g, use_t5), strict=True))
    for kind, use in used.items():
        flag(f"use_{kind}", use)
    left_out = [kind for kind, use in used.items() if not use]
    kinds = [kind for kind in PIPELINE if kind not in left_out]
    rules: dict[str, Any] = {"allow_pickle": allow_pickle, "keep_quantized": keep_quantized}
    opened = open_source(source, kinds, weights=weights, verify=verify, **rules)
    pipeline = opened.pipeline(
        dtype=dtype,
        left_out=left_out,
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
    expect_computable(dtype)  # before any file is searched for
    return open_source(source, [kind], **rules).part(kind, expected, dtype=dtype, **hints)


def load_mmdit(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    keep_quantized: bool = False,
) -> Backbone:
    """Load the diffusion transformer alone, in eval mode on the CPU.

    The architecture is inferred from the file. The result is an `MMDiT`, unless `source` is a run
    of this project that trained another backbone.

    Example:
        mmdit = load_mmdit("sd3.5_medium.safetensors", dtype=torch.bfloat16)
        velocity = mmdit(z_t, t, c_vec, c_ctxt)  # (b, 16, h, w), as z_t

    Args:
        source, weights, dtype: as in `load_pipeline`.
        num_heads: number of attention heads, if neither the file nor a config.json states it.
        allow_pickle: read .ckpt and .pt files, tensors only.
        verify: compare files with their known hashes, and check even large ones for NaN. False
            opens 10 GB about ten seconds sooner, but damage goes unnoticed.
        keep_quantized: linear layers keep the codes of a GGUF or fp8 file in memory, and decode
            them whenever they compute. The result is the same; it takes less memory, and longer.

    Raises:
        UserError: the source does not exist, is damaged or holds no such model; an argument does
            not apply to it.
    """
    rules = {"weights": weights, "allow_pickle": allow_pickle, "verify": verify}
    rules["keep_quantized"] = keep_quantized
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
    """Load the autoencoder alone, from a text-to-image model or from a run that trained one.

    `encode` maps images (b, 3, H, W) in [-1, 1] to normalized latents (b, c, h, w), and `decode`
    maps them back.

    Args:
        source, weights, dtype: as in `load_pipeline`.
        allow_pickle, verify: as in `load_mmdit`.

    Raises:
        UserError: as in `load_mmdit`.
    """
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
    """Load a CLIP text tower: `clip(ids) -> (penultimate hidden (b, 77, d), pooled (b, p))`.

    Args:
        source: file or folder of the tower, or of a complete model.
        which: 'clip_l' or 'clip_g', if the source holds both.
        weights, dtype, allow_pickle, verify: as in `load_mmdit`.

    Raises:
        UserError: the source holds both and `which` is not given; or as in `load_mmdit`.
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
    """Load a CLIP image tower, as in openai/clip-vit-large-patch14: `(b, 3, 224, 224) -> (b, p)`.

    Args:
        source, dtype, allow_pickle, verify: as in `load_mmdit`.

    Raises:
        UserError: as in `load_mmdit`.
    """
    rules = {"allow_pickle": allow_pickle, "verify": verify}
    return _part(source, "clip_image", CLIPImageModel, dtype, rules)


def load_t5(
    source: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    keep_quantized: bool = False,
) -> T5Encoder:
    """Load the T5 encoder: `t5(ids) -> hidden (b, l, d)`.

    Args:
        source, weights, dtype, allow_pickle, verify, keep_quantized: as in `load_mmdit`.

    Raises:
        UserError: as in `load_mmdit`.
    """
    rules: dict[str, Any] = {"allow_pickle": allow_pickle, "keep_quantized": keep_quantized}
    opened = open_source(source, ["t5"], weights=weights, verify=verify, **rules)
    return opened.part("t5", T5Encoder, dtype=dtype)


def load_controlnet(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    control_type: str | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
) -> ControlNet:
    """Load a ControlNet for SD3.5 Large.

    `mmdit.models.controlnet.ControlledMMDiT` joins it to a base model.

    Args:
        source, dtype, allow_pickle, verify: as in `load_mmdit`.
        control_type: 'blur', 'canny' or 'depth'; None takes the one stated in the file.

    Raises:
        UserError: as in `load_mmdit`.
    """
    rules = {"allow_pickle": allow_pickle, "verify": verify}
    return _part(source, "controlnet", ControlNet, dtype, rules, control_type=control_type)
