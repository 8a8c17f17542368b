"""A few rounds of `faults.py`, which tries many."""

from __future__ import annotations

import random
import subprocess

import pytest
from faults import KINDS, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Two of the commands; `faults.py` by hand takes all of them."""
    return Bench(tmp_path_factory.mktemp("faults"), ["train", "sample"])


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    """Skips where no file system can be mounted."""
    place = tmp_path_factory.mktemp("mount")
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_fault_a_later_call_ends_as_without_it(bench, kind, request):
    if kind in ("full", "read-only", "places"):
        request.getfixturevalue("mounts")
    rows = list(KINDS[kind](bench, 2 if kind == "malformed" else 1, random.Random(kind)))
    assert sum(row.tried for row in rows) > 0
    assert {f"{row.what}, {row.fault}": row.problems for row in rows if row.problems} == {}
