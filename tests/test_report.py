from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from haste_core import figures
from haste_core.analysis.statistics import interval
from haste_core.errors import HasteError
from haste_core.figures.style import panels, style
from haste_core.files import write_json, write_table
from haste_core.study import claims, config, cost, evaluation, judging, pretrain, report, report_text
from haste_core.study.cli import main
from haste_core.study.runs import Run, study_dir
from haste_core.study.sections import ClaimsSettings
from haste_core.study.train import fit

# One worker builds the finished study once.
pytestmark = pytest.mark.xdist_group("report")

ROOT = Path(__file__).parents[1]
FID_COLUMNS = evaluation.columns(config.load("digits"))
# The reports that README shows, each with its study and profile.
COMMITTED = {
    "digits": ("digits", None),
    "digits-full": ("digits", "full"),
    "cifar10-two-cores": ("cifar10", "two-cores"),
    "cifar10-two-cores-imagenet": ("cifar10", "two-cores-imagenet"),
    "textured": ("textured", None),
    "textured-full": ("textured", "full"),
    "textured-long": ("textured", "long"),
    "textured-choices": ("textured", "choices"),
    "textured-faint": ("textured", "faint"),
    "mnist-two-cores-14": ("mnist", "two-cores-14"),
    "mnist-two-cores": ("mnist", "two-cores"),
    "captions-two-cores": ("captions", "two-cores"),
    "captions-confirm": ("captions", "confirm"),
}
README_TABLES = ("fid.csv", "claims.csv", "denoising.csv", "step_time.csv", "provenance.json")
ARMS = ("vanilla", "repa", "atta", "holistic", "haste")
STEPS = (250, 1000, 3000)
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
EARLY = ClaimsSettings(early=[250, 1000])
FIGURES = ("summary", "denoising", "fid", "gain", "samples", "attention", "curves", "step_time", "claims")


# Small tables with known contents


def fid_rows(card="abc"):
    more = ("fid_unlabelled", "fd_pixel", "near_data", "structure", "denoising", "nats", "nearest", "copies")
    held_out = [name for name in FID_COLUMNS if name.endswith("_heldout")]
    return [
        {
            **dict.fromkeys((*more, *held_out), 1.5 + i / 10), "arm": arm, "seed": seed, "step": step,
            "images_seen": 64 * step, "fid": 40.0 / (1 + i) * 250 / step + seed, "kid": 0.1, "precision": 0.8,
            "recall": 0.7, "n": 1000, "card": card,
        }
        for i, arm in enumerate(ARMS)
        for seed in (0, 1)
        for step in STEPS
    ]  # fmt: skip


def gains(arm, step, t):
    """log of the synthetic held-out loss over vanilla's: high noise gains early, the data costs late."""
    if arm in ("holistic", "haste") and step < 3000:
        return -0.1 if t >= 0.3 else 0.0
    return {"holistic": 0.06, "haste": 0.04}.get(arm, 0.0) if t <= 0.1 else 0.0


def denoising_rows(seeds=(0, 1, 2), arms=ARMS, noise=0.001, card="abc"):
    return [
        {
            "arm": arm, "seed": seed, "step": step, "t": t, "split": split, "n": 450, "draws": 3, "card": card,
            "loss": (1 - 0.5 * t) * np.exp(gains(arm, step, t) + noise * seed * (arm != "vanilla")), "nats": 2.0,
        }
        for arm in arms
        for seed in seeds
        for step in STEPS
        for split in ("held-out", "training")
        for t in LEVELS
    ]  # fmt: skip


def time_rows():
    keys = [("vanilla", 2), *((arm, 1) for arm in ARMS[1:]), ("haste", 2)]
    return [
        dict(zip(cost.COLUMNS, (arm, phase, 0.05, ratio, ratio - 0.02, ratio + 0.02, 30), strict=True))
        for (arm, phase), ratio in zip(keys, (1.0, 1.31, 1.42, 1.53, 1.54, 1.01), strict=True)
    ]


def metric_rows():
    return [
        {
            "arm": arm, "seed": seed, "step": step, "phase": 1, "loss": 1.0, "denoising": 1 / step, "grad_norm": 1.0,
            "feature": -0.5 if arm != "vanilla" else None, "attention": 2.0 if arm != "vanilla" else None,
        }
        for arm in ARMS
        for seed in (0, 1)
        for step in (50, 100, 150)
    ]  # fmt: skip


