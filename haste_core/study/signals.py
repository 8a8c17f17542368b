"""SIGTERM and SIGINT as an event, so that running work can save before it ends."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import psutil

STOPPING = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1


@contextmanager
def catch(act: Callable[[], None] | None = None) -> Iterator[threading.Event]:
    """While open, SIGTERM and SIGINT set the event (and call `act`) instead of ending the process.

    Only the main thread can change what signals do; in another one the event stays unset.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def handler(*_: object) -> None:
        stopping.set()
        if act is not None:
            act()

    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield stopping
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def terminate(processes: Iterable[psutil.Process]) -> None:
    """Send SIGTERM to each process that is still there."""
    for process in processes:
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            continue  # it has ended


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the system send this process a signal when the one that started it dies, however it dies; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
