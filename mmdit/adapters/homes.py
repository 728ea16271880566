"""Where the linear layers of a pipeline are in public layouts, under all names that files use."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from mmdit.adapters.targets import PARTS
from mmdit.checkpoints.formats import FORMATS
from mmdit.checkpoints.public import slots_of
from mmdit.checkpoints.tables import Slot
from mmdit.errors import UserError
from mmdit.models.mmdit import MMDiT

# What may come before a layer's name in an adapter file, by part and layout. After one that ends
# with an underscore the dots of the name are underscores, too.
PREFIXES = {
    ("mmdit", "diffusers"): (
        *("transformer.", "", "base_model.model.", "diffusion_model."),
        *("lora_transformer_", "lycoris_", "lora_unet_"),
    ),
    ("mmdit", "original"): (
        *("diffusion_model.", "", "model.diffusion_model.", "transformer.", "base_model.model."),
        *("lora_unet_", "lora_transformer_", "lycoris_"),
    ),
    ("clip_l", "diffusers"): (
        *("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer."),
        *("lora_te1_", "lora_te_"),
    ),
    ("clip_g", "diffusers"): (
        *("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.transformer."),
        *("lora_te2_",),
    ),
    # Some count only the encoders that are there.
    ("t5", "diffusers"): (
        *("text_encoder_3.", "text_encoders.t5xxl.transformer.", "t5xxl.transformer."),
        *("lora_te3_", "lora_te2_", "lora_te1_"),
    ),
}


class Home(NamedTuple):
    """A matrix of a public layout, and the layers of a pipeline that it consists of.

    Attributes:
        part: 'mmdit', 'clip_l', 'clip_g' or 't5'.
        layout: 'original' or 'diffusers'.
        stem: its key in that layout, without prefix and `.weight`.
        slot: its shape, and how it contains our matrices, by the names of their layers.
    """

    part: str
    layout: str
    stem: str
    slot: Slot

    @property
    def layers(self) -> list[str]:
        """The layers of the pipeline, by name."""
        return [name for name, _, _ in self.slot.parts]


def homes(root: nn.Module) -> Iterator[Home]:
    """The matrices of all layouts that linear layers of a pipeline are stored in."""
    for part, path in PARTS.items():
        try:
            model = root.get_submodule(path)
        except AttributeError:
            continue  # an encoder that was left out
        if part == "mmdit" and not isinstance(model, MMDiT):
            continue  # it has no public layout
        linear = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".changes." not in name
        }
        for format in FORMATS:
            if format.kind != part or (part, format.layout) not in PREFIXES:
                continue
            for key, slot in slots_of(model, format).items():
                names = [ours.removesuffix(".weight") for ours, _, _ in slot.parts]
                if key.endswith(".weight") and linear.issuperset(names):
                    own = [
                        (f"{path}.{name}", shape, form)
                        for name, (_, shape, form) in zip(names, slot.parts, strict=True)
                    ]
                    stem = key.removesuffix(".weight")
                    yield Home(part, format.layout, stem, Slot(slot.shape, own))


def spelled(found: Iterator[Home]) -> Mapping[str, Home]:
    """The homes by each name that a file may use for them."""
    names: dict[str, Home] = {}
    for home in found:
        for prefix in PREFIXES[home.part, home.layout]:
            stem = home.stem.replace(".", "_") if prefix.endswith("_") else home.stem
            names.setdefault(prefix + stem, home)
    return names


def home_in(root: nn.Module, layout: str) -> dict[str, Home]:
    """The home in a layout of each linear layer, by its name; encoders have one layout.

    Raises:
        UserError: the network has no public layout.
    """
    found = {
        layer: home
        for home in homes(root)
        if home.layout == layout or home.part != "mmdit"
        for layer in home.layers
    }
    if not found:
        raise UserError("the network of this model has no public layout")
    return found
