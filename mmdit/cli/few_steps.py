"""Students of few steps, taught by the model of `initial=`: what `student=` asks for."""

from mmdit.cli.build import Parts
from mmdit.cli.reading import TrainingRequest
from mmdit.cli.students import student_of
from mmdit.engine.parallel import FSDP
from mmdit.engine.tasks import Validation
from mmdit.errors import UserError
from mmdit.fewsteps.pairs import Pairs, Recipe
from mmdit.fewsteps.task import StudentTask
from mmdit.latents.sources import LatentSource
from mmdit.registry import describe


def source_for_student(
    request: TrainingRequest, parts: Parts, source: LatentSource
) -> LatentSource:
    """Where the latents of a run come from: of a student that learns from pairs, those pairs.

    Raises:
        UserError: the config has what students cannot be trained with.
    """
    config, student = request.config, student_of(request.config)
    if student is None:
        return source
    assert request.initial is not None, "open_initial raises without a teacher"
    check_beside(request, parts)
    if student.pairs is None:
        return source
    assert student.guidance is not None and student.teacher_steps is not None
    recipe = Recipe(
        weights_sha256=request.initial.sha256,
        data=request.plain["data"],
        objective=describe(parts.pipeline.objective),
        image_size=config.image_size,
        pairs=student.pairs.number,
        steps=student.teacher_steps,
        guidance=student.guidance,
        seed=student.pairs.seed,
    )
    return Pairs(
        parts.pipeline,
        recipe=recipe,
        data=request.data,
        root=config.runs,
        batch_size=student.pairs.batch_size,
        autocast=request.precision,
    )


def check_beside(request: TrainingRequest, parts: Parts) -> None:
    """Raise UserError if the config has what students cannot be trained with."""
    config, student = request.config, student_of(request.config)
    if config.get("prior") is not None and config.prior.prompt is not None:
        raise UserError("student and prior exclude each other: a student learns from its teacher")
    assert student is not None
    if student.taught and not parts.pipeline.text.frozen:
        raise UserError(
            "a teacher reads captions as the text encoders were when it was trained: they must "
            "stay as they are, train=[mmdit]; only student=reflow trains them, too"
        )
    if (why := student.not_whole) and config.compile:
        raise UserError(f"{why}, which compiled blocks do not allow: leave compile out")
    if why and isinstance(parts.parallel, FSDP):
        raise UserError(f"{why}, which sharded weights do not allow: choose parallel=ddp")


def student_task(
    request: TrainingRequest, parts: Parts, source: LatentSource, validation: Validation
) -> StudentTask | None:
    """The training of the student that the config asks for, if it does."""
    student = student_of(request.config)
    if student is None:
        return None
    assert student.guidance is not None and student.teacher_steps is not None
    opponent = parts.state.opponent
    return StudentTask(
        module=parts.pipeline,
        student=student,
        guidance=student.guidance,
        steps=student.teacher_steps,
        opponent=opponent and opponent.module,
        source=source,
        validation=validation,
        seed=request.config.seed,
        autocast=request.precision,
    )
