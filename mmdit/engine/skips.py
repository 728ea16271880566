"""Steps that are left out because a loss or a gradient is not finite."""

from collections import deque

from mmdit.engine.advice import where_not_finite
from mmdit.errors import UserError
from mmdit.printable import logger

log = logger(__name__)
MOST_IN_A_ROW = 100  # after which nothing will be finite any more
SHARE = 0.1  # of the last `WINDOW` steps, or of all at the end: above, the run is ruined
WINDOW = 100


class Skips:
    """Counts the steps that are left out, and ends a run that leaves out too many.

    Args:
        total: of the run so far.
        section: of the config, whose keys messages name.
    """

    def __init__(self, total: int = 0, *, section: str = "training") -> None:
        self.total, self.section = total, section
        self._in_a_row = 0
        self._recent = deque[bool](maxlen=WINDOW)

    def count(self, step: int, *, skipped: bool) -> None:
        """Note whether a step was left out."""
        self._recent.append(skipped)
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped:
            self.total += 1
            log.warning("step %d: loss or gradient not finite, step left out", step)

    def check(self, step: int, *, last: bool) -> None:
        """Look whether there are too many after a step.

        Raises:
            UserError: too many in a row, of the last ones or, after the `last` step, of all.
        """
        if self._in_a_row == MOST_IN_A_ROW:
            raise UserError(
                f"step {step}: {self._in_a_row} steps in a row were left out, because loss or "
                f"gradient was not finite. {where_not_finite(self.section)}"
            )
        made, recent = step + 1, sum(self._recent)
        if len(self._recent) == WINDOW and recent > SHARE * WINDOW:
            raise self._ruined(step, f"{recent} of the last {WINDOW}")
        if last and (self.total > max(1, SHARE * made) or self.total == made):
            raise self._ruined(step, f"{self.total} of all {made}")

    def figures(self) -> dict[str, int]:
        """What a checkpoint says of them: nothing where there are none."""
        return {"skipped_steps": self.total} if self.total else {}

    def _ruined(self, step: int, count: str) -> UserError:
        return UserError(
            f"step {step}: {count} steps were left out, because loss or gradient was not finite: "
            f"more than {SHARE:.0%} train another model than was asked for. "
            f"{where_not_finite(self.section)}"
        )
