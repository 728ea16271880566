"""The 61 formulations of the paper's study (Sec. 5.1), as options of the group `formulation`.

Each picks the yaml of its family in `objective/`, sets the family's parameters, and takes back the
shift of `train.yaml`: the study has none. They are a list made by rule, so they live in Hydra's
store of configs rather than in 61 files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from mmdit.errors import UserError

OBJECTIVES = Path(__file__).resolve().parent / "objective"
PARTS = ("path", "timesteps", "prediction", "shift")
NO_SHIFT = {"shift": {"alpha": 1.0}}
LOGNORM_M = (-1.0, -0.5, 0.0, 0.5, 1.0)
LOGNORM_S = (0.2, 0.6, 1.0, 1.4, 1.8, 2.2)
MODE_S = tuple(-1.0 + i * 2.75 / 6 for i in range(7))  # seven points, uniform in [-1, 1.75]
EDM_P_M = (-1.2, -0.6, 0.0, 0.6, 1.2)
EDM_P_S = (0.6, 1.2, 1.8)


class Formulation(NamedTuple):
    """A row of the study: its name in the paper, and what it sets."""

    name: str
    family: str  # objective/<family>.yaml
    settings: dict[str, Any]  # of the objective

    @property
    def option(self) -> str:
        """The name as an option of a group: rf_lognorm_0.50_1.00 for rf/lognorm(0.50,1.00)."""
        return self.name.replace("/", "_").replace("(", "_").replace(",", "_").rstrip(")")


def study() -> list[Formulation]:
    """All 61, in the order of the paper's description."""
    plain = [
        Formulation("eps/linear", "eps_linear", {}),
        Formulation("v/linear", "v_linear", {}),
        Formulation("eps/cos", "eps_cos", {}),
        Formulation("v/cos", "v_cos", {}),
        Formulation("rf", "rf", {}),  # mode(0)
    ]
    modes = [
        Formulation(f"rf/mode({s:.2f})", "rf_mode", {"timesteps": {"s": s}}) for s in (*MODE_S, 1.0)
    ]
    lognorms = [
        Formulation(f"rf/lognorm({m:.2f},{s:.2f})", "rf_lognorm", {"timesteps": {"m": m, "s": s}})
        for m in LOGNORM_M
        for s in LOGNORM_S
    ]
    edms = [
        Formulation(f"edm({m:.2f},{s:.2f})", "edm", {"path": {"P_m": m, "P_s": s}})
        for m in EDM_P_M
        for s in EDM_P_S
    ]
    rest = [
        Formulation("rf/cosmap", "rf_cosmap", {}),
        Formulation("edm/rf", "edm_rf", {}),
        Formulation("edm/cos", "edm_cos", {}),
    ]
    return [*plain, *modes, *lognorms, *edms, *rest]


def parts_of(row: Formulation) -> dict[str, Any]:
    """Path, density, prediction and shift of a formulation, as its config has them."""
    chosen: dict[str, str] = {}
    for entry in OmegaConf.load(OBJECTIVES / f"{row.family}.yaml").defaults:
        chosen |= {} if isinstance(entry, str) else entry
    files = {part: OmegaConf.load(OBJECTIVES / part / f"{chosen[part]}.yaml") for part in PARTS}
    parts: dict[str, Any] = OmegaConf.to_container(OmegaConf.merge(files, NO_SHIFT, row.settings))  # type: ignore[assignment]
    return parts


def check_variant(variant: str | None, objective: Mapping[str, Any]) -> None:
    """Refuse another objective under the name of one of the 61: a ranking would believe it.

    Raises:
        UserError: a part of `objective` is not what the study means by `variant`.
    """
    for row in study():
        if row.name == variant:
            wanted = parts_of(row)
            for part in PARTS:
                if objective[part] != wanted[part]:
                    raise UserError(
                        f"objective.{part} is {objective[part]}, but the study's {row.name} has "
                        f"{wanted[part]}: leave it as it is, or give another name, variant=..."
                    )


def store_formulations() -> None:
    """Make `formulation=<option>` known to Hydra."""
    for row in study():
        ConfigStore.instance().store(
            group="formulation",
            name=row.option,
            package="_global_",
            node={
                "defaults": [{"override /objective": row.family}, "_self_"],
                "variant": row.name,
                "objective": {**NO_SHIFT, **row.settings},
            },
        )
