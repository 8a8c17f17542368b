"""Errors that a user can cause, and words of messages."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class HasteError(Exception):
    """One line for the user: what was given, what is expected, what to do. The command line exits with status 2."""


class InUse(HasteError):
    """Another process holds the lock."""


class NotDownloaded(HasteError):
    """A file or data set is downloaded at first use, and is not here yet."""


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; everything up to this step is saved. The command line exits with status 143."""


def unknown(what: str, given: object, known: Iterable[object]) -> HasteError:
    """An error that names `given`, its nearest match, and the known names."""
    names = [str(p) for p in known]
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    expected = f"expected one of: {', '.join(names)}" if names else "expected none, since none are defined"
    return HasteError(f"unknown {what} {str(given)!r}{hint}; {expected}")


def one_line(error: BaseException) -> str:
    """The text of an error of another library, in one line."""
    return " ".join(str(error).split())


def number_of(count: int, noun: str) -> str:
    """Words such as "1 image", "1,797 images" and "10 classes"."""
    return f"{count:,} {noun}{('es' if noun.endswith('s') else 's') * (count != 1)}"


def is_disk_full(error: BaseException) -> bool:
    """True when writing failed for want of room: a full disk, a quota, or a file-size limit."""
    found: BaseException | None = error
    while found is not None:
        # safetensors reports such failures by the operating system's text alone, torch.save by an error of its own.
        if getattr(found, "errno", None) in _NO_ROOM or any(f"os error {code}" in str(found) for code in _NO_ROOM):
            return True
        found = found.__cause__ or found.__context__
    return False
