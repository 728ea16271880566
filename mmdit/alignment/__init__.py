"""Post-training: prompts to sample, rewards of the images, and what is learned from them."""

from mmdit.alignment.prompts import DataPrompts, PromptFile, ScenePrompts
from mmdit.alignment.rewards import CLIPReward, CompositionalReward, FunctionReward, WeightedSum
from mmdit.alignment.spelling import SpellingReward

__all__ = [
    "CLIPReward",
    "CompositionalReward",
    "DataPrompts",
    "FunctionReward",
    "PromptFile",
    "ScenePrompts",
    "SpellingReward",
    "WeightedSum",
]
