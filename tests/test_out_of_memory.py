"""A lack of memory ends in one message that says what needs less, wherever it shows."""

import errno
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdit.cli.messages import explain
from mmdit.data.shapes import Shapes
from mmdit.engine.loggers import NoLogger
from mmdit.engine.reports import Reports
from mmdit.engine.tasks import AutoencoderTask
from mmdit.errors import UserError
from mmdit.latents.encoding import encode_each
from mmdit.models.autoencoder import Autoencoder
from mmdit.out_of_memory import enough_memory
from mmdit.processes import Processes

each_error = pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to ..."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:24] or "MemoryError",
)


@pytest.fixture
def autoencoder() -> Autoencoder:
    return Autoencoder(latent_channels=4, width=32, multipliers=(1, 1), blocks=0)


@pytest.fixture
def task(autoencoder: Autoencoder) -> AutoencoderTask:
    data = Shapes(split="train", image_size=32, samples=6)
    return AutoencoderTask(
        module=autoencoder,
        data=data,
        truth=data.square(range(2)).images,
        kl_weight=0.1,
        seed=0,
        autocast=nullcontext,
    )


def running_out(part: nn.Module, error: Exception) -> None:
    def forward(*_: object) -> None:
        raise error

    part.forward = forward  # type: ignore[method-assign]


@each_error
def test_a_command_line_says_what_needs_less(error: Exception, tmp_path: Path) -> None:
    told = explain(error, in_job=True, config_dir=tmp_path)
    assert told is not None and told.startswith("out of memory (") and "batch_size" in told


@each_error
def test_while_latents_are_encoded(error: Exception, autoencoder: Autoencoder) -> None:
    data = Shapes(split="train", image_size=32, samples=6)
    running_out(autoencoder.encoder, error)
    with pytest.raises(UserError, match=r"^encoding 6 images of 32 x 32: out of memory\. Try pre"):
        list(encode_each(data, range(6), autoencoder=autoencoder, autocast=nullcontext, threads=1))


@each_error
def test_while_the_autoencoder_is_measured(error: Exception, task: AutoencoderTask) -> None:
    running_out(task.module.encoder, error)
    with pytest.raises(UserError, match=r"^measuring the latents of 6 images of 32 x 32: out of"):
        task.evaluate(task.module)


@pytest.mark.parametrize("spoil", ["evaluate", "picture"])
def test_while_a_run_is_evaluated(
    task: AutoencoderTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    def fail(module: nn.Module) -> None:
        raise MemoryError

    reports = Reports(
        tmp_path, task=task, logger=NoLogger(), processes=Processes(), start=0, steps=9
    )
    monkeypatch.setattr(task, spoil, fail)
    with pytest.raises(UserError, match=r"^evaluating step 3: out of memory"):
        reports.evaluate(3, task.module, task.module, {"ema": task.module, "raw": task.module})
    reports.close()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EIO, "I/O error")])
def test_another_error_is_raised_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])), enough_memory("a", "b"):
        raise error
