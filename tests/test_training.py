from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
import yaml
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from haste_core import checkpoint, training
from haste_core.errors import HasteError, Interrupted
from haste_core.models import SiT
from haste_core.study import config
from haste_core.study.runs import Run
from haste_core.study.train import fit, open_trainer
from haste_core.teacher import Teacher
from haste_core.termination import Termination
from haste_core.training import Batch, draw_noise, train_step

ARMS = ("vanilla", "repa", "atta", "holistic", "haste")


def train(study, arm="haste", seed=0, on_step=None):
    run = Run(study, arm, seed)
    fit(run, on_step=on_step, progress=False)
    return run


def contents(run, only=None):
    """Everything a run leaves that must be the same however it got there."""
    found = {}
    for step in run.config.train.kept_steps if only is None else only:
        tensors, rest = checkpoint.load(run.checkpoint_path(step))
        found[step] = tensors, {key: value for key, value in rest.items() if key != "run"}
    metrics = [{k: v for k, v in line.items() if k != "steps_per_s"} for line in run.metrics()]
    return found, metrics


def assert_same(one, other):
    """Equal to the bit: all tensors and states of all kept checkpoints, and all logged values."""
    (checkpoints, metrics), (checkpoints_too, metrics_too) = one, other
    assert metrics == metrics_too
    assert checkpoints.keys() == checkpoints_too.keys()
    for step, (tensors, rest) in checkpoints.items():
        tensors_too, rest_too = checkpoints_too[step]
        assert rest == rest_too
        assert tensors.keys() == tensors_too.keys()
        differing = [name for name in tensors if not torch.equal(tensors[name], tensors_too[name])]
        assert not differing, (step, differing)


def at(step, action):
    return lambda state: action(state) if state.step == step else None


def send_sigterm(_):
    os.kill(os.getpid(), signal.SIGTERM)


class Crash(Exception):
    """The process died here."""


def crash(_):
    raise Crash


@pytest.fixture
def elsewhere(output, monkeypatch):
    """A function that moves HASTE_OUTPUT to a fresh folder, as a second machine would have it."""

    def move(name="second"):
        monkeypatch.setenv("HASTE_OUTPUT", str(output / name))
        torch.manual_seed(0)

    return move


# -- phase II is vanilla ----------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts every operator that runs, forward, backward and optimizer."""

    def __init__(self):
        super().__init__()
        self.operators = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators_of_a_step(state):
    with Recorder() as recorder:
        train_step(state)
    return recorder.operators


def test_a_phase_two_step_runs_exactly_the_operators_of_a_vanilla_step(output, tiny):
    counted = {}
    for arm in ("vanilla", "haste"):
        state = open_trainer(Run(tiny, arm, 0))
        counted[arm] = [operators_of_a_step(state) for _ in range(11)]
    assert counted["haste"][10] == counted["vanilla"][10]
    assert counted["haste"][9] == counted["vanilla"][9]
    assert counted["haste"][7].total() > counted["vanilla"][7].total()


def test_nothing_of_phase_one_stays_in_memory_after_the_switch(output, tiny):
    """Not even in what accelerate keeps of all that it prepared."""
    state = open_trainer(Run(tiny, "haste", 0))
    alignment, optimizer = state.alignment, state.alignment_optimizer
    left = [weakref.ref(one) for one in (alignment, alignment.teacher, alignment.projector, optimizer)]
    del alignment, optimizer
    assert all(one() is not None for one in left)
    for _ in range(9):
        train_step(state)
    gc.collect()
    assert [one() for one in left] == [None] * 4
    assert len(state.accelerator._models) == len(state.accelerator._optimizers) == 1


# Operators whose result Python or a shape depends on: on a GPU each of them waits for all that was asked before.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2", "_unique2"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_no_step_reads_what_the_device_computes(output, make_study, precision):
    state = open_trainer(Run(make_study("train.watch_angle=true", f"train.precision={precision}"), "haste", 0))
    for _ in range(11):
        names = {name.split(".")[1] for name in operators_of_a_step(state)}
        assert "mm" in names or "addmm" in names
        assert not names & WAITING


