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

import pytest
import torch

from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked
from haste_core.processes import micro_batches
from haste_core.snapshot import capture
from haste_core.study import config, launching
from haste_core.study.data import contexts
from haste_core.study.runs import Run
from haste_core.training import draw_noise, fit, open_state, train_step, update_ema

# Six steps across the switch, all of them logged.
SHORT = ("train.steps=6", "train.keep=[3]", "train.log_every=1", "arms.haste.termination.at=4")
MEASURED = ("loss", "denoising", "feature", "attention", "grad_norm", "online_angle", "gradient_angle")
WORKER = Path(__file__).with_name("distributed_worker.py")
DIVIDED = ("train.sharded=true",)
CACHED = ("data.augment={shift: 0, rotation: 0, scale: 0}", "train.cache_teacher=true", "train.prefetch=true")
EXACT = ("arms.haste.termination={kind: gradient_angle, at: null, every: 1, after: 2, threshold: 1, n: 8}",)


def logged(run):
    return [{k: v for k, v in line.items() if k in MEASURED} for line in run.metrics()]


def assert_close_logs(one, other, rel=1e-5, lines=6):
    assert len(one) == len(other) == lines
    for line, line_too in zip(one, other, strict=True):
        assert line == pytest.approx(line_too, rel=rel)


def assert_close_checkpoints(found, expected):
    """Equal weights but for rounding, equal streams of images and noise to the bit."""
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
    torch.manual_seed(0)  # of the teacher, whose weights are random here
    fit(run, on_step=on_step, progress=False)
    return run


# -- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 16])
def test_micro_batches_change_no_number_but_by_rounding(output, short, monkeypatch, accumulate):
    whole = trained(short(), output / "whole", monkeypatch)
    parts = trained(short(f"train.accumulate={accumulate}"), output / "parts", monkeypatch)
    assert parts.dir.relative_to(output / "parts") == whole.dir.relative_to(output / "whole")
    assert_close_logs(logged(parts), logged(whole))
    assert_close_checkpoints(parts.load(6)[0], whole.load(6)[0])


def plain_step(s):
    """A step on the whole batch at once, written out as it was before there were micro-batches."""
    if s.termination.update(s.step):
        s.enter_phase_two()
    batch = s.batches.next()
    t, eps, y = draw_noise(batch, s.ema.null_label, s.config.train.label_dropout, s.noise)
    x_t = s.objective.noised(batch.x, eps, t)
    if s.alignment is None:
        loss = s.objective.loss(s.model(x_t, t, y), batch.x, eps, t).mean()
    else:
        tapped = s.model(x_t, t, y, s.alignment.taps)
        loss = s.objective.loss(tapped.output, batch.x, eps, t).mean()
        loss = loss + s.alignment.losses(tapped, batch.images, t).total
    loss.backward()
    torch.nn.utils.clip_grad_norm_(s.parameters(), s.config.train.clip_norm)
    for optimizer in s.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    update_ema(s)
    s.step += 1


def test_one_micro_batch_of_one_process_is_the_plain_step_to_the_bit(output, short):
    states = []
    for step in (plain_step, train_step):
        torch.manual_seed(0)
        states.append(open_state(Run(short(), "haste", 0)))
        for _ in range(6):
            step(states[-1])
    plain, now = (capture(state)[0] for state in states)
    assert states[1].termination.phase == 2
    assert [name for name in plain if not torch.equal(plain[name], now[name])] == []


def test_one_micro_batch_is_the_whole_batch_and_a_step_looks_at_each_image_once(output, short):
    state = open_state(Run(short("train.accumulate=4"), "vanilla", 0))
    sizes = []
    state.model.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    train_step(state)
    assert sizes == [4, 4, 4, 4]
    assert open_state(Run(short(), "vanilla", 0)).micro_batches == [slice(0, 16)]


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes", "possible"),
    [(16, 3, 1, "a multiple of 3 for train.batch_size, or 1, 2, 4, 8, 16 for train.accumulate"),
     (16, 4, 8, "a multiple of 32 for train.batch_size, or 1, 2 for train.accumulate"),
     (16, 1, 3, "a multiple of 3 for train.batch_size"),
     (16, 32, 1, "a multiple of 32 for train.batch_size, or 1, 2, 4, 8, 16 for train.accumulate")],
)  # fmt: skip
def test_a_batch_that_cannot_be_divided_is_refused(make_study, batch, accumulate, processes, possible):
    train = make_study(f"train.batch_size={batch}", f"train.accumulate={accumulate}").train
    with pytest.raises(HasteError) as caught:
        micro_batches(train, processes)
    message = str(caught.value)
    assert message.endswith(f"possible: {possible}")
    assert f"batch_size {batch} cannot go through {processes} process(es) in {accumulate} equal" in message
    assert "\n" not in message


