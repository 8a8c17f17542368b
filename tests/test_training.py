"""The training step and the two phases, and runs that are interrupted, resumed and shared: the same to the bit."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import signal
import weakref
from collections import Counter
from pathlib import Path

import accelerate
import pytest
import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from haste_core import checkpoint
from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked
from haste_core.models import SiT
from haste_core.processes import HARMLESS, UNSUPPORTED
from haste_core.study import config
from haste_core.study import train as training
from haste_core.study.runs import Run
from haste_core.study.train import fit, open_trainer
from haste_core.teacher import Teacher
from haste_core.termination import Switch
from haste_core.training import OVERFLOWS, Batch, draw_noise

ARMS = ("vanilla", "repa", "atta", "holistic", "haste")


def train(study, arm="haste", seed=0, on_step=None):
    run = Run(study, arm, seed)
    fit(run, on_step=on_step, progress=False)
    return run


def steps_of(study, arm="haste"):
    """The run, and the steps that training now takes."""
    taken = []
    return train(study, arm, on_step=lambda trainer: taken.append(trainer.step)), taken


def contents(run):
    """Everything a run leaves that must be the same however it got there: tensors, states, logged values."""
    tensors, rest = {}, {}
    for step in run.config.train.kept_steps:
        found, rest[step] = checkpoint.load(run.checkpoint_path(step))
        rest[step].pop("run")
        tensors |= {(step, name): value for name, value in found.items()}
    return tensors, rest, [{k: v for k, v in line.items() if k != "steps_per_s"} for line in run.metrics()]


def assert_same(one, other):
    """Equal to the bit."""
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    assert [name for name, value in one[0].items() if not torch.equal(value, other[0][name])] == []


def at(step, action):
    return lambda trainer: action(trainer) if trainer.step == step else None


def send_sigterm(_=None):
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(study, arm="haste", step=7):
    with pytest.raises(Interrupted, match=f"{arm} seed 0 stopped at step {step}, saved; run again to go on"):
        train(study, arm, on_step=at(step, send_sigterm))
    torch.manual_seed(99)  # a new process has a random state of its own


@pytest.fixture(scope="module")
def uninterrupted(new_output, tiny_overrides):
    """Contents of the haste run in one go."""
    with new_output():
        return contents(train(config.load("digits", overrides=[*tiny_overrides, "train.log_every=5"])))


@pytest.fixture
def study(make_study):
    """Logged between checkpoints, so that a resumed run begins in the middle of a line."""
    return make_study("train.log_every=5")


# -- phase II is vanilla ----------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts every operator that runs, forward, backward and optimizer."""

    def __init__(self):
        super().__init__()
        self.operators = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators_of_a_step(trainer):
    with Recorder() as recorder:
        trainer.train_step()
    return recorder.operators


# Operators whose result Python or a shape depends on: on a GPU each of them waits for all that was asked before.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2", "_unique2"}


def test_a_phase_two_step_runs_the_operators_of_a_vanilla_step_and_no_step_waits_for_the_device(output, make_study):
    study, counted = make_study("train.watch_angle=true", "train.precision=bf16", "arms.haste.termination.at=2"), {}
    for arm in ("vanilla", "haste"):
        trainer = open_trainer(Run(study, arm, 0))
        counted[arm] = [operators_of_a_step(trainer) for _ in range(4)]
        for operators in counted[arm]:
            names = {name.split(".")[1] for name in operators}
            assert names & {"mm", "addmm"}
            assert not names & WAITING
    assert counted["haste"][3] == counted["vanilla"][3]
    assert counted["haste"][1].total() > counted["vanilla"][1].total()


