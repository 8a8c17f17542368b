"""One step's batch in several micro-batches and over several processes: the same numbers but for rounding."""

from __future__ import annotations

import pytest
import torch

from haste_core.errors import HasteError
from haste_core.processes import micro_batches
from haste_core.runs import Run
from haste_core.state import capture
from haste_core.training import draw_noise, fit, open_state, train_step, update_ema

# Six steps across the switch, all of them logged.
SHORT = ("train.steps=6", "train.keep=[3]", "train.log_every=1", "arms.haste.termination.at=4")
MEASURED = ("loss", "denoising", "feature", "attention", "grad_norm")


def logged(run):
    return [{k: v for k, v in line.items() if k in MEASURED} for line in run.metrics()]


def assert_close_logs(one, other, rel=1e-5):
    assert len(one) == len(other) == 6
    for line, line_too in zip(one, other, strict=True):
        assert line == pytest.approx(line_too, rel=rel)


def assert_close_checkpoints(found, expected):
    """Equal weights but for rounding, equal streams of images and noise to the bit."""
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name.startswith(("data.", "noise.")):
            assert torch.equal(found[name], value), name
        # A shift of all keys moves no attention: the gradient of their bias is rounding, of which Adam makes full steps.
        elif name.startswith(("model.", "ema.", "alignment.projector.")) and not name.endswith("qkv.bias"):
            assert torch.allclose(found[name], value, atol=2e-5), (name, float((found[name] - value).abs().max()))


@pytest.fixture
def short(make_study):
    return lambda *more: make_study(*SHORT, *more)


def trained(study, place, monkeypatch, arm="haste"):
    monkeypatch.setenv("HASTE_OUTPUT", str(place))
    torch.manual_seed(0)  # of the teacher, whose weights are random here
    run = Run(study, arm, 0)
    fit(run, progress=False)
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