def test_alignment_and_its_optimizer_are_gone_after_the_switch(output, tiny):
    seen = {}

    def look(state):
        parts = state.alignment is not None, state.alignment_optimizer is not None
        seen[state.step] = (state.termination.phase, *parts, len(state.optimizers))

    run = train(tiny, on_step=look)
    assert all(seen[step] == (1, True, True, 2) for step in range(1, 9))
    assert all(seen[step] == (2, False, False, 1) for step in range(9, 13))
    assert any(name.startswith("alignment.") for name in run.load(4)[0])
    assert not any(name.startswith("alignment.") for name in run.load(12)[0])
    assert [line["phase"] for line in run.metrics()] == [1, 1, 1, 1, 2, 2]
    assert ["feature" in line and "attention" in line for line in run.metrics()] == [True] * 4 + [False] * 2


def test_the_teacher_is_never_called_in_phase_two(output, tiny, monkeypatch):
    def forbid(_):
        def raising(*_, **__):
            raise AssertionError("the teacher was called")

        monkeypatch.setattr(Teacher, "forward", raising)

    train(tiny, "haste", on_step=at(8, forbid))
    monkeypatch.undo()
    monkeypatch.setenv("HASTE_OUTPUT", str(output))
    with pytest.raises(AssertionError, match="the teacher was called"):
        train(tiny, "holistic", on_step=at(8, forbid))


def test_a_run_past_its_switch_or_without_alignment_never_builds_a_teacher(output, tiny, monkeypatch):
    with pytest.raises(Interrupted):
        train(tiny, on_step=at(9, send_sigterm))
    monkeypatch.setattr(training, "find_teacher", lambda *_: pytest.fail("a teacher was built"))
    train(tiny, "haste")
    train(tiny, "vanilla")
    with pytest.raises(pytest.fail.Exception, match="a teacher was built"):
        train(tiny, "repa")


def test_the_model_is_called_without_taps_in_phase_two(output, tiny):
    calls = []
    state = open_trainer(Run(tiny, "haste", 0))
    state.model.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((len(args), kwargs)), with_kwargs=True)
    for _ in range(10):
        train_step(state)
    assert calls == [(4, {})] * 8 + [(3, {})] * 2


