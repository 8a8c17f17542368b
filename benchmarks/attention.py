"""Attention alignment, forward and backward: whole maps against chunks of queries, from 64 to 4,096 tokens."""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch

from benchmarks import machine
from haste_core.alignment import DENSE_UP_TO, QUERIES_AT_ONCE, attention_loss
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


def both_passes(student: QK, teacher: QK, chunk: int) -> None:
    """The loss and its gradients to the student's q and k."""
    torch.autograd.grad(attention_loss(student, teacher, chunk=chunk), student)


def measure(rounds: int) -> pd.DataFrame:
    """Seconds and memory by the number of tokens and the queries held at once; the batch shrinks as tokens grow.

    Returns:
        tokens, batch, queries (held at once; all tokens: whole maps), chosen (what training takes), seconds, ratio,
        low, high (to whole maps), peak_gib (of a process that does this alone), returning_gib (the same where the C
        library gives freed blocks back, which is what is really in use; on a GPU equal), rounds.
    """
    rows = []
    for tokens in TOKENS:
        batch = max(1, 1024 // tokens)
        student, teacher = queries_and_keys(tokens, batch)
        held = sorted({tokens, min(tokens, QUERIES_AT_ONCE), min(tokens, 4 * QUERIES_AT_ONCE)})
        actions = {chunk: partial(both_passes, student, teacher, chunk) for chunk in held}
        timed = cost.interleaved(actions, tokens, rounds, device=default_device(), label=f"attention, {tokens} tokens")
        taken = tokens if tokens <= DENSE_UP_TO else QUERIES_AT_ONCE
        rows += [
            {"tokens": tokens, "batch": batch, "queries": chunk, "chosen": chunk == taken, "seconds": t.seconds,
             "ratio": t.ratio, "low": t.low, "high": t.high,
             **_memory(tokens, batch, chunk),
             "rounds": t.rounds}
            for chunk, t in timed.items()
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _memory(tokens: int, batch: int, chunk: int) -> dict[str, float]:
    """Columns `peak_gib` and `returning_gib`."""
    if default_device().type == "cuda":
        given = queries_and_keys(tokens, batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_passes(*given, chunk)
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        return {"peak_gib": gib, "returning_gib": gib}
    alone = (_alone, tokens, batch, chunk)
    return {
        "peak_gib": machine.peak_gib(*alone),
        "returning_gib": machine.peak_gib(*alone, environment=GIVES_BACK),
    }


def _alone(tokens: int, batch: int, chunk: int) -> None:
    both_passes(*queries_and_keys(tokens, batch), chunk)
