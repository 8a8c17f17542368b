"""Numbers as a person reads them: counts, bytes, times, phases."""

from __future__ import annotations


def phase_name(phase: int) -> str:
    """What the paper calls a phase."""
    return "phase I" if phase == 1 else "phase II"


def count_text(number: float) -> str:
    """A number with K, M or G for thousands, millions and thousands of millions."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def bytes_text(number: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    if not number:
        return "0"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"


def hours_text(hours: float) -> str:
    """Hours in days, hours, minutes or seconds."""
    for unit, size in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:.1f} {unit}"
    return f"{hours * 3600:.1f} s"


def flops_text(number: float) -> str:
    """Floating-point operations with the prefix that suits them, G to Z."""
    if not number:
        return "0"
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12)):
        if number >= size:
            return f"{number / size:.3g} {unit}FLOP"
    return f"{number / 1e9:.3g} GFLOP"
