"""How fast training goes, what it costs, and what it waits for."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch

from mmdit.engine.loader import Loader
from mmdit.engine.tasks import Work

# Dense bfloat16 peak in TFLOP/s as the vendors state it, by what a device calls itself.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_of(device: torch.device) -> float | None:
    """Peak of a device in TFLOP/s; None where nobody states one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


class Meter:
    """Rates of training between two looks at it.

    Args:
        loader: whose waiting is counted.
        device: of this process.
        world_size: devices that share the work.
    """

    def __init__(self, loader: Loader, device: torch.device, world_size: int) -> None:
        self.loader, self.device, self.world_size = loader, device, world_size
        self.peak = peak_of(device)
        self.restart()

    def restart(self) -> None:
        """Forget what was."""
        self._began, self._waited = time.perf_counter(), self.loader.waited
        self._samples, self._tokens, self._flops = 0, 0, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count no time of the block: for what is not training, such as an evaluation."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped

    def count(self, samples: int, work: Work) -> None:
        """So many more samples were trained on, over all devices."""
        self._samples += samples
        self._tokens += samples * work.tokens
        self._flops += samples * work.flops

    def figures(self) -> dict[str, float]:
        """Rates since `restart`; of tokens and operations only where the task counts them."""
        elapsed = time.perf_counter() - self._began
        found = {
            "images_per_second": self._samples / elapsed,
            "data_wait": (self.loader.waited - self._waited) / elapsed,
            "memory_gb": memory(self.device) / 1e9,
        }
        if self._tokens:
            found["tokens_per_second"] = self._tokens / elapsed
        if self._flops:
            found["tflops"] = self._flops / elapsed / 1e12
            if self.peak is not None:
                found["mfu"] = found["tflops"] / (self.peak * self.world_size)
        return found


def memory(device: torch.device) -> int:
    """Greatest use of memory so far in bytes: of the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    greatest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return greatest if sys.platform == "darwin" else 1024 * greatest  # macOS counts no kilobytes
