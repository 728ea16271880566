"""Training outlives W&B."""

import re
from pathlib import Path
from typing import Any

import pytest
import wandb

from mmdit.engine.wandb_logger import WandbLogger
from mmdit.errors import UserError


class Gone:
    """A W&B run whose connection is lost."""

    def __getattr__(self, name: str) -> Any:
        def lost(*args: object, **kwargs: object) -> None:
            raise ConnectionError("no route to host")

        return lost


def test_a_lost_connection_is_told_once_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = WandbLogger(mode="offline")
    logger._run = Gone()
    for step in range(3):
        logger.log(step, {"loss": 1.0})
    logger.close()
    assert [record.getMessage() for record in caplog.records] == [
        "W&B is lost (no route to host): training goes on, and all figures are in metrics.jsonl"
    ]


def test_a_run_of_any_folder_name_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        wandb.Settings(run_id=options["id"], run_name=options["name"])  # refuses what W&B refuses
        begun.append(options)

    monkeypatch.setattr(wandb, "init", init)
    folders = [tmp_path / "default,seed=0", tmp_path / "default,seed=1"]
    for folder in folders:
        folder.mkdir()
    for folder in [*folders, *folders]:  # and once more, when the runs go on
        WandbLogger().start(folder, {})
    assert [each["name"] for each in begun] == [folder.name for folder in folders] * 2
    ids = [each["id"] for each in begun]
    assert ids[:2] == ids[2:] and ids[0] != ids[1]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (wandb.errors.AuthenticationError("the key is too short"), "log in by `wandb login`"),
        (wandb.errors.UsageError("No API key configured."), "log in by `wandb login`"),
        (wandb.errors.CommError("no route to host"), "set logger.mode=offline"),
        (wandb.errors.UsageError("Invalid project name 'a/b'"), "mend that"),
    ],
)
def test_advice_is_about_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: wandb.Error, advice: str
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", init)
    told = re.escape(f"W&B did not start ({error}): {advice}")
    with pytest.raises(UserError, match=told):
        WandbLogger().start(tmp_path, {})
