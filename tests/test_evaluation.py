"""Scores of runs: rows, cards, resuming, checkpoints shared by arms, in both suites."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from haste_core import checkpoint
from haste_core.errors import HasteError
from haste_core.study import adm, config, evaluation, pretrain, scores
from haste_core.study.evaluation import evaluate_run, evaluation_samples, find_samples
from haste_core.study.runs import Run
from haste_core.study.scores import METRICS, compare, extract_features
from haste_core.study.train import fit

# One worker builds the trained runs once.
pytestmark = pytest.mark.xdist_group("evaluation")

ARMS = ("vanilla", "holistic", "haste")


def noise_images(n, seed=0):
    """uint8 images (n, 1, 8, 8) of noise."""
    return torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def trained(new_output, tiny_overrides):
    """A folder with three tiny trained runs and the extractors, of which tests get copies, and their scorer."""
    with new_output() as folder:
        study = config.load("digits", overrides=tiny_overrides)
        pretrain.prepare_extractors(study)
        for arm in ARMS:
            fit(Run(study, arm, 0), progress=False)
        return folder, evaluation.open_scorer(study)


@pytest.fixture
def scorer(trained):
    return trained[1]


@pytest.fixture
def workshop(trained, output):
    """The folder of this test, with a copy of the trained runs."""
    shutil.copytree(trained[0], output, dirs_exist_ok=True)
    return output


@pytest.fixture
def counted(monkeypatch):
    """Steps that were drawn, in order: scoring a checkpoint begins with drawing from it."""
    calls, original = [], evaluation.evaluation_samples

    def count(run, step, *more):
        calls.append((run.arm, step))
        return original(run, step, *more)

    monkeypatch.setattr(evaluation, "evaluation_samples", count)
    return calls


def evaluate(study, arm):
    return evaluate_run(Run(study, arm, 0), progress=False)


def test_evaluation_gives_the_scores_of_the_drawn_images_for_every_kept_step(workshop, tiny, scorer, monkeypatch):
    monkeypatch.setattr("haste_core.teacher.build_encoder", lambda *_: pytest.fail("the teacher was built"))
    run = Run(tiny, "vanilla", 0)
    monkeypatch.setattr(evaluation, "open_scorer", lambda *_: pytest.fail("opened again"))
    rows = evaluate_run(run, progress=False, scorer=scorer)
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        assert set(evaluation.columns(tiny)) == set(row)
        assert (row["arm"], row["seed"], row["n"], row["images_seen"]) == ("vanilla", 0, 40, 16 * row["step"])
        assert np.isfinite([row[name] for name in METRICS]).all()
        assert row["card"] == scorer.card["card_id"]
    assert len({row["fid"] for row in rows}) == 3
    kept = json.loads(run.evaluation_path.read_text())
    assert kept["card"] == scorer.card
    network, name = pretrain.load_extractor(tiny, "extractor")
    assert kept["card"]["extractor"].split("+")[0] == name
    features = {
        side: extract_features(images, network, 500)
        for side, images in {"made": evaluation_samples(run, 12), **scorer.real}.items()
    }
    for side, suffix in (("train", ""), ("test", "_heldout")):
        found = {name: rows[-1][f"{name}{suffix}"] for name in METRICS}
        assert found == compare(features["made"], features[side], tiny.evaluate)


def test_a_run_is_scored_once_for_its_settings_even_if_it_is_interrupted(
    workshop, tiny, scorer, make_study, counted, monkeypatch
):
    run, original = Run(tiny, "vanilla", 0), scorer.score

    def stop_at_the_second(generated):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return original(generated)

    with monkeypatch.context() as patch:
        patch.setattr(scorer, "score", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(run, False, scorer)
    with pytest.raises(HasteError, match="haste evaluate"):
        evaluation.rows(run)
    counted.clear()
    first = evaluate_run(run, False, scorer)
    assert counted == [("vanilla", 8), ("vanilla", 12)]
    counted.clear()
    assert evaluate_run(run, False, scorer) == first
    assert counted == []
    changed = evaluate(make_study("sample.sampler=euler", "evaluate.seed=1000", "train.keep=[]"), "vanilla")
    assert counted == [("vanilla", 12)]
    assert changed[-1]["card"] != first[-1]["card"]
    # Images are kept beside the scores of each setting.
    found = np.load(find_samples(run, 12))[:10]
    assert np.array_equal(found, evaluation_samples(run, 12)[:10].numpy())


def test_a_profile_that_keeps_fewer_checkpoints_leaves_the_scores_of_the_others(workshop, tiny, scorer, make_study):
    run = Run(tiny, "vanilla", 0)
    before = evaluate_run(run, False, scorer)
    fewer = Run(make_study("train.keep=[]"), "vanilla", 0)
    assert fewer.dir == run.dir
    assert evaluate_run(fewer, False, scorer) == before[-1:]
    assert evaluation.is_scored(run)
    assert evaluation.rows(run) == before
    # A checkpoint that is gone has no scores.
    run.checkpoint_path(8).unlink()
    evaluate_run(fewer, False, scorer)
    assert not evaluation.is_scored(run)


def test_a_shared_checkpoint_is_scored_once_and_its_samples_are_found(workshop, tiny, scorer, counted):
    one, other = (evaluate_run(Run(tiny, arm, 0), False, scorer) for arm in ("haste", "holistic"))
    assert counted == [("haste", 4), ("haste", 8), ("haste", 12), ("holistic", 12)]
    assert [row | {"arm": "holistic"} for row in one[:2]] == other[:2]
    assert np.array_equal(*(np.load(find_samples(Run(tiny, arm, 0), 8)) for arm in ("haste", "holistic")))


def test_images_that_are_gone_are_drawn_again_with_their_scores(workshop, tiny, scorer, counted):
    run = Run(tiny, "holistic", 0)
    evaluate_run(run, False, scorer)
    before = np.load(find_samples(run, 8))
    find_samples(run, 8).unlink()
    with pytest.raises(HasteError, match="haste evaluate digits holistic --seed 0"):
        find_samples(run, 8)
    counted.clear()
    evaluate_run(run, False, scorer)
    assert counted == [("holistic", 8)]
    assert np.array_equal(np.load(find_samples(run, 8)), before)


def test_a_missing_checkpoint_or_score_is_an_error_with_the_command_that_makes_it(workshop, tiny):
    run = Run(tiny, "vanilla", 0)
    run.checkpoint_path(8).unlink()
    with pytest.raises(HasteError, match=r"\[8\].*haste train digits vanilla --seed 0"):
        evaluate(tiny, "vanilla")
    with pytest.raises(HasteError, match="haste evaluate digits haste --seed 3"):
        evaluation.rows(Run(tiny, "haste", 3))


def test_weights_that_are_not_finite_are_named_with_their_checkpoint(workshop, tiny):
    run = Run(tiny, "vanilla", 7)
    fit(run, progress=False)
    tensors, state = run.load(12)
    name = next(name for name in tensors if name.startswith("ema."))
    checkpoint.save(run.checkpoint_path(12), tensors | {name: tensors[name] * torch.nan}, state)
    with pytest.raises(HasteError, match=r"step_00000012\.safetensors holds weights that are not finite"):
        evaluation_samples(run, 12)


def test_images_depend_on_weights_and_evaluation_noise_alone(workshop, tiny, monkeypatch):
    one, other = (evaluation_samples(Run(tiny, arm, 0), 8) for arm in ("holistic", "haste"))  # a shared checkpoint
    assert (one.dtype, one.shape) == (torch.uint8, (40, 1, 8, 8))
    assert torch.equal(one, other)
    assert not torch.equal(one, evaluation_samples(Run(tiny, "haste", 0), 12))
    loaded = evaluation.generator_at(Run(tiny, "vanilla", 0), 12)
    averaged, state = Run(tiny, "vanilla", 0).load(12, prefixes=("ema.",))
    assert loaded[1] == state["ema_fingerprint"]
    assert all(torch.equal(value.cpu(), averaged[f"ema.{name}"]) for name, value in loaded[0].state_dict().items())
    monkeypatch.setattr(evaluation, "generator_at", lambda run, step: loaded)
    expected = evaluation_samples(Run(tiny, "vanilla", 0), 12)
    for arm, seed, step in (("haste", 0, 12), ("repa", 1, 4), ("vanilla", 7, 8)):
        torch.manual_seed(seed)
        assert torch.equal(evaluation_samples(Run(tiny, arm, seed), step), expected)


def check_floor(rows, scorer, study, sizes):
    """Real images are near real ones, by the measure of noise."""
    floor = {row["pair"]: row for row in rows}
    assert {pair: (row["n"], row["n_reference"]) for pair, row in floor.items()} == sizes
    far = scorer.score(noise_images(450))["fid"]
    for row in rows:
        assert set(row) == {"pair", "n", "n_reference", *evaluation.metrics_of(study)}
        assert 0 < row["fid"] < far / 10
    return floor


def test_the_floor_compares_real_images_with_real_ones_once_for_a_card(workshop, tiny, scorer, monkeypatch):
    measured = evaluation.floor(scorer, tiny)
    sizes = {
        "held-out against held-in": (450, 1212),
        "augmented held-in against held-in": (1212, 1212),
        "augmented held-in against held-out": (1212, 450),
    }
    floor = check_floor(measured, scorer, tiny, sizes)
    assert all(row["precision"] > 0.5 for row in measured)
    assert scorer.score(scorer.real["test"])["fid"] == pytest.approx(floor["held-out against held-in"]["fid"])
    monkeypatch.setattr(scorer, "floor", lambda: pytest.fail("measured again"))
    assert evaluation.floor(scorer, tiny) == measured


# The suite adm


class GreyInception(torch.nn.Module):
    """Replaces Inception: features are the grey values of digits."""

    def forward(self, images):
        grey = images[:, 0].flatten(1).float()
        return {adm.POOL: grey, adm.SPATIAL: grey[:, :9], adm.LOGITS: grey[:, :10] / 10}


@pytest.fixture
def adm_study(make_study, monkeypatch):
    """The tiny study's own checkpoints under the suite adm."""
    monkeypatch.setattr(adm, "build_networks", lambda evaluate: adm.Networks(GreyInception(), None, "grey"))
    return make_study("evaluate.suite=adm", "evaluate.dinov2=none")


