"""The student of few steps that a config asks for, and what it takes over from its teacher."""

from collections.abc import Collection

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from mmdit.engine.state import Opponent
from mmdit.errors import UserError
from mmdit.fewsteps.student import Student
from mmdit.pipeline import Pipeline


def student_of(config: DictConfig) -> Student | None:
    """The way to train a student of few steps that a config asks for."""
    student: Student | None = instantiate(config.get("student"))
    return student


def opponent_of(config: DictConfig, pipeline: Pipeline) -> Opponent | None:
    """What is trained beside the student that a config asks for, if anything; from the seed."""
    student = student_of(config)
    if student is None:
        return None
    torch.manual_seed(config.seed)
    opposed = student.opponent(pipeline.mmdit)
    if opposed is None:
        return None
    module = opposed.module.to(pipeline.device)
    try:
        return Opponent(module, opposed.optimizer(module))
    except UserError as error:  # names its keys as those of the student's optimizer
        raise UserError(f"student.{error}") from error


def take_over(config: DictConfig, teacher: Pipeline, given: Collection[str]) -> Student | None:
    """The student that a config asks for, in which values of null become those of the teacher.

    Raises:
        UserError: an adapter cannot hold what the student has of its own, or encoders are dropped.
    """
    if student_of(config) is None:
        return None
    if "text.dropout" in given:
        raise UserError(
            "text.dropout: a student samples without guidance and keeps all text encoders; leave "
            "it out"
        )
    for key, value in {"guidance": teacher.guidance, "teacher_steps": teacher.steps}.items():
        if config.student[key] is None:
            config.student[key] = value
    student = student_of(config)
    assert student is not None
    if (why := student.not_adapter) and config.get("adapter") is not None:
        raise UserError(
            f"{why}, which an adapter does not hold: leave adapter out, or choose student=reflow"
        )
    return student
