"""Runs scripts in processes of their own that need not import anything first.

A process that has imported the package waits for commands and forks for each: what takes seconds
of imports is done once a test session, and a script is still killed, interrupted and measured by
its exit code like any other. What must be a new interpreter (torchrun, memory) is started as such.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

IMPORTED = (
    *("mmdit.cli.train", "mmdit.cli.sample", "mmdit.cli.eval.compositional", "mmdit.cli.eval.rank"),
    "torch._dynamo",  # every optimizer imports it, in seconds
)


class Ready:
    """A script that runs in a forked process, with as much of `subprocess.Popen` as tests use."""

    def __init__(self, words: list[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        self.args = words
        self.returncode: int | None = None
        self._files = tuple(tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        request = {"words": words, "cwd": str(cwd), "env": dict(env)}
        content = json.dumps(request).encode()
        descriptors = [file.fileno() for file in self._files]
        socket.send_fds(self._connection, [len(content).to_bytes(4, "big")], descriptors)
        self._connection.sendall(content)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._answers.readline())
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (_text(file) for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run(
    words: list[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    process = Ready(words, cwd=cwd or Path.cwd(), env=os.environ if env is None else env)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(words, process.wait(), out, err)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace").replace("\r\n", "\n")


@functools.cache
def _server() -> str:
    """The address of this session's server, which ends with the session."""
    folder = tempfile.mkdtemp(prefix="ready-")
    address = f"{folder}/socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, address],
        env=environment,
        stdin=subprocess.PIPE,  # closed when this process ends, in whatever way
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    _kept.append(process)
    return address


_kept: list[Any] = []


# In the server


def serve(address: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    os.close(1)
    os.open(os.devnull, os.O_WRONLY)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        answer(connection)
    shutil.rmtree(Path(address).parent)
    os._exit(0)


def answer(connection: socket.socket) -> None:
    """Start the script and tell its process id, then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, (out, err), _, _ = socket.recv_fds(connection, 4, 2)
    request = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        os.dup2(out, 1)
        os.dup2(err, 2)
        become(request["words"], request["cwd"], request["env"])
    connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(words: list[str], cwd: str, env: dict[str, str]) -> None:
    """What `python script words` does after its imports."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    sys.stdin, sys.stdout, sys.stderr = (
        open(i, mode, buffering=1, closefd=False)  # noqa: SIM115
        for i, mode in enumerate(("r", "w", "w"))
    )
    code: Any = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # waits for the script's threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    serve(sys.argv[1])
