"""Error messages for when an allocator, of a GPU or of the CPU, runs out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmdit.errors import UserError

# As C10's allocator of the CPU, CUDA's driver, cuBLAS and the kernel put it.
SAYINGS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this was raised for lack of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(s in str(error) for s in SAYINGS)


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a lack of memory inside the block into a UserError: what was done, and what needs less.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise UserError(f"{what}: out of memory. Try {advice}") from error
        raise
