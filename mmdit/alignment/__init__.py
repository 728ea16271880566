"""Post-training: prompts to sample, rewards of the images, and what is learned from them."""

from mmdit.alignment.awm import AdvantageWeightedMatching
from mmdit.alignment.best_of_n import BestOfN
from mmdit.alignment.collector import Collector
from mmdit.alignment.diffusion_dpo import DiffusionDPO
from mmdit.alignment.diffusion_ipo import DiffusionIPO
from mmdit.alignment.diffusion_nft import DiffusionNFT
from mmdit.alignment.flow_grpo import FlowGRPO
from mmdit.alignment.pairs import PreferencePairs
from mmdit.alignment.prompts import DataPrompts, PromptFile, ScenePrompts
from mmdit.alignment.rewards import CLIPReward, CompositionalReward, FunctionReward, WeightedSum
from mmdit.alignment.samplers import ODESampler, SDESampler
from mmdit.alignment.spelling import SpellingReward

__all__ = [
    "AdvantageWeightedMatching",
    "BestOfN",
    "CLIPReward",
    "Collector",
    "CompositionalReward",
    "DataPrompts",
    "DiffusionDPO",
    "DiffusionIPO",
    "DiffusionNFT",
    "FlowGRPO",
    "FunctionReward",
    "ODESampler",
    "PreferencePairs",
    "PromptFile",
    "SDESampler",
    "ScenePrompts",
    "SpellingReward",
    "WeightedSum",
]
