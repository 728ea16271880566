"""CLIP features for metrics: both towers of CLIP, from public weights or from a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.checkpoints.archive import Archive
from mmdit.checkpoints.folders import read_config
from mmdit.checkpoints.public import load
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.loading import Public, Run, Source, open_source
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.text.clip_pair import CLIPPair
from mmdit.text.clip_tokenizer import clip_tokenizer_in
from mmdit.text.conditioning import TextEncoder

Items = TypeVar("Items", Tensor, Sequence[str])


def load_clip_features(
    source: str | Path,
    *,
    weights: str = "ema",
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
) -> CLIPPair:
    """Load both towers of CLIP, in eval mode; the paper uses CLIP-L/14 (Sec. 5.1).

    Args:
        source: a file or folder of public weights with both towers, such as
            openai/clip-vit-large-patch14; or a run that trained a `CLIPPair`, one of its checkpoint
            folders, or a file exported from it.
        weights: 'ema' or 'raw', for a run.
        tokenizer: folder of the public tokenizer's files; None looks beside the weights.
        dtype: dtype of the weights; None keeps the file's.
        device: device of the model; None is the CPU.
        allow_pickle, verify: for public weights, as in `mmdit.load_mmdit`.

    Raises:
        UserError: `source` does not exist, is damaged, or is another kind of model.
    """
    place = None if device is None else available(device)  # before any file is read
    opened = open_source(source, (), weights=weights, allow_pickle=allow_pickle, verify=verify)
    return clip_features(opened, tokenizer=tokenizer, dtype=dtype, device=place)


def clip_features(
    source: Source,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CLIPPair:
    """`load_clip_features` of weights that have been found already."""
    where = None if device is None else available(device)
    if isinstance(source, Run):
        pair = source.module()
        if not isinstance(pair, CLIPPair):
            raise UserError(f"{source.name} holds a {type(pair).__name__}, not a CLIPPair")
        return pair.to(dtype=dtype, device=where)
    assert isinstance(source, Public)
    archive, folder = source.place.weights_of("clip_image")
    text, image = towers(archive, read_config(folder), dtype=dtype, verify=source.place.verify)
    words = clip_tokenizer_in(
        folder if tokenizer is None else tokenizer, pad_with_end=True, length=text.length
    )
    pair = CLIPPair(text=TextEncoder(tokenizer=words, model=text), image=image)
    if "logit_scale" in archive.infos:
        pair.logit_scale.data = archive["logit_scale"].float().reshape(())
    return pair.eval().to(device=where)


def towers(
    archive: Archive, config: dict[str, Any], **options: Any
) -> tuple[CLIPTextModel, CLIPImageModel]:
    """The text and image towers of a public CLIP.

    Args:
        archive: the weights.
        config: its config.json, for what tensor shapes do not determine; empty if there is none.
        options: `dtype` and `verify` of `mmdit.checkpoints.public.load`.

    Raises:
        UserError: a tower is missing or does not fit, or has an unsupported activation.
    """
    configs = {half: config.get(f"{half}_config") or {} for half in ("text", "vision")}
    activation = configs["vision"].get("hidden_act", "quick_gelu")
    if activation != "quick_gelu":
        raise UserError(
            f"{archive.name}: config.json: vision_config.hidden_act is {activation!r}; only "
            "'quick_gelu', the activation of CLIP's own image towers, is supported"
        )
    heads = {
        half: {"num_heads": part["num_attention_heads"]}
        for half, part in configs.items()
        if "num_attention_heads" in part
    }
    hints = heads.get("text", {})
    if "hidden_act" in configs["text"]:
        hints = {**hints, "activation": configs["text"]["hidden_act"]}
    text_part = archive.without("vision_model.", "visual_projection.")
    text = load(text_part, "clip_l", layout="diffusers", hints=hints, **options)
    image = load(archive, "clip_image", hints=heads.get("vision", {}), **options)
    assert isinstance(text, CLIPTextModel) and isinstance(image, CLIPImageModel)
    return text, image


@torch.no_grad()
def in_batches(features: Callable[[Items], Tensor], items: Items, *, size: int = 64) -> Tensor:
    """Features (n, d) of many images or prompts, on the CPU, computed in batches to save memory.

    Example:
        in_batches(pair.image_features, pixels)
        in_batches(pair.text_features, prompts)

    Raises:
        UserError: there are no items, or `size` is not positive.
    """
    if not len(items) or size < 1:
        raise UserError(f"{len(items)} items in batches of {size}: both must be at least 1")
    starts = tqdm(range(0, len(items), size), desc="features", unit="batch", disable=None)
    return torch.cat([features(items[start : start + size]).cpu() for start in starts])
