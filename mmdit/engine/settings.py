"""How long the loop trains and how often it does what: the keys of a config's training section."""

from collections.abc import Collection, Mapping
from math import inf
from typing import Any, NamedTuple, Self

from mmdit.errors import UserError
from mmdit.runs.retention import Retention

REAL = ("clip", "timeout")  # settings that need not be whole


class Settings(NamedTuple):
    """How long to train, and how often to do what; see `configs/training`."""

    steps: int
    batch_size: int  # samples of a step, over all processes
    clip: float  # greatest norm of the gradient
    log_every: int
    evaluate_every: int
    save_every: int
    keep: int  # newest checkpoints
    keep_every: int | None = None  # steps of which this is a divisor keep theirs for good
    keep_best: str | None = None  # figure of the evaluation, whose best keeps its checkpoint
    asynchronous: bool = False  # write checkpoints while training goes on
    accumulation: int = 1  # parts that each process makes its share of a batch in
    workers: int = 0  # processes that prepare data for each process that trains
    timeout: float = 1800.0  # seconds after which a step is taken to hang
    nonfinite: str = "stop"  # or skip: what to do where a loss or a gradient is not finite
    section: str = "training"  # of the config, whose keys messages name

    @classmethod
    def of(cls, config: Mapping[Any, Any], where: str) -> Self:
        """The settings among the keys of a config section.

        Raises:
            UserError: a key is missing; a value is no positive number, not whole where it counts
                something, or no such word.
        """
        given = {name: config[name] for name in cls._fields if name in config}
        given["section"] = where
        if missing := [n for n in cls._fields if n not in given and n not in cls._field_defaults]:
            raise UserError(f"{where} has no {', '.join(missing)}, and needs them")
        others = {"workers", "nonfinite", "keep_best", "asynchronous", "section"}
        for name in given.keys() - others:
            if name != "keep_every" or given[name] is not None:
                positive(config, name, where)
        workers, nonfinite = given.get("workers", 0), given.get("nonfinite", "stop")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise UserError(f"{where}.workers={workers} must be a whole number, 0 or more")
        if nonfinite not in ("stop", "skip"):
            raise UserError(f"{where}.nonfinite={nonfinite} must be stop or skip")
        if not isinstance(best := given.get("keep_best"), str | None):
            raise UserError(f"{where}.keep_best={best} must be the name of a figure, as ema/loss")
        if not isinstance(given.get("asynchronous", False), bool):
            raise UserError(f"{where}.asynchronous={given['asynchronous']} must be true or false")
        return cls(**given)

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps."""
        return step % self.evaluate_every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after `step` steps; the best one is that of an evaluation,
        so it holds the weights that were measured.
        """
        best = self.keep_best is not None and self.evaluates(step)
        return step % self.save_every == 0 or step == self.steps or best

    def retention(self, higher_is_better: Collection[str]) -> Retention:
        """Which checkpoints stay.

        Args:
            higher_is_better: figures, without the prefix that tells whose weights were measured.
        """
        figure = (self.keep_best or "").rpartition("/")[2]
        return Retention(
            last=self.keep,
            every=self.keep_every,
            best=self.keep_best,
            highest=figure in higher_is_better,
        )


def positive(config: Mapping[Any, Any], name: str, where: str) -> Any:
    """A value of a config section that counts something, or a real number of `REAL`.

    Raises:
        UserError: it is no number above 0, or not whole.
    """
    value = config[name]
    kind, expected = (float | int, "a") if name in REAL else (int, "a whole")
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < inf:
        raise UserError(f"{where}.{name}={value} must be {expected} number above 0")
    return value