def attention_rows():
    return [
        {
            "source": source, "seed": 0, "step": 3000, "block": 2, "t": 0.5, "query": query, "key": key,
            "probability": (key + 1) / 136, "divergence": 0.3 * (source != "teacher"), "n": 200,
        }
        for source in ("teacher", *ARMS)
        for query in (5, 6, 10)
        for key in range(16)
    ]  # fmt: skip


def sample_images(count=10):
    rng = np.random.default_rng(0)
    return {(arm, s): rng.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8) for arm in ARMS for s in STEPS}


def claim_rows():
    return judging.judge_all(claims.CLAIMS, judging.Evidence(pd.DataFrame(fid_rows()), [250, 1000], 3000), 0.95)


PROVENANCE = {
    "invocation": {"minutes": 12.25, "peak_memory_gib": 1.75, "resumed": False, "install_minutes": 1.5},
    "machine": {"cores": 2, "cpu": "A processor"},
    "teacher": {"test_accuracy": 0.9867},
    "extractor": {"test_accuracy": 0.9933},
    "main": list(ARMS),
    "commits": ["0123456789ab"],
    "study_hash": "abcdef0123",
    "claims": {"early": [250, 1000]},
    "tau": 1000,
    "steps": 3000,
}


def write_synthetic(folder):
    write_table(folder / "fid.csv", fid_rows(), FID_COLUMNS)
    write_table(folder / "denoising.csv", denoising_rows(), evaluation.DENOISING_COLUMNS)
    write_table(folder / "claims.csv", claim_rows(), judging.COLUMNS)
    write_table(folder / "step_time.csv", time_rows(), cost.COLUMNS)
    write_json(folder / "provenance.json", PROVENANCE)
    return folder


def hero(fid, denoising=None, samples=None):
    given = sample_images() if samples is None else samples
    return figures.summary(fid, pd.DataFrame(denoising_rows()) if denoising is None else denoising, given, 1000, [250])


DRAW = {
    "summary": lambda: hero(pd.DataFrame(fid_rows())),
    "denoising levels": lambda: figures.denoising_levels(pd.DataFrame(denoising_rows(seeds=(0,), arms=("haste",)))),
    "fid without switch and floor": lambda: figures.fid_against_steps(pd.DataFrame(fid_rows()), None),
    "attention": lambda: figures.attention_maps(pd.DataFrame(attention_rows()), np.eye(8)),
    "claims": lambda: figures.claims_forest(pd.DataFrame(claim_rows()[:4])),
    "image rows": lambda: figures.image_rows({"a": sample_images()["repa", 250], "b": sample_images()["atta", 250]}),
}


