"""Seeds of independent random streams, one per role and seed."""

from __future__ import annotations

import hashlib

# Version of the rule below; part of the hashes that name runs, teachers and extractors, so that results drawn from the
# streams of version 1 (consecutive numbers, which runs, teacher and extractor shared) are never taken for new ones.
STREAMS = 2


def stream(role: str, seed: int) -> int:
    """Seed of one generator: the first 8 bytes of SHA-256 of "haste/<role>/<seed>", in [0, 2**63)."""
    return int.from_bytes(hashlib.sha256(f"haste/{role}/{seed}".encode()).digest()[:8], "big") % 2**63
