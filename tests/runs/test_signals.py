"""Signals are recorded, and a step that hangs ends the process with a stack trace."""

import os
import signal
import subprocess
import sys

import pytest

from mmdit.runs.signals import Signals, time_limit


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_recorded_once(number):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.received is None and sum(signals.flags()) == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert signals.agreed(signals.flags()) == number
        assert signal.getsignal(number) == before  # a second one has its usual effect
    assert signal.getsignal(number) == before


def test_several_hangups_are_recorded_as_one():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Signals() as signals:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == signal.SIGHUP
        os.kill(os.getpid(), signal.SIGHUP)  # during shutdown
        with Signals() as signals:
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_to_one_process_holds_for_all():
    none = Signals()
    assert none.agreed([0.0, 2.0, 0.0, 0.0]) == signal.SIGTERM
    assert none.agreed([0.0] * 4) is None


@pytest.mark.slow
def test_a_step_that_hangs_ends_with_a_stack_trace():
    program = (
        "import time\nfrom mmdit.runs.signals import time_limit\n"
        "def stuck_here():\n    time.sleep(60)\n"
        "with time_limit(0.5):\n    stuck_here()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr and "stuck_here" in ended.stderr


def test_a_step_in_time_is_not_interrupted():
    with time_limit(60):
        pass
