"""Work shared by processes through lock files: take what nobody holds, or wait for one's turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from haste_core.errors import Interrupted, InUse
from haste_core.files import locked

POLL_SECONDS = 0.5


@contextmanager
def claimed(path: Path, what: str) -> Iterator[bool]:
    """Holds the lock file `path` if nobody else does; yields whether it does."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(path, what))
            free = True
        except InUse:
            free = False
        yield free


@contextmanager
def turn(path: Path, what: str, stopping: threading.Event | None = None) -> Iterator[None]:
    """Waits until nobody else holds the lock file `path`, and holds it.

    Raises:
        Interrupted: `stopping` was set while waiting.
    """
    stopping = stopping or threading.Event()
    while True:
        with claimed(path, what) as free:
            if free:
                yield
                return
        if stopping.wait(POLL_SECONDS):
            raise Interrupted(f"stopped while waiting for {what}; run again to go on")
