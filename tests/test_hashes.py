"""Hashes that name runs, networks and scores are those that committed reports and finished run folders bear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from haste_core.study import config

FROZEN = json.loads((Path(__file__).parent / "golden" / "hashes.json").read_text())


def hashes(study: config.StudySettings) -> dict[str, str]:
    """Every hash of a study by what it names."""
    runs = {arm: study.run(arm) for arm in study.arms}
    return {
        **{f"run {arm}": run.hash for arm, run in runs.items()},
        **{f"lineage {arm}": run.lineage for arm, run in runs.items()},
        **{f"unaligned {arm}": run.unaligned for arm, run in runs.items()},
        **{f"scores {arm}": study.evaluation_hash_of(study.sample_of(arm)) for arm in study.arms},
        **{f"teacher {i}": study.teacher_hash(teacher) for i, teacher in enumerate(study.teachers())},
        "extractor": study.extractor_hash,
        "autoencoder": study.autoencoder_hash,
        "scores": study.evaluation_hash,
    }


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_hashes_of_the_shipped_studies_never_change(name):
    study, _, profile = name.partition(" ")
    assert hashes(config.load(study, profile or None)) == FROZEN[name]


def test_every_shipped_study_and_profile_is_frozen():
    shipped = {
        f"{name} {profile}".strip() for name in config.studies() for profile in ["", *config.load(name).profiles]
    }
    assert shipped <= set(FROZEN)
