"""Errors that a user can cause, and how they are worded."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class HasteError(Exception):
    """One clear line for the user: what was given and what is expected. The command line exits with status 2."""


class InUse(HasteError):
    """Another process holds what this one needs."""


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived during training; everything up to this step is saved. Exit status 143."""


def unknown(what: str, given: object, possible: Iterable[object], within: str = "") -> HasteError:
    """An error that names what was given, the nearest match, and everything that is possible.

    within: the path of the section that `given` is a key of.
    """
    names = [str(p) for p in possible]
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return HasteError(f"unknown {what} {within + str(given)!r}{hint}; expected one of: {', '.join(names) or 'none'}")


def is_disk_full(error: BaseException) -> bool:
    """True when writing failed for want of room: ENOSPC, a quota, or a file-size limit.

    safetensors reports such failures with the operating system's text only, hence the second test.
    """
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return any(f"os error {code}" in str(error) for code in _NO_ROOM)
