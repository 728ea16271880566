"""Write adapters as other programs read them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.adapters.adapter import Adapter, weight_of
from mmdit.adapters.homes import Home, home_in
from mmdit.adapters.layers import Change, DoRA, LoKr, LoRA, dense
from mmdit.adapters.matrices import rows_of
from mmdit.adapters.reading import NORM, base_norms
from mmdit.adapters.stated import CONFIG, HEADER, WEIGHTS
from mmdit.adapters.words import NewWords, write_words
from mmdit.atomic import write_atomically
from mmdit.checkpoints.archive import write_archive
from mmdit.checks import expanded, one_of
from mmdit.dtypes import wide
from mmdit.errors import UserError

LAYOUTS = {
    "diffusers": "diffusers",
    "peft": "diffusers",
    "sd-scripts": "original",
    "comfyui": "original",
}
DIALECTS = tuple(LAYOUTS)
PREFIXES = {
    "diffusers": {
        "mmdit": "transformer.",
        "clip_l": "text_encoder.",
        "clip_g": "text_encoder_2.",
    },
    "peft": {"mmdit": "base_model.model."},
    "sd-scripts": {
        "mmdit": "lora_unet_",
        "clip_l": "lora_te1_",
        "clip_g": "lora_te2_",
        "t5": "lora_te3_",
    },
    "comfyui": {
        "mmdit": "diffusion_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "clip_g": "text_encoders.clip_g.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    },
}
# Of the down and the up matrix, and of DoRA's norms, whose `.weight` transformers wants.
ENDS = {
    "diffusers": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"),
    "peft": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"),
    "sd-scripts": ("lora_down.weight", "lora_up.weight", "dora_scale"),
    "comfyui": ("lora_A.weight", "lora_B.weight", "dora_scale"),
}


def write_adapter(adapter: Adapter, path: str | Path, *, dialect: str, root: nn.Module) -> Path:
    """Write an adapter in the spelling of another program, which then applies the same changes.

    - 'diffusers': a file for `pipe.load_lora_weights`, with ranks and alphas in its header.
    - 'peft': a folder for `PeftModel.from_pretrained`, of changes of the network alone.
    - 'sd-scripts': a file of its `networks.lora_sd3`, which most programs read.
    - 'comfyui': a file for ComfyUI's LoRA loaders; the only one that may hold LoKr.

    Args:
        adapter: of the network, text encoders, or both.
        path: a file that ends in `.safetensors`; for 'peft' a folder.
        dialect: one of the above.
        root: the pipeline it is for.

    Raises:
        UserError: the dialect cannot express it, or the file cannot be written.
    """
    one_of("dialect", dialect, DIALECTS)
    path = expanded(path)
    if dialect != "peft" and path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors")
    words = {at: new for at, new in adapter.changes.items() if isinstance(new, NewWords)}
    if words:
        if len(words) < len(adapter.changes):
            raise UserError("new words and changes of layers do not go into one file")
        write_words(words, path, dialect)
        return path
    spelling = Spelling(dialect, adapter, root)
    tensors = {key: value.detach().cpu().contiguous() for key, value in spelling.tensors()}
    metadata = {
        **({"mmdit.base_sha256": adapter.base["sha256"]} if adapter.base else {}),
        **spelling.metadata(),
    }
    if dialect == "peft":
        config = {**spelling.config("mmdit"), "peft_type": "LORA", "inference_mode": True}
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / CONFIG, f"{json.dumps(config, indent=2)}\n".encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error})") from None
        write_archive(path / WEIGHTS, tensors, metadata)
    else:
        write_archive(path, tensors, metadata)
    return path


class Spelling:
    """The tensors of an adapter under the keys of a dialect.

    Args:
        dialect, adapter, root: as in `write_adapter`.

    Raises:
        UserError: as in `write_adapter`.
    """

    def __init__(self, dialect: str, adapter: Adapter, root: nn.Module) -> None:
        self.dialect, self.root = dialect, root
        self._normed = any(isinstance(change, DoRA) for change in adapter.changes.values())
        at = home_in(root, LAYOUTS[dialect])
        self.homes: dict[str, Home] = {}  # by key, without the end
        self.changes: dict[str, dict[str, Change]] = {}  # by key and layer
        self.lokr: dict[str, Change] = {}
        for layer, change in adapter.changes.items():
            assert isinstance(change, Change)
            if layer not in at:
                raise UserError(f"{layer} is not stored in any public layout")
            home = at[layer]
            if home.part not in PREFIXES[dialect]:
                raise UserError(
                    f"dialect={dialect} has no keys for {home.part}: choose sd-scripts or comfyui"
                )
            if isinstance(change, LoRA) or isinstance(getattr(change, "change", None), LoRA):
                key = self._key(home)
                self.homes[key] = home
                self.changes.setdefault(key, {})[layer] = change
            elif dialect != "comfyui":
                raise UserError(
                    f"dialect={dialect} has no keys for a {type(change).__name__} of {layer}: "
                    "choose comfyui"
                )
            else:
                self.lokr[layer] = change

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor of everything in the file."""
        down_end, up_end, norm_end = ENDS[self.dialect]
        for key, home in self.homes.items():
            down, up, alpha = self._matrices(key)
            if len(home.slot.shape) > 2:  # a convolution
                down, up = down.reshape(-1, *home.slot.shape[1:]), up[:, :, None, None]
            yield f"{key}.{down_end}", down
            yield f"{key}.{up_end}", up
            if self.dialect in ("sd-scripts", "comfyui"):
                yield f"{key}.alpha", torch.tensor(alpha)
            if (norms := self._norms(key)) is not None:
                if self.dialect in ("sd-scripts", "comfyui"):
                    norms = norms[:, None]
                elif len(home.slot.shape) > 2:
                    norms = norms[None, :, None, None]
                yield f"{key}.{norm_end}", norms
        yield from self._lokr_tensors()

    def metadata(self) -> dict[str, str]:
        """Entries of the header."""
        if self.dialect == "diffusers":
            parts = {home.part for home in self.homes.values()}
            names = PREFIXES["diffusers"]
            stated = {
                f"{names[part]}{key}": value
                for part in sorted(parts)
                for key, value in self.config(part).items()
            }
            return {HEADER: json.dumps(stated, sort_keys=True)}
        if self.dialect == "comfyui" and self._normed:
            return {NORM: "base"}
        if self.dialect == "sd-scripts":
            found = [c for changes in self.changes.values() for c in low_rank(changes).values()]
            return {
                "ss_network_module": "networks.lora_sd3",
                "ss_network_dim": str(max(change.rank for change in found)),
                "ss_network_alpha": f"{max(change.scale * change.rank for change in found):g}",
            }
        return {}

    def config(self, part: str) -> dict[str, Any]:
        """The arguments of PEFT's LoraConfig for a part."""
        numbers: dict[str, tuple[int, float]] = {}
        normed = set()
        for key, home in self.homes.items():
            if home.part == part:
                down, _, alpha = self._matrices(key)
                numbers[home.stem] = (down.shape[0], alpha)
                normed |= {isinstance(c, DoRA) for c in self.changes[key].values()}
        if len(normed) > 1:
            raise UserError(f"dialect={self.dialect} has DoRA in all layers of a part, or in none")
        rank, alpha = max(numbers.values(), key=list(numbers.values()).count)
        return {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(numbers),
            "rank_pattern": {stem: r for stem, (r, _) in numbers.items() if r != rank},
            "alpha_pattern": {stem: a for stem, (_, a) in numbers.items() if a != alpha},
            "use_dora": normed == {True},
            "lora_dropout": 0.0,
            "bias": "none",
        }

    def _key(self, home: Home) -> str:
        prefix = PREFIXES[self.dialect][home.part]
        return prefix + (home.stem.replace(".", "_") if prefix.endswith("_") else home.stem)

    def _matrices(self, key: str) -> tuple[Tensor, Tensor, float]:
        """The down and up matrix and the alpha of a public layer.

        In a file for diffusers alpha is the rank, and the scale is in the up matrix: older versions
        and other programs do not look for alpha in the header, and would read another strength.
        """
        down, up, alpha = joined(self.homes[key], low_rank(self.changes[key]))
        rank = len(down)
        if self.dialect == "diffusers" and alpha != rank:
            up, alpha = wide(up) * (alpha / rank), float(rank)
        return down, up, alpha

    def _norms(self, key: str) -> Tensor | None:
        """DoRA's norms of the rows of a public layer, where there are any.

        ComfyUI divides by the norms of the base, not of the changed weight: its file holds norms
        that give the same weights.
        """
        home, changes = self.homes[key], self.changes[key]
        if not any(isinstance(change, DoRA) for change in changes.values()):
            return None
        parts = []
        for layer, _, _ in home.slot.parts:
            weight = weight_of(self.root, layer)
            norms = torch.linalg.vector_norm(dense(weight), dim=1)
            if (change := changes.get(layer)) is not None:
                if not isinstance(change, DoRA) or change.axis != 1:
                    raise UserError(f"{layer}: norms for each input have no keys here")
                norms = wide(change.magnitude)
                if self.dialect == "comfyui":
                    norms = norms * base_norms(weight) / change.norm(weight).flatten()
            parts.append(norms[:, None])
        if len(home.slot.shape) > 2:
            return parts[0][:, 0]
        rows = (sum(len(part) for part in parts), 1)
        return home.slot.parts[0][2].write(parts, rows)[:, 0]

    def _lokr_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """LoKr and whole changes, in LyCORIS's spelling of diffusers' layers."""
        at = home_in(self.root, "diffusers") if self.lokr else {}
        for layer, change in self.lokr.items():
            home = at[layer]
            prefix = "lycoris_" if home.part == "mmdit" else PREFIXES["sd-scripts"][home.part]
            key = prefix + home.stem.replace(".", "_")
            inner = change.change if isinstance(change, DoRA) else change
            rows = torch.arange(inner.outputs)[:, None]
            kept = torch.equal(rows_of(home.slot, home.slot.parts[0][2], rows), rows)
            if isinstance(change, DoRA):
                if change.axis != 1 or not kept:
                    raise UserError(f"{layer}: DoRA over LoKr has no keys here")
                weight = weight_of(self.root, layer)
                norms = wide(change.magnitude) * base_norms(weight) / change.norm(weight).flatten()
                yield f"{key}.dora_scale", norms[:, None]
            if isinstance(inner, LoKr) and kept:
                yield from (
                    (f"{key}.lokr_{name}{end}", value)
                    for name, factor in (("w1", inner.first), ("w2", inner.second))
                    for end, value in (("", factor.whole), ("_a", factor.up), ("_b", factor.down))
                    if value is not None
                )
                yield f"{key}.alpha", torch.tensor(inner.alpha)
            else:
                matrix = inner.of_weight(weight_of(self.root, layer))
                yield f"{key}.diff", home.slot.parts[0][2].write([matrix], home.slot.shape)


