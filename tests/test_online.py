from __future__ import annotations

import pytest
import torch

from haste_core.alignment import attention_cross_entropy, attention_logits, attention_probabilities
from haste_core.analysis import gradients
from haste_core.errors import HasteError
from haste_core.gradient_angle import losses_at, noise
from haste_core.online_angle import EDGES, OnlineAngle
from haste_core.study.pretrain import prepare_teacher
from haste_core.study.runs import Run
from haste_core.study.train import fit, open_trainer
from haste_core.taps import Tapped
from haste_core.training import draw_noise, train_step, update_ema


def watched_step(s, angle):
    """A phase I step as in `training.train_step`, with the angle between student and alignment."""
    batch = s.batches.next()
    draws = draw_noise(batch, s.ema.null_label, s.config.train.label_dropout, s.noise)
    at = s.objective.timesteps(draws.t)
    x_t = s.objective.noised(batch.x, draws.eps, at)
    tapped = s.model(x_t, at, draws.y, s.alignment.taps)
    aligned = s.alignment.losses(angle.watch(tapped, draws.t), batch.images)  # the only line that differs
    loss = s.objective.loss(tapped.output, batch.x, draws.eps, at).mean() + aligned.total
    s.accelerator.backward(loss)
    s.accelerator.clip_grad_norm_(s.parameters(), s.config.train.clip_norm)
    for optimizer in s.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    update_ema(s)
    s.step += 1
    return loss.detach()


@pytest.fixture
def state(output, make_study):
    """A function from an arm and overrides to its state before the first step."""

    def make(arm, *more):
        run = Run(make_study(*more), arm, 0)
        prepare_teacher(run.study, run.config.teacher)
        return open_trainer(run)

    return make


@pytest.mark.parametrize("more", [(), ("alignment.layer_pairs=[[1, 1], [1, 2], [2, 2], [2, 3]]",), ("model.kind=dit",)])
def test_training_is_the_same_to_the_bit_with_and_without(state, more):
    with_it, without = state("holistic", *more), state("holistic", *more)
    angle = OnlineAngle()
    for _ in range(6):
        loss = watched_step(with_it, angle)
        assert loss.equal(train_step(without)["loss"])
    for ours, theirs in zip(with_it.parameters(), without.parameters(), strict=True):
        assert ours.equal(theirs)
    table = angle.read()
    assert set(table["loss"]) == {"feature", "attention"}
    assert table.groupby("loss")["count"].sum().tolist() == [96, 96]
    assert table["cosine"].dropna().between(-1, 1).all()


@pytest.fixture
def seen(state):
    """A trained holistic state, a batch with its noise, and what one watched backward pass caught."""
    s = state("holistic")
    for _ in range(4):
        train_step(s)
    batch = s.batches.next()
    return s, batch, noise(batch.x, 5)


def separate(s, batch, eps, t, wanted):
    """Gradients of the denoising loss and of each alignment loss at tokens, q and k, by passes of their own."""
    caught = {}

    def watch(tapped, _):
        caught["tapped"] = tapped
        return tapped

    losses = losses_at(s.model, s.alignment, s.objective, batch, eps, t, watch)
    tensors = wanted(caught["tapped"])
    return {
        name: torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        for name, loss in losses.items()
    }


def read_once(s, batch, eps, t, angle):
    losses = losses_at(s.model, s.alignment, s.objective, batch, eps, t, angle.watch)
    torch.autograd.grad(sum(losses.values()), list(s.model.parameters()), allow_unused=True)
    return angle.read().set_index("loss")


def cosine_of(own, rest):
    own, rest = (torch.cat([g.double().flatten() for g in parts]) for parts in (own, rest))
    return float(own @ rest / (own.norm() * rest.norm())), float(own.norm() / rest.norm())


def test_at_the_tokens_own_is_the_feature_part_and_the_rest_all_above(seen):
    s, batch, eps = seen
    # Depth 2 (from 1); attention is aligned in blocks 1 and 2 (from 0): only block 2 lies above the tokens.
    apart = separate(s, batch, eps, 0.4, lambda tapped: list(tapped.tokens.values()))
    rest = [d + a for d, a in zip(apart["denoising"], apart["attention"], strict=True)]
    assert float(apart["attention"][0].abs().max()) > 0
    found = read_once(s, batch, eps, 0.4, OnlineAngle(edges=(0, 1))).loc["feature"]
    assert (found["cosine"], found["norm_ratio"]) == pytest.approx(cosine_of(apart["feature"], rest), rel=1e-4)


