"""Training: the loop, steps, optimizers, averages, schedules, logging."""

from mmdit.engine.ema import ConstantDecay, Following, HalfLife, PowerFunction
from mmdit.engine.loggers import NoLogger
from mmdit.engine.optimizers import adamw, adamw_8bit, muon
from mmdit.engine.parallel import DDP, FSDP, Single
from mmdit.engine.posthoc import PostHoc
from mmdit.engine.schedules import WarmupConstant, WarmupCosine, WarmupStableDecay
from mmdit.engine.wandb_logger import WandbLogger

__all__ = [
    "DDP",
    "FSDP",
    "ConstantDecay",
    "Following",
    "HalfLife",
    "NoLogger",
    "PostHoc",
    "PowerFunction",
    "Single",
    "WandbLogger",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupStableDecay",
    "adamw",
    "adamw_8bit",
    "muon",
]