def test_a_run_is_refused_before_its_first_step(output, short):
    with pytest.raises(HasteError, match=r"train\.batch_size 16 cannot go through 1 process"):
        fit(Run(short("train.accumulate=3"), "vanilla", 0), progress=False)


# -- two processes ----------------------------------------------------------------------------------------------------

# Runs of two processes by name: settings, and what happens in them.
TASKS = {
    "plain": ((), ""),
    "accumulating": (("train.accumulate=4",), ""),
    "watching": (("train.watch_angle=true", "train.log_every=2"), ""),
    "exact": (EXACT, ""),
    "stopped": (("train.log_every=2",), "stop"),
    "resumed": ((), ""),  # finds the checkpoint of one process
    "indivisible": (("train.accumulate=5",), ""),
    "taken": ((), ""),  # finds its lock held
    "unwell": (("train.lr=1e30",), ""),
    "halves": (("train.precision=bf16",), ""),
    "compiled": (("train.compile=true",), ""),
    "cached": (CACHED, ""),
    # With weights divided between the two.
    "divided": (DIVIDED, "measure"),
    "divided accumulating": ((*DIVIDED, "train.accumulate=4"), ""),
    "divided watching": ((*DIVIDED, "train.watch_angle=true", "train.log_every=2"), ""),
    "divided exact": ((*DIVIDED, *EXACT), ""),
    "divided compiled": ((*DIVIDED, "train.compile=true"), ""),
    "divided halves": ((*DIVIDED, "train.precision=bf16"), ""),
    "divided dit": ((*DIVIDED, "model.kind=dit"), ""),
    "divided mmdit": ((*DIVIDED, "model.kind=mmdit", "model.context_width=6"), ""),
    "divided stopped": ((*DIVIDED, "train.log_every=2"), "stop"),
    "divided resumed": (DIVIDED, ""),  # finds the checkpoint of one process
    "divided twice": (DIVIDED, "stop and go on"),
    "divided unwell": ((*DIVIDED, "train.lr=1e30"), ""),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_overrides, new_output):
    """The folder with what two processes made of all tasks, and one process of the settings that need comparing."""
    place = tmp_path_factory.mktemp("two")
    with new_output(), pytest.MonkeyPatch.context() as patch:
        half = config.load("digits", overrides=[*tiny_overrides, *SHORT])
        for name in ("resumed", "divided resumed"):
            with pytest.raises(Interrupted):
                trained(half, place / name, patch, on_step=stop_after_three)
        contexts.write(place / "captions.safetensors", torch.randn(10, 3, 6), torch.randn(3, 6))
        with locked(run_in(place / "taken", half, patch).dir / "run.lock", "it"):
            tasks = [
                (name, [*tiny_overrides, *SHORT, *settings(place, name)], what) for name, (_, what) in TASKS.items()
            ]
            subprocess.run([sys.executable, str(WORKER), str(place), json.dumps(tasks)], check=True, timeout=250)
    return place


def settings(place, name):
    """Those of a task; a model of text has its captions in the folder of all tasks."""
    captions = (f"data.contexts={place / 'captions.safetensors'}",) if "mmdit" in name else ()
    return (*TASKS[name][0], *captions)


def stop_after_three(state):
    if state.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def compared(two, output, short, monkeypatch):
    """A function from a task to its run by two processes and the same by one."""

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def compare(name):
        study = short(*settings(two, name))
        alone = trained(study, output / "one", monkeypatch)
        return run_in(two / name, study, monkeypatch), alone

    return compare