def hooked(model):
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def test_nothing_of_phase_one_stays_in_memory_after_the_switch(output, tiny):
    """Teacher, projector, its moments and hooks are gone, also from what accelerate keeps."""
    trainer = open_trainer(Run(tiny, "haste", 0))
    trainer.train_step()
    own = [*trainer.haste.parameters()]
    moments = [value for p in own for value in trainer.optimizer.optimizer.state[p].values()]
    left = [weakref.ref(one) for one in (trainer.haste, trainer.haste.teacher, trainer.haste.projector, *own, *moments)]
    assert len(moments) == 3 * len(own) > 0
    assert trainer.batches.with_images
    del own, moments
    for _ in range(8):
        trainer.train_step()
        assert not hooked(trainer.model)
    gc.collect()
    assert [one() for one in left] == [None] * len(left)
    (group,) = trainer.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.model.parameters()}
    assert len(trainer.optimizer.optimizer.state) == len(group["params"])
    assert (trainer.haste, trainer.batches.with_images) == (None, False)


def test_the_teacher_is_never_called_or_built_in_phase_two(output, tiny, monkeypatch):
    def forbid(_):
        monkeypatch.setattr(Teacher, "forward", lambda *_: pytest.fail("the teacher was called"))
        monkeypatch.setattr(training, "find_teacher", lambda *_: pytest.fail("a teacher was built"))

    with pytest.raises(Interrupted):
        train(tiny, "haste", on_step=lambda trainer: (at(8, forbid)(trainer), at(10, send_sigterm)(trainer)))
    train(tiny, "haste")
    train(tiny, "vanilla")
    with pytest.raises(pytest.fail.Exception, match="a teacher was built"):
        train(tiny, "repa")


def test_a_phase_two_step_is_a_vanilla_step_from_the_same_state_to_the_bit(output, tiny):
    tensors, rest = train(tiny).load(8)
    haste, vanilla = open_trainer(Run(tiny, "haste", 1)), open_trainer(Run(tiny, "vanilla", 1))
    checkpoint.restore(haste, tensors, rest)
    checkpoint.restore(vanilla, tensors, rest | {"termination": Switch().state_dict()})
    for _ in range(3):
        assert haste.train_step() == vanilla.train_step()
    for a, b in zip(haste.model.parameters(), vanilla.model.parameters(), strict=True):
        assert torch.equal(a, b)


# -- stop and resume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [8, 9])
def test_stopping_by_signal_and_resuming_equals_never_having_stopped(output, study, uninterrupted, step):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    interrupt(study, step=step)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert Run(study, "haste", 0).resume_step() == step
    assert_same(contents(train(study)), uninterrupted)


def test_resuming_after_a_crash_equals_never_having_stopped(output, study, uninterrupted):
    with pytest.raises(ZeroDivisionError):
        train(study, on_step=at(10, lambda _: 1 / 0))
    torch.manual_seed(12345)
    assert_same(contents(train(study)), uninterrupted)


@pytest.mark.parametrize("arm", [pytest.param("vanilla", marks=pytest.mark.slow), "repa"])
def test_other_arms_settings_and_kinds_resume(output, monkeypatch, make_study, arm):
    more = ("precision=bf16", "prefetch=true", "accumulate=2", "watch_angle=true")
    study = make_study("model.kind=dit", *(f"train.{setting}" for setting in more))
    straight = contents(train(study, arm))
    monkeypatch.setenv("HASTE_OUTPUT", str(output / "second"))
    interrupt(study, arm)
    assert_same(contents(train(study, arm)), straight)


def test_activation_checkpointing_and_previews_change_no_bit_and_a_finished_run_is_left_alone(
    output, make_study, uninterrupted
):
    run = train(make_study("train.log_every=5", "train.activation_checkpointing=true", "train.sample_every=3"))
    assert_same(contents(run), uninterrupted)
    before = {path: path.stat().st_mtime_ns for path in run.dir.rglob("*") if path.name != "run.lock"}
    train(run.study, on_step=lambda _: pytest.fail("trained again"))
    assert {path: path.stat().st_mtime_ns for path in run.dir.rglob("*") if path.name != "run.lock"} == before


