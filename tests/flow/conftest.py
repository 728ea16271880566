"""All families of formulations: a test that takes one runs on each."""

import pytest

from mmdit.flow.grids import CosineGrid, KarrasGrid, LDMGrid, UniformGrid
from mmdit.flow.objective import Objective
from mmdit.flow.paths import EDM, Cosine, LDMLinear, MatchedEDM, RectifiedFlow
from mmdit.flow.predictions import Epsilon, FPrediction, V, Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import CosMap, DiscreteUniform, LogitNormal, Mode, Uniform

# As in configs/objective; edm/cos is edm/rf.
FORMULATIONS = {
    "eps/linear": (LDMLinear(), DiscreteUniform(), Epsilon(), LDMGrid()),
    "v/linear": (LDMLinear(), DiscreteUniform(), V(), LDMGrid()),
    "eps/cos": (Cosine(), Uniform(), Epsilon(), CosineGrid()),
    "v/cos": (Cosine(), Uniform(), V(), CosineGrid()),
    "rf": (RectifiedFlow(), Uniform(), Velocity(), UniformGrid()),
    "edm(-1.2,1.2)": (EDM(), Uniform(), FPrediction(), KarrasGrid()),
    "edm(0.6,0.6)": (EDM(P_m=0.6, P_s=0.6), Uniform(), FPrediction(), KarrasGrid()),
    "edm/rf": (MatchedEDM(), Uniform(), FPrediction(), KarrasGrid()),
}
# These differ from rf in training alone.
DENSITIES = {
    "rf/mode(1.29)": Mode(s=1.29),
    "rf/lognorm(0.5,0.6)": LogitNormal(m=0.5, s=0.6),
    "rf/lognorm(0,1)": LogitNormal(),
    "rf/cosmap": CosMap(),
}
TRAINED = {
    **FORMULATIONS,
    **{
        name: (RectifiedFlow(), density, Velocity(), UniformGrid())
        for name, density in DENSITIES.items()
    },
}


@pytest.fixture(params=[1 / 3, 1.0, 3.0], ids=lambda alpha: f"alpha={alpha:.2f}")
def moved(request):
    return Shift(alpha=request.param)


def objective(parts, shift=None):
    path, timesteps, prediction, grid = parts
    shift = shift or Shift()
    return Objective(path=path, timesteps=timesteps, prediction=prediction, shift=shift, grid=grid)


@pytest.fixture(params=FORMULATIONS.values(), ids=FORMULATIONS)
def sampled(request):
    """Formulations that sample in different ways."""
    return objective(request.param)


@pytest.fixture(params=TRAINED.values(), ids=TRAINED)
def trained(request):
    """Formulations that train in different ways."""
    return objective(request.param)


@pytest.fixture(params=TRAINED.values(), ids=TRAINED)
def shifted(request, moved):
    """The same, at all shifts."""
    return objective(request.param, moved)
