"""Where numbers come from: commit, versions, machine, minutes and memory, kept beside what they describe."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from haste_core.files import write_json

_PACKAGES = ("torch", "torchvision", "timm", "torch-fidelity", "accelerate", "numpy", "scikit-learn", "snakemake",
             "papermill")  # fmt: skip


def now() -> str:
    """The present time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def commit() -> str:
    """The commit of the code, with "+changes" when tracked code differs from it, or "unknown" outside git."""
    where = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.ipynb", "*.yaml", "Snakefile")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@cache
def environment() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


@cache
def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine, and its GPU if it has one."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(gib, 1), "gpu": gpu}


def peak_memory_gib() -> float:
    """The largest resident memory this process has had, in GiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent held when it started this process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if platform.system() == "Darwin" else 2**20)


def read(folder: Path) -> dict[str, Any]:
    """The provenance kept in `folder`, empty when there is none."""
    path = folder / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def note(folder: Path, **facts: Any) -> None:
    """Add facts to the provenance of `folder`."""
    write_json(folder / "provenance.json", read(folder) | facts)


@contextmanager
def session(folder: Path, **facts: Any) -> Iterator[dict[str, Any]]:
    """Records one stretch of work in `folder`, however it ends: when, how long, with which code and versions.

    Yields a dict to which the block can add facts.
    """
    record: dict[str, Any] = {"start": now(), "commit": commit(), "environment": environment(), "machine": machine()}
    record |= facts
    begun = time.perf_counter()
    try:
        yield record
    finally:
        record |= {"seconds": round(time.perf_counter() - begun, 2), "peak_memory_gib": round(peak_memory_gib(), 3)}
        note(folder, sessions=[*read(folder).get("sessions", []), record])


def seconds(folder: Path) -> float:
    """Seconds of all sessions recorded in `folder`."""
    return sum(s["seconds"] for s in read(folder).get("sessions", []))