# Figures


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_is_saved_as_png_and_svg_with_the_same_bytes_every_time(name, tmp_path):
    for folder in ("one", "redrawn"):
        figures.save(DRAW[name](), tmp_path / folder, "a")
    for kind in ("png", "svg"):
        assert (tmp_path / "one" / f"a.{kind}").read_bytes() == (tmp_path / "redrawn" / f"a.{kind}").read_bytes(), kind
    with Image.open(tmp_path / "one" / "a.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 50
    assert "<svg" in (tmp_path / "one" / "a.svg").read_text()


def test_scores_with_different_cards_do_not_share_an_axis():
    rows = fid_rows()
    mixed = pd.DataFrame([*rows[:10], *(row | {"card": "other"} for row in rows[10:])])
    for draw in (lambda fid: figures.fid_against_steps(fid, 1), lambda fid: figures.gain_over_vanilla(fid, 1), hero):
        with pytest.raises(ValueError, match=r"different cards.*abc, other"):
            draw(mixed)


def test_fid_figure_draws_the_tables_numbers():
    axis = figures.fid_against_steps(pd.DataFrame(fid_rows()), 1000, 1.2).axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    for i, arm in enumerate(ARMS):
        base = np.array([40.0 / (1 + i) * 250 / step for step in STEPS])
        assert list(lines[arm].get_xdata()) == list(STEPS)
        assert lines[arm].get_ydata() == pytest.approx(np.sqrt(base * (base + 1)))
    assert "1000 samples, 2 seeds, card abc" in axis.get_title(loc="left")
    assert axis.get_ylim()[0] < 1.2
    # A floor far below every score is written, not drawn.
    far = figures.fid_against_steps(pd.DataFrame(fid_rows()), None, 0.001).axes[0]
    assert far.get_ylim()[0] > 0.5
    assert "real against real: 0.001, below" in [text.get_text() for text in far.texts]


def test_gain_is_above_zero_where_alignment_helps():
    axis = figures.gain_over_vanilla(pd.DataFrame(fid_rows()), None).axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert "vanilla" not in lines
    expected = np.mean([np.log(40 + seed) - np.log(20 + seed) for seed in (0, 1)])
    assert lines["repa"].get_ydata()[0] == pytest.approx(expected)
    assert axis.get_ylabel().startswith("log FID")


@pytest.mark.parametrize("arms", [("vanilla",), ("vanilla", "haste"), ("repa", "holistic", "haste")])
def test_the_first_picture_draws_any_set_of_arms(arms):
    fid, rows = pd.DataFrame(fid_rows()), pd.DataFrame(denoising_rows(seeds=(0,)))
    samples = {key: images for key, images in sample_images().items() if key[0] in arms and len(arms) > 1}
    figure = hero(fid[fid["arm"].isin(arms)], rows[rows["arm"].isin(arms)], samples)
    titles = " ".join(axis.get_title() for axis in figure.axes)
    assert ("early: step 250" in titles) == ("vanilla" in arms and len(arms) > 1)


def test_the_first_picture_draws_the_ratio_to_vanilla_and_haste_above_holistic():
    figure = hero(pd.DataFrame(fid_rows()))
    panel = next(axis for axis in figure.axes if "at the end: step 3,000" in axis.get_title())
    lines = {line.get_label(): line for line in panel.lines}
    over = np.exp(np.mean([0.0, 0.001, 0.002]))
    assert lines["holistic"].get_ydata() == pytest.approx([over * np.exp(gains("holistic", 3000, t)) for t in LEVELS])
    assert lines["vanilla"].get_ydata() == pytest.approx([1.0] * len(LEVELS))
    assert lines["haste"].get_zorder() > lines["holistic"].get_zorder()
    assert any("equal to holistic before the switch" in text.get_text() for text in figure.findobj(match=_is_text))


def _is_text(artist):
    return hasattr(artist, "get_text")


def test_steps_in_detail_are_before_at_and_after_the_switch():
    assert figures.panel_steps([400, 800, 1200, 1600], 800, [400, 800, 1200]) == {
        400: "early", 800: "at the switch", 1600: "at the end",
    }  # fmt: skip
    assert figures.panel_steps([400, 1600], None, [400, 1600]) == {1600: "at the end"}
    assert figures.panel_steps([12], 8, [1]) == {12: "at the end"}


def test_every_verdict_has_a_meaning_and_every_arm_a_look_of_its_own():
    assert list(report_text.VERDICTS) == list(figures.VERDICT_COLOUR)
    assert len(set(figures.VERDICT_COLOUR.values())) == 6
    arms = [*ARMS, "mine", "yours"]
    assert len({figures.style(arm, arms)["color"] for arm in arms}) == len(arms)
    assert figures.style("haste", ["haste"]) == figures.style("haste", arms)


# Tables


def header(path):
    return tuple(path.read_text().splitlines()[0].split(","))


@pytest.fixture(scope="module")
def finished(new_output, tiny_overrides):
    """Report of a finished study of two arms, from training to tables."""
    with new_output():
        study = config.load("digits", overrides=[*tiny_overrides, "train.keep=[8]"])
        study = study.model_copy(update={"arms": {arm: study.arms[arm] for arm in ("vanilla", "haste")}})
        pretrain.write_facts(study, study_dir(study) / "prepared.json")
        result = report.open_report(study)
        for run in result.all_runs():
            fit(run, progress=False)
            evaluation.evaluate_run(run, progress=False)
        cost.write(study, rounds=2)
        (result.tables / "cards").mkdir(parents=True)
        (result.tables / "cards" / "0123456789.json").write_text("{}")
        report.write_tables(result)
        yield result


def test_tables_hold_the_scores_and_samples_of_the_runs(finished):
    tables, fid = finished.tables, finished.table("fid")
    assert header(tables / "fid.csv") == FID_COLUMNS
    assert header(tables / "denoising.csv") == evaluation.DENOISING_COLUMNS
    assert header(tables / "step_time.csv") == cost.COLUMNS
    assert header(tables / "claims.csv") == judging.COLUMNS
    assert list(zip(fid["arm"], fid["seed"], fid["step"], strict=True)) == [
        (arm, 0, step) for arm in ("vanilla", "haste") for step in (8, 12)
    ]
    assert fid.notna().all().all()
    rows = evaluation.rows(Run(finished.study, "haste", 0))
    assert list(fid.query("arm == 'haste'")["fid"]) == pytest.approx([r["fid"] for r in rows], rel=1e-5)
    images = evaluation.evaluation_samples(Run(finished.study, "vanilla", 0), 12)
    assert np.array_equal(finished.samples()["vanilla", 12], images[:10].numpy())
    # Cards of other scores are removed.
    assert [path.stem for path in (tables / "cards").iterdir()] == [fid["card"][0]]


def test_the_report_of_a_finished_study_shows_the_numbers_of_its_tables(finished):
    html = report.write_report(finished).read_text()
    assert_opens_offline(html)
    drawn = {p.name for p in (finished.dir / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    fid = finished.table("fid")
    for arm in ("vanilla", "haste"):
        mean = fid.query(f"arm == '{arm}' and step == 12")["fid"].mean()
        assert f"{mean:.2f}" in html
    assert fid["card"][0] in html
    assert config.digest(finished.study.model_dump(mode="json")) in html


def test_without_runs_the_tables_that_came_with_the_project_are_used(finished, output, tiny):
    assert "came with the project" in report.refresh(finished)
    other = finished.study.evaluate.model_copy(update={"n": 44})
    with pytest.raises(HasteError, match=r"vanilla seed 0, .* is of other evaluation settings; run again: haste study"):
        report.refresh(replace(finished, study=finished.study.model_copy(update={"evaluate": other})))
    with pytest.raises(HasteError, match="haste study digits"):
        report.refresh(report.open_report(tiny))
    with pytest.raises(HasteError, match="haste study digits"):
        report.open_report(tiny).table("fid")


def test_claims_may_read_arms_of_a_report_beside_this_one(finished, tmp_path):
    roles = {"low_resolution_vanilla": "beside/vanilla", "low_resolution_haste": "gone/haste"}
    named = finished.study.claims.model_copy(update={"roles": roles})
    own = replace(finished, study=finished.study.model_copy(update={"claims": named}), dir=tmp_path / "own")
    shutil.copytree(finished.dir, own.dir)
    shutil.copytree(finished.dir, tmp_path / "beside")
    fid = own.table("fid")
    scores = report.evidence(own, fid).scores
    assert set(scores["arm"]) == {"vanilla", "haste", "beside/vanilla", "beside/haste"}
    theirs = scores[scores["arm"] == "beside/haste"]
    assert list(theirs["fid"]) == list(fid.loc[fid["arm"] == "haste", "fid"])
    known = json.loads((finished.tables / "provenance.json").read_text())
    assert "beside" not in known
    origin = report.study_provenance(own)["beside"]
    assert origin == {"beside": {key: known[key] for key in ("study_hash", "commits", "written")}}


# The three answers


def asked(fid=None, denoising=None, settings=EARLY, tau=1000, last=3000):
    fid = pd.DataFrame(fid_rows() if fid is None else fid)
    rows = pd.DataFrame(denoising_rows() if denoising is None else denoising)
    return dict(report.answers(fid, rows, settings, tau, last))


def arms_of(rows, *arms):
    return [row for row in rows if row["arm"] in arms]


def percent(change):
    return f"{100 * np.expm1(abs(change)) if change > 0 else -100 * np.expm1(change):.1f} %"


HELP, COST, BACK = "Does it help early?", "What does it cost late, and where?", "Does the switch give it back?"


def test_the_answers_give_sign_size_interval_and_share():
    found = asked()
    assert list(found) == [HELP, COST, BACK]
    logs = [np.mean([np.log((10 * 250 / s + seed) / (40 * 250 / s + seed)) for s in EARLY.early]) for seed in (0, 1)]
    mean, low, high = (100 * np.expm1(value) for value in interval(logs, 0.95))
    assert f"FID {-mean:.1f} % lower (95 % interval {low:+.1f} to {high:+.1f} %, 2 seeds)" in found[HELP]
    assert "mean over steps 250 and 1,000" in found[HELP]
    assert f"at t ≥ 0.3 {percent(-0.1 + 0.001)} lower" in found[HELP]
    assert f"near the data (t ≤ 0.1) {percent(0.06 + 0.001)} higher (95 % interval +" in found[COST]
    assert "at t ≥ 0.3 not decided (+0.1 %" in found[COST]
    assert "holistic (alignment stays on) against haste (off from step 1,000)" in found[BACK]
    assert f"{percent(0.02)} higher" in found[BACK]
    assert f"That is {100 * 0.02 / 0.061:.0f} % of the cost near the data." in found[BACK]


def test_a_share_of_the_cost_is_given_where_cost_and_return_are_decided():
    found = asked(denoising=denoising_rows(noise=0.1))
    assert "near the data (t ≤ 0.1) not decided" in found[COST]
    assert "The cost near the data is itself not decided" in found[BACK]
    assert "That is" not in found[BACK]
    rows = [
        row | {"loss": row["loss"] * np.exp(0.05 * (row["arm"] == "haste" and row["step"] == 3000))}
        for row in denoising_rows()
    ]
    assert "% lower (95 %" in asked(denoising=rows)[BACK]
    assert "So the switch gives nothing back." in asked(denoising=rows)[BACK]


def test_one_seed_has_no_interval():
    fid = [row for row in fid_rows() if row["seed"] == 0]
    found = asked(fid, denoising_rows(seeds=(0,)))
    for text in found.values():
        assert "(one seed)" in text
        assert "interval" not in text


@pytest.mark.parametrize(
    ("arms", "questions"),
    [
        (("vanilla", "holistic"), [HELP, COST]),
        (("vanilla", "repa", "haste"), [HELP, COST]),
        (("vanilla", "haste"), []),
        (("holistic", "haste"), []),
    ],
)
def test_a_question_without_its_arms_is_left_out(arms, questions):
    assert list(asked(arms_of(fid_rows(), *arms), arms_of(denoising_rows(), *arms))) == questions
    if "repa" in arms:
        assert asked(arms_of(fid_rows(), *arms), arms_of(denoising_rows(), *arms))[HELP].startswith("repa against")


def test_roles_name_the_arms_that_are_asked_about():
    def renamed(rows):
        return [row | {"arm": {"holistic": "both"}.get(row["arm"], row["arm"])} for row in rows]

    settings = EARLY.model_copy(update={"roles": {"holistic": "both"}})
    assert asked(renamed(fid_rows()), renamed(denoising_rows()), settings)[BACK].count("both (alignment stays on)") == 1


# The report on synthetic tables


def write_fast(result, patch):
    """The HTML of a report whose pictures are drawn and not saved."""

    def save(figure, folder, name):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.svg").write_bytes(b"a picture")

    patch.setattr(report.figures, "save", save)
    patch.setattr(report.Report, "test_image", lambda _: np.eye(8))
    return report.write_report(result).read_text()


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A report on synthetic tables whose claims have every verdict, and its HTML."""
    study = config.load("digits", overrides=["train.keep=[250, 1000]", "train.steps=3000", "claims.early=[250]"])
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder / "tables")
    # An arm beside the main ones may be drawn in its own way; its scores stand in the tables, on no axis with others.
    for name, rows, columns in (
        ("fid", fid_rows(), FID_COLUMNS), ("denoising", denoising_rows(), evaluation.DENOISING_COLUMNS),
    ):  # fmt: skip
        other = [row | {"arm": "dit_haste", "card": "other"} for row in rows if row["arm"] == "haste"]
        write_table(folder / "tables" / f"{name}.csv", rows + other, columns)
    table = pd.DataFrame(claim_rows())
    there = report.measured(table)
    verdicts = [v for v in report_text.VERDICTS if v != "not tested"]
    table.loc[there, "verdict"] = [verdicts[i % len(verdicts)] for i in range(there.sum())]
    write_table(folder / "tables" / "claims.csv", table.to_dict("records"), judging.COLUMNS)
    facts = PROVENANCE | {"machine": {"cores": 2, "cpu": "x", "memory_gib": 1, "gpu": None}, "environment": {}}
    facts |= {"compute_minutes": 1, "largest_process_gib": 1.0, "runs": {}, "written": "today", "study": "digits"}
    facts["teacher"] = {"model": "vit", "weights": "pretrain", "blocks": 4, "width": 96, "test_accuracy": 0.99}
    facts["extractor"] = {"kind": "SmallCNN", "width": 64, "test_accuracy": 0.99, "fingerprint": "ab"}
    write_json(folder / "tables" / "provenance.json", facts)
    write_json(folder / "tables" / "cards" / "abc.json", {"card_id": "abc", "n": 1000})
    write_table(folder / "tables" / "metrics.csv", metric_rows(), tuple(metric_rows()[0]))
    write_table(folder / "tables" / "attention.csv", attention_rows(), tuple(attention_rows()[0]))
    floor = {"pair": "augmented held-in against held-in", "n": 10, "n_reference": 10, "fid": 0.2}
    write_table(folder / "tables" / "floor.csv", [floor], tuple(floor))
    found = judging.Evidence(pd.DataFrame(fid_rows()), [250, 1000], 3000)
    sensitive = judging.sensitivity(claims.CLAIMS, found, 0.95)
    write_table(folder / "tables" / "sensitivity.csv", sensitive, judging.SENSITIVITY)
    np.savez(folder / "tables" / "samples.npz", **{f"{arm}@{step}": v for (arm, step), v in sample_images().items()})
    result = report.Report(study, folder)
    with pytest.MonkeyPatch.context() as patch:
        return result, write_fast(result, patch)


def test_the_report_begins_with_answers_hero_and_linked_verdicts(synthetic):
    result, html = synthetic
    assert_opens_offline(html)
    assert html.index(HELP) < html.index(COST) < html.index(BACK) < html.index('class="chip"') < html.index("<img")
    assert html.index("<img") < html.index("<h2")
    judged = result.table("claims")
    shown = judged[report.measured(judged)]
    # The others are folded into one chip.
    assert html.count('class="chip"') == len(shown) + (len(shown) < len(judged))
    for identity, verdict in zip(shown["id"], shown["verdict"], strict=True):
        assert f'style="--c: {figures.VERDICT_COLOUR[verdict]}" href="#claim-{identity}"' in html
        assert html.count(f'id="claim-{identity}"') == 1
    headings = re.findall(r'<h3 class="verdict"[^>]*>([^<]*)</h3>', html)
    assert [h.replace("&#39;", "'") for h in headings] == [
        v for v in report_text.VERDICTS if v in set(shown["verdict"])
    ]
    assert "trained on the labels of the same training images" in html
    assert "FD, pixels" in html
    assert "All summaries: difference to vanilla" in html
    assert "+26.67 % " in html  # near_data of haste, 1.9 against 1.5


# The HTML file


class Offline(HTMLParser):
    """A page that loads nothing; collects its tags."""

    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href", "background"):
                assert (value or "").startswith(("data:", "#")), str(value)[:80]
            if name == "style":
                self.check(value or "")
            assert not name.startswith("on")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "style":
            self.check(data)

    def check(self, rules):
        assert "@import" not in rules
        assert all(url.strip("'\" ").startswith("data:") for url in re.findall(r"url\(([^)]*)", rules))


def assert_opens_offline(html):
    page = Offline()
    page.feed(html)
    assert not {"iframe", "object", "embed", "link", "base"} & set(page.tags)
    assert page.tags.count("script") == 1  # that of the template
    assert page.tags.count("img") + page.tags.count("svg") >= len(FIGURES) - 3


def test_lines_of_arms_are_found_in_a_page_by_name_and_point(tmp_path):
    figure, (axis,) = panels(1, 3, 2)
    axis.plot([1, 2], [0.5, 0.25], marker="o", **style("repa", ["repa"]))
    axis.plot([1, 2], [3, 3], color="black")
    before = [line.get_gid() for line in axis.lines]
    figures.save(figure, tmp_path, "one")
    assert [line.get_gid() for line in axis.lines] == before
    svg = (tmp_path / "one.svg").read_text()
    page = report.embedded(svg, "one", 'what "is" shown')
    assert page.count('data-arm="repa" data-points="1,0.5;2,0.25"') == page.count("data-arm") == 1
    assert 'aria-label="what &quot;is&quot; shown"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert all(name.startswith("one-") for name in ids)
    assert {name for pair in re.findall(r'url\(#([^)]+)|href="#([^"]+)"', page) for name in pair if name} <= set(ids)
    assert report.embedded(svg.replace("data-arm", "data-x"), "one", "x").startswith(
        '<img src="data:image/svg+xml;base64,'
    )


def test_sentences_name_every_claim_and_every_arm(synthetic):
    sentences = report.sentences(synthetic[0])
    told = " ".join(sentences)
    assert all(re.search(rf"\b{re.escape(identity)}\b", told) for identity in synthetic[0].table("claims")["id"])
    assert "C4a (table missing: gradient_conflict)" in told
    assert sentences[-1].startswith("haste: FID against vanilla's at step 3,000 ")


def test_plain_training_by_itself_has_a_report_too_and_titles_cannot_become_markup(synthetic, tmp_path, monkeypatch):
    whole = synthetic[0]
    study = whole.study.model_copy(update={"arms": {"vanilla": {}}, "groups": {}, "title": "<script>alert(1)</script>"})
    alone = report.Report(study, tmp_path)
    shutil.copytree(whole.tables, alone.tables)
    for name in ("fid", "denoising", "step_time", "metrics"):
        rows = alone.main(alone.table(name))
        write_table(alone.tables / f"{name}.csv", rows.to_dict("records"), tuple(rows))
    found = judging.judge_all(claims.CLAIMS, judging.Evidence(alone.table("fid"), [250], 3000), 0.95)
    write_table(alone.tables / "claims.csv", found, judging.COLUMNS)
    html = write_fast(alone, monkeypatch)
    assert_opens_offline(html)
    drawn = {path.stem for path in (alone.dir / "figures").glob("*.svg")}
    assert drawn == set(FIGURES) - {"denoising", "gain", "claims"}
    assert html.count("<img") == len(drawn)
    assert '<span id="claim-C1">C1 (arms missing: repa)</span>' in html


def test_the_index_has_a_card_for_each_report(synthetic, tmp_path, capsys, monkeypatch):
    result, _ = synthetic
    for name in ("one", "two"):
        shutil.copytree(result.dir, tmp_path / "reports" / name)
    (tmp_path / "reports" / "older").mkdir()
    (tmp_path / "reports" / "older" / "report.html").write_text("of another version")
    monkeypatch.setenv("HASTE_OUTPUT", str(tmp_path))
    assert main(["report", "--index"]) == 0
    path = tmp_path / "reports" / "index.html"
    assert capsys.readouterr().out == f"{path}\n"
    html = path.read_text()
    for name in ("one", "two"):
        assert f'href="{name}/report.html"' in html
    assert html.count(HELP) == 2
    assert re.search(r"Verdicts: \d+ \w+", html)
    assert main(["report"]) == 2
    assert "haste report needs a study, or --index" in capsys.readouterr().err
    assert main(["report", "digits", "--set", "no.such=1"]) == 2  # settings are taken, such as where the data are
    assert "unknown key 'no'" in capsys.readouterr().err


# The committed report


def test_a_study_at_two_resolutions_answers_its_own_question():
    told = {name: pd.read_csv(ROOT / "reports" / name / "tables" / "claims.csv") for name in COMMITTED}
    ((question, text),) = report_text.further_answers(told["mnist-two-cores"])
    assert question == "Is the gain as large at the higher resolution?"
    assert text.startswith("Log FID, gain of haste over vanilla at the higher resolution minus that at the lower")
    assert "-0.229 (-0.301 to -0.157), contradicted. " in text
    assert report_text.further_answers(told["digits"]) == []


def test_a_study_with_a_pretrained_teacher_asks_whether_it_helps_more():
    two = config.load("cifar10", "two-cores-imagenet")
    more = claims.claims_of(two)[len(claims.CLAIMS) :]
    assert {claim.arms for claim in more} == {("repa", "repa_imagenet"), ("similarity", "similarity_imagenet")}
    assert {arm for claim in more for arm in claim.arms} <= set(two.main)
    assert claims.claims_of(config.load("cifar10", "two-cores")) == claims.CLAIMS
    others = [arm for arm in two.main if not report.shares_target(Run(two, arm, 0))]
    assert others == ["repa_imagenet", "similarity", "similarity_imagenet"]
    fid, denoising = (
        pd.read_csv(ROOT / "reports" / "cifar10-two-cores-imagenet" / "tables" / f"{name}.csv")
        for name in ("fid", "denoising")
    )
    question, told = report.answers(fid, denoising, two.claims, None, 1200)[-1]
    assert question == "Does a teacher that has seen ImageNet help more?"
    at = fid[fid["step"] == 1200].set_index(["arm", "seed"])["fid"]
    logs = np.log(at["similarity_imagenet"]) - np.log(at["similarity"])
    mean, low, high = 100 * np.expm1(interval(list(logs), 0.95))
    assert f"FID {mean:.1f} % higher (95 % interval {low:+.1f} to {high:+.1f} %, 3 seeds)" in told
    assert told.startswith("repa_imagenet against repa at step 1,200: FID not decided (")
    without = report.answers(fid[fid["arm"] != "repa_imagenet"], denoising, two.claims, None, 1200)
    assert "repa_imagenet" not in str(without)


committed = pytest.mark.parametrize("shown", COMMITTED)


@committed
def test_a_committed_report_is_complete_small_and_opens_offline(shown):
    folder = ROOT / "reports" / shown
    tables = folder / "tables"
    for name in ("fid", "step_time", "claims", "floor", "attention", "metrics"):
        assert (tables / f"{name}.csv").is_file(), name
    assert header(tables / "claims.csv") == judging.COLUMNS
    for card in pd.read_csv(tables / "fid.csv", dtype={"card": str})["card"].unique():
        kept = json.loads((tables / "cards" / f"{card}.json").read_text())
        assert kept.pop("card_id") == card == config.digest(kept)
    drawn = {p.name for p in (folder / "figures").iterdir()}
    assert drawn >= {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    # Executed notebooks are written beside it and never committed.
    files = [p for p in folder.rglob("*") if p.is_file() and "notebooks" not in p.relative_to(folder).parts]
    assert (folder / "report.html").stat().st_size < 5 * 2**20
    assert sum(p.stat().st_size for p in files) < 8 * 2**20
    assert_opens_offline((folder / "report.html").read_text())


@committed
def test_the_committed_claims_follow_from_the_committed_tables(shown):
    folder, study = ROOT / "reports" / shown, config.load(*COMMITTED[shown])
    tables = folder / "tables"
    fid = pd.read_csv(tables / "fid.csv", dtype={"card": str})
    found = report.evidence(report.Report(study, folder), fid)
    judged = pd.DataFrame(judging.judge_all(claims.claims_of(study), found, study.claims.confidence))
    written = pd.read_csv(tables / "claims.csv")
    assert list(written["verdict"]) == list(judged["verdict"])
    for name in ("effect", "low", "high"):
        assert written[name].to_numpy() == pytest.approx(judged[name].to_numpy(), rel=1e-3, abs=1e-4, nan_ok=True)


# Documentation


def readme_block(folder: Path, whole: bool = True) -> str:
    """The answers, verdicts and origin as README shows them (markdown), from the tables in `folder` alone.

    whole: with step times and the time of the study.
    """
    facts = json.loads((folder / "provenance.json").read_text())
    told, verdicts, origin = report._told(folder, facts)
    lines = [f"- **{question}** {text}" for question, text in told]
    if not whole:
        return "\n".join([*lines, f"- {verdicts} {origin}"]) + "\n"
    lines.append(f"- {verdicts}")
    times = pd.read_csv(folder / "step_time.csv")
    ratios = ", ".join(
        f"{row['arm']} phase {report_text.phase(row)} {row['ratio_to_vanilla']:.2f}"
        for row in times[times["arm"] != "vanilla"].to_dict("records")
    )
    lines += ["", f"Step time over a vanilla step: {ratios}."]
    run, machine = facts["invocation"], facts["machine"]
    if run and not run["resumed"]:
        installing = f" after {run['install_minutes']:.1f} minutes of installing" if "install_minutes" in run else ""
        lines.append(
            f"From nothing to this report: {run['minutes']:.1f} minutes{installing}, {run['peak_memory_gib']:.1f} GiB "
            f"of memory at most, on {machine['cores']} cores ({machine['cpu']})."
        )
    networks = {name: facts[name] or {} for name in ("teacher", "extractor")}
    right = [f"{name} {known['test_accuracy']:.1%}" for name, known in networks.items() if "test_accuracy" in known]
    if right:
        lines.append(f"Of held-out images classified correctly: {', '.join(right)}.")
    return "\n".join([*lines, origin]) + "\n"


def losses(shown, steps=(100, 400, 1000)):
    """Rows of docs/metrics-and-cards.md: losses of main arms of a committed report, means over seeds."""
    log, study = pd.read_csv(ROOT / "reports" / shown / "tables" / "metrics.csv"), config.load(*COMMITTED[shown])
    for arm in study.main:
        means = log[log["arm"] == arm].groupby("step")[["denoising", "feature", "attention"]].mean().reindex(steps)
        cells = [" ".join("-" if math.isnan(v) else f"{v:.3f}" for v in means[name]) for name in means]
        yield f"| {shown} | {arm} | " + " | ".join(cells) + " |"


def test_documentation_states_the_losses_of_the_committed_studies():
    page = (ROOT / "docs" / "metrics-and-cards.md").read_text()
    shown = page.partition("<!-- losses: begin -->\n")[2].partition("<!-- losses: end -->")[0].strip().splitlines()
    header = "| report | arm | denoising at steps 100, 400, 1000 | feature | attention |"
    assert shown == [header, "|---|---|---|---|---|", *(row for name in COMMITTED for row in losses(name))]


# README


@pytest.mark.parametrize("shown", ["digits", "digits-full", "cifar10-two-cores", "textured-full"])
def test_the_results_in_readme_are_those_of_the_tables(shown, tmp_path):
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- results {shown}: begin -->\n(.*?)<!-- results {shown}: end -->", text, re.DOTALL)
    assert found, f"README.md has no block between its two results marks of {shown}"
    # A new run replaces the tables here; README then still shows those that were committed.
    for name in README_TABLES:
        command = ["git", "-C", str(ROOT), "show", f"HEAD:reports/{shown}/tables/{name}"]
        (tmp_path / name).write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    here = ROOT / "reports" / shown / "tables"
    folders = [tmp_path, *([here] if all((here / name).is_file() for name in README_TABLES) else [])]
    assert found[1] in [readme_block(folder, whole=shown == "digits") for folder in folders]
