"""The 61 formulations of the paper's study (Sec. 5.1).

Each has a family in `configs/objective/` and the values that it sets there. The study uses no
shift, so each formulation resets that of `train.yaml`.
"""

from typing import Any, NamedTuple

NO_SHIFT = {"shift": {"alpha": 1.0}}
LOGNORM_M = (-1.0, -0.5, 0.0, 0.5, 1.0)
LOGNORM_S = (0.2, 0.6, 1.0, 1.4, 1.8, 2.2)
MODE_S = tuple(-1.0 + i * 2.75 / 6 for i in range(7))  # seven points, uniform in [-1, 1.75]
EDM_P_M = (-1.2, -0.6, 0.0, 0.6, 1.2)
EDM_P_S = (0.6, 1.2, 1.8)


class Formulation(NamedTuple):
    """A formulation of the study: its name in the paper, and its settings."""

    name: str
    family: str  # objective/<family>.yaml
    settings: dict[str, Any]  # overrides of the family's objective

    @property
    def option(self) -> str:
        """The name as a config option: rf_lognorm_0.50_1.00 for rf/lognorm(0.50,1.00)."""
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