def test_only_kept_checkpoints_remain_and_a_missing_one_is_made_again_from_the_one_before(output, study, uninterrupted):
    seen = {}

    def look(trainer):
        seen[trainer.step] = Run(study, "haste", 0).steps()

    run = train(study, on_step=look)
    assert (seen[3], seen[6], seen[9], run.steps()) == ([3], [4, 6], [4, 8, 9], [4, 8, 12])
    run.checkpoint_path(8).unlink()
    assert steps_of(study)[1][0] == 5
    assert_same(contents(run), uninterrupted)


def test_a_run_in_use_and_a_damaged_checkpoint_are_refused(output, study, uninterrupted):
    interrupt(study)
    run = Run(study, "haste", 0)
    with locked(run.dir / "run.lock", "it"), pytest.raises(HasteError, match="haste seed 0 is in use by process"):
        train(study)
    path = run.checkpoint_path(7)
    path.write_bytes(path.read_bytes()[:1000])
    with run.metrics_path.open("a") as log:
        log.write('{"step": 8, "lo')  # a line cut short by a crash is dropped
    with pytest.raises(HasteError, match=r"damaged.*delete it"):
        train(study)
    path.unlink()
    assert_same(contents(train(study)), uninterrupted)


def test_a_checkpoint_of_another_seed_or_lineage_is_refused(output, tiny):
    repa = train(tiny, "repa")
    for arm, seed in (("repa", 1), ("haste", 0)):
        run = Run(tiny, arm, seed)
        run.checkpoint_path(4).parent.mkdir(parents=True)
        shutil.copy(repa.checkpoint_path(4), run.checkpoint_path(4))
        with pytest.raises(HasteError, match="belongs to lineage"):
            train(tiny, arm, seed)


# -- sharing the first part -------------------------------------------------------------------------------------------


def test_haste_branched_from_holistic_equals_haste_from_scratch(output, study, uninterrupted):
    holistic = train(study, "holistic")
    before = contents(holistic)
    haste, taken = steps_of(study)
    assert taken == [9, 10, 11, 12]
    assert_same(contents(haste), uninterrupted)
    assert_same(contents(holistic), before)
    noted = json.loads((haste.dir / "provenance.json").read_text())
    assert (noted["shared_with"], noted["shared_until_step"]) == ("holistic seed 0", 8)


@pytest.mark.parametrize(
    ("folder", "when", "said"),
    [*((".", when, "was removed while it trained; run again to begin anew") for when in (2, 6, 12)),
     ("checkpoints", 6, r"checkpoints \[4\] were removed while it trained")],
)  # fmt: skip
def test_a_folder_removed_while_its_run_trains_is_said_and_made_again(output, study, uninterrupted, folder, when, said):
    run = Run(study, "haste", 0)
    with pytest.raises(HasteError, match=said):
        fit(run, on_step=at(when, lambda _: shutil.rmtree((run.dir / folder).resolve())))
    if folder == ".":
        assert run.steps() == []
        with pytest.raises(HasteError, match=r"no metrics at .*; run haste train digits haste"):
            run.metrics()
    assert_same(contents(train(study)), uninterrupted)
    run.metrics_path.unlink()
    with pytest.raises(HasteError, match=r"no metrics at .*; delete .* and run haste train"):
        run.metrics()


def test_a_shorter_call_leaves_what_a_longer_one_logged(output, make_study):
    long = train(make_study())
    before, steps = long.metrics_path.read_bytes(), [line["step"] for line in long.metrics()]
    short = train(make_study("train.steps=6", "train.keep=[]"))
    assert short.dir == long.dir
    assert short.metrics()[-1]["step"] == 6
    assert [line["step"] for line in long.metrics()] == sorted({*steps, 6})

    def kept(content):
        return [line for line in map(json.loads, content.splitlines()) if line["step"] > 6]

    assert kept(long.metrics_path.read_bytes()) == kept(before)
    assert long.missing_steps() == []


# -- the environment --------------------------------------------------------------------------------------------------


