"""Public weights: loaded as pipelines with a preset's defaults, and saved in the same formats."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdit.adapters.adapter import adapted
from mmdit.checkpoints.archive import write_archive
from mmdit.checkpoints.atomic_save import replacing
from mmdit.checkpoints.folders import (
    SUBFOLDERS,
    TOKENIZERS,
    read_index,
    stored_shift,
    write_folder,
    write_model,
)
from mmdit.checkpoints.gguf_writing import ARCHITECTURES, WRITTEN, write_gguf
from mmdit.checkpoints.locate import Place, local
from mmdit.checkpoints.presets import PRESETS
from mmdit.checkpoints.public import descriptions, exported, format_of, kind_of, matrices_of
from mmdit.checkpoints.readers import REMARK, remark
from mmdit.checkpoints.scaled_fp8 import in_fp8
from mmdit.checks import expanded, one_of
from mmdit.errors import UserError
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import PublishedShift
from mmdit.flow.timesteps import LogitNormal
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.nn.network import Network
from mmdit.pipeline import Pipeline
from mmdit.printable import logger
from mmdit.registry import describe
from mmdit.text.clip_tokenizer import CLIPTokenizer, clip_tokenizer_in
from mmdit.text.conditioning import ENCODERS, AbsentEncoder, TextConditioner, TextEncoder
from mmdit.text.t5_tokenizer import T5Tokenizer, t5_tokenizer_in

log = logger("mmdit")

FP8 = ("scaled_fp8", "fp8")


def load_published(
    place: Place,
    source: str,
    *,
    used: Mapping[str, bool],
    preset: str | None = None,
    dtype: torch.dtype | None = None,
    t5_length: int | None = None,
    autoencoder: str | Path | None = None,
    encoders: str | Path | None = None,
    tokenizers: str | Path | None = None,
) -> Pipeline:
    """Load a pipeline from public weights, in eval mode on the CPU.

    Args:
        place: location of the network, and of all parts whose location is not given separately.
        source: the source as the user named it.
        used: for each kind of text encoder, whether to load it; otherwise it contributes zeros.
        preset: name in `PRESETS`; None infers it from the architecture and the source's name.
        dtype: dtype of all weights; None keeps the files'.
        t5_length: number of tokens T5 reads; None takes the preset's.
        autoencoder: location of the autoencoder, if not at `place`.
        encoders: location of the text encoders, if not at `place`.
        tokenizers: location of `tokenizer/`, `tokenizer_2/`, `tokenizer_3/`, if not at `place`.

    Raises:
        UserError: a part is missing, damaged, or does not fit the others.
    """
    if preset is not None:
        one_of("preset", preset, PRESETS)
    if source in PRESETS and not Path(source).exists():
        preset = preset or source
    path, used = place.path, dict(used)
    if encoders is None and path.is_dir():
        for kind in [kind for kind in read_index(path, ENCODERS) if used[kind]]:
            log.info("%s was saved without %s: it contributes zeros", path, kind)
            used[kind] = False
    wanted = [kind for kind in ENCODERS if used[kind]]
    root = path if path.is_dir() else path.parent
    vocabularies = root
    if tokenizers is not None:
        vocabularies = local(tokenizers, [TOKENIZERS[kind] for kind in wanted])

    mmdit = place.load("mmdit", dtype=dtype)
    assert isinstance(mmdit, MMDiT)
    chosen = PRESETS[chosen_preset(mmdit, source, preset)]
    try:
        elsewhere = place if autoencoder is None else place.like(autoencoder, ["vae"])
        vae = elsewhere.load("autoencoder", dtype=dtype)
    except UserError as error:
        raise UserError(f"{error}. (Elsewhere: autoencoder=<file or folder>)") from None
    assert isinstance(vae, Autoencoder)
    length = chosen.t5_length if t5_length is None else t5_length
    folders = [SUBFOLDERS[kind] for kind in wanted]
    at = place if encoders is None else place.like(encoders, folders)
    parts = load_encoders(at, used, t5_length=length, tokenizers=vocabularies, dtype=dtype)
    three: dict[str, Any] = {**parts, **zeros_for(mmdit, parts, length)}
    return Pipeline(
        mmdit=mmdit,
        text=TextConditioner(**three, empty_prompt="encoded"),
        autoencoder=vae,
        objective=published_objective(stored_shift(root, chosen.shift)),
        image_size=min(1024, vae.factor * mmdit.longest_side),
        steps=chosen.steps,
        guidance=chosen.guidance,
    ).eval()


def published_objective(shift: float) -> Objective:
    """The objective SD3 was trained with (Sec. 3.1, 5.3.2), with the shift used in sampling."""
    return Objective(
        path=RectifiedFlow(),
        timesteps=LogitNormal(),
        prediction=Velocity(),
        shift=PublishedShift(alpha=shift),
    )


def chosen_preset(mmdit: MMDiT, source: str, asked: str | None) -> str:
    """The requested preset, checked against the architecture; or the one that fits it.

    Raises:
        UserError: the preset is for another architecture.
    """
    a = describe(mmdit)
    fitting = [
        name
        for name, p in PRESETS.items()
        if (p.depth, p.qk_norm, p.dual) == (a["depth"], a["qk_norm"], bool(a["dual_attention"]))
    ]
    if asked is not None:
        if fitting and asked not in fitting:
            raise UserError(
                f"preset={asked} does not fit {source}: this is {fitting[0]}; use preset="
                f"{fitting[0]}, or leave preset out"
            )
        return asked
    if not fitting:
        log.warning("%s is not one of the published sizes: sampling it like sd3.5-medium", source)
        return "sd3.5-medium"
    turbo = [name for name in fitting if "turbo" in name]
    chosen = turbo[0] if turbo and "turbo" in source.lower() else fitting[0]
    if turbo and chosen != turbo[0]:
        log.warning(
            "sampling like %s; %s has the same shapes: preset=%s selects it",
            chosen,
            turbo[0],
            turbo[0],
        )
    return chosen


def frozen_text(
    *,
    source: str,
    tokenizers: str | None = None,
    use_clip_l: bool = True,
    use_clip_g: bool = True,
    use_t5: bool = True,
    t5_length: int = 77,
    dropout: float = 0.464,
    allow_pickle: bool = False,
    verify: bool = True,
) -> TextConditioner:
    """Load public text encoders, frozen, for training a network on their embeddings.

    Args:
        source: single file, folder, hub id, or the name of a preset.
        tokenizers: location of `tokenizer/`, `tokenizer_2/`, `tokenizer_3/`, if not in `source`.
        use_clip_l, use_clip_g, use_t5: load this encoder; one that is left out contributes zeros
            of its published size.
        t5_length: number of tokens T5 reads.
        dropout: see `TextConditioner`.
        allow_pickle, verify: as in `mmdit.load_mmdit`.

    Raises:
        UserError: an encoder in use, or its tokenizer, is missing or damaged.
    """
    used = dict(zip(ENCODERS, (use_clip_l, use_clip_g, use_t5), strict=True))
    wanted = [kind for kind, use in used.items() if use]
    folders = [SUBFOLDERS[kind] for kind in wanted] + [TOKENIZERS[kind] for kind in wanted]
    place = Place(source, folders, allow_pickle=allow_pickle, verify=verify)
    beside = place.path if place.path.is_dir() else place.path.parent
    vocabularies = local(tokenizers, folders) if tokenizers else beside
    parts = load_encoders(place, used, t5_length=t5_length, tokenizers=vocabularies)
    three: dict[str, Any] = {
        "clip_l": AbsentEncoder(width=768, pooled_width=768, length=77),
        "clip_g": AbsentEncoder(width=1280, pooled_width=1280, length=77),
        "t5": AbsentEncoder(width=4096, length=t5_length),
        **parts,
    }
    text = TextConditioner(**three, dropout=dropout)
    text.requires_grad_(False)
    return text


def load_encoders(
    place: Place,
    used: Mapping[str, bool],
    *,
    t5_length: int,
    tokenizers: Path,
    dtype: torch.dtype | None = None,
) -> dict[str, TextEncoder]:
    """Load the encoders in use, by kind.

    Raises:
        UserError: an encoder in use, or its tokenizer, is missing or damaged.
    """
    parts: dict[str, TextEncoder] = {}
    for kind in (kind for kind in ENCODERS if used[kind]):
        try:
            model = place.load(kind, dtype=dtype)
        except UserError as error:
            raise UserError(
                f"{error}. (Elsewhere: text.encoders=<folder or file>; to do without it: "
                f"text.use_{kind}=false)"
            ) from None
        assert isinstance(model, CLIPTextModel | T5Encoder)
        folder = tokenizers / TOKENIZERS[kind]
        tokenizer: CLIPTokenizer | T5Tokenizer
        try:
            if kind == "t5":
                tokenizer = t5_tokenizer_in(folder, length=t5_length)
            else:
                tokenizer = clip_tokenizer_in(folder, pad_with_end=kind == "clip_l")
        except UserError as error:
            raise UserError(f"{error}. (Elsewhere: text.tokenizers=<folder>)") from None
        if kind == "clip_l" and describe(model)["projection_width"] is not None:
            log.warning(
                "%s: CLIP-L's pooled vector passes through a projection that is not the identity, "
                "as in diffusers; single files and SD3's reference have no such projection",
                place.path,
            )
        parts[kind] = TextEncoder(tokenizer=tokenizer, model=model)
    return parts


def with_tokenizers(description: Any, folder: Path, *, asked: bool) -> Any:
    """A run's description, completed with the tokenizers of a folder.

    Older versions stored only the tokenizers' paths. These are never followed, because a file from
    elsewhere may name any path.

    Args:
        folder: folder with `tokenizer/`, `tokenizer_2/` and `tokenizer_3/`.
        asked: whether the user named the folder; if not, missing tokenizers are left as they are.

    Raises:
        UserError: a tokenizer is missing, or a folder was named although none is needed.
    """
    text = _table(_table(description).get("text"))
    parts: dict[str, Any] = {}
    for kind, subfolder in TOKENIZERS.items():
        part = _table(text.get(kind))
        old = _table(part.get("tokenizer"))
        noted = old.get("vocabulary", old.get("model"))
        if isinstance(noted, str) and (asked or (folder / subfolder).is_dir()):
            length = old.get("length", 77)
            tokenizer: CLIPTokenizer | T5Tokenizer
            if kind == "t5":
                tokenizer = t5_tokenizer_in(folder / subfolder, length=length)
            else:
                tokenizer = clip_tokenizer_in(
                    folder / subfolder, pad_with_end=kind == "clip_l", length=length
                )
            parts[kind] = {**part, "tokenizer": describe(tokenizer)}
    if asked and not parts:
        raise UserError(
            "the model already includes its tokenizers, as all current runs of this project do: "
            "leave tokenizers out"
        )
    return {**description, "text": {**text, **parts}} if parts else description


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def zeros_for(
    mmdit: MMDiT, present: Mapping[str, TextEncoder], t5_length: int
) -> dict[str, AbsentEncoder]:
    """Placeholders for absent encoders, with the widths these would have.

    A CLIP tower's hidden states are as wide as its pooled vector, so the width of one absent tower
    follows from the other's. Two absent towers share the pooled width in the published proportion.
    """
    lengths = [part.length for kind, part in present.items() if kind != "t5"]
    length = lengths[0] if lengths else 77
    pooled = mmdit.pooled_width - sum(part.pooled_width for part in present.values())
    absent = {}
    clips = [kind for kind in ("clip_l", "clip_g") if kind not in present]
    widths = [pooled] if len(clips) == 1 else [pooled * 768 // 2048, pooled - pooled * 768 // 2048]
    for kind, width in zip(clips, widths, strict=False):
        absent[kind] = AbsentEncoder(width=width, pooled_width=width, length=length)
    if "t5" not in present:
        absent["t5"] = AbsentEncoder(width=mmdit.context_width, length=t5_length)
    return absent


def without(pipeline: Pipeline, kinds: list[str]) -> None:
    """Remove text encoders from a pipeline, which then contribute zeros."""
    old = pipeline.text
    parts: dict[str, Any] = {kind: getattr(old, kind) for kind in ENCODERS}
    for kind in kinds:
        parts[kind] = AbsentEncoder.instead_of(parts[kind])
    description = describe(old)
    options = {name: description[name] for name in ("dropout", "empty_prompt")}
    pipeline.text = TextConditioner(**parts, **options)


# Saving


def models_of(thing: nn.Module) -> dict[str, Network]:
    """The models of a pipeline by kind; for a single model, that one."""
    if not isinstance(thing, Pipeline):
        kind = kind_of(thing)
        assert isinstance(thing, Network)
        return {kind: thing}
    models: dict[str, Network] = {"mmdit": thing.mmdit, "autoencoder": thing.autoencoder}
    for kind in ENCODERS:
        encoder = getattr(thing.text, kind)
        if isinstance(encoder, TextEncoder):
            models[kind] = encoder.model
    return models


def _expect_no_adapters(thing: nn.Module) -> None:
    """Raise UserError where adapters change a model, beside its weights."""
    if live := [name for layer in adapted(thing).values() for name in layer.scales]:
        raise UserError(
            f"the model has the adapter {live[0]!r}: fuse it with the weights (pipe.fuse_lora()), "
            "or remove it (pipe.unload_lora()) before saving; write_adapter saves the adapter alone"
        )


def save_gguf(thing: nn.Module, path: str | Path, *, quantized: str = "Q8_0") -> Path:
    """Save a transformer or a T5 encoder as a GGUF file, as ComfyUI-GGUF reads it.

    Matrices are rounded to the type. Vectors and tensors of up to 1,024 values are float32; the
    embeddings, the positions and the output layer of a transformer keep 16 bits, or 32 where the
    model has them. `load_mmdit`, `load_t5` and `load_pipeline` read the file.

    Example:
        save_gguf(load_mmdit("sd3.5_medium.safetensors"), "sd3.5_medium-Q8_0.gguf")

    Args:
        thing: MMDiT or T5Encoder.
        path: path of the file, which must end in `.gguf`.
        quantized: 'Q8_0', 'Q5_1', 'Q4_0' or 'BF16'.

    Returns:
        The path, with `~` expanded.

    Raises:
        UserError: it is another model; the package `gguf` is not installed; a value is not finite;
            the file cannot be written.
    """
    path = expanded(path)
    one_of("quantized", quantized, WRITTEN)
    if path.suffix != ".gguf":
        raise UserError(f"{path} must end in .gguf")
    if isinstance(thing, Pipeline):
        raise UserError(
            "a GGUF file holds one network: give pipe.mmdit, or pipe.text.t5.model for T5"
        )
    _expect_no_adapters(thing)
    ((kind, model),) = models_of(thing).items()
    if kind not in ARCHITECTURES:
        raise UserError(
            f"a GGUF file holds an MMDiT or a T5Encoder, not a {type(thing).__name__}: use the "
            "single-file layout"
        )
    if message := write_gguf(path, model, kind, quantized):
        log.warning("%s: %s", path, message)
    return path


def save_single_file(thing: nn.Module, path: str | Path, *, quantized: str | None = None) -> Path:
    """Save a model, or all models of a pipeline, in the original single-file layout.

    The keys are as published: a transformer has the prefix `model.diffusion_model.`, and any other
    model saved alone has none. This project reads every such file, with the sizes in its header.
    ComfyUI reads transformers of width 64 x depth with heads of width 64, 16 latent channels, a
    context of width 4096 and a pooled vector of width 2048, and other models in their published
    sizes. diffusers (`from_single_file`) reads only the published sizes, and no ControlNet. A
    warning, and the header's metadata under `mmdit.readers`, list what these programs would reject
    or compute wrongly. A single file includes neither tokenizers nor sampling defaults.

    Example:
        pipe = load_pipeline("runs/shapes-001")
        save_single_file(pipe, "shapes.safetensors")

    Args:
        thing: MMDiT, Autoencoder, CLIPTextModel, T5Encoder, ControlNet, or a Pipeline.
        path: path of the file, which must end in `.safetensors`.
        quantized: 'scaled_fp8' rounds the weights of linear layers of the transformer and of T5 to
            8-bit floats with one scale each, as ComfyUI does, and 'fp8' to such without a scale;
            None rounds nothing.

    Returns:
        The path, with `~` expanded.

    Raises:
        UserError: the model has no public format or none that can be quantized, the path does not
            end in `.safetensors`, or the file cannot be written.
    """
    path = expanded(path)
    if quantized is not None:
        one_of("quantized", quantized, FP8)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors")
    _expect_no_adapters(thing)
    models = models_of(thing)
    if quantized is not None and not models.keys() & ARCHITECTURES.keys():
        raise UserError(f"quantized={quantized} is for transformers and T5, which are not here")
    tensors: dict[str, torch.Tensor] = {}
    for kind, model in models.items():
        prefixed = kind == "mmdit" or len(models) > 1
        if quantized is not None and kind in ARCHITECTURES:
            scaled = quantized == "scaled_fp8"
            tensors |= _in_fp8(model, kind, prefixed=prefixed, scaled=scaled)
        else:
            tensors |= exported(model, "original", kind=kind, prefixed=prefixed)
    metadata = descriptions(models)
    if message := remark(models, not_stored(thing, single_file=True)):
        metadata[REMARK] = message
    write_archive(path, tensors, metadata)
    if message:
        log.warning("%s: %s", path, message)
    return path


def _in_fp8(
    model: Network, kind: str, *, prefixed: bool, scaled: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model in the original layout, with its matrices in 8-bit floats."""
    prefix = format_of(kind, "original").prefixes[0] if prefixed else ""
    tensors = dict(exported(model, "original", kind=kind))
    return in_fp8(tensors, matrices_of(model, "original", kind), prefix, scaled=scaled)


