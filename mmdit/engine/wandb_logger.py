"""Weights & Biases: the only file that imports wandb."""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmdit.atomic import write_atomically
from mmdit.errors import UserError, first_line
from mmdit.printable import logger
from mmdit.runs.files import writing

log = logger(__name__)


class WandbLogger:
    """Sends figures and pictures to W&B, of a run that goes on to the same place as before.

    Args:
        project: name of the W&B project.
        mode: 'online' or 'offline' (written to the run folder; `wandb sync` sends it later).
    """

    def __init__(self, *, project: str = "mmdit", mode: str = "online") -> None:
        if mode not in ("online", "offline"):
            raise ValueError(f"logger.mode {mode!r} must be 'online' or 'offline'")
        self.project, self.mode = project, mode
        self._run: Any = None
        self._lost = False

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        number = id_of(folder)
        try:
            self._run = wandb.init(
                project=self.project,
                name=folder.name,
                id=number,
                resume="allow",
                dir=str(folder),
                mode=self.mode,  # type: ignore[arg-type]
                config=dict(config),
            )
        except wandb.Error as error:
            if isinstance(error, wandb.errors.AuthenticationError) or "API key" in str(error):
                advice = "log in by `wandb login`, or set logger.mode=offline"
            elif isinstance(error, wandb.errors.CommError):
                advice = "set logger.mode=offline, and send it later by `wandb sync`"
            else:
                advice = "mend that, or train without W&B by logger=none"
            raise UserError(f"W&B did not start ({first_line(error)}): {advice}") from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._send(lambda: self._run.log(dict(figures), step=step))

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        self._send(lambda: self._run.log({name: wandb.Image(str(path))}, step=step))

    def close(self) -> None:
        if self._run is not None:
            self._send(self._run.finish)

    def _send(self, send: Callable[[], object]) -> None:
        """Training outlives W&B, which itself waits and tries again while it can."""
        import wandb

        try:
            send()
        except (wandb.Error, OSError) as error:
            if not self._lost:
                log.warning(
                    "W&B is lost (%s): training goes on, and all figures are in metrics.jsonl",
                    first_line(error),
                )
            self._lost = True


def id_of(folder: Path) -> str:
    """The id of a run at W&B, drawn once: names of folders hold characters that an id must not.

    Raises:
        UserError: it cannot be kept in the folder.
    """
    path = folder / "wandb_id.txt"
    with writing(path, folder):
        if not path.is_file():
            write_atomically(path, secrets.token_hex(8).encode())
        return path.read_text().strip()
