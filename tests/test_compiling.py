"""Compiled training: the numbers of uncompiled training, one graph for all blocks, none more at the switch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from haste_core.devices import check_compiler
from haste_core.errors import HasteError
from haste_core.study.runs import Run
from haste_core.study.train import exact_angle, fit, open_trainer

SWITCH = ["arms.haste.termination.at=3", "train.steps=6", "train.keep=[]", "train.log_every=2"]
COMPILED = "train.compile=true"


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
    trainer = open_trainer(Run(study, arm, 0))
    return [trainer.train_step() for _ in range(count)], trainer


def close(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        assert_close(torch.stack(list(one.values())), torch.stack(list(other.values())), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "precision"), [("repa", "bf16"), ("haste", "no")])
def test_blocks_share_one_graph_and_the_switch_makes_none(output, make_study, traced, arm, precision):
    trainer = open_trainer(Run(make_study(*SWITCH, COMPILED, f"train.precision={precision}"), arm, 0))
    for step in range(5):
        trainer.train_step()
        # The attention loss is compiled as well.
        assert graphs(traced) == (1 + (arm == "haste"), 0), step
        # q and k are read inside blocks 1 and 2 in phase I of `haste`: these are compiled from the switch on.
        read = arm == "haste" and trainer.switch.phase == 1
        assert ["forward" in vars(block) for block in trainer.generator.blocks] == [True, not read, not read]


@pytest.mark.slow
def test_compiled_training_is_training(output, make_study, traced):
    more = [f"train.{s}" for s in ("accumulate=2", "watch_angle=true", "activation_checkpointing=true")]
    plain, one = steps(make_study(*SWITCH, *more), "haste", 2)
    compiled, other = steps(make_study(*SWITCH, *more, COMPILED), "haste", 2)
    assert graphs(traced)[0] > 0
    assert_close(one.haste.angle.sums, other.haste.angle.sums, rtol=1e-4, atol=1e-7)
    assert one.haste.angle.sums[1].abs().sum() > 0
    for before, trainer in ((plain, one), (compiled, other)):
        before += [trainer.train_step() for _ in range(3)]
    close(plain, compiled)


@pytest.mark.slow
def test_compiled_and_uncompiled_runs_are_one_run(output, make_study, traced):
    """The same name, the same names of weights: one goes on where the other stopped."""
    compiled = Run(make_study(*SWITCH, COMPILED, "train.steps=2"), "haste", 0)
    fit(compiled, progress=False)
    plain = Run(make_study(*SWITCH), "haste", 0)
    assert plain.dir == compiled.dir
    fit(plain, progress=False)
    assert [line["step"] for line in plain.metrics()] == [2, 4, 6]
    assert not [name for name in plain.load(6)[0] if "_orig_mod" in name]


@pytest.mark.slow
def test_the_papers_trigger_reads_the_same_from_a_compiled_model(output, make_study, traced):
    """It takes several gradients from one graph, which compiled blocks give up after the first."""
    settings = ["arms.haste.termination={kind: gradient_angle, at: null, threshold: -1, every: 2, n: 16}"]
    angles = []
    for compiled in (False, True):
        study = make_study(*SWITCH[1:], *settings, f"train.compile={compiled}")
        angles.append(exact_angle(study.run("haste"), steps(study, "haste", 2)[1])["gradient_angle"])
    assert angles[0] == pytest.approx(angles[1], abs=1e-4)
    assert graphs(traced)[0] > 0


@pytest.mark.slow
def test_kernels_of_their_own_compute_the_same(output, make_study):
    torch.compiler.reset()
    small = [*SWITCH, "model.depth=2", "alignment.layer_pairs=[[1, 1]]", "train.steps=2"]
    close(steps(make_study(*small), "vanilla", 2)[0], steps(make_study(*small, COMPILED), "vanilla", 2)[0])
    torch.compiler.reset()


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(HasteError, match=r"needs a C\+\+ compiler; install g\+\+, or set compile=false"):
        check_compiler(torch.device("cpu"))
    cpp_builder.cpp_compiler_search.cache_clear()