def not_stored(thing: nn.Module, *, single_file: bool) -> list[str]:
    """Settings of a pipeline that the public layouts cannot store, and other programs ignore."""
    if not isinstance(thing, Pipeline):
        return []
    objective, lost = thing.objective, []
    path, prediction = type(objective.path), type(objective.prediction)
    if (path, prediction) != (RectifiedFlow, Velocity):
        lost.append(
            f"it was trained as {path.__name__} with {prediction.__name__}, but is sampled "
            "elsewhere as rectified flow that predicts a velocity"
        )
    if single_file and objective.shift.alpha != 3.0:
        lost.append(f"its timesteps are shifted by {objective.shift.alpha:g}, but elsewhere by 3")
    if thing.text.empty_prompt != "encoded":
        lost.append("its empty prompt is all zeros, but is encoded elsewhere")
    for kind in ENCODERS if single_file else ():
        tokenizer = getattr(getattr(thing.text, kind), "tokenizer", None)
        if tokenizer is not None and not isinstance(tokenizer, CLIPTokenizer | T5Tokenizer):
            lost.append(f"{kind} reads the tokens of a {type(tokenizer).__name__}")
    return lost


def save_diffusers(thing: nn.Module, folder: str | Path) -> Path:
    """Save a model (weights and config.json), or a whole pipeline, in diffusers' layout.

    A pipeline's folder includes its tokenizers and its scheduler; `load_pipeline` and diffusers
    read it. A warning lists the settings that the layout cannot store.

    Example:
        save_diffusers(load_pipeline("runs/shapes-001"), "shapes")

    Args:
        thing: as in `save_single_file`.
        folder: folder to write; of a pipeline, with a subfolder for each part. An existing one
            is replaced at once when the new one is complete.

    Returns:
        The folder, with `~` expanded.

    Raises:
        UserError: the model has no public format.
    """
    _expect_no_adapters(thing)
    folder = expanded(folder)
    if not isinstance(thing, Pipeline):
        (model,) = models_of(thing).values()
        with replacing(folder, pipeline=False) as new:
            write_model(model, new)
        return folder
    tokenizers: dict[str, Any] = {}
    for kind in ENCODERS:
        encoder = getattr(thing.text, kind)
        if isinstance(encoder, TextEncoder):
            if not isinstance(encoder.tokenizer, CLIPTokenizer | T5Tokenizer):
                raise UserError(
                    f"the tokenizer of {kind} is a {type(encoder.tokenizer).__name__}, which has "
                    "no public format; save the models one by one"
                )
            tokenizers[kind] = encoder.tokenizer
    shift = thing.objective.shift.alpha
    with replacing(folder, pipeline=True) as new:
        write_folder(models_of(thing), new, shift=shift, tokenizers=tokenizers)
    if lost := not_stored(thing, single_file=False):
        log.warning("%s: the folder cannot store this: %s", folder, "; ".join(lost))
    return folder