def test_a_phase_two_step_is_a_vanilla_step_from_the_same_state_to_the_bit(output, tiny):
    train(tiny, "haste", on_step=None)
    tensors, rest = Run(tiny, "haste", 0).load(8)
    haste, vanilla = open_trainer(Run(tiny, "haste", 1)), open_trainer(Run(tiny, "vanilla", 1))
    training.restore(haste, tensors, rest)
    training.restore(vanilla, tensors, rest | {"termination": Termination(tiny.run("vanilla")).state_dict()})
    for _ in range(3):
        one, other = train_step(haste), train_step(vanilla)
        assert one == other
    for a, b in zip(haste.model.parameters(), vanilla.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_switch_at_zero_is_a_vanilla_run(output, make_study):
    study = make_study("arms.haste.termination.at=0")
    haste, vanilla = train(study, "haste"), train(study, "vanilla")
    for name, value in vanilla.load(12)[0].items():
        assert torch.equal(haste.load(12)[0][name], value)


# -- stop and resume --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(new_output, tiny_overrides):
    """Contents of the haste run in one go, by log_every."""
    found = {}
    for log_every in (2, 5):
        with new_output():
            study = config.load("digits", overrides=[*tiny_overrides, f"train.log_every={log_every}"])
            found[log_every] = contents(train(study))
    return found


@pytest.mark.parametrize("step", [1, 5, 7, 8, 9, 11])
def test_stopping_by_signal_and_resuming_equals_never_having_stopped(output, make_study, uninterrupted, step):
    study = make_study("train.log_every=5")
    with pytest.raises(Interrupted, match=f"stopped at step {step}"):
        train(study, on_step=at(step, send_sigterm))
    assert Run(study, "haste", 0).resume_step() == step
    torch.manual_seed(99)  # a new process has a random state of its own
    assert_same(contents(train(study)), uninterrupted[5])


@pytest.mark.parametrize("step", [2, 3, 7, 8, 10])
def test_resuming_after_a_crash_equals_never_having_stopped(output, tiny, uninterrupted, step):
    with pytest.raises(Crash):
        train(tiny, on_step=at(step, crash))
    torch.manual_seed(0)  # a run without any checkpoint starts over, in a new process
    assert_same(contents(train(tiny)), uninterrupted[2])


def test_stopping_again_and_again_equals_never_having_stopped(output, make_study, uninterrupted):
    study, stops = make_study("train.log_every=5"), 0
    while Run(study, "haste", 0).missing_steps():
        try:
            train(study, on_step=send_sigterm)
        except Interrupted:
            stops += 1
    assert stops == 11
    assert_same(contents(Run(study, "haste", 0)), uninterrupted[5])


def test_the_bits_do_not_depend_on_the_random_state_of_the_process(output, tiny, uninterrupted):
    torch.manual_seed(12345)
    checkpoints, metrics = contents(train(tiny))
    assert metrics == uninterrupted[2][1]
    for step, (tensors, _) in checkpoints.items():
        for name, value in uninterrupted[2][0][step][0].items():
            assert torch.equal(tensors[name], value) or name.startswith("random."), (step, name)


@pytest.mark.parametrize("precision", ["'no'", "bf16"])
@pytest.mark.parametrize("arm", ["vanilla", "repa", "atta"])
def test_every_arm_and_precision_resumes(output, elsewhere, make_study, arm, precision):
    study = make_study(f"train.precision={precision}")
    straight = contents(train(study, arm))
    elsewhere()
    with pytest.raises(Interrupted):
        train(study, arm, on_step=at(7, send_sigterm))
    assert_same(contents(train(study, arm)), straight)


def test_a_finished_run_is_left_alone(output, tiny):
    run = train(tiny)
    before = {path: path.stat().st_mtime_ns for path in run.dir.rglob("*") if path.name != "run.lock"}
    train(tiny, on_step=lambda _: pytest.fail("trained again"))
    assert {path: path.stat().st_mtime_ns for path in run.dir.rglob("*") if path.name != "run.lock"} == before


def test_a_longer_run_goes_on_from_the_shorter_one(output, elsewhere, make_study):
    train(make_study("train.steps=6", "train.keep=[4]"))
    steps = []
    long = train(make_study(), on_step=lambda state: steps.append(state.step))
    assert steps == list(range(7, 13))
    found = contents(long)[0]
    elsewhere()
    for step, (tensors, _) in contents(train(make_study()))[0].items():
        assert all(torch.equal(found[step][0][name], value) for name, value in tensors.items())


def test_only_kept_checkpoints_remain(output, tiny):
    seen = {}

    def look(state):
        seen[state.step] = Run(tiny, "haste", 0).steps()

    assert train(tiny, on_step=look).steps() == [4, 8, 12]
    assert (seen[3], seen[6], seen[9]) == ([3], [4, 6], [4, 8, 9])


@pytest.mark.parametrize("removed", [4, 8, 12])
def test_a_missing_kept_checkpoint_is_made_again_from_the_one_before(output, tiny, uninterrupted, removed):
    run = train(tiny)
    run.checkpoint_path(removed).unlink()
    steps = []
    train(tiny, on_step=lambda state: steps.append(state.step))
    assert steps[0] == removed - 3
    assert_same(contents(run), uninterrupted[2])


def test_a_damaged_checkpoint_is_refused_and_deleting_it_helps(output, tiny, uninterrupted):
    with pytest.raises(Interrupted):
        train(tiny, on_step=at(7, send_sigterm))
    run = Run(tiny, "haste", 0)
    path = run.checkpoint_path(7)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(HasteError, match=r"damaged.*delete it"):
        train(tiny)
    path.unlink()
    assert_same(contents(train(tiny)), uninterrupted[2])


def test_a_checkpoint_of_another_seed_or_lineage_is_refused(output, tiny):
    repa = train(tiny, "repa")
    for arm, seed in (("repa", 1), ("haste", 0)):
        run = Run(tiny, arm, seed)
        run.checkpoint_path(4).parent.mkdir(parents=True)
        shutil.copy(repa.checkpoint_path(4), run.checkpoint_path(4))
        with pytest.raises(HasteError, match="belongs to lineage"):
            train(tiny, arm, seed)


def test_changing_which_steps_are_kept_deletes_no_checkpoint_kept_before(output, make_study):
    run = train(make_study())
    train(make_study("train.keep=[6]"))
    assert set(run.steps()) >= {4, 6, 8, 12}


def test_a_line_cut_short_by_a_crash_is_dropped(output, tiny, uninterrupted):
    with pytest.raises(Interrupted):
        train(tiny, on_step=at(7, send_sigterm))
    with Run(tiny, "haste", 0).metrics_path.open("a") as log:
        log.write('{"step": 8, "lo')
    assert_same(contents(train(tiny)), uninterrupted[2])


# -- sharing the first part -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [2, 5])
def test_haste_branched_from_holistic_equals_haste_from_scratch(output, make_study, uninterrupted, log_every):
    study = make_study(f"train.log_every={log_every}")
    holistic = train(study, "holistic")
    before = contents(holistic)
    steps = []
    haste = train(study, "haste", on_step=lambda state: steps.append(state.step))
    assert steps == [9, 10, 11, 12]
    assert_same(contents(haste), uninterrupted[log_every])
    assert_same(contents(holistic), before)
    provenance = json.loads((haste.dir / "provenance.json").read_text())
    assert (provenance["shared_with"], provenance["shared_until_step"]) == ("holistic seed 0", 8)
    assert [session["first_step"] for session in provenance["sessions"]] == [8]


def test_a_run_from_scratch_says_nothing_of_sharing(output, tiny):
    run = train(tiny)
    assert "shared_with" not in json.loads((run.dir / "provenance.json").read_text())


def test_nothing_is_shared_with_a_donor_that_has_not_reached_the_switch_or_has_another_seed(output, tiny):
    train(tiny, "holistic", seed=1)
    with pytest.raises(Interrupted):
        train(tiny, "holistic", on_step=at(7, send_sigterm))
    steps = []
    train(tiny, "haste", on_step=lambda state: steps.append(state.step))
    assert steps[0] == 1


def test_a_run_with_progress_of_its_own_does_not_start_over_from_the_donor(output, tiny):
    with pytest.raises(Interrupted):
        train(tiny, "haste", on_step=at(5, send_sigterm))
    train(tiny, "holistic")
    steps = []
    train(tiny, "haste", on_step=lambda state: steps.append(state.step))
    assert steps[0] == 6


# -- processes --------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys, time, torch
from haste_core.study import config
from haste_core.errors import Interrupted
from haste_core.study.runs import Run
from haste_core.study.train import fit

def on_step(state):
    print(state.step, flush=True)
    time.sleep(0.2 if state.step >= 5 else 0)

torch.manual_seed(0)
study = config.load("digits", overrides=json.loads(sys.argv[1]))
try:
    fit(Run(study, "haste", 0), on_step=on_step, progress=False)
except Interrupted as error:
    print(error, flush=True)
    sys.exit(143)
"""


def test_a_second_process_is_refused_and_sigterm_saves_what_a_second_run_goes_on_from(
    output, tiny, tiny_overrides, uninterrupted
):
    command = [sys.executable, "-c", CHILD, json.dumps(tiny_overrides)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            for line in child.stdout:
                if line.strip() == "5":
                    break
            with pytest.raises(HasteError, match=f"haste seed 0 is in use by process {child.pid}"):
                train(tiny)
            child.send_signal(signal.SIGTERM)
            rest = child.stdout.read()
            assert child.wait(timeout=60) == 143
        finally:
            child.kill()
    assert "saved; run again to go on" in rest
    run = Run(tiny, "haste", 0)
    assert 5 <= run.resume_step() < 12
    assert_same(contents(train(tiny)), uninterrupted[2])


def test_signal_handlers_are_put_back(output, tiny):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(tiny, "vanilla")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# -- losses that are not finite ---------------------------------------------------------------------------------------


@torch.no_grad()
def poison(state):
    next(state.model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("arm", ["vanilla", "haste"])
def test_a_far_too_high_learning_rate_is_an_error(output, make_study, arm):
    study = make_study("train.lr=1e30")
    with pytest.raises(HasteError, match=r"loss is (nan|inf).*train\.lr") as caught:
        train(study, arm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("log_every", [2, 100])
def test_checkpoints_before_a_loss_that_is_not_finite_stay_and_can_be_resumed(output, make_study, log_every):
    study = make_study(f"train.log_every={log_every}")
    with pytest.raises(HasteError, match="checkpoints before it are intact"):
        train(study, on_step=at(5, poison))
    run = Run(study, "haste", 0)
    assert run.steps() == [4]
    for name, value in run.load(4)[0].items():
        assert value.float().isfinite().all(), name
    train(study)
    assert run.missing_steps() == []


# -- the step ---------------------------------------------------------------------------------------------------------


def batch_of(size, channels=1):
    x = torch.zeros(size, channels, 2, 2)
    return Batch(x, torch.arange(size) % 10, x)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_given_rate_and_otherwise_kept(rate):
    batch = batch_of(20_000)
    y = draw_noise(batch, 10, rate, torch.Generator().manual_seed(0)).y
    dropped = y == 10
    assert torch.equal(y[~dropped], batch.y[~dropped])
    assert float(dropped.float().mean()) == pytest.approx(rate, abs=0.01)


def test_t_is_uniform_and_noise_standard_normal_and_independent_per_image():
    t, eps, _ = draw_noise(batch_of(20_000), 10, 0.1, torch.Generator().manual_seed(0))
    assert t.shape == (20_000,)
    assert eps.shape == (20_000, 1, 2, 2)
    counts = torch.histc(t, 10, 0, 1)
    assert float((counts / 2000 - 1).abs().max()) < 0.1
    assert float(eps.mean()) == pytest.approx(0, abs=0.02)
    assert float(eps.std()) == pytest.approx(1, abs=0.02)
    together = torch.corrcoef(torch.cat([eps.flatten(1), t[:, None]], 1).T) - torch.eye(5)
    assert float(together.abs().max()) < 0.04


def test_draws_come_from_their_generator():
    first, again, other = (draw_noise(batch_of(8), 10, 0.5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.eps, other.eps)


def test_the_ema_is_the_weighted_mean_of_all_weights_so_far(output, make_study):
    decay = 0.7
    state = open_trainer(Run(make_study(f"train.ema_decay={decay}"), "vanilla", 0))
    history = [[p.detach().clone() for p in state.model.parameters()]]
    for _ in range(5):
        train_step(state)
        history.append([p.detach().clone() for p in state.model.parameters()])
    for i, average in enumerate(state.ema.parameters()):
        expected = decay**5 * history[0][i]
        for n in range(1, 6):
            expected = expected + (1 - decay) * decay ** (5 - n) * history[n][i]
        assert_close(average, expected, atol=1e-6, rtol=1e-5)
        assert not average.requires_grad


def gradients_at_the_optimizers(study, steps=3):
    """Gradients of student and projector as their optimizers see them, and the logged norm, per step."""
    state = open_trainer(Run(study, "haste", 0))
    seen = []
    for number, optimizer in enumerate(state.optimizers):
        optimizer.optimizer.register_step_pre_hook(
            lambda o, *_, number=number: seen.append(
                (number, [p.grad.clone() for group in o.param_groups for p in group["params"]])
            )
        )
    norms = [float(train_step(state)["grad_norm"]) for _ in range(steps)]
    return [(seen[2 * i][1], seen[2 * i + 1][1], norms[i]) for i in range(steps)]


def norm(*groups):
    return float(torch.cat([g.flatten() for group in groups for g in group]).norm())


def test_gradients_of_student_and_projector_are_clipped_jointly(output, make_study):
    free = gradients_at_the_optimizers(make_study("train.clip_norm=1e9"))
    clipped = gradients_at_the_optimizers(make_study("train.clip_norm=0.01"))
    for student, projector, logged in free:
        assert norm(projector) > 0
        assert logged == pytest.approx(norm(student, projector), rel=1e-5)
    for student, projector, logged in clipped:
        assert logged > 0.01
        assert norm(student, projector) == pytest.approx(0.01, rel=1e-3)
    # The first step's gradients are the same but for one common factor.
    factor = 0.01 / free[0][2]
    for full, cut in zip([*free[0][0], *free[0][1]], [*clipped[0][0], *clipped[0][1]], strict=True):
        assert_close(cut, full * factor, atol=1e-8, rtol=1e-3)


def test_the_logged_loss_is_denoising_plus_the_weighted_alignment_losses(output, make_study):
    study = make_study("arms.haste.alignment.lambda_feature=0.3", "arms.haste.alignment.lambda_attention=0.7")
    for line in train(study).metrics():
        expected = line["denoising"] + 0.3 * line.get("feature", 0) + 0.7 * line.get("attention", 0)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["images_seen"] == 16 * line["step"]


def test_the_denoising_loss_is_the_mean_square_distance_to_eps_minus_x(output, tiny):
    """At initialisation the velocity is exactly 0, so the first loss is the mean of (eps - x)^2."""
    state, twin = open_trainer(Run(tiny, "vanilla", 0)), open_trainer(Run(tiny, "vanilla", 0))
    batch = twin.batches.next()
    eps = draw_noise(batch, 10, 0.1, twin.noise).eps
    assert float(train_step(state)["denoising"]) == pytest.approx(float(((eps - batch.x) ** 2).mean()), rel=1e-5)


def inputs_of(study, arm, seed, steps=10):
    """What the model is called with, per step."""
    state = open_trainer(Run(study, arm, seed))
    seen = []
    state.model.register_forward_pre_hook(lambda _m, args: seen.append([a.clone() for a in args[:3]]))
    initial = {name: value.clone() for name, value in state.model.state_dict().items()}
    for _ in range(steps):
        train_step(state)
    return initial, seen


def test_arms_with_the_same_seed_start_alike_and_see_the_same_images_noise_times_and_labels(output, tiny):
    initial, seen = inputs_of(tiny, "vanilla", 0)
    for arm in ARMS[1:]:
        initial_too, seen_too = inputs_of(tiny, arm, 0)
        assert all(torch.equal(initial[name], initial_too[name]) for name in initial)
        for step, step_too in zip(seen, seen_too, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(step, step_too, strict=True))
    other, _ = inputs_of(tiny, "vanilla", 1, steps=1)
    assert any(not torch.equal(initial[name], other[name]) for name in initial)


def test_a_checkpoint_holds_a_plain_generator(output, tiny):
    run = train(tiny, "holistic")
    generator = SiT(image_size=8, channels=1, classes=10, depth=3, width=32, heads=4, patch=2)
    tensors, rest = run.load(12)
    for prefix in ("model.", "ema."):
        generator.load_state_dict(checkpoint.under(tensors, prefix))
    assert rest["ema_fingerprint"] == checkpoint.fingerprint(checkpoint.under(tensors, "ema."))
    assert not any("teacher" in name or "encoder" in name for name in tensors)


def test_a_run_leaves_its_resolved_settings_and_a_preview(output, tiny):
    run = train(tiny)
    written = yaml.safe_load((run.dir / "config.yaml").read_text())
    assert (written["arm"], written["seed"]) == ("haste", 0)
    assert config.RunConfig.model_validate({k: v for k, v in written.items() if k not in ("study", "arm", "seed")}) == (
        run.config
    )
    assert [p.name for p in (run.dir / "samples").iterdir()] == ["step_00000012.png"]


def test_previews_do_not_change_the_run(output, make_study, uninterrupted):
    assert_same(contents(train(make_study("train.sample_every=1"))), uninterrupted[2])


def test_no_room_for_a_checkpoint_is_an_error_and_the_run_goes_on_later(output, tiny, uninterrupted, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(HasteError, match="no room"):
        train(tiny, on_step=at(5, lambda _: patch.setattr(checkpoint, "save_file", full)))
    assert Run(tiny, "haste", 0).steps() == [4]
    assert_same(contents(train(tiny)), uninterrupted[2])
