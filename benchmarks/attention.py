"""Attention alignment, forward and backward: whole maps against chunks of queries, from 64 to 4,096 tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pandas as pd
import torch
from torch import Tensor

from benchmarks import machine
from haste_core.alignment import QUERIES_AT_ONCE, attention_loss, queries_at_once, whole_maps
from haste_core.devices import default_device
from haste_core.study import cost
from haste_core.taps import QK

TOKENS = (64, 256, 1024, 4096)
HEADS, WIDTH = 12, 64
# glibc keeps freed blocks below 32 MiB, such as a chunk's maps, for itself; from this threshold on it returns them.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)}


def queries_and_keys(tokens: int, batch: int) -> tuple[QK, QK]:
    """Random q and k of a student, which wants gradients, and of a teacher, (batch, 12, tokens, 64) float32."""
    device = default_device()
    drawn = [torch.randn(batch, HEADS, tokens, WIDTH, device=device) for _ in range(4)]
    return (drawn[0].requires_grad_(), drawn[1].requires_grad_()), (drawn[2], drawn[3])


def both_passes(student: QK, teacher: QK, chunk: int, compiled: bool = False) -> None:
    """The loss and its gradients to the student's q and k."""
    whole = _compiled() if compiled else None
    torch.autograd.grad(attention_loss(student, teacher, chunk=chunk, whole=whole), student)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(whole_maps, dynamic=False)


def measure(rounds: int) -> pd.DataFrame:
    """Seconds and memory by the number of tokens and the queries held at once; the batch shrinks as tokens grow.

    Returns:
        tokens, batch, queries (held at once; all tokens: whole maps), compiled (on a GPU whole maps are timed compiled,
        too), chosen (what training takes), seconds, ratio, low, high (to whole maps), peak_gib (of a process that does
        this alone; on a GPU of the two passes), returning_gib (the same where the C library gives freed blocks back,
        which is what is really in use; on a GPU equal), rounds.
    """
    rows, on_gpu = [], default_device().type == "cuda"
    for tokens in TOKENS:
        batch = max(1, (8192 if on_gpu else 1024) // tokens)
        student, teacher = queries_and_keys(tokens, batch)
        held = sorted({tokens, min(tokens, QUERIES_AT_ONCE), min(tokens, 4 * QUERIES_AT_ONCE)})
        ways = [(chunk, False) for chunk in held] + [(tokens, True)] * on_gpu
        actions = {way: partial(both_passes, student, teacher, *way) for way in ways}
        timed = cost.interleaved(
            actions, (tokens, False), rounds, device=default_device(), label=f"attention, {tokens} tokens"
        )
        taken = queries_at_once(student[0].shape, default_device().type)
        rows += [
            {"tokens": tokens, "batch": batch, "queries": chunk, "compiled": compiled,
             "chosen": chunk == taken and not compiled, "seconds": t.seconds,
             "ratio": t.ratio, "low": t.low, "high": t.high,
             **_memory(tokens, batch, chunk, compiled),
             "rounds": t.rounds}
            for (chunk, compiled), t in timed.items()
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _memory(tokens: int, batch: int, chunk: int, compiled: bool) -> dict[str, float]:
    """Columns `peak_gib` and `returning_gib`."""
    if default_device().type == "cuda":
        given = queries_and_keys(tokens, batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_passes(*given, chunk, compiled)
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        return {"peak_gib": gib, "returning_gib": gib}
    alone = (_alone, tokens, batch, chunk)
    return {
        "peak_gib": machine.peak_gib(*alone),
        "returning_gib": machine.peak_gib(*alone, environment=GIVES_BACK),
    }


def _alone(tokens: int, batch: int, chunk: int) -> None:
    both_passes(*queries_and_keys(tokens, batch), chunk)
