"""Signals set an event, act once each, and are put back; terminating a process that has ended is no error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from haste_core.study import signals


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_sets_the_event_acts_and_is_put_back(number):
    before, acted = [signal.getsignal(s) for s in signals.STOPPING], []
    with signals.catch(lambda: acted.append(1)) as stopping:
        assert not stopping.is_set()
        os.kill(os.getpid(), number)
        assert stopping.wait(5)
    assert acted == [1]
    assert [signal.getsignal(s) for s in signals.STOPPING] == before


def test_outside_the_main_thread_nothing_is_changed():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with signals.catch() as stopping:
            seen.extend([stopping.is_set(), signal.getsignal(signal.SIGTERM) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_terminate_ends_the_living_and_skips_the_dead():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    gone = psutil.Process(dead.pid)
    dead.wait()
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    signals.terminate([gone, psutil.Process(alive.pid)])
    assert alive.wait(10) == -signal.SIGTERM
