"""Post-training: prompts to sample, rewards of the images, and what is learned from them."""

from mmdit.alignment.prompts import DataPrompts, PromptFile, ScenePrompts

__all__ = [
    "DataPrompts",
    "PromptFile",
    "ScenePrompts",
]
