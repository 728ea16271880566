"""How long the loop trains and how often it does what: the keys of a config's training section."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

from mmdit.checks import flag, number, one_of, text, whole_number
from mmdit.errors import UserError
from mmdit.runs.retention import Retention


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
            UserError: a key is missing, or a value makes no sense.
        """
        given = {name: config[name] for name in cls._fields if name in config}
        given["section"] = where
        if missing := [n for n in cls._fields if n not in given and n not in cls._field_defaults]:
            raise UserError(f"{where} has no {', '.join(missing)}, and needs them")
        settings = cls(**given)
        settings._check()
        return settings

    def _check(self) -> None:
        """Raise UserError where a value makes no sense; its key is named."""
        field = f"{self.section}.{{}}".format
        for name in ("steps", "batch_size", "log_every", "evaluate_every", "save_every", "keep"):
            whole_number(field(name), getattr(self, name))
        if self.keep_every is not None:
            whole_number(field("keep_every"), self.keep_every)
        whole_number(field("accumulation"), self.accumulation)
        whole_number(field("workers"), self.workers, 0)
        number(field("clip"), self.clip, above=0)
        number(field("timeout"), self.timeout, above=0)
        flag(field("asynchronous"), self.asynchronous)
        one_of(field("nonfinite"), self.nonfinite, ("stop", "skip"))
        if self.keep_best is not None:
            text(field("keep_best"), self.keep_best)

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
