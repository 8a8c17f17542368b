"""Teacher and extractor are made once, however many runs ask for them."""

from __future__ import annotations

import pytest

from haste_core import preparation, runs
from haste_core.errors import InUse
from haste_core.files import locked


@pytest.mark.parametrize(
    ("prepare", "where"),
    [
        (preparation.prepare_teacher, lambda study: runs.teacher_path(study, study.teacher)),
        (preparation.prepare_extractor, runs.extractor_path),
    ],
    ids=["teacher", "extractor"],
)
def test_runs_that_begin_together_read_what_is_there_and_do_not_make_it_twice(make_study, output, prepare, where):
    study = make_study("teacher.weights=pretrain", "teacher.fitting.steps=5", "teacher.fitting.min_accuracy=0")
    path = where(study)
    with locked(path.parent / "run.lock", "what another makes"), pytest.raises(InUse):
        prepare(study)
    made = prepare(study)
    written = path.stat().st_mtime_ns
    with locked(path.parent / "run.lock", "what another reads"):
        assert prepare(study) == made
    assert path.stat().st_mtime_ns == written
