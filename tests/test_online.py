"""The online angle against passes of its own and closed forms; angles a run logs and that end its phase I."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from haste_core.alignment import attention_probabilities
from haste_core.errors import HasteError
from haste_core.gradient_angle import EDGES, OnlineAngle, losses_at, noise
from haste_core.study.data.base import Digits
from haste_core.study.runs import Run
from haste_core.study.train import fit, open_trainer, trigger_of
from haste_core.taps import Seen
from haste_core.termination import replay

WATCHED = "train.watch_angle=true"


@pytest.fixture
def trained(output, make_study):
    def train(arm, *more):
        run = Run(make_study(*more), arm, 0)
        fit(run, progress=False)
        return run

    return train


class Look:
    """Stands for an online angle: keeps what it is shown."""

    def watch(self, seen, t):
        self.seen = seen
        return seen


@pytest.fixture
def moment(output, make_study):
    """Model, HASTE, objective, batch and noise a few steps into phase I. Depth 2 (from 1), q and k of blocks 1, 2."""
    trainer = open_trainer(Run(make_study(), "holistic", 0))
    for _ in range(4):
        trainer.train_step()
    batch = trainer.batches.next()
    return trainer.generator, trainer.haste, trainer.objective, batch, noise(batch.x, 5)


def losses_under(angle, moment, t=0.4):
    moment[1].angle = angle
    return losses_at(*moment, t, watch=True)


def separate(moment, wanted):
    """Gradients of each loss at tensors by passes of their own."""
    look = Look()
    losses = losses_under(look, moment)
    return {
        name: torch.autograd.grad(loss, wanted(look.seen), retain_graph=True, allow_unused=True, materialize_grads=True)
        for name, loss in losses.items()
    }


def read_once(moment, angle):
    """Rows by loss after one backward pass."""
    torch.autograd.grad(sum(losses_under(angle, moment).values()), list(moment[0].parameters()), allow_unused=True)
    return {row["loss"]: row for row in angle.read()}


def cosine_of(own, rest):
    own, rest = (torch.cat([g.double().flatten() for g in parts]) for parts in (own, rest))
    return [float(own @ rest / (own.norm() * rest.norm())), float(own.norm() / rest.norm())]


def test_at_the_tokens_own_is_the_feature_part_and_the_rest_all_above(moment):
    apart = separate(moment, lambda seen: [seen.tokens[2]])
    rest = [d + a for d, a in zip(apart["denoising"], apart["attention"], strict=True)]
    assert float(apart["attention"][0].abs().max()) > 0  # block 2 lies above the tokens
    found = read_once(moment, OnlineAngle(edges=(0, 1)))["feature"]
    assert [found["cosine"], found["norm_ratio"]] == pytest.approx(cosine_of(apart["feature"], rest), rel=1e-4)


def test_at_q_and_k_own_is_the_block_s_attention_loss_and_the_rest_all_above(moment):
    apart = separate(moment, lambda seen: [x for block in (1, 2) for x in seen.qk[block]])
    # Block 2 is the last: its q and k see no other alignment loss. Block 1's see the feature loss and block 2's.
    assert [bool(g.any()) for g in apart["feature"]] == [True, True, False, False]
    # In closed form, own is lambda (p_s - p_t) / (B H N pairs), times scale k for q and scale q for k.
    haste, images, own = moment[1], moment[3].images, []
    target, look = haste.teacher(images, haste.teacher_blocks), Look()
    losses_under(look, moment)
    for student, teacher in haste.pairs:
        q, k = (x.detach() for x in look.seen.qk[student])
        p_s, p_t = attention_probabilities(q, k), attention_probabilities(*target.qk[teacher])
        ds = haste.lambda_attention * (p_s - p_t) / (p_s[..., 0].numel() * len(haste.pairs)) * q.shape[-1] ** -0.5
        own += [ds @ k, ds.transpose(-1, -2) @ q]
    rest = [sum(parts) - part for parts, part in zip(zip(*apart.values(), strict=True), own, strict=True)]
    found = read_once(moment, OnlineAngle(edges=(0, 1)))["attention"]
    assert [found["cosine"], found["norm_ratio"]] == pytest.approx(cosine_of(own, rest), rel=1e-3)


def test_samples_fall_into_the_bins_of_their_noise_level():
    t = torch.tensor([0.0, 0.05, 0.1, 0.29, 0.3, 0.6, 0.89, 0.9, 0.95, 1.0, 0.5, 0.5, 0.2, 0.7, 0.99, 0.31])
    h, angle = torch.ones(16, 2, 2, requires_grad=True) * 1, OnlineAngle()
    (angle.watch(Seen({1: h}), t).tokens[1].sum() + h.sum()).backward()
    rows = angle.read()
    assert [row["count"] for row in rows] == [2, 3, 2, 3, 2, 4]
    assert [row["cosine"] for row in rows] == pytest.approx([1] * 6)
    assert [(row["t_low"], row["t_high"]) for row in rows] == list(zip(EDGES[:-1], EDGES[1:], strict=True))


def test_a_sum_of_two_steps_is_the_angle_over_both_and_goes_on_from_where_it_was_saved(moment):
    *parts, batch, eps = moment
    whole = read_once(moment, OnlineAngle(edges=(0, 1)))
    angle = OnlineAngle(edges=(0, 1))
    for i in (slice(0, 8), slice(8, 16)):
        saved, angle = angle.state_dict(), OnlineAngle(edges=(0, 1))
        angle.load_state_dict(saved)
        both = read_once((*parts, type(batch)(*(part[i] for part in batch)), eps[i]), angle)
    for loss in ("feature", "attention"):
        assert both[loss]["cosine"] == pytest.approx(whole[loss]["cosine"], rel=1e-4)
        assert both[loss]["count"] == 16
    angle.reset()
    assert angle.read() == []
    with pytest.raises(HasteError, match="online angles were saved in bins"):
        OnlineAngle(edges=(0, 0.5, 1)).load_state_dict(saved)


def test_samples_that_are_not_finite_and_tensors_without_loss_or_gradient_do_not_count():
    seen, angle = torch.ones(3, 2, 2, requires_grad=True) * 1, OnlineAngle(edges=(0, 1))
    angle.watch(Seen({1: seen}), torch.zeros(3))  # read by no loss
    frozen = torch.ones(3, 2, 2)
    assert angle.watch(Seen({1: frozen}), torch.zeros(3)).tokens[1] is frozen
    seen.sum().backward(retain_graph=True)
    assert angle.read() == []
    alias = angle.watch(Seen({1: seen}), torch.full((3,), 0.5)).tokens[1]
    weight = torch.tensor([1.0, float("inf"), 2.0])[:, None, None]
    (seen.sum() + (alias * weight).sum()).backward()
    (row,) = angle.read()
    assert (row["count"], row["cosine"]) == (2, pytest.approx((1 + 2) / (5 * 2) ** 0.5))


# -- angles of a run --------------------------------------------------------------------------------------------------


def test_watching_changes_no_bit_and_logs_a_cosine_per_loss_and_bin(trained):
    more = ("alignment.layer_pairs=[[1, 1], [1, 2], [2, 2], [2, 3]]", "model.kind=dit")
    plain, watched = trained("haste", *more), trained("haste", *more, WATCHED, "name=watched")
    assert plain.config.hash == watched.config.hash
    for step in (4, 12):
        weights, same = (run.load(step, ("model.", "alignment."))[0] for run in (plain, watched))
        assert all(value.equal(same[name]) for name, value in weights.items())
    for line, same in zip(watched.metrics(), plain.metrics(), strict=True):
        assert line["loss"] == same["loss"]
        assert "online" not in same
        assert ("online" in line) == (line["phase"] == 1)
        if line["phase"] == 1:
            cosines = [c for bins in line["online"].values() for c in bins if c is not None]
            assert set(line["online"]) == {"feature", "attention"}
            assert all(-1 <= c <= 1 for c in cosines)
            assert line["online_angle"] == pytest.approx(np.mean(cosines))


@pytest.mark.parametrize("kind", ["gradient_angle", "online_angle"])
def test_an_angle_of_training_and_validation_images_ends_phase_one_where_its_replay_says(kind, trained, monkeypatch):
    read, images = set(), Digits.images

    def without_test(self, split, count=None):
        assert split != "test", "the test split was read"
        read.add(split)
        return images(self, split, count)

    monkeypatch.setattr(Digits, "images", without_test)
    # Every cosine is below a threshold of 1, so the second reading after step 2 ends it.
    settings = [f"kind={kind}", "at=null", "threshold=1", "patience=2", "after=2", "every=2", "n=10"]
    run = trained("haste", *(f"arms.haste.termination.{s}" for s in settings))
    lines = run.metrics()
    assert [line["phase"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert [line["step"] for line in lines if kind in line] == ([2, 4, 6] if kind == "online_angle" else [4, 6])
    assert replay(trigger_of(run.config.termination), lines) == 6
    assert run.load(12, ("none",))[1]["termination"]["switched_at"] == 6
    assert ("validation" in read) == (kind == "gradient_angle")


def test_checks_come_at_logged_steps(make_study):
    with pytest.raises(HasteError, match=r"termination\.every 3 is no multiple of train\.log_every 2"):
        make_study("arms.holistic.termination={kind: gradient_angle, every: 3}")
    with pytest.raises(HasteError, match=r"termination\.block names block 7; expected 0 to 2"):
        make_study("arms.holistic.termination={kind: gradient_angle, every: 2, block: 7}")
