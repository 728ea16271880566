"""The cost of loading a transformer, here and in diffusers: time, and memory beyond the file."""

import importlib.util
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from mmdit import loading, published


class Load(NamedTuple):
    """Cost of one load."""

    seconds: float
    anonymous: int | None  # peak bytes beyond mapped files; None where not available


def measure_loading(source: Path, scratch: Path, *, rounds: int) -> list[dict[str, Any]]:
    """The fastest of several loads, ours and theirs alternating, each in its own process.

    Nothing is converted: the weights keep the dtype of the file. All files are in the page cache,
    because they have just been read or written.

    Args:
        source: file or folder of a transformer.
        scratch: where the weights are saved in diffusers' layout.
        rounds: number of loads of each kind.
    """
    model = loading.load_mmdit(source, verify=False)
    folder = str(published.save_diffusers(model, scratch / "transformer"))
    dtype = str(model.compute_dtype).removeprefix("torch.")
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    del model
    accelerate = "with" if importlib.util.find_spec("accelerate") else "without"
    tasks: dict[str, tuple[Callable[..., Load], tuple[str, ...]]] = {
        "ours, as given": (load_ours, (str(source),)),
        "ours, diffusers' layout": (load_ours, (folder,)),
        f"diffusers, from_pretrained {accelerate} accelerate": (load_theirs, (folder, dtype)),
    }
    loads: dict[str, list[Load]] = {name: [] for name in tasks}
    for _ in tqdm(range(rounds), desc="loading", unit="round", disable=None):
        for name, (load, arguments) in tasks.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                loads[name].append(pool.submit(load, *arguments).result())
    return [
        {"what": name, "bytes": size, "dtype": dtype, **min(found, key=_seconds)._asdict()}
        for name, found in loads.items()
    ]


def _seconds(load: Load) -> float:
    return load.seconds


def load_ours(source: str) -> Load:
    """Cost of loading with our loader, in this process."""
    return timed(lambda: loading.load_mmdit(source, verify=False))


def load_theirs(folder: str, dtype: str) -> Load:
    """Cost of loading with diffusers, in this process."""
    from diffusers import SD3Transformer2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    kind = getattr(torch, dtype)
    return timed(lambda: SD3Transformer2DModel.from_pretrained(folder, torch_dtype=kind))


def timed(load: Callable[[], object]) -> Load:
    """Duration of a call, and the peak increase of anonymous memory, sampled during the call."""
    before = anonymous()
    if before is None:
        start = time.perf_counter()
        load()
        return Load(time.perf_counter() - start, None)
    samples, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            samples.append(anonymous() or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    samples.append(anonymous() or 0)
    done.set()
    watcher.join()
    del model
    return Load(seconds, max(samples) - before)


def anonymous() -> int | None:
    """Bytes of this process that are not backed by a file; None if unavailable (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:")), None)