def test_no_variable_of_accelerate_moves_a_number(output, make_study, monkeypatch):
    """Every name of one in accelerate's source, with a value that it would take."""
    source = "".join(path.read_text() for path in Path(accelerate.__file__).parent.rglob("*.py"))
    names = set(re.findall(r"ACCELERATE_[A-Z0-9_]*[A-Z0-9]", source)) - HARMLESS
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND"} < names
    plain = contents(train(make_study()))
    taken = {"STEPS": "4", "BACKEND": "inductor", "PRECISION": "bf16", "MODE": "default", "CLIPPING": "0.1"}
    for name in sorted(names - set(UNSUPPORTED)):
        monkeypatch.setenv(name, taken.get(name.rpartition("_")[2], "1"))
    monkeypatch.setenv("HASTE_OUTPUT", str(output / "other"))
    assert_same(contents(train(make_study())), plain)
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4", "left as it was"


def test_other_ways_of_training_in_parallel_are_refused(output, make_study, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(HasteError, match="ACCELERATE_USE_FSDP is set; expected plain data parallel training"):
        train(make_study())
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HasteError, match="WORLD_SIZE is 2, and these are not set: RANK, MASTER_ADDR, MASTER_PORT; "):
        train(make_study())


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''; expected a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0; expected 1 and above"),
        ({"RANK": "x"}, "RANK is 'x'; expected a number"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is not set; expected RANK below WORLD_SIZE"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'; expected a number"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU is 'maybe'; expected true or false"),
        ({"ACCELERATE_USE_FSDP": "maybe"}, "ACCELERATE_USE_FSDP is 'maybe'; expected true or false"),
        ({"ACCELERATE_DEBUG_MODE": "maybe"}, "ACCELERATE_DEBUG_MODE is 'maybe'; expected true or false"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "ACCELERATE_TORCH_DEVICE is 'meta', no device of this machine"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:77"}, "ACCELERATE_TORCH_DEVICE is 'cuda:77', no device of this machine"),
        ({"ACCELERATE_TORCH_DEVICE": "gpu"}, "ACCELERATE_TORCH_DEVICE is 'gpu', no device of this machine"),
    ],
)
def test_an_environment_that_names_no_processes_or_devices_is_refused(output, tiny, monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HasteError, match=said):
        train(tiny)


def test_a_single_process_of_a_launcher_trains_as_one(output, make_study, monkeypatch, forget_accelerator):
    study = make_study("train.steps=2", "train.keep=[]")
    plain = contents(train(study, "vanilla"))
    forget_accelerator()
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "HASTE_OUTPUT": str(output / "o")}.items():
        monkeypatch.setenv(name, value)
    assert_same(contents(train(study, "vanilla")), plain)
    assert os.environ["LOCAL_RANK"] == "0", "left as it was"


# -- losses that are not finite, disks that are full ------------------------------------------------------------------


@torch.no_grad()
def poison(trainer):
    next(trainer.model.parameters()).fill_(float("nan"))


def test_checkpoints_before_a_loss_that_is_not_finite_stay_and_can_be_resumed(output, make_study):
    study = make_study("train.log_every=100")
    with pytest.raises(HasteError, match=r"loss is nan.*train\.lr.*the checkpoint of step 4 is intact"):
        train(study, on_step=at(5, poison))
    run = Run(study, "haste", 0)
    assert run.steps() == [4]
    assert all(value.float().isfinite().all() for value in run.load(4)[0].values())
    train(study)
    assert run.missing_steps() == []


@pytest.mark.parametrize("infinite", [OVERFLOWS["no"] - 1, OVERFLOWS["no"]])
def test_gradients_that_are_not_finite_end_a_run_and_never_reach_the_log_as_infinity(output, make_study, infinite):
    """An infinite norm clips every gradient to zero, so the loss stays finite."""
    study = make_study("train.log_every=2", "train.keep=[4]")
    steps = range(6, 6 + infinite)  # of 12

    def begin(trainer):
        if trainer.step == 1:
            trainer.accelerator.clip_grad_norm_ = lambda *_: torch.tensor(math.inf if trainer.step in steps else 1.0)

    if infinite < OVERFLOWS["no"]:
        run = train(study, on_step=begin)
    else:
        with pytest.raises(HasteError, match=r"not finite in 5 steps in a row at or before step 12; try .*; "
                           r"the checkpoint of step \d+ is intact"):  # fmt: skip
            train(study, on_step=begin)
        run = Run(study, "haste", 0)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [8, 10]
    assert all(math.isfinite(line["loss"]) for line in lines)


