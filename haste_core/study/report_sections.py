"""The sections that analyses add to a report: each a question, how to read its pictures, and pictures from tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from haste_core import figures
from haste_core.analysis import switching
from haste_core.figures import Figure

if TYPE_CHECKING:
    from haste_core.study.report import Report

Draw = Callable[["Report"], Figure]


class Section(NamedTuple):
    """One section. tables: what it is drawn from; it is left out where one of them is missing."""

    name: str
    title: str
    text: str
    tables: tuple[str, ...]
    pictures: dict[str, Draw]


def _conflict(report: Report) -> Figure:
    table = report.table("gradient_conflict")
    return figures.conflict_over_training(table, report.tau, "repa" if "repa" in set(table["arm"]) else table["arm"][0])


def _capacity(report: Report) -> Figure:
    table = report.table("capacity")
    level = float(table.loc[table["who"] == "student", "t"].min())
    block = report.study.alignment.depth - 1
    return figures.capacity_over_training(table, block=block, t=level, kind="tokens", tau=report.tau)


def _spectrum(report: Report) -> Figure:
    table = report.table("spectrum")
    return figures.error_by_arm(table, step=int(table["step"].max()))


def _effects(report: Report, table: str) -> Figure:
    rows = report.table(table)
    return figures.group_effects(rows, switching.effects(rows, report.study.claims.confidence))


def _family(report: Report) -> str:
    """The family of arms with the most switches."""
    taus = report.table("termination_sweep").groupby("family")["tau"].nunique()
    return str(taus.idxmax())


def _sweep(report: Report) -> Figure:
    swept, fired = report.table("termination_sweep"), report.table("termination_fired")
    return figures.fid_over_tau(swept, fired, _family(report))


def _triggers(report: Report) -> Figure:
    return figures.trigger_logs(report.table("termination_logs"), report.study.triggers, _family(report))


def _regret(report: Report) -> Figure:
    near = report.table("termination_nearest")
    return figures.regret_by_trigger(near, switching.ranking(near, report.study.claims.confidence), _family(report))


SECTIONS = (
    Section(
        "conflict",
        "Do alignment and denoising pull the same way?",
        "The cosine between the gradients of both losses over one block's parameters, on held-out images: above 0 "
        "a small step along one loss lowers the other, below 0 it raises it. A line per noise level t (0 is data); "
        "bars are bootstrap intervals over groups of images. A falling cosine is weak evidence by itself: where the "
        "summed loss is stationary, the two gradients are exactly opposed. Below: the estimate that an ordinary step "
        "gives at no extra pass, against the exact cosine.",
        ("gradient_conflict", "gradient_conflict_online"),
        {
            "conflict": _conflict,
            "online": lambda r: figures.online_against_exact(
                r.table("gradient_conflict"), r.table("gradient_conflict_online")
            ),
        },
    ),
    Section(
        "similarity",
        "Do student and teacher see alike?",
        "Unbiased linear CKA of the aligned pair of blocks on held-out images; thin lines are the same on shuffled "
        "pairs of images: the level that unrelated images reach.",
        ("similarity",),
        {"similarity": lambda r: figures.aligned_similarity(r.table("similarity"), r.tau, "cka")},
    ),
    Section(
        "cross-effects",
        "Does one alignment do the other's work?",
        "Left, the divergence of student from teacher attention (0: equal); right, how much of the teacher's tokens a "
        "linear map of the student's explains on images it was not fitted on. Thin lines are baselines: another image.",
        ("cross_effects",),
        {"cross_effects": lambda r: figures.cross_effects(r.table("cross_effects"), r.tau)},
    ),
    Section(
        "capacity",
        "The capacity mismatch",
        "How many directions the aligned block's tokens use, beside the teacher's; and the share of the image that a "
        "linear readout of the tokens does not find, by spatial frequency (0: all is there, 1: nothing is).",
        ("capacity", "spectrum"),
        {"capacity": _capacity, "spectrum": _spectrum},
    ),
    Section(
        "help",
        "Which parts of alignment give the early gain?",
        "Early gain over plain training: of REPA, of REPA whose teacher sees only low spatial frequencies (the number "
        "is a share of Nyquist), of alignment at some noise levels only (low, mid, high thirds of t), and of the "
        "control without any alignment that trains on high noise more often (shift). Small dots are seeds; grey means "
        "that the interval over seeds holds 0, which is not evidence of no difference.",
        ("help_consists_of",),
        {"help": lambda r: _effects(r, "help_consists_of")},
    ),
    Section(
        "termination",
        "When should alignment end?",
        "FID at the end over the step of the switch: all points of a line branch from one always-on run. Marks above "
        "show where triggers fired that look at the run itself; below, how far above the best switch FID ends with "
        "each trigger's own step, and what never switching costs.",
        ("termination_sweep", "termination_fired", "termination_nearest", "termination_logs"),
        {"termination": _sweep, "triggers": _triggers, "regret": _regret},
    ),
    Section(
        "ablations",
        "Which choices matter?",
        "Groups of arms that differ in one choice, against the reference named in each title; right of 0 is better "
        "than the reference. haste_teacher_random is aligned with a teacher that was never trained.",
        ("ablations",),
        {"ablations": lambda r: _effects(r, "ablations")},
    ),
    Section(
        "late",
        "Where does alignment begin to hurt?",
        "Each aligned arm against the run without alignment that differs in nothing else, on FID and on held-out "
        "denoising loss near the data: green points are below it, orange ones above, grey ones have an interval over "
        "seeds that holds 0.",
        ("late_gain",),
        {
            "late": lambda r: figures.gain_by_setting(r.table("late_gain")),
            "late_near_data": lambda r: figures.gain_by_setting(r.table("late_gain"), "near_data"),
        },
    ),
    Section(
        "plane",
        "Where is switching needed, and when?",
        "The weight of both alignment losses against the step of the switch, at the end of training; weights above 0.5 "
        "are outside of the paper's. Left: is the arm better (blue) or worse (red) than plain training? Right: was "
        "switching better than staying on with the same weight? Numbers in bold have an interval that excludes zero.",
        ("plane",),
        {"plane": lambda r: figures.weight_and_switch(r.table("plane"))},
    ),
)


def sections(report: Report) -> list[Section]:
    """The sections whose tables there are."""
    return [
        section
        for section in SECTIONS
        if all(report.has(table) and len(report.table(table)) for table in section.tables)
    ]
