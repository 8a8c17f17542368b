"""Atomic writes, locks, and the folders of a project."""

from __future__ import annotations

import csv
import errno
import importlib.util
import io
import json
import os
import platform
import site
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from haste_core.errors import HasteError, Interrupted, InUse, is_disk_full

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


CHECKOUT = Path(__file__).resolve().parents[1]


def notebooks_folder() -> Path:
    """The project's notebooks: those of the checkout, else those that were installed with the package."""
    bases = (sys.prefix, site.getuserbase(), CHECKOUT)  # the last for pip install --target
    places = [CHECKOUT, *(Path(base) / "share" / "haste" for base in bases)]
    for place in places:
        if (place / "notebooks" / "01_train.ipynb").is_file():
            return place / "notebooks"
    raise HasteError(f"the package's notebooks are in none of {', '.join(map(str, places))}; install it again")


def output_root() -> Path:
    """The folder of runs/ and reports/: HASTE_OUTPUT (HasteError for no folder); in a checkout its top; else here."""
    given = os.environ.get("HASTE_OUTPUT")
    try:
        if given and Path(given).exists() and not Path(given).is_dir():
            raise HasteError(f"HASTE_OUTPUT is {given}, which is no folder; expected a folder, or a path that is free")
    except OSError as error:
        raise HasteError(f"HASTE_OUTPUT is {given}: {error.strerror}; expected the path of a folder") from error
    if given:
        return Path(given).resolve()
    here = Path.cwd()
    mine = (CHECKOUT / "pyproject.toml").is_file() and CHECKOUT in (here, *here.parents)
    return CHECKOUT if mine else here


def unwritable(place: str | Path, error: OSError) -> HasteError:
    """An error in one line for a place that cannot be written; it names HASTE_OUTPUT where that decides the place."""
    path, root = Path(place).absolute(), output_root()
    own = path == root or path in root.parents or any((root / n) in (path, *path.parents) for n in ("runs", "reports"))
    hint = ", such as HASTE_OUTPUT=FOLDER for runs and reports" if own else ""
    return HasteError(f"{place}: {error.strerror}; expected a place that can be written{hint}")


def make_parent(path: Path) -> None:
    """Make the folder that a file goes to; HasteError where it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise unwritable(error.filename or path.parent, error) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Context with a temporary path, whose file replaces `path` when the block ends without an error.

    Raises:
        HasteError: the disk is full, or the place cannot be written; `path` stays as it was.
    """
    make_parent(path)
    # Process numbers are unique on one machine only.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # a place that cannot be written is an OSError, whatever writes there
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise HasteError(
                f"no room to write {path} ({error}); everything saved before is intact, free some space and run again"
            ) from error
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise unwritable(path, error) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented JSON."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows atomically as CSV with exactly these columns; floats keep six significant digits."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, stream.getvalue())


@contextmanager
def locked(path: Path, what: str, wait: bool = False, stopping: threading.Event | None = None) -> Iterator[None]:
    """Context that holds an exclusive lock on the file `path`; the lock ends with the process, however that ends.

    path: the lock file, which stays. what: name of the locked thing in errors. wait: wait for the lock, until the event
    `stopping` is set, instead of raising InUse.

    Raises:
        InUse: another process holds the lock. Interrupted: `stopping` was set.
        HasteError: the file system does not support locks.
    """
    make_parent(path)
    lock = FileLock(path, timeout=-1 if wait else 0, poll_interval=0.1, fallback_to_soft=False)
    try:
        lock.acquire(cancel_check=stopping.is_set if stopping else None)
    except Timeout as error:
        if wait:
            raise Interrupted(f"stopped while waiting for {what}; run again to go on") from error
        holder = path.read_text().strip() or "unknown"
        raise InUse(f"{what} is in use by process {holder} ({path}); wait for it, or stop it first") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise HasteError(
            f"{path} cannot be locked ({error.strerror}); expected a file system with locks for HASTE_OUTPUT, for "
            f"instance NFS 4, or Lustre mounted with -o flock"
        ) from error
    try:
        path.write_text(f"{os.getpid()} on {platform.node()}")
        yield
    finally:
        lock.release()


def package_file(path: str, key: str, needs: str = "") -> Path:
    """The file NAME/PATH inside of an installed package, none of whose code is run.

    key: the setting that names it, for errors. needs: what to type to get the package; its own name by default.

    Raises:
        HasteError: the package is not installed, or has no such file.
    """
    name, _, inside = path.partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        needs = needs or f"pip install {name.replace('_', '-')}"
        raise HasteError(f"{key}: package {name!r} is not installed; type: {needs}")
    root = Path(found.submodule_search_locations[0]).resolve()
    file = (root / inside).resolve()
    if not (file.is_file() and file.is_relative_to(root)):
        expected = f"another version; type: {needs}" if needs else "package:NAME/PATH within the package"
        raise HasteError(f"{key}: package {name} has no file {inside!r}; expected {expected}")
    return file