def outcomes(two, name):
    return [json.loads((two / f"outcome-{i}.json").read_text())[name] for i in range(2)]


@pytest.mark.parametrize(
    "name",
    ["plain", "accumulating", "compiled", "cached", "divided", "divided accumulating", "divided compiled",
     "divided dit", "divided mmdit"],
)  # fmt: skip
def test_two_processes_train_as_one_does_across_the_switch(two, compared, name):
    together, alone = compared(name)
    assert outcomes(two, name) == ["done", "done"]
    assert [line["phase"] for line in together.metrics()] == [1, 1, 1, 1, 2, 2]
    assert_close_logs(logged(together), logged(alone))
    assert together.steps() == alone.steps() == [3, 6]
    for step in (3, 6):
        assert_close_checkpoints(together.load(step)[0], alone.load(step)[0])
    record = json.loads((together.dir / "provenance.json").read_text())["sessions"]
    assert [session["processes"] for session in record] == [2]
    assert [p.name for p in (together.dir / "samples").iterdir()] == ["step_00000006.png"]


@pytest.mark.parametrize("name", ["watching", "divided watching"])
def test_the_online_angle_is_that_of_all_samples(compared, name):
    together, alone = compared(name)
    for line, line_too in zip(together.metrics(), alone.metrics(), strict=True):
        assert line["loss"] == pytest.approx(line_too["loss"], rel=1e-5)
        assert line.get("online_angle") == pytest.approx(line_too.get("online_angle"), rel=1e-3, abs=1e-5)
    # Saved in the middle of a window.
    sums, expected = (run.load(3)[0]["angle.sums"] for run in (together, alone))
    assert torch.allclose(sums, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["exact", "divided exact"])
def test_the_exact_angle_ends_phase_one_at_the_same_step(two, compared, name):
    together, alone = compared(name)
    assert outcomes(two, name) == ["done", "done"]
    assert [line["phase"] for line in together.metrics()] == [line["phase"] for line in alone.metrics()]
    assert_close_logs(logged(together), logged(alone), rel=1e-4)


@pytest.mark.parametrize("name", ["stopped", "divided stopped"])
def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(two, output, short, monkeypatch, name):
    study = short(*TASKS["stopped"][0])
    assert outcomes(two, name) == ["Interrupted: haste seed 0 stopped at step 3, saved; run again to go on"] * 2
    stopped = run_in(two / name, study, monkeypatch)
    assert stopped.steps() == [3]
    trained(study, two / name, monkeypatch)
    alone = trained(study, output / "one", monkeypatch)
    assert_close_logs(logged(stopped), logged(alone), lines=3)
    assert_close_checkpoints(stopped.load(6)[0], alone.load(6)[0])


