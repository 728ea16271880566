"""Learning-rate schedules: the factor of the learning rate at each step.

Pure functions of the step, which know no past: a resumed run sees the rates of an unbroken one, and
nothing can restart. Each begins with a linear warm-up to 1 (App. B.3).
"""

import math
from abc import ABC, abstractmethod

from mmdit.checks import number, whole_number
from mmdit.errors import UserError


class Schedule(ABC):
    """From a step to the factor of the learning rate there.

    Args:
        warmup_steps: of the linear warm-up; 0 is none.

    Raises:
        UserError: no number of them, or a negative one.
    """

    def __init__(self, *, warmup_steps: int) -> None:
        whole_number("warmup_steps", warmup_steps, 0)
        self.warmup_steps = warmup_steps

    end: int | None = None  # the step from which the factor stays at `final`, if there is one
    final: float = 1.0

    def __call__(self, step: int) -> float:
        """Factor for the step that is about to be made, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.warmed_up(step)

    @abstractmethod
    def warmed_up(self, step: int) -> float:
        """Factor after the warm-up; 1 at its end."""

    def check_length(self, steps: int) -> list[str]:
        """Compare the schedule with the length of training, and say what is worth a remark.

        Raises:
            UserError: the learning rate would be 0 for a part of the training.
        """
        end, warmup = self.end, self.warmup_steps
        if end is not None and end < steps and self.final == 0:
            raise UserError(
                f"training.steps={steps} is more than schedule.steps={end}, where the learning "
                f"rate reaches 0: the last {steps - end} steps would train nothing. Leave "
                "schedule.steps out, which then is training.steps; or give schedule.final=0.1, "
                "which is kept afterwards, or schedule=warmup_constant"
            )
        remarks = []
        if end is not None and end < steps:
            remarks.append(f"the last {steps - end} steps are made at {self.final:g} x lr")
        if end is not None and end > steps:
            remarks.append(
                f"training ends {end - steps} steps before its schedule: schedule.steps={end}"
            )
        if warmup >= steps:
            remarks.append(
                f"training.steps={steps} ends within the warm-up, schedule.warmup_steps={warmup}: "
                "the learning rate never reaches optimizer.lr"
            )
        return remarks


class WarmupConstant(Schedule):
    """Linear warm-up, then constant: the paper's (App. B.3)."""

    def __init__(self, *, warmup_steps: int = 1000) -> None:
        super().__init__(warmup_steps=warmup_steps)

    def warmed_up(self, step: int) -> float:
        return 1.0


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to `final` (Loshchilov & Hutter 2017).

    Args:
        warmup_steps: of the linear warm-up.
        steps: where the cosine ends; later steps stay at `final`. A longer run is another schedule
            from the start, so the number is part of the config that a resumed run has to share.
        final: the factor there.

    Raises:
        UserError: the cosine has no step; `final` lies outside of [0, 1].
    """

    def __init__(self, *, warmup_steps: int = 1000, steps: int, final: float = 0.0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        _check_end(steps, warmup_steps, "warmup_steps", final)
        self.steps, self.end, self.final = steps, steps, final

    def warmed_up(self, step: int) -> float:
        past = min(1.0, (step - self.warmup_steps) / (self.steps - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * past)) / 2


class WarmupStableDecay(Schedule):
    """Linear warm-up, constant, and a short decay 1 - sqrt at the end (Hägele et al. 2024).

    About as good as a cosine of the same length, without being bound to one: until the decay
    begins, runs of all lengths are the same.

    Args:
        warmup_steps: of the linear warm-up.
        steps: where the decay ends; later steps stay at `final`.
        decay_steps: its length; about a fifth of `steps` serves well.
        final: the factor at its end.

    Raises:
        UserError: the decay has no step, or begins in the warm-up; `final` lies outside of [0, 1].
    """

    def __init__(
        self, *, warmup_steps: int = 1000, steps: int, decay_steps: int, final: float = 0.0
    ) -> None:
        super().__init__(warmup_steps=warmup_steps)
        whole_number("decay_steps", decay_steps, 1)
        _check_end(steps, warmup_steps + decay_steps - 1, "warmup_steps + decay_steps - 1", final)
        self.steps, self.end, self.decay_steps, self.final = steps, steps, decay_steps, final

    def warmed_up(self, step: int) -> float:
        past = (step - (self.steps - self.decay_steps)) / self.decay_steps
        return self.final + (1 - self.final) * (1 - math.sqrt(min(1.0, max(0.0, past))))


def _check_end(steps: int, least: int, name: str, final: float) -> None:
    whole_number("steps", steps, 1)
    if steps <= least:
        raise UserError(f"steps {steps} of the schedule must be more than {name}, {least}")
    number("final", final, 0, 1)  # a factor of the learning rate
