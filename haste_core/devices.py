"""The default device, and autocast by the name of a precision."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """While open, autocast of "bf16" or "fp16" is on, or off for "no"."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
