"""One step's batch in several micro-batches and over several processes: the same numbers but for rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked
from haste_core.study import config, launching
from haste_core.study.runs import Run
from haste_core.study.train import fit

# Six steps across the switch, all of them logged.
SHORT = ("train.steps=6", "train.keep=[3]", "train.log_every=1", "arms.haste.termination.at=4")
MEASURED = ("loss", "denoising", "feature", "attention", "grad_norm", "online_angle", "gradient_angle")
WORKER = Path(__file__).with_name("distributed_worker.py")


def logged(run):
    return [{k: v for k, v in line.items() if k in MEASURED} for line in run.metrics()]


def assert_close_logs(one, other, rel=1e-5, lines=6):
    one, other = logged(one), logged(other)
    assert len(one) == len(other) == lines
    for line, line_too in zip(one, other, strict=True):
        assert line == pytest.approx(line_too, rel=rel)


def assert_close_checkpoints(one, other, step=6):
    """Equal weights but for rounding, equal streams of images and noise to the bit."""
    found, expected = one.load(step)[0], other.load(step)[0]
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name.startswith(("data.", "noise.")):
            assert torch.equal(found[name], value), name
        # A shift of all keys moves no attention: their bias has a gradient of rounding, of which Adam makes full steps.
        elif name.startswith(("model.", "ema.", "alignment.projector.")) and not name.endswith("qkv.bias"):
            assert torch.allclose(found[name], value, atol=2e-5), (name, float((found[name] - value).abs().max()))


@pytest.fixture
def short(make_study):
    return lambda *more: make_study(*SHORT, *more)


def run_in(place, study, monkeypatch):
    monkeypatch.setenv("HASTE_OUTPUT", str(place))
    run = Run(study, "haste", 0)
    assert run.dir.is_relative_to(place)  # found once: the folder may change afterwards
    return run


def trained(study, place, monkeypatch, on_step=None):
    run = run_in(place, study, monkeypatch)
    fit(run, on_step=on_step, progress=False)
    return run


# -- accumulation -----------------------------------------------------------------------------------------------------


def test_micro_batches_change_no_number_but_by_rounding(output, short, monkeypatch):
    whole = trained(short(), output / "whole", monkeypatch)
    parts = trained(short("train.accumulate=8"), output / "parts", monkeypatch)
    assert parts.dir.relative_to(output / "parts") == whole.dir.relative_to(output / "whole")
    assert_close_logs(parts, whole)
    assert_close_checkpoints(parts, whole)


@pytest.mark.parametrize(
    ("accumulate", "processes", "expected"),
    [(3, 1, "a multiple of 3 for train.batch_size, or 1, 2, 4, 8, 16 for train.accumulate"),
     (4, 8, "a multiple of 32 for train.batch_size, or 1, 2 for train.accumulate"),
     (1, 3, "a multiple of 3 for train.batch_size")],
)  # fmt: skip
def test_a_batch_that_cannot_be_divided_is_refused_before_a_run_starts(output, short, accumulate, processes, expected):
    with pytest.raises(HasteError) as caught:
        launching.fit(Run(short(f"train.accumulate={accumulate}"), "haste", 0), processes)
    assert str(caught.value) == (
        f"train.batch_size 16 cannot go through {processes} process(es) in {accumulate} equal micro-batches each; "
        f"expected {expected}"
    )
    with pytest.raises(HasteError, match="0 processes; expected 1 or more"):
        launching.fit(Run(short(), "haste", 0), 0)
    assert not (output / "runs").exists()


# -- two processes ----------------------------------------------------------------------------------------------------

# Settings of runs of two processes, by name.
QUICK = {"plain": (), "stopped": ("train.log_every=2",), "indivisible": ("train.accumulate=5",)}
MORE = {
    "accumulating": ("train.accumulate=4", "train.activation_checkpointing=true", "model.kind=dit"),
    "compiled": ("train.compile=true",),
    "watching": (
        "train.log_every=2",
        "train.watch_angle=true",
        "arms.haste.termination={kind: gradient_angle, at: null, every: 2, after: 2, threshold: 1, n: 8}",
    ),
    "resumed": (),  # finds the checkpoint of one process
    "unwell": ("train.lr=1e30",),
}
SETTINGS = QUICK | MORE
slow = pytest.mark.slow


def send_sigterm_after_three(trainer):
    if trainer.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_overrides, new_output):
    """A function from a task to the folder where two processes did it and all of its group, and to its outcomes."""
    places = {}

    def work(tasks):
        place = tmp_path_factory.mktemp("two")
        with new_output(), pytest.MonkeyPatch.context() as patch:
            if "resumed" in tasks:
                study = config.load("digits", overrides=[*tiny_overrides, *SHORT])
                with pytest.raises(Interrupted):
                    trained(study, place / "resumed", patch, on_step=send_sigterm_after_three)
            settings = [(name, [*tiny_overrides, *SHORT, *more]) for name, more in tasks.items()]
            subprocess.run([sys.executable, str(WORKER), str(place), json.dumps(settings)], check=True, timeout=250)
        return place

    def found(name):
        group = "quick" if name in QUICK else "more"
        if group not in places:
            places[group] = work(QUICK if name in QUICK else MORE)
        outcomes = [json.loads((places[group] / f"outcome-{i}.json").read_text())[name] for i in range(2)]
        return places[group] / name, outcomes

    return found


@pytest.fixture
def compared(two, output, short, monkeypatch):
    """A function from a task to its run by two processes and the same by one."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def compare(name):
        place, outcomes = two(name)
        assert outcomes == ["done", "done"]
        study = short(*SETTINGS[name])
        alone = trained(study, output / "one", monkeypatch)
        return run_in(place, study, monkeypatch), alone

    return compare


