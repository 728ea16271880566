"""Opens files that were made to hang or to eat memory, each in a process of its own.

Prints a JSON line for each: what was raised, seconds of the processor, MB beyond those before.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmdit
import mmdit.loading  # what is measured is not how long imports take


def opened(path: str) -> dict[str, object]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    raised = "nothing"
    resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
    try:
        if mmdit.is_native(path):
            mmdit.load_pipeline(path)
        else:
            mmdit.load_mmdit(path, allow_pickle=True)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"path": path, "raised": raised, "seconds": seconds, "megabytes": grown / 1024}


def measured(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What opening each of the files gave and cost, in a process of its own."""
    command = [sys.executable, __file__, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    for path in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            print(json.dumps(opened(path)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
