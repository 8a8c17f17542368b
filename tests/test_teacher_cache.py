"""What the teacher sees, written down once: the same training, no teacher call, and a size that is told first."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from haste_core import training
from haste_core.errors import HasteError
from haste_core.study.runs import Run
from haste_core.teacher import Teacher

STILL = ["data.augment={shift: 0, rotation: 0, scale: 0}", "train.steps=10", "train.keep=[]"]
CACHED = [*STILL, "train.cache_teacher=true"]


def losses(run, steps=6):
    state = training.open_trainer(run)
    return state, [training.train_step(state) for _ in range(steps)]


@pytest.mark.parametrize("arm", ["repa", "atta", "haste"])
def test_a_run_with_a_cache_trains_as_one_without(output, make_study, arm):
    _, plain = losses(Run(make_study(*STILL), arm, 0))
    state, cached = losses(Run(make_study(*CACHED), arm, 0))
    assert state.cache is not None
    for one, other in zip(plain, cached, strict=True):
        assert one.keys() == other.keys()
        assert_close(torch.stack(list(one.values())), torch.stack(list(other.values())), rtol=1e-5, atol=1e-6)


def test_the_teacher_is_not_called_once_it_is_written_down(output, make_study, monkeypatch):
    run = Run(make_study(*CACHED), "haste", 0)
    training.open_trainer(run)

    def called(self, *given):
        raise AssertionError("the teacher was called")

    monkeypatch.setattr(Teacher, "forward", called)
    state, _ = losses(run, 10)  # over the switch at step 8
    assert state.cache is None  # phase II has nothing of it
    assert state.alignment is None


def test_a_cached_run_through_micro_batches_and_ahead_of_time_is_the_same(output, make_study):
    _, plain = losses(Run(make_study(*STILL), "haste", 0))
    _, cached = losses(Run(make_study(*CACHED, "train.accumulate=4", "train.prefetch=true"), "haste", 0))
    for one, other in zip(plain, cached, strict=True):
        assert_close(one["loss"], other["loss"], rtol=1e-5, atol=1e-6)


def test_its_size_is_told_first_and_is_what_lies_on_the_disk(output, make_study, capsys):
    training.open_trainer(Run(make_study(*CACHED), "haste", 0))
    (folder,) = output.glob("runs/digits/teacher-*/seen-*/")
    arrays = [np.load(path, mmap_mode="r") for path in folder.glob("*.npy")]
    # 1,212 images of 16 tokens: tokens of width 24, and q and k of two blocks with 4 heads of width 6.
    assert sum(array.nbytes for array in arrays) == 1212 * 16 * 24 * 4 * 5
    assert f"1,212 images takes {1212 * 16 * 24 * 4 * 5 / 2**30:.3f} GiB" in capsys.readouterr().out
    training.open_trainer(Run(make_study(*CACHED), "haste", 1))  # another seed reads the same
    assert capsys.readouterr().out == ""


def test_half_precision_takes_half_the_room(output, make_study):
    state, _ = losses(Run(make_study(*CACHED, "teacher.precision=bf16"), "haste", 0), 1)
    assert state.cache is not None
    seen = state.cache.seen(torch.tensor([3, 5]), torch.device("cpu"))
    exact = state.alignment.teacher(state.batches.dataset.images("train")[0][[3, 5]], state.alignment.teacher_blocks)
    assert seen.qk[1][0].dtype == torch.bfloat16
    assert_close(seen.qk[1][0], exact.qk[1][0], rtol=0.05, atol=0.05)
    (folder,) = output.glob("runs/digits/teacher-*/seen-*/")
    assert np.load(folder / "q1.npy", mmap_mode="r").itemsize == 2


def test_augmented_data_are_refused(output, make_study):
    with pytest.raises(HasteError, match=r"cache_teacher with data\.augment.*possible: train.cache_teacher=false"):
        training.open_trainer(Run(make_study("train.cache_teacher=true"), "haste", 0))


def test_a_disk_without_room_is_an_error_before_anything_is_written(output, make_study, monkeypatch):
    usage = shutil.disk_usage(output)._replace(free=1000)
    monkeypatch.setattr("haste_core.teacher_cache.shutil.disk_usage", lambda path: usage)
    with pytest.raises(HasteError, match=r"needs 0\.01 GiB in .*, 0\.00 are free"):
        training.open_trainer(Run(make_study(*CACHED), "haste", 0))
    assert not list(output.rglob("*.npy"))


def test_a_cache_that_was_not_finished_is_made_again(output, make_study):
    run = Run(make_study(*CACHED), "haste", 0)
    training.open_trainer(run)
    (folder,) = output.glob("runs/digits/teacher-*/seen-*/")
    tokens = np.load(folder / "tokens.npy").copy()
    unfinished = folder.with_suffix(".unfinished")
    folder.rename(unfinished)
    np.save(unfinished / "tokens.npy", np.zeros(3))
    training.open_trainer(run)
    assert np.array_equal(np.load(folder / "tokens.npy"), tokens)
    assert not unfinished.exists()


def test_vanilla_runs_and_phase_two_make_no_cache(output, make_study):
    losses(Run(make_study(*CACHED), "vanilla", 0), 1)
    assert not list(output.glob("runs/digits/teacher-*/seen-*"))
