"""Estimates against published numbers, against what a step really takes on the CPU, and as `haste plan` prints them."""

from __future__ import annotations

import json
import re
import statistics
import time

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from haste_core.errors import HasteError
from haste_core.study import config, cost, estimate
from haste_core.study.cli import main
from haste_core.study.estimate import Example
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.train import adopt_shared_part, create, fit

IMAGENET, DIGITS = Example(32, 4, 1000, 256, 3), Example(8, 1, 10, 8, 1)
RATE, SHARE = 1e12, 0.5
SPEED = {1: RATE * SHARE, 2: RATE * SHARE}
BY_HAND = ("--rate", "1e12", "--utilisation", "0.5")


def estimated(study, arm, example=DIGITS, **options):
    """The rows of an estimate by phase, as dicts."""
    return {row["phase"]: row for row in estimate.estimate(study.run(arm), example, **options).to_dict("records")}


def planned(study, gpus=1):
    return estimate.plan(study, DIGITS, SPEED, gpus)


def rows_of(table, arm):
    return table[table["arm"] == arm].set_index("phase")


# -- operations -------------------------------------------------------------------------------------------------------


# Peebles and Xie, arXiv 2212.09748: millions of parameters and G of multiply-adds at 256 and at 512 pixels.
@pytest.mark.parametrize(
    ("profile", "example", "millions", "multiply_adds"),
    [
        ("sit-b", IMAGENET, 130, 23.01),
        pytest.param("dit-xl", IMAGENET, 675, 118.64, marks=pytest.mark.slow),
        pytest.param(None, Example(64, 4, 1000, 512, 3), 675, 524.60, marks=pytest.mark.slow),
    ],
)
def test_parameters_and_operations_are_the_published_ones(profile, example, millions, multiply_adds):
    found = estimated(config.load("imagenet256", profile), "vanilla", example)[2]
    assert round(found["student"] / 1e6) == millions
    assert found["forward"] / 2e9 == pytest.approx(multiply_adds, rel=5e-4)


def test_phase_two_costs_what_vanilla_costs_and_phase_one_a_teacher_projector_and_logits_more():
    study = config.load("imagenet256", "sit-b")
    haste, vanilla = (estimated(study, arm, IMAGENET) for arm in ("haste", "vanilla"))
    assert {phase: row["steps"] for phase, row in haste.items()} == {1: 100_000, 2: 300_000}
    assert set(vanilla) == {2}
    for name in ("step_flops", "memory", "writing_bytes"):
        assert haste[2][name] == vanilla[2][name]
    # ViT-B on 256 tokens and a class token: 12 blocks and its patches. Reading q and k adds a little.
    tokens, n, d, pairs = 256, 257, 768, len(study.alignment.layer_pairs)
    teacher = 12 * (24 * n * d**2 + 4 * n**2 * d) + 2 * tokens * 3 * 14**2 * d
    projector = 2 * tokens * (768 * 2048 + 2048 * 2048 + 2048 * 768)
    logits = 2 * 12 * tokens * tokens * 64  # 12 heads of width 64 on both sides
    # The teacher goes forward alone, and so do its logits; the rest goes back through inputs and weights too.
    added = (haste[1]["step_flops"] - haste[2]["step_flops"]) / 256
    assert added == pytest.approx(teacher + 3 * projector + pairs * (1 + 3) * logits, rel=0.05)


# -- memory and disk --------------------------------------------------------------------------------------------------


def measured_peak(state):
    """Bytes that a step of a warmed-up run takes at most beyond what lies there between steps."""
    for _ in range(2):
        state.train_step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        state.train_step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(taken.max())


