"""Images to the latents that are trained on: from pixels, from memory, from a cache."""

from mmdit.latents.sources import FromCache, FromMemory, FromPixels

__all__ = [
    "FromCache",
    "FromMemory",
    "FromPixels",
]