def test_at_q_and_k_own_is_the_block_s_attention_loss_and_the_rest_all_above(seen):
    s, batch, eps = seen
    q_and_k = lambda tapped: [x for block in (1, 2) for x in tapped.qk[block]]  # noqa: E731
    apart = separate(s, batch, eps, 0.4, q_and_k)
    total = [sum(parts) for parts in zip(*apart.values(), strict=True)]
    own = own_in_closed_form(s, batch, eps, 0.4)
    # Block 2 is the last: its q and k see no other alignment loss. Block 1's see the feature loss and block 2's.
    assert all(not g.any() for g in apart["feature"][2:])
    assert all(bool(g.any()) for g in apart["feature"][:2])
    rest = [whole - part for whole, part in zip(total, own, strict=True)]
    found = read_once(s, batch, eps, 0.4, OnlineAngle(edges=(0, 1))).loc["attention"]
    assert (found["cosine"], found["norm_ratio"]) == pytest.approx(cosine_of(own, rest), rel=1e-3)


def own_in_closed_form(s, batch, eps, t):
    """lambda (p_s - p_t) / (B H N pairs), times scale k for q and scale q for k; blocks 1 and 2 in turn."""
    kept = {}

    def watch(tapped, _):
        kept["tapped"] = tapped
        return tapped

    losses_at(s.model, s.alignment, s.objective, batch, eps, t, watch)
    taught = s.alignment.teacher(batch.images, s.alignment.teacher_blocks).qk
    own = []
    for student, teacher in s.alignment.pairs:
        q, k = (x.detach() for x in kept["tapped"].qk[student])
        p_s, p_t = attention_probabilities(q, k), attention_probabilities(*taught[teacher])
        ds = s.alignment.config.lambda_attention * (p_s - p_t) / (p_s[..., 0].numel() * len(s.alignment.pairs))
        scale = q.shape[-1] ** -0.5
        own += [scale * ds @ k, scale * ds.transpose(-1, -2) @ q]
    return own


def test_hooks_catch_the_closed_form_and_own_plus_rest_is_the_whole():
    g = torch.Generator().manual_seed(0)
    q, k, teacher_q, teacher_k = (torch.randn(2, 3, 5, 4, generator=g, requires_grad=True) for _ in range(4))
    target = attention_probabilities(teacher_q, teacher_k).detach()
    q_seen, k_seen = q * 1, k * 1  # what a model hands out is no leaf
    angle, caught = OnlineAngle(edges=(0, 1)), []
    angle._add = lambda loss, member, own, total, counts: caught.append((own, total))
    watched = angle.watch(Tapped(q_seen, {}, {0: (q_seen, k_seen)}), torch.tensor([0.1, 0.9])).qk[0]
    above = (attention_logits(q_seen, k_seen).softmax(-1) * torch.arange(5.0)).sum()
    (above + attention_cross_entropy(watched, target)).backward()
    ds = (attention_probabilities(q, k) - target) / (2 * 3 * 5)
    expected = {"q": ds @ k * 0.5, "k": ds.transpose(-1, -2) @ q * 0.5}
    alone = torch.autograd.grad((attention_logits(q, k).softmax(-1) * torch.arange(5.0)).sum(), [q, k])
    by_size = sorted(caught, key=lambda pair: not pair[1].allclose(q.grad))  # q first
    for (own, total), closed, rest in zip(by_size, expected.values(), alone, strict=True):
        torch.testing.assert_close(own, closed.detach())
        torch.testing.assert_close(total - own, rest)


def test_samples_fall_into_the_bins_of_their_noise_level(seen):
    s, batch, eps = seen
    t = torch.tensor([0.0, 0.05, 0.1, 0.29, 0.3, 0.6, 0.89, 0.9, 0.95, 1.0, 0.5, 0.5, 0.2, 0.7, 0.99, 0.31])
    tapped = s.model(s.objective.noised(batch.x, eps, t), t, batch.y, s.alignment.taps)
    angle = OnlineAngle()
    aligned = s.alignment.losses(angle.watch(tapped, t), batch.images)
    (aligned.total + s.objective.loss(tapped.output, batch.x, eps, t).mean()).backward()
    table = angle.read()
    feature = table[table["loss"] == "feature"]
    assert feature["count"].tolist() == [2, 3, 2, 3, 2, 4]
    assert [*feature["t_low"], 1.0] == list(EDGES)
    assert feature["t_high"].tolist() == list(EDGES[1:])