@pytest.mark.parametrize("name", ["resumed", "divided resumed"])
def test_two_processes_go_on_from_what_one_saved(two, compared, name):
    together, alone = compared(name)
    assert outcomes(two, name) == ["done", "done"]
    sessions = json.loads((together.dir / "provenance.json").read_text())["sessions"]
    assert [(s["first_step"], s["last_step"], s["processes"]) for s in sessions] == [(0, 3, 1), (3, 6, 2)]
    assert_close_logs(logged(together), logged(alone))
    assert_close_checkpoints(together.load(6)[0], alone.load(6)[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [("indivisible", "train.batch_size 16 cannot go through 2 process(es) in 5 equal micro-batches each; possible: a "
                     "multiple of 10 for train.batch_size, or 1, 2, 4, 8 for train.accumulate"),
     ("taken", "is in use by process"),
     ("unwell", "checkpoints before it are intact"),
     ("divided unwell", "checkpoints before it are intact")],
)  # fmt: skip
def test_an_error_is_the_same_in_both(two, name, message):
    first, second = outcomes(two, name)
    assert first == second
    assert first.startswith(("HasteError: ", "InUse: "))
    assert message in first


@pytest.mark.parametrize("kind", ["sit", "dit", "mmdit"])
@pytest.mark.parametrize("arm", ["vanilla", "haste"])
def test_every_parameter_has_a_gradient_in_either_phase(output, short, kind, arm):
    contexts.write(output / "captions.safetensors", torch.randn(10, 3, 6), torch.randn(3, 6))
    text = ("model.context_width=6", f"data.contexts={output / 'captions.safetensors'}")
    more = text if kind == "mmdit" else ("model.qk_norm=true",)
    state = open_state(Run(short(f"model.kind={kind}", *more), arm, 0))
    missing = []
    for optimizer in state.optimizers:
        optimizer.optimizer.register_step_pre_hook(
            lambda o, *_: missing.extend(p for group in o.param_groups for p in group["params"] if p.grad is None)
        )
    for _ in range(6):
        train_step(state)
    assert state.termination.phase == 2
    assert missing == []


# -- weights divided between two --------------------------------------------------------------------------------------


def test_each_process_holds_half_of_what_is_trained(two):
    """And of the average; in phase II nothing is left of the projector."""
    parts = [json.loads((two / "divided" / f"parts-{i}.json").read_text()) for i in range(2)]
    for step, projected in (("1", True), ("5", False)):
        first, second = (part[step] for part in parts)
        assert bool(first["projector"]) == projected
        for kind in ("weights", "average", "moments") + ("projector",) * projected:
            (here, all_of_it), (there, known) = first[kind], second[kind]
            assert here + there == all_of_it == known
            assert abs(here - there) < 0.01 * all_of_it, kind


def test_divided_weights_go_on_to_the_bit(two, short, monkeypatch):
    study = short()
    whole, twice = (run_in(two / name, study, monkeypatch) for name in ("divided", "divided twice"))
    assert outcomes(two, "divided twice") == ["done", "done"]
    assert len(json.loads((twice.dir / "provenance.json").read_text())["sessions"]) == 2
    expected, found = (run.load(6)[0] for run in (whole, twice))
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_half_precision_is_that_of_whole_weights(two, short, monkeypatch):
    study = short(*TASKS["halves"][0])
    whole, divided = (run_in(two / name, study, monkeypatch) for name in ("halves", "divided halves"))
    assert_close_logs(logged(divided), logged(whole))


def test_one_process_trains_as_without(output, short):
    torch.manual_seed(0)
    state = open_state(Run(short(*DIVIDED), "haste", 0))
    plain = open_state(Run(short(), "haste", 0))
    assert state.config.hash == plain.config.hash
    assert [type(p) for p in state.parameters()] == [type(p) for p in plain.parameters()]


# -- the launcher -----------------------------------------------------------------------------------------------------


def test_a_launch_stops_at_a_signal_and_the_run_goes_on(output, make_study, monkeypatch):
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
    assert list(run.dir.glob(".launch-*")) == []
    longer = Run(make_study(f"train.steps={step + 1}", "train.keep=[]"), "haste", 0)
    launching.fit(longer, progress=False)
    assert longer.steps() == [step + 1]


@pytest.mark.parametrize(
    ("processes", "message"),
    [(0, "0 processes; possible: 1 and above"),
     (3, "train.batch_size 16 cannot go through 3 process(es) in 1 equal micro-batches each; possible: a multiple of 3 "
         "for train.batch_size")],
)  # fmt: skip
def test_a_launch_of_so_many_processes_is_refused_before_it_starts(output, tiny, processes, message):
    with pytest.raises(HasteError) as caught:
        launching.fit(Run(tiny, "haste", 0), processes)
    assert str(caught.value) == message
    assert not (output / "runs").exists()


@pytest.mark.parametrize(
    ("recorded", "stopped", "expected"),
    [
        ("HasteError: no room", True, HasteError("no room")),
        ("Interrupted: at step 3, saved", True, Interrupted("at step 3, saved")),
        (None, True, Interrupted("stopped; run again to go on")),
        ("RuntimeError: 1\n2", False, HasteError("a process failed: RuntimeError: 1 2; all output is in FOLDER")),
        (None, False, HasteError("a process failed: it was killed; all output is in FOLDER")),
    ],
)
def test_the_failure_that_the_launcher_recorded_is_the_reason(tmp_path, recorded, stopped, expected):
    failure = tmp_path / "error.json"
    if recorded is not None:
        failure.write_text(json.dumps({"message": {"message": recorded}}))
    assert repr(launching._error(Path("FOLDER"), failure, stopped)) == repr(expected)