def test_the_adm_suite_scores_runs_once_by_the_same_rows_and_card(workshop, tiny, adm_study, monkeypatch):
    rows, run = evaluate(adm_study, "vanilla"), Run(adm_study, "vanilla", 0)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert evaluation.metrics_of(adm_study) == scores.ADM_METRICS
    finite = set(scores.ADM_METRICS) - {"fd_dinov2"} | set(evaluation.SUMMARIES)
    for row in rows:
        assert set(row) == set(evaluation.columns(adm_study))
        assert np.isfinite([row[name] for name in finite]).all()
        assert np.isnan(row["fd_dinov2"])
    content = json.loads(run.evaluation_path.read_text())["card"]
    assert content["card_id"] == rows[0]["card"]
    assert (content["suite"], content["extractor"]) == ("adm", "grey")
    images = evaluation_samples(Run(tiny, "vanilla", 0), 12)
    expected = adm.AdmScorer(adm_study.evaluate, adm_study.data, progress=False).score(images)
    assert {name: rows[-1][name] for name in scores.ADM_METRICS} == pytest.approx(expected, nan_ok=True)
    assert np.array_equal(np.load(evaluation.find_samples(run, 12), allow_pickle=False), images.numpy())
    monkeypatch.setattr(evaluation, "evaluation_set", lambda *_: pytest.fail("drawn again"))
    assert [row["fid"] for row in evaluate(adm_study, "vanilla")] == [row["fid"] for row in rows]


def test_another_reference_under_the_same_name_is_scored_anew(workshop, make_study, adm_study, tmp_path):
    path = tmp_path / "reference.npz"
    study = make_study("evaluate.suite=adm", "evaluate.dinov2=none", f"evaluate.reference={path}", "train.keep=[]")
    found = []
    for seed in (0, 1):
        np.savez(path, arr_0=noise_images(60, seed).permute(0, 2, 3, 1).numpy())
        found += [(row["card"], row["fid"]) for row in evaluate(study, "vanilla")]
    assert len(dict(found)) == len({fid for _, fid in found}) == 2


def test_the_floor_of_the_adm_suite_compares_real_images_with_the_reference(output, adm_study):
    scorer = evaluation.open_scorer(adm_study, progress=False)
    sizes = {"held-out against held-in": (450, 1212), "augmented held-in against held-in": (1212, 1212)}
    check_floor(scorer.floor(), scorer, adm_study, sizes)
