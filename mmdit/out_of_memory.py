"""Clear error messages when the GPU or the CPU runs out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmdit.errors import UserError

# Messages of C10's CPU allocator, the kernel, CUDA's driver and cuBLAS.
MESSAGES = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error was raised because memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(m in str(error) for m in MESSAGES)


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a UserError.

    Args:
        what: what the block does, for the message.
        advice: what would need less memory, for the message.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise UserError(f"{what}: out of memory. Try {advice}") from error
        raise