# -- the step ---------------------------------------------------------------------------------------------------------


def test_draws_are_uniform_times_normal_noise_and_labels_dropped_at_the_given_rate():
    x = torch.zeros(20_000, 1, 2, 2)
    batch = Batch(x, torch.arange(20_000) % 10, x)
    for rate in (0.0, 0.1, 1.0):
        t, eps, y = draw_noise(batch, 10, rate, torch.Generator().manual_seed(0))
        dropped = y == 10
        assert torch.equal(y[~dropped], batch.y[~dropped])
        assert float(dropped.float().mean()) == pytest.approx(rate, abs=0.01)
    assert (t.shape, eps.shape) == ((20_000,), x.shape)
    assert float((torch.histc(t, 10, 0, 1) / 2000 - 1).abs().max()) < 0.1
    assert float(eps.mean()) == pytest.approx(0, abs=0.02)
    assert float(eps.std()) == pytest.approx(1, abs=0.02)
    together = torch.corrcoef(torch.cat([eps.flatten(1), t[:, None]], 1).T) - torch.eye(5)
    assert float(together.abs().max()) < 0.04
    again, other = (draw_noise(batch, 10, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(again.eps, eps)
    assert not torch.equal(other.eps, eps)


def test_a_run_is_the_loop_written_out_with_a_plain_optimizer(output, make_study):
    """README's loss on the same draws, through the switch; joint clipping; EMA as the mean of all weights so far."""
    study = make_study("train.ema_decay=0.7", "train.clip_norm=0.5", "arms.haste.termination.at=4",
                       "arms.haste.alignment.lambda_feature=0.3")  # fmt: skip
    trainer, twin = (open_trainer(Run(study, "haste", 0)) for _ in range(2))
    model, haste, history, norms = twin.generator, twin.haste, [], []
    optimizer = torch.optim.AdamW([*model.parameters(), *haste.parameters()], lr=twin.options.lr, weight_decay=0)
    trainer.optimizer.optimizer.register_step_pre_hook(
        lambda o, *_: norms.append(torch.cat([p.grad.flatten() for g in o.param_groups for p in g["params"]]).norm())
    )
    for step in range(6):
        history.append([p.detach().clone() for p in model.parameters()])
        batch = twin.batches.next()
        t, eps, y = draw_noise(batch, 10, 0.1, twin.noise)
        at_t = t[:, None, None, None]
        with haste.tap(model.blocks) as seen:
            v = model((1 - at_t) * batch.x + at_t * eps, t, y)
        denoising = (v - (eps - batch.x)).square().mean()
        loss = denoising + haste(seen, batch.images, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), *haste.parameters()], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        measured = trainer.train_step()
        found, expected = [measured[n] for n in ("loss", "denoising", "grad_norm")], (loss, denoising, norm)
        assert_close(torch.stack(found), torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
        assert float(norms[-1]) == pytest.approx(min(0.5, float(norm)), rel=1e-4)
        assert (trainer.haste is None) == (haste.phase == 2) == (step >= 4)
    history.append([p.detach() for p in model.parameters()])
    for i, (name, ours) in enumerate(trainer.model.named_parameters()):
        if not name.endswith("qkv.bias"):  # the bias of k has a gradient of rounding, of which Adam makes full steps
            assert_close(ours.detach(), history[6][i], rtol=0, atol=2e-5)
        mean = 0.7**6 * history[0][i] + sum(0.3 * 0.7 ** (6 - n) * history[n][i] for n in range(1, 7))
        average = trainer.ema.get_parameter(name)
        assert name.endswith("qkv.bias") or torch.allclose(average, mean, rtol=0, atol=2e-5)
        assert not average.requires_grad


def test_arms_with_the_same_seed_start_alike_and_see_the_same_images_noise_times_and_labels(output, tiny):
    def start_and_inputs(arm, seed=0):
        trainer, seen = open_trainer(Run(tiny, arm, seed)), []
        trainer.model.register_forward_pre_hook(lambda _m, args: seen.extend(a.clone() for a in args))
        initial = [p.detach().clone() for p in trainer.model.parameters()]
        for _ in range(3):
            trainer.train_step()
        return initial, seen

    for vanilla, *others in zip(*(start_and_inputs(arm) for arm in ARMS), strict=True):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(vanilla, other, strict=True))
    first, second = (start_and_inputs("vanilla", seed) for seed in (0, 1))
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[1][0], second[1][0])


