"""Training outlives W&B."""

from typing import Any

import pytest

from mmdit.engine.wandb_logger import WandbLogger


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
