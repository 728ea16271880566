"""The published models by name: where they are on the hub, and how they are meant to be used."""

from typing import NamedTuple


class Preset(NamedTuple):
    """How a published model is meant to be used.

    Attributes:
        hub: its repository on the Hugging Face hub.
        depth, qk_norm, dual: what identifies its architecture; `dual` is True for MMDiT-X.
        steps, guidance, shift: settings for sampling; guidance 1 is off.
        t5_length: number of tokens that T5 reads.
    """

    hub: str
    depth: int
    qk_norm: bool
    dual: bool
    steps: int
    guidance: float
    shift: float = 3.0
    t5_length: int = 256


PRESETS = {
    "sd3-medium": Preset(
        "stabilityai/stable-diffusion-3-medium-diffusers", 24, False, False, 28, 7.0
    ),
    "sd3.5-medium": Preset("stabilityai/stable-diffusion-3.5-medium", 24, True, True, 28, 4.5),
    "sd3.5-large": Preset("stabilityai/stable-diffusion-3.5-large", 38, True, False, 28, 3.5),
    "sd3.5-large-turbo": Preset(
        "stabilityai/stable-diffusion-3.5-large-turbo", 38, True, False, 4, 1.0
    ),
}
