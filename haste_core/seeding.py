"""Seeds of independent random streams, one per role and seed."""

from __future__ import annotations

import hashlib

# Version of the rule below, part of the hashes of runs, teachers and extractors.
STREAMS = 2


def stream(role: str, seed: int) -> int:
    """Seed of one generator: the first 8 bytes of SHA-256 of "haste/<role>/<seed>", in [0, 2**63)."""
    return int.from_bytes(hashlib.sha256(f"haste/{role}/{seed}".encode()).digest()[:8], "big") % 2**63
