"""Compiled training: the numbers of uncompiled training, two graphs in phase I, none more at the switch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from haste_core import observing, training
from haste_core.compiling import check_compiler, is_compiled, uncompiled
from haste_core.errors import HasteError
from haste_core.study.runs import Run

SWITCH = ["arms.haste.termination.at=3", "train.steps=6", "train.keep=[]", "train.log_every=2"]


@pytest.fixture
def traced(monkeypatch):
    """Graphs are captured and differentiated as ever, and run without kernels of their own, which take long to make."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield counters
    torch.compiler.reset()


def graphs(found):
    return found["stats"]["unique_graphs"], sum(found["graph_break"].values())


def steps(study, arm, count=6):
    state = training.open_trainer(Run(study, arm, 0))
    return [training.train_step(state) for _ in range(count)], state


def close(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        assert_close(torch.stack(list(one.values())), torch.stack(list(other.values())), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("arm", "made"), [("vanilla", 1), ("repa", 1), ("haste", 2)])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_blocks_share_their_graphs_and_the_switch_makes_none(output, make_study, traced, arm, made, precision):
    study = make_study(*SWITCH, "train.compile=true", f"train.precision={precision}")
    state = training.open_trainer(Run(study, arm, 0))
    for step in range(6):
        training.train_step(state)
        assert graphs(traced) == (made, 0), step


@pytest.mark.parametrize("more", [[], ["train.accumulate=2"], ["train.watch_angle=true"]])
def test_compiled_training_is_training(output, make_study, traced, more):
    plain, one = steps(make_study(*SWITCH, *more), "haste", 2)
    compiled, other = steps(make_study(*SWITCH, *more, "train.compile=true"), "haste", 2)
    assert graphs(traced)[0] > 0
    close(plain, compiled)
    if one.angle is not None:
        assert_close(one.angle.sums, other.angle.sums, rtol=1e-4, atol=1e-7)
        assert one.angle.sums[1].abs().sum() > 0  # attention is seen although its blocks could be compiled
    for before, state in ((plain, one), (compiled, other)):
        before += [training.train_step(state) for _ in range(3)]
    close(plain, compiled)


def test_watched_blocks_are_compiled_from_the_switch_on(output, make_study, traced):
    _, state = steps(make_study(*SWITCH, "train.compile=true", "train.watch_angle=true"), "haste", 2)
    assert [is_compiled(block) for block in state.model.blocks] == [True, False, False]
    training.train_step(state)
    training.train_step(state)
    assert all(is_compiled(block) for block in state.model.blocks)


def test_compiled_and_uncompiled_runs_are_one_run(output, make_study, traced):
    """The same name, the same names of weights: one goes on where the other stopped."""
    compiled = Run(make_study(*SWITCH, "train.compile=true", "train.steps=2"), "haste", 0)
    training.fit(compiled, progress=False)
    plain = Run(make_study(*SWITCH), "haste", 0)
    assert plain.dir == compiled.dir
    training.fit(plain, progress=False)
    assert [line["step"] for line in plain.metrics()] == [2, 4, 6]
    assert not [name for name in plain.load(6)[0] if "_orig_mod" in name]


def test_the_papers_trigger_reads_the_same_from_a_compiled_model(output, make_study, traced):
    """It takes several gradients from one graph, which compiled blocks give up after the first."""
    settings = ["arms.haste.termination={kind: gradient_angle, at: null, threshold: -1, every: 2, n: 16}"]
    angles = []
    for compiled in (False, True):
        _, state = steps(make_study(*SWITCH[1:], *settings, f"train.compile={compiled}"), "haste", 2)
        angles.append(observing.exact(state))
    assert angles[0] == pytest.approx(angles[1], abs=1e-4)
    assert graphs(traced)[0] > 0


def test_passes_can_be_made_as_the_blocks_were_written(output, make_study, traced):
    _, state = steps(make_study(*SWITCH, "train.compile=true"), "vanilla", 1)
    made = graphs(traced)
    x, t, y = torch.zeros(3, 1, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with uncompiled():
        state.model(x, t, y)
    assert graphs(traced) == made
    state.model(x, t, y)
    assert graphs(traced)[0] > made[0]  # another number of images is another graph


def test_kernels_of_their_own_compute_the_same(output, make_study):
    torch.compiler.reset()
    small = [*SWITCH, "model.depth=2", "alignment.layer_pairs=[[1, 1]]", "train.steps=2"]
    plain, _ = steps(make_study(*small), "vanilla", 2)
    compiled, _ = steps(make_study(*small, "train.compile=true"), "vanilla", 2)
    close(plain, compiled)
    torch.compiler.reset()


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(HasteError, match=r"needs a C\+\+ compiler; possible: install g\+\+, or compile=false"):
        check_compiler(torch.device("cpu"))
    cpp_builder.cpp_compiler_search.cache_clear()
