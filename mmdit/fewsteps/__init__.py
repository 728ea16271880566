"""Students that sample in few steps without guidance, taught by a model that needs many."""

from mmdit.fewsteps.ladd import LADD
from mmdit.fewsteps.mean_flow import MeanFlow
from mmdit.fewsteps.reflow import Reflow

__all__ = [
    "LADD",
    "MeanFlow",
    "Reflow",
]
