"""Rounds: what happens between the steps of a training that makes its own data."""

from typing import Any, Protocol

from mmdit.engine.settings import Settings
from mmdit.engine.state import TrainState
from mmdit.errors import UserError


class Collector(Protocol):
    """Makes the data of a round from the averaged weights, before the steps that train on them.

    What it makes depends on those weights and the number of the round alone. So a run that was
    stopped within a round repeats it from the checkpoint before, and checkpoints hold no data.
    """

    @property
    def updates(self) -> int:
        """Steps of a round."""

    def __call__(self, number: int, averaged: Any) -> dict[str, float]:
        """Collect the data of round `number`, from 0, in all processes; returns what is logged."""


def begins(collector: Collector | None, step: int) -> bool:
    """Whether a round begins after `step` steps: only there is a run saved."""
    return collector is None or step % collector.updates == 0


def collect(collector: Collector, state: TrainState) -> dict[str, float]:
    """Collect the data of the round that begins now; returns what is logged."""
    return collector(state.step // collector.updates, state.ema.module)


def check_rounds(collector: Collector, settings: Settings) -> None:
    """Check that whole rounds are trained, evaluated and saved.

    Raises:
        UserError: they are not; the message names the key.
    """
    for name in ("steps", "evaluate_every", "save_every"):
        value = getattr(settings, name)
        if value % collector.updates:
            raise UserError(
                f"{settings.section}.{name}={value} must be a multiple of collector.updates="
                f"{collector.updates}, the steps of a round"
            )