def sessions(run):
    found = json.loads((run.dir / "provenance.json").read_text())["sessions"]
    return [(session["first_step"], session["last_step"], session["processes"]) for session in found]


@pytest.mark.parametrize("name", ["plain", *(pytest.param(n, marks=slow) for n in ("accumulating", "compiled"))])
def test_two_processes_train_as_one_does_across_the_switch(compared, name):
    together, alone = compared(name)
    assert [line["phase"] for line in together.metrics()] == [1, 1, 1, 1, 2, 2]
    assert_close_logs(together, alone)
    assert together.steps() == alone.steps() == [3, 6]
    for step in (3, 6):
        assert_close_checkpoints(together, alone, step)
    assert sessions(together) == [(0, 6, 2)]
    assert [p.name for p in (together.dir / "samples").iterdir()] == ["step_00000006.png"]


@slow
def test_angles_are_those_of_all_samples_and_end_phase_one_at_the_same_step(compared):
    together, alone = compared("watching")
    for line, line_too in zip(together.metrics(), alone.metrics(), strict=True):
        assert line["phase"] == line_too["phase"]
        for key in ("loss", "online_angle", "gradient_angle"):
            assert line.get(key) == pytest.approx(line_too.get(key), rel=1e-3, abs=1e-5)
    sums, expected = (run.load(3)[0]["angle.sums"] for run in (together, alone))  # in the middle of a window
    assert torch.allclose(sums, expected, rtol=1e-3, atol=1e-9)


def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(two, output, short, monkeypatch):
    study, (place, outcomes) = short(*SETTINGS["stopped"]), two("stopped")
    assert outcomes == ["Interrupted: haste seed 0 stopped at step 3, saved; run again to go on"] * 2
    stopped = run_in(place, study, monkeypatch)
    assert stopped.steps() == [3]
    trained(study, place, monkeypatch)
    alone = trained(study, output / "one", monkeypatch)
    assert_close_logs(stopped, alone, lines=3)
    assert_close_checkpoints(stopped, alone)


@slow
def test_two_processes_go_on_from_what_one_saved(compared):
    together, alone = compared("resumed")
    assert sessions(together) == [(0, 3, 1), (3, 6, 2)]
    assert_close_logs(together, alone)
    assert_close_checkpoints(together, alone)


@pytest.mark.parametrize(
    ("name", "message"),
    [("indivisible", "train.batch_size 16 cannot go through 2 process(es) in 5 equal micro-batches each; expected a "
                     "multiple of 10 for train.batch_size, or 1, 2, 4, 8 for train.accumulate"),
     pytest.param("unwell", "there is no checkpoint before it", marks=slow)],
)  # fmt: skip
def test_an_error_is_the_same_in_both(two, name, message):
    first, second = two(name)[1]
    assert first == second
    assert first.startswith("HasteError: ")
    assert message in first


# -- the launcher -----------------------------------------------------------------------------------------------------


@slow
def test_a_launch_stops_at_a_signal_and_the_run_goes_on_and_its_error_is_that_of_a_worker(output, make_study):
    study = make_study("train.steps=2000", "train.keep=[]", "train.log_every=1", "train.checkpoint_every=2000")
    run = Run(study, "haste", 0)

    def stop_on_the_way():
        while not run.metrics_path.is_file() or len(run.metrics_path.read_text().splitlines()) < 3:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_on_the_way, daemon=True).start()
    with pytest.raises(Interrupted, match=r"haste seed 0 stopped at step \d+, saved; run again to go on"):
        launching.fit(run, processes=2, progress=False)
    (step,) = run.steps()
    assert 3 <= step < 2000
    assert run.metrics()[-1]["step"] == step
    assert list(run.dir.glob("launch-*")) == []
    longer = Run(make_study(f"train.steps={step + 1}", "train.keep=[]"), "haste", 0)
    launching.fit(longer, progress=False)
    assert longer.steps() == [step + 1]
    with pytest.raises(HasteError, match=r"the loss is nan.*there is no checkpoint before it"):
        launching.fit(Run(make_study("train.lr=1e30"), "haste", 0), processes=2, progress=False)


@slow
def test_workers_save_and_stop_when_the_process_that_started_them_is_killed(output, make_study):
    settings = ["train.steps=5000", "train.keep=[]", "train.log_every=1", "train.checkpoint_every=5000"]
    run = Run(config.load("digits", "smoke", settings), "vanilla", 0)
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "haste_core.study.cli", "train", "digits", "vanilla", "--profile", "smoke", *words]
    parent = subprocess.Popen([*command, "--processes", "2"], stderr=subprocess.DEVNULL)
    while not run.metrics_path.is_file() or len(run.metrics_path.read_text().splitlines()) < 3:
        assert parent.poll() is None
        time.sleep(0.1)
    below = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(below, timeout=60)
    assert alive == []
    (step,) = run.steps()
    assert 3 <= step < 5000
    with locked(run.dir / "run.lock", "the run"):
        pass