def low_rank(changes: Mapping[str, Change]) -> dict[str, LoRA]:
    """The low-rank changes among these, those of directions in DoRA included."""
    found = {layer: c.change if isinstance(c, DoRA) else c for layer, c in changes.items()}
    return {layer: change for layer, change in found.items() if isinstance(change, LoRA)}


def joined(home: Home, changes: Mapping[str, LoRA]) -> tuple[Tensor, Tensor, float]:
    """The down and up matrix and the alpha of a public layer, from those of our layers.

    Where a public layer is made of several of ours, the down matrices are stacked, and the up
    matrices are the blocks of a diagonal: the ranks add up, and so alpha must grow with them.
    """
    slot = home.slot
    if len(slot.parts) == 1:
        (only,) = changes.values()
        up = only.up.weight
        if len(slot.shape) == 2:
            up = slot.parts[0][2].write([up], tuple(up.shape))
        return only.down.weight, up, only.scale * only.rank
    own = [changes.get(layer) for layer, _, _ in slot.parts]
    there = [change for change in own if change is not None]
    first, same_scale = there[0], len({change.scale for change in there}) == 1
    shared = all(torch.equal(change.down.weight, first.down.weight) for change in there[1:])
    if len(there) == len(own) and shared and same_scale:
        return (
            first.down.weight,
            torch.cat([change.up.weight for change in there]),
            first.scale * first.rank,
        )
    down = torch.cat([change.down.weight for change in there])
    up = down.new_zeros(slot.shape[0], len(down))
    row = column = 0
    for (_, shape, _), change in zip(slot.parts, own, strict=True):
        if change is not None:
            block = change.up.weight if same_scale else change.scale * change.up.weight
            up[row : row + shape[0], column : column + change.rank] = block
            column += change.rank
        row += shape[0]
    return down, up, (first.scale if same_scale else 1.0) * len(down)