def test_a_run_leaves_a_plain_generator_its_settings_and_a_preview(output, tiny):
    run = train(tiny, "holistic")
    generator = SiT(image_size=8, channels=1, classes=10, depth=3, width=32, heads=4, patch=2)
    tensors, rest = run.load(12)
    for prefix in ("model.", "ema."):
        generator.load_state_dict(checkpoint.under(tensors, prefix))
    assert rest["ema_fingerprint"] == checkpoint.fingerprint(checkpoint.under(tensors, "ema."))
    assert not any("teacher" in name or "encoder" in name for name in tensors)
    written = yaml.safe_load((run.dir / "config.yaml").read_text())
    assert [written.pop(key) for key in ("study", "arm", "seed")] == ["digits", "holistic", 0]
    assert config.RunSettings.model_validate(written) == run.config
    assert [p.name for p in (run.dir / "samples").iterdir()] == ["step_00000012.png"]


def test_the_log_goes_to_trackers_too(make_study, output, monkeypatch):
    begun = []

    class Tracker:
        name = "tensorboard"

        def __init__(self, project, **where):
            self.where, self.logged, self.images, self.ended = (project, where), [], [], False
            begun.append(self)

        def start(self): ...

        def log(self, values, step):
            self.logged.append((step, values))

        def log_images(self, values, step, dataformats):
            self.images.append((step, values["samples"].shape, dataformats))

        def finish(self):
            self.ended = True

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    plain = make_study("train.watch_angle=true")
    followed = make_study("train.watch_angle=true", "train.trackers=[tensorboard]")
    assert followed.run("haste").hash == plain.run("haste").hash
    run = train(followed)
    (tracker,) = begun
    assert tracker.where == ("tensorboard", {"logging_dir": run.dir})
    assert tracker.ended
    assert [step for step, _ in tracker.logged] == [line["step"] for line in run.metrics()]
    assert {"loss", "phase", "feature", "attention", "online_angle"} <= tracker.logged[0][1].keys()
    assert all(isinstance(value, int | float) for _, values in tracker.logged for value in values.values())
    step, shape, formats = tracker.images[-1]
    assert (step, shape[0], shape[-1], formats) == (run.config.train.steps, 1, 3, "NHWC")


def test_a_tracker_that_is_not_installed_is_named(make_study, output, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", missing)
    with pytest.raises(HasteError, match=r"train\.trackers names wandb, which is not installed; pip install wandb"):
        train(make_study("train.trackers=[wandb]"))


def test_a_run_that_ends_while_it_draws_a_preview_loses_neither_the_picture_nor_a_step(make_study, output, monkeypatch):
    run, there = Run(make_study("train.sample_every=100"), "vanilla", 0), []

    def fails(*given):
        there.extend(run.steps())
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_preview", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(run, progress=False)
    last = run.config.train.steps
    assert last in run.steps()  # after an error a later call goes on from here
    # After a kill at that moment it comes by again.
    assert last not in there
    run.checkpoint_path(last).unlink()
    fit(run, progress=False)
    assert [p.name for p in (run.dir / "samples").iterdir()] == [f"step_{last:08d}.png"]
