"""Opens files that were made to hang or to eat memory, each in a process of its own.

Prints a JSON line for each: what was raised, seconds of the processor, MB beyond those before.
"""

import json
import os
import resource
import sys
import time

import mmdit


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


for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        print(json.dumps(opened(path)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
