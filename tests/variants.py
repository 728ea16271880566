"""All variants of a kind, so that laws hold for whatever is registered or has a yaml.

A test marked `@pytest.mark.each("density")` takes an argument `density` and runs once for every
yaml of the group, once for every registered class that has none, and for parameters worth a look.
`pytest --config-dir mine --imports my_module` adds the yamls and the classes of somebody else.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from mmdit import registry
from mmdit.cli import CONFIGS
from mmdit.engine.ema import HalfLife, PowerFunction, Profile
from mmdit.engine.schedules import Schedule, WarmupCosine, WarmupStableDecay
from mmdit.flow.grids import Grid, KarrasGrid
from mmdit.flow.guidance import ClassifierFreeGuidance, Guidance
from mmdit.flow.paths import EDM, LDMLinear, MatchedEDM
from mmdit.flow.paths import Path as FlowPath
from mmdit.flow.predictions import FPrediction, Prediction
from mmdit.flow.schedule import PublishedShift, Shift
from mmdit.flow.timesteps import DiscreteUniform, LogitNormal, Mode, TimestepDensity
from mmdit.flow.transitions import CPS, Ancestral, FlowSDE, GaussianSDE, Transition
from mmdit.models.backbone import PatchBackbone
from tests.tiny import SIZES, Tiny

Build = Callable[[], Any]


class Kind(NamedTuple):
    """Variants that obey the same laws."""

    group: str  # of yamls
    base: type | None  # of the classes; solvers are functions
    more: Mapping[str, Build] = {}  # parameters beside those of the yamls


KINDS = {
    "density": Kind(
        "objective/timesteps",
        TimestepDensity,
        {
            "lognorm(1, 0.6)": lambda: LogitNormal(m=1.0, s=0.6),
            "lognorm(-0.5, 1)": lambda: LogitNormal(m=-0.5, s=1.0),
            "lognorm(-1, 2.2)": lambda: LogitNormal(m=-1.0, s=2.2),
            "mode(-1)": lambda: Mode(s=-1.0),
            "mode(0)": lambda: Mode(s=0.0),
            "mode(1.75)": lambda: Mode(s=1.75),
            "discrete(7)": lambda: DiscreteUniform(steps=7),
        },
    ),
    "path": Kind(
        "objective/path",
        FlowPath,
        {
            "linear(20)": lambda: LDMLinear(beta_start=0.01, beta_end=0.4, steps=20),
            "edm(0.6, 0.6)": lambda: EDM(P_m=0.6, P_s=0.6),
            "matched(1)": lambda: MatchedEDM(sigma_data=1.0),
        },
    ),
    "prediction": Kind(
        "objective/prediction", Prediction, {"F(1)": lambda: FPrediction(sigma_data=1.0)}
    ),
    "shift": Kind(
        "objective/shift",
        Shift,
        {
            "shift(0.3)": lambda: Shift(alpha=0.3),
            "shift(3)": lambda: Shift(alpha=3.0),
            "published(0.5)": lambda: PublishedShift(alpha=0.5),
        },
    ),
    "grid": Kind(
        "grid",
        Grid,
        {"karras(short)": lambda: KarrasGrid(sigma_min=0.1, sigma_max=9.0, rho=2.0)},
    ),
    "solver": Kind("solver", None),
    "transition": Kind(
        "transition",
        Transition,
        {
            "ancestral(0.5)": lambda: Ancestral(eta=0.5),
            "cps(1)": lambda: CPS(eta=1.0),
            "flow-sde(0.3)": lambda: FlowSDE(a=0.3),
            "gaussian(1, 0.5)": lambda: GaussianSDE(variance=1.0, eta=0.5),
        },
    ),
    "guidance": Kind("guide", Guidance, {"cfg(1)": lambda: ClassifierFreeGuidance(scale=1.0)}),
    "schedule": Kind(
        "schedule",
        Schedule,
        {
            "cosine(0.1)": lambda: WarmupCosine(warmup_steps=10, steps=200, final=0.1),
            "cosine without warm-up": lambda: WarmupCosine(warmup_steps=0, steps=200),
            "all decay": lambda: WarmupStableDecay(warmup_steps=0, steps=200, decay_steps=200),
        },
    ),
    "profile": Kind(
        "ema",
        Profile,
        {
            "half-life": lambda: HalfLife(half_life=1e5, batch_size=4),
            "power(0.05)": lambda: PowerFunction(sigma_rel=0.05),
        },
    ),
    "backbone": Kind("model", PatchBackbone),
}
# What the toys have of their own, smaller.
SMALLER = {"toy_mmdit_three": {"clip_length": 3}, "toy_mmdit_x": {"dual_attention": [0]}}

_folders: list[Path] = [CONFIGS]
_packages: list[str] = ["mmdit"]


def look_in(folders: Sequence[str], modules: Sequence[str]) -> None:
    """Take in the yamls and the classes of somebody else."""
    _folders.extend(Path(folder).resolve() for folder in folders)
    _packages.extend(modules)
    for module in modules:
        importlib.import_module(module)


@functools.cache
def variants(kind: str) -> dict[str, Build]:
    """What builds each variant of a kind, by a name for it."""
    _, base, more = KINDS[kind]
    named = {name: functools.partial(_of_yaml, kind, file) for name, file in _yamls(kind).items()}
    with_yaml = [get_object(OmegaConf.load(file)._target_) for file in _yamls(kind).values()]
    bare = [cls for cls in _classes(base) if cls not in with_yaml] if base else []
    # The laws of backbones are about those that read text alone.
    bare = [cls for cls in bare if not getattr(cls, "reads", None)]
    return {**named, **{cls.__name__: functools.partial(_bare, kind, cls) for cls in bare}, **more}


def _yamls(kind: str) -> dict[str, Path]:
    """By name; of backbones of this project the toys, as others are as large as their yaml."""
    found: dict[str, Path] = {}
    for folder in _folders:
        files = sorted((folder / KINDS[kind].group).glob("*.yaml"))
        toys = kind == "backbone" and folder == CONFIGS
        found |= {file.stem: file for file in files if not toys or file.stem.startswith("toy")}
    return found


def _classes(base: type) -> Iterator[type]:
    """Concrete subclasses in this project and in the modules asked for; as registered, if they are.

    Schedules and profiles are not: no checkpoint describes one.
    """
    package = importlib.import_module(base.__module__.rpartition(".")[0])
    if package.__name__ != "mmdit.engine":
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for cls in {base, *_below(base)}:
        own = any(f"{cls.__module__}.".startswith(f"{package}.") for package in _packages)
        known = registry._classes.get(cls.__name__) is cls or base in (Schedule, Profile)
        if own and known and not inspect.isabstract(cls):
            yield cls


def _below(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _below(cls)


def _bare(kind: str, cls: type) -> Any:
    if kind == "backbone":
        return Tiny(cls)
    try:
        return cls()
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"{cls.__module__}.{cls.__name__} cannot be tested: {error}. Give its arguments in a "
            f"yaml, {KINDS[kind].group}/<name>.yaml of configs/ or of --config-dir"
        ) from error


def _of_yaml(kind: str, file: Path) -> Any:
    config = node(KINDS[kind].group, file)
    if kind != "backbone":
        return instantiate(config)
    sizes = {"_target_", "mlp_ratio", "patch_size", "qk_norm", *SIZES}
    own = {str(key): value for key, value in config.items() if key not in sizes}
    own |= SMALLER.get(file.stem, {})
    return Tiny(get_object(config._target_), own)


def node(group: str, file: Path) -> DictConfig:
    """A yaml of a group as a job has it: its defaults filled in, interpolations resolved."""
    around = _surroundings()
    config = OmegaConf.load(file)
    if "defaults" not in config:
        whole = OmegaConf.create({**around, "variant": config})
    else:
        alone = {"defaults": ["_self_", {f"{group}@variant": file.stem}], **around}
        ConfigStore.instance().store(name="variant_alone", node=alone)
        path = ",".join(f"file://{folder}" for folder in _folders[1:])
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            whole = compose("variant_alone", [f"hydra.searchpath=[{path}]"])
    OmegaConf.resolve(whole)
    return whole.variant


@functools.cache
def _surroundings() -> dict[str, Any]:
    """The values of train.yaml and sample.yaml that variants interpolate."""
    train = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"))
    train["training"] = OmegaConf.to_container(OmegaConf.load(CONFIGS / "training/toy.yaml"))
    train["collector"] = {"updates": 2}
    names = ("seed", "image_size", "training", "collector")
    return {key: train[key] for key in names} | {"guidance": 4.5}
