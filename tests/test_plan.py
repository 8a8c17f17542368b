"""`haste plan`: its table against the dry run's arithmetic, and its times against those of a run on this machine."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace

import pytest
import torch
from haste_core.study.preflight import calibration, checks, estimates, planning, stand_in, tracing
from haste_core.study.preflight.tracing import Example

from haste_core import training
from haste_core.errors import HasteError
from haste_core.study import config, cost
from haste_core.study.cli import main
from haste_core.study.data import Batches
from haste_core.study.runs import Run

RATE, SHARE = 1e12, 0.5
BY_HAND = ("--rate", "1e12", "--utilisation", "0.5")


@pytest.fixture(scope="module", autouse=True)
def followed_once():
    """To follow a step takes seconds: what several tests follow is followed once."""
    found, follow = {}, estimates.follow

    def remembered(run, example, nets):
        key = config.digest([run.model_dump(exclude={"data", "train", "termination"}), run.train.precision, example])
        if key not in found:
            found[key] = follow(run, example, nets)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "follow", remembered)
        yield


def estimated(study, arm, **options):
    run = study.run(arm)
    return estimates.estimate(run, checks.DIGITS, tracing.networks_of(run, checks.DIGITS), **options)


def rows_of(table, arm):
    return table[table["arm"] == arm].set_index("phase")


@pytest.fixture
def table(tiny):
    return planned_of(tiny)


def planned_of(study, gpus=1, **options):
    return planning.planned(study, gpus, RATE, SHARE, **options)


# -- the table --------------------------------------------------------------------------------------------------------


def test_a_row_for_each_arm_and_phase_with_the_arithmetic_of_the_dry_run(tiny, table):
    assert tuple(table.columns) == planning.COLUMNS
    assert not table.isna().any(axis=None)
    assert list(zip(table["arm"], table["phase"], strict=True)) == [
        ("vanilla", 2), ("repa", 1), ("atta", 1), ("holistic", 1), ("haste", 1), ("haste", 2),
    ]  # fmt: skip
    for arm in ("vanilla", "repa", "holistic"):
        found, (row,) = estimated(tiny, arm), rows_of(table, arm).to_dict("records")
        phase = min(found.steps)
        assert row["run_flops"] == found.flops == 12 * row["step_flops"]
        assert row["days"] == pytest.approx(found.hours(RATE, SHARE)[phase] / 24)
        assert row["images_per_s"] == pytest.approx(16 * RATE * SHARE / found.step_flops[phase])
        assert row["memory_bytes"] == found.memory[phase].peak
        assert row["checkpoint_bytes"] + row["writing_bytes"] == found.disk
        assert (row["student"], row["teacher"]) == (found.student, found.teacher)


def test_an_arm_that_shares_its_first_part_costs_its_tail_alone(table):
    haste, vanilla = rows_of(table, "haste"), rows_of(table, "vanilla")
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
    haste = rows_of(planned_of(study), "haste")
    assert (haste["shared_with"][1], haste["steps"][1], haste["steps"][2]) == ("", 8, 4)
    if "lambda" not in change:
        training.fit(Run(study, "holistic", 0), progress=False)
        assert not training.adopt_shared_part(Run(study, "haste", 0))


def test_a_fading_run_is_in_phase_one_until_it_has_faded(make_study):
    study = make_study("arms.haste.termination.fade=3")
    assert estimated(study, "haste").steps == {1: 11, 2: 1}
    haste = rows_of(planned_of(study), "haste")
    assert (haste["shared_steps"][1], haste["steps"][1], haste["steps"][2]) == (8, 3, 1)


def test_seeds_multiply_and_sums_are_over_arms_phases_and_seeds(make_study):
    table = planned_of(make_study("seeds=[0, 1, 2]"))
    assert table["days_all_seeds"].tolist() == pytest.approx([3 * days for days in table["days"]])
    found = planning.sums(table)
    assert found["runs"] == 15
    assert found["days"] == pytest.approx(3 * table["days"].sum())
    assert found["flops"] == 3 * table["run_flops"].sum()
    assert found["checkpoint_bytes"] == 3 * table["checkpoint_bytes"].sum()
    assert found["memory_bytes"] == table["memory_bytes"].max()


def test_memory_goes_by_the_images_on_one_device_and_time_by_the_fullest(tiny):
    one, three = planned_of(tiny), planned_of(tiny, gpus=3)
    assert set(three["micro_batch"]) == {6}  # 16 images: 6, 5, 5
    assert three["days"].tolist() == pytest.approx([days * 6 / 16 for days in one["days"]])
    halved = tiny.model_copy(update={"train": tiny.train.model_copy(update={"accumulate": 2})})
    assert set(planned_of(halved, gpus=3)["micro_batch"]) == {3}
    small = planned_of(tiny, gpus=3, micro_batch=2)
    assert small["days"].tolist() == three["days"].tolist()
    few, many = (estimated(tiny, "holistic", micro_batch=n).memory[1] for n in (2, 6))
    assert 3 * few.activations == many.activations
    assert few._replace(activations=0) == many._replace(activations=0)
    assert rows_of(three, "holistic")["memory_bytes"][1] == many.peak
    assert rows_of(small, "holistic")["memory_bytes"][1] == few.peak


def test_what_is_divided_takes_its_part_of_the_memory(make_study):
    plain = make_study("train.precision=bf16")
    divided = make_study("train.precision=bf16", "train.sharded=true")
    alone, whole, found = (
        estimated(study, "holistic", micro_batch=2, processes=n).memory[1]
        for study, n in ((divided, 1), (plain, 4), (divided, 4))
    )
    assert alone == whole
    for kind in ("weights", "average", "optimizer", "gradients"):
        assert getattr(found, kind) == pytest.approx(getattr(whole, kind) / 4, abs=1)
    assert (found.copies, found.activations, found.teacher) == (whole.copies, whole.activations, whole.teacher)
    assert rows_of(planned_of(divided, gpus=4), "holistic")["memory_bytes"][1] == (
        estimated(divided, "holistic", processes=4).memory[1].peak
    )
    # On the way from one micro-batch to the next each adds up whole gradients.
    parts = estimated(make_study("train.sharded=true", "train.accumulate=2"), "holistic", processes=4).memory[1]
    assert parts.gradients == whole.gradients


def test_shares_by_phase_are_used_by_phase(tiny, table):
    by_phase = planning.planned(tiny, 1, RATE, {1: SHARE, 2: SHARE / 2})
    slower = [2 if phase == 2 else 1 for phase in table["phase"]]
    assert by_phase["days"].tolist() == pytest.approx([n * days for n, days in zip(slower, table["days"], strict=True)])


def test_arms_of_equal_networks_are_followed_once(tiny, monkeypatch):
    followed, follow = [], estimates.follow
    monkeypatch.setattr(estimates, "follow", lambda run, *rest: followed.append(run) or follow(run, *rest))
    planned_of(tiny)
    assert len(followed) == 4  # vanilla, repa, atta, and holistic for haste, too


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((0, RATE, SHARE), "0 GPUs"),
        ((17, RATE, SHARE), "possible: 1 to 16"),
        ((1, 0, SHARE), "0 FLOP/s"),
        ((1, RATE, 0), "utilisation of 0"),
        ((1, RATE, {1: 1, 2: -1}), "utilisation of -1"),
    ],
)
def test_figures_out_of_range_are_refused(tiny, options, words):
    with pytest.raises(HasteError, match=words):
        planning.planned(tiny, *options)


def test_a_patch_that_does_not_fit_is_refused(make_study):
    with pytest.raises(HasteError, match=r"model.patch 3 does not divide the size 8; possible: 1, 2, 4, 8"):
        planned_of(make_study("model.patch=3"))


# -- the calibration --------------------------------------------------------------------------------------------------


def test_a_large_student_is_timed_with_few_blocks():
    run, example = config.load("imagenet256").run("holistic"), Example(32, 4, 1000, 256, 3)
    small = stand_in.smaller(run, example, 4e8)
    assert small.model.depth == 14
    assert small.alignment.layer_pairs == [(4, 8), (5, 9), (6, 10), (7, 11)]
    smaller = stand_in.smaller(run, example, 1)
    assert (smaller.model.depth, smaller.model.width, smaller.alignment.depth) == (1, 1152, 1)
    assert smaller.alignment.layer_pairs == [(0, 11)]
    assert smaller.teacher.weights == "random"


def test_a_small_student_is_timed_whole(tiny):
    run = tiny.run("haste")
    small = stand_in.smaller(run, checks.DIGITS, 1e6)
    assert (small.model, small.alignment) == (run.model, run.alignment)
    assert small.tau == float("inf")
    assert stand_in.unaligned(small).tau == 0


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_invented_images_have_the_shape_of_the_studys(kind):
    example = Example(8, 3, 10, 8, 3) if kind == "images" else Example(8, 4, 1000, 64, 3)
    data = config.Data(kind=kind, path="nowhere", image_size=example.image_size)
    with stand_in.images(data, example, 5) as dataset:
        batch = Batches(dataset, 5, seed=0).next()
        assert batch.x.shape == (5, example.channels, 8, 8)
        assert batch.images.shape == (5, 3, example.image_size, example.image_size)


def test_the_matrix_rate_is_the_median_and_plausible(monkeypatch):
    assert 1e8 < estimates.matrix_rate("no", "cpu", repeats=3) < 1e14
    # Two that warm up, then 1, 5 and 2 seconds.
    clock = iter([0, 9, 9, 18, 18, 19, 19, 24, 24, 26])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert estimates.matrix_rate("no", "cpu", repeats=3) == 2 * 1024**3 / 2


def test_shares_are_operations_over_time_and_rate(tiny, output, monkeypatch):
    flops = estimated(tiny, "holistic").step_flops[1], estimated(tiny, "vanilla").step_flops[2]
    times = {1: [1.0, 2.0, 4.0], 2: [1.0, 1.0, 1.0]}
    rates = iter([7.0, 1e9, 3e9, 0.5e9])  # the first one decides how many images go into a step

    def timed(states, *_, each_round, **__):
        for _ in times[1]:
            each_round()
        return {phase: times[phase] for phase in states}

    monkeypatch.setattr(cost, "timed", timed)
    monkeypatch.setattr(estimates, "matrix_rate", lambda *_, **__: next(rates))
    found = calibration.calibrate(tiny, checks.DIGITS)
    assert found.rate == 1e9
    assert found.shares[1].median == pytest.approx(flops[0] / 16 / 2 / 1e9)
    assert found.shares[1].low < found.shares[1].median < found.shares[1].high
    assert found.shares[2] == pytest.approx((flops[1] / 16 / 1e9,) * 3 + (3,))
    assert found.utilisation[2] == found.shares[2].median
    assert "3 of the 3 blocks of arm holistic, 1 of 16 images (the optimizer" in found.timed


def test_timing_stops_when_its_time_is_up(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(cost, "_now", lambda _: next(clock))
    called = []
    action = {"one": lambda: None}
    assert len(cost.timed(action, 20, seconds=0, each_round=lambda: called.append(1))["one"]) == 3
    assert len(called) == 3
    assert len(cost.timed(action, 20)["one"]) == 20


def test_another_kind_of_device_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(calibration, "PartialState", lambda: type("State", (), {"device": torch.device("mps")}))
    with pytest.raises(HasteError, match="device 'mps' cannot be calibrated; possible: cpu, cuda, or --rate"):
        calibration.calibrate(tiny, checks.DIGITS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_calibrated_in_the_precision_of_the_run(make_study, tmp_path, monkeypatch, forget_accelerator):
    monkeypatch.setenv("HASTE_OUTPUT", str(tmp_path))
    forget_accelerator()
    found = calibration.calibrate(make_study("train.precision=fp16"), checks.DIGITS)
    forget_accelerator()
    assert (found.device_type, found.precision, set(found.shares)) == ("cuda", "fp16", {1, 2})


def step_seconds(run):
    """Median seconds of a training step in each phase of a run that is trained now."""
    looks = {1: [], 2: []}
    training.fit(run, lambda s: looks[s.termination.phase].append(time.perf_counter()), progress=False)
    return {p: statistics.median(b - a for a, b in zip(t, t[1:], strict=False)) for p, t in looks.items() if len(t) > 1}


def test_foretold_times_are_those_of_a_run_on_the_same_machine(make_study, output):
    """Medians, so that what else the machine does for a moment counts for neither side."""
    study = make_study(
        "model.width=64", "train.batch_size=32", "train.steps=60", "train.keep=[30]", "claims.early=30",
        "train.checkpoint_every=30", "train.log_every=30", "arms.haste.termination.at=30",
        "arms.holistic.train.keep=[]",
    )  # fmt: skip
    study = study.model_copy(update={"arms": {arm: study.arms[arm] for arm in ("holistic", "haste")}})
    found = calibration.calibrate(study, checks.DIGITS, seconds=3)
    haste = rows_of(planning.planned(study, 1, found.rate, found.utilisation), "haste")
    assert haste["steps"].tolist() == [30, 30]
    taken = step_seconds(Run(study, "haste", 0))
    for phase in (1, 2):
        assert 1 / 2 < 86400 * haste["days"][phase] / (30 * taken[phase]) < 2
    assert 1 / 2 < 86400 * haste["days"].sum() / (30 * sum(taken.values())) < 2


def test_drawing_is_passes_of_the_network_for_every_image_that_is_scored(tiny, make_study, table):
    found = planning.drawing(tiny, table)
    assert found["images"] == 40
    assert found["checkpoints"] == 5 * 3  # arms, kept steps
    assert found["passes"] == 3  # Heun in two steps
    images = 15 * 40 * 3
    forward = estimated(tiny, "vanilla").forward
    assert found["flops"] == pytest.approx(forward * images)
    assert found["days"] == pytest.approx(found["flops"] / (RATE * SHARE) / 86400)
    guided = make_study("sample.guidance=2", "seeds=[0, 1]")
    assert planning.drawing(guided, planned_of(guided))["flops"] == pytest.approx(4 * found["flops"])


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny_overrides):
    return [word for override in tiny_overrides for word in ("--set", override)]


def printed(capsys, *argv):
    assert main(["plan", *argv]) == 0
    return capsys.readouterr().out


def test_the_plan_of_given_figures_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(calibration, "calibrate", None)
    text = printed(capsys, "imagenet256", "--profile", "smoke", "--gpus", "2", *BY_HAND)
    assert "rate: 1 TFLOP/s a device, given" in text
    assert "share of it: 50%, given; nothing was measured" in text
    assert "4x8x8 and 1000 classes assumed" in text
    assert "0 (4 of holistic)" in text
    assert "in all: 5 runs" in text
    assert "not counted:" in text


def test_json_is_the_table_its_basis_and_its_sums(tiny, settings, capsys):
    content = json.loads(printed(capsys, "digits", *settings, *BY_HAND, "--json"))
    table = planned_of(tiny)
    assert [list(row) for row in content["rows"]] == [list(planning.COLUMNS)] * len(table)
    assert [row["days"] for row in content["rows"]] == pytest.approx(table["days"].tolist())
    assert content["sums"] == pytest.approx(planning.sums(table))
    assert content["given"] == {"gpus": 1, "rate": 1e12, "utilisation": 0.5}
    assert content["measured"] is None


def test_what_was_measured_on_what_is_said(settings, output, capsys, monkeypatch):
    shares = {1: calibration.Share(0.3, 0.2, 0.4, 9), 2: calibration.Share(0.25, 0.2, 0.3, 9)}
    found = calibration.Calibration("1 thread of a CPU (A)", "cpu", "no", 5e10, shares, "3 of the 3 blocks")
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: found)
    text = printed(capsys, "digits", *settings)
    assert "rate: 50 GFLOP/s a device, measured here on 1 thread of a CPU (A) in float32" in text
    assert "phase I 30.0% (8 in 10 of 9 steps: 20.0% to 40.0%)" in text
    assert "note:" not in text
    text = printed(capsys, "digits", *settings, "--set", "train.precision=fp16")
    assert "precision fp16 needs a GPU and there is none here" in text
    assert "not of any GPU" in text
    busy = replace(found, shares=shares | {1: shares[1]._replace(median=1.1)})
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: busy)
    text = printed(capsys, "digits", *settings, "--rate", "3e14")
    assert "a share above 100%" in text
    assert "rate: 300 TFLOP/s a device, given" in text
    assert "the share is this device's" in text


def test_the_command_measures_this_device(settings, output, capsys):
    content = json.loads(printed(capsys, "digits", *settings, "--json"))
    assert set(content["measured"]["shares"]) == {"1", "2"}
    assert 0 < content["measured"]["shares"]["2"]["median"] < 2
    assert content["sums"]["days"] > 0
    assert list(output.iterdir()) == []


def test_an_arm_with_a_trigger_is_counted_as_aligned_throughout(settings, capsys):
    plateau = [*settings, "--set", "arms.repa.termination.kind=plateau"]
    assert "a trigger ends phase I of repa; counted as if it never fired" in printed(
        capsys, "digits", *plateau, *BY_HAND
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus 0; possible: 1 and above"),
        (["--gpus", "99"], "99 GPUs for arm 'vanilla' with train.batch_size 32; possible: 1 to 32"),
        (["--rate", "-1"], "--rate -1; possible: FLOP/s above 0"),
        (["--rate", "inf"], "--rate inf; possible: FLOP/s above 0"),
        (["--utilisation", "1.5"], "--utilisation 1.5; possible: above 0, at most 1"),
        (["--set", "data.kind=latents", "--set", "data.path=nowhere"], "possible: data.image_size"),
    ],
)
def test_what_cannot_be_planned_ends_in_one_line(capsys, words, said):
    assert main(["plan", "digits", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert told.err.count("\n") == 1
