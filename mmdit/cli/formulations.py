"""The 61 formulations of the study as options of the group `formulation`.

They are a list made by rule, so they live in Hydra's store of configs rather than in 61 files.
"""

from collections.abc import Mapping
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from mmdit.cli import CONFIGS
from mmdit.errors import UserError
from mmdit.recipes import differences
from mmdit.study.formulations import NO_SHIFT, Formulation, study

OBJECTIVES = CONFIGS / "objective"
PARTS = ("path", "timesteps", "prediction", "shift")


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
                if differences(wanted[part], objective[part]):
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