@pytest.mark.parametrize(
    ("arm", "phase", "batch", "accumulate", "decides"),
    [
        ("vanilla", 2, 2, 1, {"gradients"}),
        ("holistic", 1, 64, 1, {"activations"}),
        ("holistic", 1, 128, 2, {"activations", "gradients"}),  # gradients of one micro-batch stay during the next
    ],
)
def test_memory_is_what_a_step_takes_on_the_cpu(make_study, output, arm, phase, batch, accumulate, decides):
    study = make_study("model.depth=6", "model.width=64", f"train.batch_size={batch}", f"train.accumulate={accumulate}")
    held = estimated(study, arm)[phase]["memory"]
    state = create(study.run(arm), 0, find_teacher(study) if phase == 1 else None)
    assert 0.9 < measured_peak(state) / (held.get("activations", 0) + held.get("gradients", 0)) < 1.3
    assert {"activations", "gradients"} & set(held) == decides
    trained = [*state.model.parameters(), *(state.haste.parameters() if state.haste else ())]
    assert held["weights"] == sum(p.nbytes for p in trained)
    assert held["average"] == sum(p.nbytes for p in state.ema.parameters())
    moments = [s[key] for s in state.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert held["optimizer"] == sum(m.nbytes for m in moments)


def test_recomputed_activations_take_the_estimated_memory(make_study, output):
    more = ["model.depth=6", "model.width=64", "train.batch_size=128", "train.activation_checkpointing=true"]
    study = make_study(*more)
    found, whole = estimated(study, "vanilla")[2], estimated(make_study(*more[:3]), "vanilla")[2]
    assert 0.8 < measured_peak(create(study.run("vanilla"), 0, None)) / found["memory"]["activations"] < 1.3
    assert found["memory"]["activations"] < 0.4 * whole["memory"]["activations"]
    assert 1.2 < found["step_flops"] / whole["step_flops"] < 1.4


def test_checkpoints_have_the_estimated_size(tiny, output):
    run = Run(tiny, "haste", 0)
    fit(run, progress=False)
    found = estimated(tiny, "haste")
    for step, phase in ((8, 1), (12, 2)):
        size, row = run.checkpoint_path(step).stat().st_size, found[phase]
        # Headers, positions, the data order and random states come on top of a tiny network's weights.
        assert 0 < size - row["checkpoint_bytes"] / row["kept"] < 150_000
        assert row["writing_bytes"] == 2 * row["checkpoint_bytes"] / row["kept"]
    assert (found[1]["kept"], found[2]["kept"]) == (2, 1)


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_has_a_row_for_each_arm_and_phase_with_the_estimate_of_a_run(tiny):
    table = planned(tiny)
    assert not table.isna().any(axis=None)
    assert list(zip(table["arm"], table["phase"], strict=True)) == [
        ("vanilla", 2), ("repa", 1), ("atta", 1), ("holistic", 1), ("haste", 1), ("haste", 2),
    ]  # fmt: skip
    for arm in ("vanilla", "holistic"):
        (found,), (row,) = estimated(tiny, arm).values(), table[table["arm"] == arm].to_dict("records")
        assert row | found == row
        assert row["run_flops"] == 12 * row["step_flops"]
        assert row["days"] == pytest.approx(row["run_flops"] / (RATE * SHARE) / 86400)
        assert row["images_per_s"] == pytest.approx(16 * RATE * SHARE / row["step_flops"])
        assert row["memory_bytes"] == sum(row["memory"].values())


def test_an_arm_that_shares_its_first_part_costs_its_tail_alone(tiny):
    haste, vanilla = (rows_of(planned(tiny), arm) for arm in ("haste", "vanilla"))
    assert (haste["shared_with"][1], haste["shared_steps"][1], haste["steps"][1]) == ("holistic", 8, 0)
    assert (haste["run_flops"][1], haste["days"][1], haste["checkpoint_bytes"][1]) == (0, 0, 0)
    assert haste["steps"][2] == 4
    assert haste["days"][2] == pytest.approx(vanilla["days"][2] * 4 / 12)
    # Of the steps 4, 8 and 12 only the last is its own.
    assert haste["checkpoint_bytes"][2] == pytest.approx(vanilla["checkpoint_bytes"][2] / 3)


@pytest.mark.parametrize(
    "change",
    [
        "arms.holistic.train.keep=[4]",  # the donor does not keep its checkpoint at the switch
        "arms.haste.train.keep=[2, 8]",  # nor one that the arm wants before it
        "arms.haste.alignment.lambda_feature=1",
    ],
)
def test_an_arm_that_cannot_share_costs_all_of_its_steps(make_study, output, change):
    study = make_study(change)
    haste = rows_of(planned(study), "haste")
    assert (haste["shared_with"][1], haste["steps"][1], haste["steps"][2]) == ("", 8, 4)
    if "lambda" not in change:
        fit(Run(study, "holistic", 0), progress=False)
        assert not adopt_shared_part(Run(study, "haste", 0))


def test_a_fading_run_is_in_phase_one_until_it_has_faded(make_study):
    haste = rows_of(planned(make_study("arms.haste.termination.fade=3")), "haste")
    assert (haste["shared_steps"][1], haste["steps"][1], haste["steps"][2]) == (8, 3, 1)


def test_sums_are_over_arms_phases_and_seeds_with_sampling_of_what_is_scored(make_study):
    table, guided = (planned(make_study("seeds=[0, 1, 2]", f"sample.guidance={scale}")) for scale in (1, 2))
    total = estimate.sums(table)
    assert total["runs"] == 15
    assert total["days"] == pytest.approx(3 * table["days"].sum())
    assert total["flops"] == 3 * table["run_flops"].sum()
    assert total["checkpoint_bytes"] == 3 * table["checkpoint_bytes"].sum()
    assert total["checkpoints"] == 5 * 3 * 3  # arms, kept steps, seeds
    # 40 images of each; Heun in two steps passes the network three times; guidance doubles that.
    assert total["scoring_flops"] == 45 * 40 * 3 * table["forward"][0]
    assert total["scoring_days"] == pytest.approx(total["scoring_flops"] / (RATE * SHARE) / 86400)
    assert estimate.sums(guided)["scoring_flops"] == 2 * total["scoring_flops"]


def test_memory_depends_on_the_images_of_one_device_and_time_on_the_fullest(tiny, make_study):
    one, three = planned(tiny), planned(tiny, gpus=3)
    assert set(three["micro_batch"]) == {6}  # 16 images: 6, 5, 5
    assert three["days"].tolist() == pytest.approx([days * 6 / 16 for days in one["days"]])
    assert set(planned(make_study("train.accumulate=2"), gpus=3)["micro_batch"]) == {3}
    few, many = (estimated(tiny, "holistic", gpus=gpus)[1]["memory"] for gpus in (2, 1))
    assert 2 * few["activations"] == many["activations"]


def test_the_plan_of_a_cpu_says_how_long_its_cores_take_and_what_a_run_holds(tiny):
    table = planned(tiny)
    assert "on this machine" not in estimate.plan_text(table)
    total = estimate.sums(table)
    taken = estimate.hours_text(24 * (total["days"] + total["scoring_days"]) / 2)
    said = estimate.plan_text(table, 2, 0.5)
    assert f"on this machine: 2 runs at a time, about {taken} for training and sampling; a run takes 0.5 GiB" in said


# -- the speed of this device -----------------------------------------------------------------------------------------


def test_a_large_student_is_timed_with_few_blocks():
    run = config.load("imagenet256").run("holistic")
    half, one = (cost.with_depth(run, depth) for depth in (14, 1))
    assert half.alignment.layer_pairs == [(4, 8), (5, 9), (6, 10), (7, 11)]
    assert (one.model.depth, one.model.width, one.alignment.depth) == (1, 1152, 1)
    assert one.alignment.layer_pairs == [(0, 11)]
    assert (one.teacher.weights, one.tau) == ("random", float("inf"))


def test_speed_is_measured_without_data_or_the_teachers_weights(make_study, output):
    study = make_study(
        "data={kind: latents, path: nowhere, image_size: 64}", "train.batch_size=4", "teacher.weights=hub",
        "teacher.kwargs={img_size: 64, patch_size: 16, in_chans: 3, embed_dim: 24, depth: 4, num_heads: 4}",
        "teacher.mean=[0.5, 0.5, 0.5]", "teacher.std=[0.5, 0.5, 0.5]",
    )  # fmt: skip
    found = cost.measured_speed(study, Example(8, 4, 1000, 64, 3), steps=3)
    assert set(found.flops) == {1, 2}
    assert "3 steps of 3 of the 3 blocks of arm holistic on 4 of 4 images" in found.source
    assert list(output.iterdir()) == []


def test_another_kind_of_device_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(cost, "PartialState", lambda: type("State", (), {"device": torch.device("mps")}))
    with pytest.raises(HasteError, match="steps on 'mps' cannot be timed; expected cpu or cuda, or give --rate"):
        cost.measured_speed(tiny, DIGITS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_timed_in_the_precision_of_the_run(make_study, tmp_path, monkeypatch, forget_accelerator):
    monkeypatch.setenv("HASTE_OUTPUT", str(tmp_path))
    forget_accelerator()
    found = cost.measured_speed(make_study("train.precision=fp16"), DIGITS)
    forget_accelerator()
    assert set(found.flops) == {1, 2}
    assert "in fp16, " in found.source


@pytest.mark.slow
def test_estimated_times_are_those_of_a_run_on_the_same_machine(make_study, output):
    """Medians, so that what else the machine does for a moment counts for neither side."""
    study = make_study(
        "model.width=64", "train.batch_size=32", "train.steps=40", "train.keep=[20]", "claims.early=20",
        "train.checkpoint_every=20", "train.log_every=20", "arms.haste.termination.at=20",
        "arms.holistic.train.keep=[]",
    )  # fmt: skip
    study = study.model_copy(update={"arms": {arm: study.arms[arm] for arm in ("holistic", "haste")}})
    speed = cost.measured_speed(study, DIGITS, seconds=2)
    haste = rows_of(estimate.plan(study, DIGITS, speed.flops), "haste")
    looks = {1: [], 2: []}
    fit(Run(study, "haste", 0), lambda s: looks[s.switch.phase].append(time.perf_counter()), progress=False)
    for phase, t in looks.items():
        taken = 20 * statistics.median(b - a for a, b in zip(t, t[1:], strict=False))
        assert 1 / 3 < 86400 * haste["days"][phase] / taken < 3  # 2.06 was seen beside other tests


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny_overrides):
    return [word for override in tiny_overrides for word in ("--set", override)]


def printed(capsys, *argv):
    assert main(["plan", *argv]) == 0
    return capsys.readouterr().out


def test_the_plan_of_a_given_rate_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(cost, "measured_speed", None)
    monkeypatch.setattr(estimate, "step_cost", lambda *_: estimate.StepCost(1, 3, 1))
    words = ("imagenet256", "--profile", "smoke", "--gpus", "2", "--set", "arms.repa.termination.kind=plateau")
    text = printed(capsys, *words, *BY_HAND)
    for said in ("500 GFLOP/s in phase I", "50% (given) of a given rate of 1 TFLOP/s; nothing was measured",
                 "4x8x8 and 1000 classes are assumed", "in all: 5 runs", "not counted:",
                 "a trigger ends phase I of repa; counted as if it never fired"):  # fmt: skip
        assert said in text
    assert re.search(r"haste +I +0 +4 +holistic", text)
    assert "40% (an assumption)" in printed(capsys, "imagenet256", "--profile", "smoke", "--rate", "1e12")


def test_json_is_the_table_and_its_sums_measured_on_this_device(tiny, settings, output, capsys):
    content = json.loads(printed(capsys, "digits", *settings, "--json"))
    table = planned(tiny)
    assert [list(row) for row in content["rows"]] == [list(table.columns)] * len(table)
    assert [row["run_flops"] for row in content["rows"]] == table["run_flops"].tolist()
    assert content["sums"]["flops"] == estimate.sums(table)["flops"]
    assert set(content["speed"]["flops"]) == {"1", "2"}
    assert "measured here on" in content["speed"]["source"]
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "99", *BY_HAND], "train.batch_size 32 cannot go through 99 process(es)"),
        (["--rate", "inf"], "--rate is inf; expected FLOP/s above 0"),
        (["--rate", "1e12", "--utilisation", "1.5"], "--utilisation is 1.5; expected above 0, at most 1"),
        (["--utilisation", "0.5"], "expected both, or --rate alone"),
        (["--set", "data.kind=latents", "--set", "data.path=nowhere"], "expected data.image_size"),
    ],
)
def test_a_study_that_cannot_be_planned_ends_in_one_line(capsys, words, said):
    assert main(["plan", "digits", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert told.err.splitlines()[-1].startswith("haste: error: ")
