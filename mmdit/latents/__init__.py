"""Sources of latents for training: encoded at every step, kept in memory, or cached on disk."""

from mmdit.latents.sources import FromCache, FromMemory, FromPixels

__all__ = [
    "FromCache",
    "FromMemory",
    "FromPixels",
]
