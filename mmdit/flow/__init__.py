"""The mathematics: paths, timestep densities, predictions, loss, grids, guidance, solvers."""

from mmdit.flow.caches import FirstBlockCache, TaylorCache
from mmdit.flow.grids import CosineGrid, KarrasGrid, LDMGrid, UniformGrid
from mmdit.flow.guidance import (
    ClassifierFreeGuidance,
    GuidanceInterval,
    GuidanceRescale,
    SkipLayerGuidance,
    ZeroUnconditional,
)
from mmdit.flow.objective import Objective
from mmdit.flow.paths import EDM, Cosine, LDMLinear, MatchedEDM, RectifiedFlow
from mmdit.flow.predictions import Epsilon, FPrediction, V, Velocity
from mmdit.flow.schedule import PublishedShift, Shift
from mmdit.flow.solvers import (
    dpmpp_2m,
    dpmpp_2m_log_snr,
    euler,
    euler_ancestral,
    heun,
    midpoint,
    stochastic,
)
from mmdit.flow.timesteps import CosMap, DiscreteUniform, LogitNormal, Mode, Uniform
from mmdit.flow.transitions import CPS, Ancestral, DanceSDE, FlowSDE, GaussianSDE

__all__ = [
    "CPS",
    "EDM",
    "Ancestral",
    "ClassifierFreeGuidance",
    "CosMap",
    "Cosine",
    "CosineGrid",
    "DanceSDE",
    "DiscreteUniform",
    "Epsilon",
    "FPrediction",
    "FirstBlockCache",
    "FlowSDE",
    "GaussianSDE",
    "GuidanceInterval",
    "GuidanceRescale",
    "KarrasGrid",
    "LDMGrid",
    "LDMLinear",
    "LogitNormal",
    "MatchedEDM",
    "Mode",
    "Objective",
    "PublishedShift",
    "RectifiedFlow",
    "Shift",
    "SkipLayerGuidance",
    "TaylorCache",
    "Uniform",
    "UniformGrid",
    "V",
    "Velocity",
    "ZeroUnconditional",
    "dpmpp_2m",
    "dpmpp_2m_log_snr",
    "euler",
    "euler_ancestral",
    "heun",
    "midpoint",
    "stochastic",
]