def test_a_sum_of_two_steps_is_the_angle_over_both(seen):
    s, batch, eps = seen
    halves = [type(batch)(*(part[i] for part in batch)) for i in (slice(0, 8), slice(8, 16))]
    angle = OnlineAngle(edges=(0, 1))
    for half, part in zip(halves, (eps[:8], eps[8:]), strict=True):
        both = read_once(s, half, part, 0.4, angle)
    whole = read_once(s, batch, eps, 0.4, OnlineAngle(edges=(0, 1)))
    assert both["cosine"].to_dict() == pytest.approx(whole["cosine"].to_dict(), rel=1e-4)
    assert both["count"].tolist() == [16, 16]
    angle.reset()
    assert angle.read().empty


def test_a_sample_that_is_not_finite_is_not_counted():
    h = torch.ones(3, 2, 2, requires_grad=True)
    seen, angle = h * 1, OnlineAngle(edges=(0, 1))
    alias = angle.watch(Tapped(seen, {1: seen}, {}), torch.full((3,), 0.5)).tokens[1]
    weight = torch.tensor([1.0, float("inf"), 2.0])[:, None, None]
    (seen.sum() + (alias * weight).sum()).backward()
    row = angle.read().iloc[0]
    assert (row["count"], row["cosine"]) == (2, pytest.approx((1 + 2) / (5 * 2) ** 0.5))


def test_nothing_is_read_where_nothing_is_aligned_or_nothing_learns():
    h = torch.ones(3, 2, 2, requires_grad=True)
    angle = OnlineAngle()
    angle.watch(Tapped(h, {1: h}, {}), torch.zeros(3))
    h.sum().backward()
    assert angle.read().empty
    frozen = torch.ones(3, 2, 2)
    assert angle.watch(Tapped(frozen, {1: frozen}, {}), torch.zeros(3)).tokens[1] is frozen


def test_it_goes_on_from_where_it_was_saved(seen):
    s, batch, eps = seen
    first, second = OnlineAngle(), OnlineAngle()
    read_once(s, batch, eps, 0.4, first)
    second.load_state_dict(first.state_dict())
    assert read_once(s, batch, eps, 0.6, first).equals(read_once(s, batch, eps, 0.6, second))
    with pytest.raises(HasteError, match="online angles were saved in bins"):
        OnlineAngle(edges=(0, 0.5, 1)).load_state_dict(first.state_dict())


def test_the_online_angle_at_a_checkpoint_is_one_pass_over_the_held_out_images(output, make_study, monkeypatch):
    run = Run(make_study("analysis.n=20", "analysis.timesteps=[0.1, 1.0]"), "repa", 0)
    fit(run, progress=False)
    whole = gradients.online_conflict(run, [8])
    assert list(whole.columns) == ["step", "t", "loss", "online", "n"]
    assert whole[["step", "t", "loss", "n"]].to_numpy().tolist() == [[8, 0.1, "feature", 20], [8, 1.0, "feature", 20]]
    monkeypatch.setattr(gradients, "BATCH", 7)
    parts = gradients.online_conflict(run, [8])
    torch.testing.assert_close(*(torch.tensor(x["online"].to_numpy()) for x in (whole, parts)))
    # Features alone are aligned, so the rest is the denoising loss: both gradients by passes of their own.
    now = gradients.moment(run, 8, gradients.find_teacher(run.study, run.config.teacher), own=True)
    batch = gradients.held_out(run)
    kept = []
    losses = losses_at(*now, batch, noise(batch.x, 0), 0.1, watch=lambda tapped, _: kept.append(tapped) or tapped)
    own, rest = (torch.autograd.grad(losses[p], kept[0].tokens[2], retain_graph=True) for p in ("feature", "denoising"))
    assert whole["online"][0] == pytest.approx(cosine_of(own, rest)[0], rel=1e-4)
