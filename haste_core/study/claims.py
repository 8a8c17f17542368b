"""Claims C1 to C20 of arXiv 2505.16792 as data: the paper's number, a statistic, and the rule that decides.

An id ends in `d` if the claim is read on held-out denoising loss near the data, in `s` for structure (t >= 0.3), in `p`
and `r` for precision and recall, in `x` for pixels, in `c` and `u` for caption accuracy, and holds a `w` for arms with
alignment weights of 2 or 4, which are outside of the paper's. A bundle of the paper is split (C13a, C13b). C18 has a
row for each horizon.

Rules and random streams were changed together after the earlier runs, which are called exploration
(reports/exploration). `RULES` names the commit that fixed both before the first run under them.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd

from haste_core.errors import HasteError
from haste_core.study.config import StudySettings
from haste_core.study.judging import MEASURES, Claim, Contrasts, Evidence

# Set by the commit that follows the one it names.
RULES = "d23e73d88298"
MECHANISM_RULES = "a250d99599d4"
PRETRAINED_RULES = "b658a4577f09"

ABOVE_ZERO = "supported if the interval is above 0, contradicted if below"
EVERY = "supported if every interval is above 0, contradicted if one is below"
TRIGGER = "gradient angle < -0.05"
POSITIVE = (0.0, math.inf)
OTHERS = ("vanilla", "repa", "atta", "holistic")
STRONGER = ("haste_attention_1", "haste_attention_1.5", "haste_attention_3")
SUFFIX = {
    "fid": "", "near_data": "d", "structure": "s", "precision": "p", "recall": "r", "excess": "",
    "excess_structure": "s", "gap": "l", "fd_pixel": "x", "caption_seen": "c", "caption_unseen": "u",
}  # fmt: skip
BOTH = ("fid", "near_data")
STEP = {"early": "mean of the early steps", "last": "last step", "common": "last common step"}


def difference(evidence: Evidence, seed: int, worse: str, better: str, when: str) -> float:
    """The measure of `worse` minus `better`: mean of the "early" steps, at the "last" or at the last "common" step."""
    if when == "early":
        return evidence.early_value(worse, seed) - evidence.early_value(better, seed)
    step = evidence.last
    if when == "common":
        common = evidence.steps(worse, seed) & evidence.steps(better, seed)
        if not common:
            arms = f"{evidence.name(worse)}, {evidence.name(better)}"
            raise HasteError(f"arms {arms} share no scored step for seed {seed}; give them the same train.keep")
        step = max(common)
    return evidence.value(worse, seed, step) - evidence.value(better, seed, step)


def growth_of_gain(evidence: Evidence, seed: int) -> float:
    """HASTE's gain over vanilla at the higher resolution minus that at the lower, each at its last common step."""
    high, low = (
        difference(evidence, seed, f"{side}_resolution_vanilla", f"{side}_resolution_haste", "common")
        for side in ("high", "low")
    )
    return high - low


def share_of_gain(evidence: Evidence, seed: int, arm: str) -> float:
    """The arm's early gain over REPA's; NaN, which decides nothing, if REPA itself gains nothing."""
    repa = difference(evidence, seed, "vanilla", "repa", "early")
    return difference(evidence, seed, "vanilla", arm, "early") / repa if repa > 0 else math.nan


def speed_up(evidence: Evidence, seed: int, arm: str = "haste") -> float:
    """Factor by which `arm` needs fewer steps to reach the FID that vanilla has at step `evidence.last`.

    Between kept steps log FID is interpolated linearly in log step. If `arm` does not reach it by then the value is
    1, an upper bound on the factor. NaN, which decides nothing, if its first kept step is already there: the factor
    is then at least `evidence.last` over that step.
    """
    goal = evidence.value("vanilla", seed, evidence.last)
    steps = sorted(step for step in evidence.steps(arm, seed) if step <= evidence.last)
    values = [evidence.value(arm, seed, step) for step in steps]
    i = next((i for i, value in enumerate(values) if value <= goal), None)
    if i is None:
        return 1.0
    if i == 0:
        return math.nan
    share = (values[i - 1] - goal) / (values[i - 1] - values[i])
    reached = math.log(steps[i - 1]) + share * (math.log(steps[i]) - math.log(steps[i - 1]))
    return evidence.last / math.exp(reached)


def _angles(evidence: Evidence, seed: int) -> pd.DataFrame:
    """rho of REPA's loss by step (rows) and noise level (columns)."""
    rows = evidence.rows("gradient_conflict", seed, arm=evidence.name("repa"), loss="feature")
    return rows.pivot_table(index="step", columns="t", values="rho")


def fall_of_angle(evidence: Evidence, seed: int) -> float:
    """rho of REPA's loss nearest the data: at the first measured step minus at the last."""
    near = _angles(evidence, seed).iloc[:, 0]
    return float(near.iloc[0] - near.iloc[-1])


def last_angle(evidence: Evidence, seed: int) -> float:
    """rho of REPA's loss nearest the data at the last measured step."""
    return float(_angles(evidence, seed).iloc[:, 0].iloc[-1])


def mid_over_low(evidence: Evidence, seed: int) -> float:
    """rho of REPA's loss at the noise level nearest 0.5 minus its mean at levels up to 0.1, mean over steps."""
    rho = _angles(evidence, seed)
    levels = rho.columns.to_numpy(float)
    middle = int(np.abs(levels - 0.5).argmin())
    return float(rho.iloc[:, middle].mean() - np.nanmean(rho.loc[:, levels <= 0.1]))


def _effect(evidence: Evidence, seed: int, arm: str, side: str, measure: str) -> float:
    """A cross effect of an arm at its last step, mean over noise levels."""
    rows = evidence.rows("cross_effects", seed, arm=evidence.name(arm), side=side, measure=measure, baseline="none")
    return float(rows.loc[rows["step"] == rows["step"].max(), "value"].mean())


def share_of_attention(evidence: Evidence, seed: int) -> float:
    """Approach of REPA's attention to the teacher's over that of attention alignment, both from vanilla.

    By the Jensen-Shannon divergence at the last step, mean over layer pairs, heads and noise levels. NaN if attention
    alignment itself does not move attention towards the teacher's.
    """
    vanilla, repa, atta = (
        _effect(evidence, seed, arm, "attention", "jensen_shannon") for arm in ("vanilla", "repa", "atta")
    )
    return (vanilla - repa) / (vanilla - atta) if vanilla > atta else math.nan


def pull_on_features(evidence: Evidence, seed: int) -> float:
    """R^2 of the teacher's tokens from the student's at the last step: of attention alignment minus vanilla."""
    atta, vanilla = (_effect(evidence, seed, arm, "features", "r2") for arm in ("atta", "vanilla"))
    return atta - vanilla


def never_fired(evidence: Evidence, family: str) -> str:
    """Reason why the trigger of a family of arms is not tested; empty if it fired for some seed."""
    rows, name = evidence.tables["termination_fired"], evidence.name(TRIGGER)
    rows = rows[(rows["family"] == evidence.name(family)) & (rows["trigger"] == name)]
    return "" if rows["tau"].notna().any() else f"the trigger {name!r} fired for no seed"


def against_switches(evidence: Evidence, family: str, allowed: float) -> Contrasts:
    """Contrasts of the trigger's switch with every other of the family's sweep, above 0 where the trigger is good.

    With staying on: log FID at the end of staying on minus that at the trigger's switch. With each switch of the
    sweep: `allowed` plus log FID of that switch minus that at the trigger's. The latter is interpolated in log tau,
    and NaN if the log is empty or has gaps.
    """
    family = evidence.name(family)
    swept = evidence.tables["termination_sweep"]
    swept = swept[(swept["family"] == family) & (swept["fade"] == 0)]
    swept = swept[swept["step"] == swept["step"].max()]
    never = int(swept["tau"].max())

    def against(evidence: Evidence, seed: int, tau: int, more: float) -> float:
        rows = swept[(swept["seed"] == seed) & (swept["tau"] == tau)]
        near = evidence.rows("termination_nearest", seed, family=family, trigger=evidence.name(TRIGGER))
        at_tau, at_trigger = (math.log(r["fid"].iloc[0]) if len(r) else math.nan for r in (rows, near))
        return at_tau + more - at_trigger

    return {"against staying on": partial(against, tau=never, more=0.0)} | {
        f"against switching at {tau}": partial(against, tau=tau, more=allowed)
        for tau in sorted(set(swept["tau"]) - {never})
    }


def compared(
    id: str,
    text: str,
    paper: str,
    worse: tuple[str, ...],
    better: str,
    when: str,
    measures: tuple[str, ...] = ("fid",),
    size: float | None = None,
    needs: str = "",
) -> list[Claim]:
    """One claim for each measure: every arm of `worse` has more of it than `better`.

    when: see `difference`. size: the paper's effect, on the first measure.
    """
    contrasts = {f"{arm} minus {better}": partial(difference, worse=arm, better=better, when=when) for arm in worse}
    names = worse[0] if len(worse) == 1 else "each of " + ", ".join(worse)
    return [
        Claim(
            id + SUFFIX[measure], text, paper, (*worse, better),
            f"{MEASURES[measure].name}, {names} minus {better}, {STEP[when]}",
            ABOVE_ZERO if len(worse) == 1 else EVERY, POSITIVE, contrasts, size if measure == measures[0] else None,
            measure, when=when, needs=needs,
        )
        for measure in measures
    ]  # fmt: skip


def trigger(id: str, family: str, weights: str) -> Claim:
    """C14 for one family of arms that differ in their switch."""
    return Claim(
        id, f"the gradient-angle trigger finds a good tau by itself{weights}",
        "Tables 9, 10: SiT-B/2 at 100K iterations 38.69, without the switch 39.86, that is 0.03 in log FID",
        (family,),
        "log FID at the end, staying on minus the trigger's tau, and 0.05 plus each switch of the sweep minus "
        "the trigger's",
        "better than staying on and within 5 % of every switch: supported if every interval is above 0, contradicted "
        "if one is below; not tested where the trigger fires for no seed",
        POSITIVE, partial(against_switches, family=family, allowed=0.05),
        table="termination_nearest", untested=partial(never_fired, family=family),
    )  # fmt: skip


def larger_gain(measures: tuple[str, ...]) -> list[Claim]:
    """C20 across two resolutions of the same images, one claim for each measure."""
    high, low = (tuple(f"{side}_resolution_{arm}" for arm in ("vanilla", "haste")) for side in ("high", "low"))
    return [
        Claim(
            "C20g" + SUFFIX[measure], "the gain of HASTE is larger at higher resolution",
            "no such comparison: Tables 1 and 13 are of other lengths of training", (*high, *low),
            f"{MEASURES[measure].name}, gain of haste over vanilla at the higher resolution minus that at the lower, "
            f"{STEP['common']} of each",
            ABOVE_ZERO, POSITIVE, {"": growth_of_gain}, measure=measure, across=(high, low),
            needs="run the study at the lower resolution first",
        )
        for measure in measures
    ]  # fmt: skip


CLAIMS = (
    *compared(
        "C1", "REPA beats vanilla early", "Fig 1; Table 3: 40 epochs 24.3 -> 10.7, that is 0.82 in log FID",
        ("vanilla",), "repa", "early", (*BOTH, "structure"), 0.82,
    ),
    *compared(
        "C2", "always-on REPA is worse late than REPA stopped midway",
        "Fig 1: the run stopped at 400K iterations ends below the always-on one",
        ("repa",), "repa_midway", "last", BOTH,
    ),
    *compared(
        "C2w", "always-on REPA is worse late than REPA stopped midway, weight 2",
        "no such weights", ("strong_repa",), "strong_repa_midway", "last", BOTH,
    ),
    *compared(
        "C2w4", "always-on REPA is worse late than REPA stopped midway, weight 4",
        "no such weights", ("stronger_repa",), "stronger_repa_midway", "last", BOTH,
    ),
    *compared(
        "C3", "stopping REPA too early costs",
        "Fig 1: the run stopped at 100K iterations ends above the one stopped at 400K",
        ("repa_too_early",), "repa_midway", "last", BOTH,
    ),
    Claim(
        "C4a", "the gradient angle falls with training",
        "Table 7: t = 0.02, .007 at 100K, -.12 at 400K, -.21 at 4M iterations, a fall of 0.22",
        ("repa",), "rho, first minus last step, feature loss, lowest t",
        ABOVE_ZERO + "; weak evidence of harm, since the two gradients are opposed exactly wherever the summed loss is "
        "stationary",
        POSITIVE, {"": fall_of_angle}, size=0.22, table="gradient_conflict",
    ),
    Claim(
        "C4b", "the gradient angle ends below zero", "Table 7: -.21 at t = 0.02 after 4M iterations",
        ("repa",), "rho, last step, feature loss, lowest t",
        "supported if the interval is below 0, contradicted if above",
        (-math.inf, 0.0), {"": last_angle}, table="gradient_conflict",
    ),
    Claim(
        "C5", "the gradient angle is higher at mid noise than near the data", "Fig 4, Table 8",
        ("repa",), "rho at t = 0.5 minus rho at t up to 0.1, feature loss, mean over steps",
        ABOVE_ZERO, POSITIVE, {"": mid_over_low}, table="gradient_conflict",
    ),
    Claim(
        "C6", "a teacher that sees only low-pass images gives the same early gain",
        "Fig 5, a curve: SiT-L/2, 200K iterations", ("vanilla", "repa", "repa_low_pass"),
        "gain with the low-pass teacher over gain of REPA, both in log FID, mean of the early steps",
        "the same is 0.75 to 1.33 times: supported if the interval is inside, contradicted if wholly outside; not "
        "decided where REPA itself gains nothing for some seed",
        (0.75, 4 / 3), {"": partial(share_of_gain, arm="repa_low_pass")}, when="early",
    ),
    Claim(
        "C7", "attention alignment alone speeds up about as much as REPA",
        "Table 3: 40 epochs 13.6 against 10.7 (vanilla 24.3), that is 0.71 of REPA's gain in log FID",
        ("vanilla", "repa", "atta"),
        "gain of attention alignment over gain of REPA, both in log FID, mean of the early steps",
        "about as much is 0.5 to 1.5 times: supported if the interval is inside, contradicted if wholly outside; not "
        "decided where REPA itself gains nothing for some seed",
        (0.5, 1.5), {"": partial(share_of_gain, arm="atta")}, when="early",
    ),
    Claim(
        "C8a", "REPA alone moves attention incompletely", "Fig 6, curves without baselines",
        ("vanilla", "repa", "atta"),
        "share of attention alignment's approach to the teacher's maps that REPA alone makes, last step",
        "incompletely is 0 to 0.5: supported if the interval is inside, contradicted if wholly outside",
        (0.0, 0.5), {"": share_of_attention}, table="cross_effects",
    ),
    Claim(
        "C8b", "attention alignment alone pulls features too", "Fig 6, curves without baselines",
        ("vanilla", "atta"),
        "R2 of the teacher's tokens from the student's, attention alignment minus vanilla, last step",
        ABOVE_ZERO, POSITIVE, {"": pull_on_features}, table="cross_effects",
    ),
    *compared(
        "C9", "both together beat either, early",
        "Table 3: 40 epochs 9.9 against 10.7 and 13.6, that is 0.08 in log FID over the better",
        ("repa", "atta"), "holistic", "early", (*BOTH, "structure"), 0.08,
    ),
    *compared(
        "C10", "both kept on late are worse than REPA alone",
        "Table 3: 100 epochs 8.1 against 7.5, that is 0.08 in log FID", ("holistic",), "repa", "last", BOTH, 0.08,
    ),
    *compared(
        "C11", "both, then the switch, is best at the end",
        "Table 3: 100 epochs 5.3 against 7.5 (REPA), that is 0.35 in log FID over the next best; Table 4",
        OTHERS, "haste", "last", BOTH, 0.35,
    ),
    *compared(
        "C11w", "both, then the switch, is best at the end, weights of 2",
        "no such weights", ("vanilla", "strong_repa", "strong_holistic"), "strong_haste", "last", BOTH,
    ),
    *compared(
        "C12", "lambda_A = 0.5 is best of 0.5, 1, 1.5, 3",
        "Table 5: 7.9 against 8.6, 8.7, 9.0 (SiT-L/2, 400K), that is 0.08 in log FID over the next best",
        STRONGER, "haste", "common", ("fid",), 0.08,
    ),
    *compared(
        "C13a", "four mid layers are better than two (here two and one)",
        "Table 6: four mid layers 7.9, two 8.9, that is 0.12 in log FID",
        ("haste_layers_fewer",), "haste", "common", ("fid",), 0.12,
    ),
    *compared(
        "C13b", "adding shallow layers hurts",
        "Table 6: four mid layers 7.9, with shallow ones 8.3, that is 0.05 in log FID",
        ("haste_layers_shallow",), "haste", "common", ("fid",), 0.05,
    ),
    trigger("C14", "holistic", ""),
    trigger("C14w", "strong_holistic", ", weights of 2"),
    *compared(
        "C15a", "it works with another teacher", "Tables 11, 12: CLIP ViT-B/16",
        ("vanilla",), "haste_other_teacher", "common",
    ),
    *compared(
        "C15b", "it works with a different token grid", "Tables 11, 12: 14x14 tokens beside 16x16",
        ("vanilla",), "haste_other_grid", "common",
    ),
    *compared(
        "C16", "it works for text-to-image", "Table 2: MS-COCO, 150K iterations 5.26 -> 4.09, that is 0.25 in log FID",
        ("text_vanilla",), "text_haste", "common", ("fid",), 0.25,
        "needs images with captions, a text encoder and arms with model.kind mmdit",
    ),
    *compared(
        "C17", "it works for a noise-predicting DiT",
        "Table 1: DiT-XL/2 9.62 after 1400 epochs, with HASTE 9.33 after 80",
        ("dit_vanilla",), "dit_haste", "common",
    ),
    Claim(
        "C18@", "HASTE reaches vanilla's FID in far fewer steps", "Table 1: 28 times fewer at XL/2",
        ("vanilla", "haste"), "vanilla's steps over HASTE's to the FID that vanilla has at this step",
        "far fewer is at least 2 times: supported if the interval is above 2, contradicted if below; the factor "
        "describes the horizon",
        (2.0, math.inf), {"": speed_up}, log_scale=True,
    ),
    *compared(
        "C19", "switching too late is worse at the end than the right tau",
        "Table 4, Fig 7: 500K iterations, tau 250K 5.3, tau 400K 7.4, that is 0.33 in log FID",
        ("haste_too_late",), "haste", "last", BOTH, 0.33,
    ),
    *compared(
        "C19n", "staying on is worse at the end than the switch",
        "Table 4, Fig 7: 500K iterations, tau 250K 5.3, never 8.1, that is 0.42 in log FID",
        ("holistic",), "haste", "last", (*BOTH, "structure"), 0.42,
    ),
    *compared(
        "C19w", "switching too late is worse at the end than the right tau, weights of 2",
        "no such weights", ("strong_haste_too_late",), "strong_haste", "last", BOTH,
    ),
    *compared(
        "C19nw", "staying on is worse at the end than the switch, weights of 2",
        "no such weights", ("strong_holistic",), "strong_haste", "last", (*BOTH, "structure"),
    ),
    *compared(
        "C20", "it holds at higher resolution",
        "Table 13: ImageNet 512, 2.62 after 600 epochs, with HASTE 2.34 after 100",
        ("high_resolution_vanilla",), "high_resolution_haste", "common", ("fid",), None,
        "needs images of a higher resolution and their study, such as imagenet512",
    ),
    *larger_gain(("fid", "fd_pixel", "near_data")),
    *compared(
        "T14", "HASTE ends with higher precision than vanilla",
        "Table 14: SiT-XL/2 .68 after 1400 epochs, with HASTE .73 after 100",
        ("haste",), "vanilla", "last", ("precision",), 0.05,
    ),
    *compared(
        "T14", "HASTE ends with lower recall than vanilla",
        "Table 14: SiT-XL/2 .67 after 1400 epochs, with HASTE .65 after 100",
        ("vanilla",), "haste", "last", ("recall",), 0.02,
    ),
)  # fmt: skip

# Excess loss of an arm that a switch may leave, as a share of vanilla's (M4).
LEFT = 0.02


def late(evidence: Evidence, seed: int, role: str, measure: str, step: int | None = None) -> float:
    """A score of an arm at a step, by default the last one of the study."""
    scores, last = evidence.scores, evidence.last if step is None else step
    rows = (scores["arm"] == evidence.name(role)) & (scores["seed"] == seed) & (scores["step"] == last)
    return float(scores.loc[rows, measure].iloc[0])


def harm(evidence: Evidence, seed: int, arm: str, plain: str = "vanilla") -> float:
    """log excess loss near the data at the last step, an arm minus plain training."""
    return math.log(late(evidence, seed, arm, "excess") / late(evidence, seed, plain, "excess"))


def early_gain(evidence: Evidence, seed: int, arm: str) -> float:
    """log excess loss at t >= 0.3, plain training minus an arm, mean of the early steps."""
    values = [
        late(evidence, seed, "vanilla", "excess_structure", step) / late(evidence, seed, arm, "excess_structure", step)
        for step in evidence.early
    ]
    return float(np.mean(np.log(values)))


def less_harm(evidence: Evidence, seed: int, more: tuple[str, str], less: tuple[str, str]) -> float:
    """Late harm of one arm minus that of another, each as (arm, its plain training)."""
    return harm(evidence, seed, *more) - harm(evidence, seed, *less)


def harm_for_gain(evidence: Evidence, seed: int) -> float:
    """Late harm of `holistic` over its early gain minus that of `both`; NaN, which decides nothing, without a gain."""
    gains = {arm: early_gain(evidence, seed, arm) for arm in ("holistic", "both")}
    if min(gains.values()) <= 0:
        return math.nan
    return harm(evidence, seed, "holistic") / gains["holistic"] - harm(evidence, seed, "both") / gains["both"]


def harm_in_band(evidence: Evidence, seed: int, minus_template: bool) -> float:
    """Late harm of `holistic` in the texture's coefficients, or its surplus over the others', over vanilla's excess."""
    plain = late(evidence, seed, "vanilla", "excess")
    texture, template = (
        (late(evidence, seed, "holistic", name) - late(evidence, seed, "vanilla", name)) / plain
        for name in ("excess_texture", "excess_template")
    )
    return texture - template if minus_template else texture


# Of studies whose data have a known law: predictions of the capacity mismatch, fixed before the runs that judge them.
MECHANISM = (
    *compared(
        "M1", "a teacher of labels costs detail near the data late", "Sec. 1: a mismatch of capacity",
        ("holistic",), "vanilla", "last", ("excess",),
    ),
    Claim(
        "M2", "a teacher that knows the texture too costs less", "Sec. 1: a mismatch of capacity",
        ("vanilla", "holistic", "both", "both_pull"),
        "late harm (log excess loss, t <= 0.1, over vanilla's), teacher of labels minus teacher of both, last step",
        EVERY, POSITIVE,
        {
            "equal weights": partial(less_harm, more=("holistic", "vanilla"), less=("both", "vanilla")),
            "equal pull": partial(less_harm, more=("holistic", "vanilla"), less=("both_pull", "vanilla")),
        },
        measure="excess", when="last",
    ),
    Claim(
        "M2g", "it costs less for an equal early gain", "Sec. 1: a mismatch of capacity",
        ("vanilla", "holistic", "both"),
        "late harm over early gain (log excess loss, t >= 0.3), teacher of labels minus teacher of both",
        ABOVE_ZERO + "; not decided where either gains nothing early for some seed", POSITIVE, {"": harm_for_gain},
        measure="excess", when="early",
    ),
    Claim(
        "M3", "the harm shrinks with the width of the student", "Sec. 1: a mismatch of capacity",
        ("vanilla", "holistic", "narrow_vanilla", "narrow_holistic", "wide_vanilla", "wide_holistic"),
        "late harm (log excess loss, t <= 0.1, over vanilla's) at one width minus the next larger one, last step",
        EVERY, POSITIVE,
        {
            "32 minus 64": partial(
                less_harm, more=("narrow_holistic", "narrow_vanilla"), less=("holistic", "vanilla")
            ),
            "64 minus 96": partial(less_harm, more=("holistic", "vanilla"), less=("wide_holistic", "wide_vanilla")),
        },
        measure="excess", when="last",
    ),
    Claim(
        "M4", "the switch takes the harm away by the last step", "Fig 1: the run stopped midway ends below",
        ("vanilla", "haste"), "log excess loss, t <= 0.1, haste minus vanilla, last step",
        f"at most {LEFT:g} is left: supported if the interval is below {LEFT:g}, contradicted if above",
        (-math.inf, LEFT), {"": partial(difference, worse="haste", better="vanilla", when="last")},
        measure="excess", when="last",
    ),
    Claim(
        "M5", "the harm lies in the coefficients of the texture", "Sec. 1: the teacher discards detail",
        ("vanilla", "holistic"),
        "excess loss, t <= 0.1, holistic minus vanilla, over vanilla's, last step",
        EVERY, POSITIVE,
        {
            "texture": partial(harm_in_band, minus_template=False),
            "texture minus template": partial(harm_in_band, minus_template=True),
        },
        measure="excess", when="last",
    ),
    *compared(
        "M6", "alignment helps structure early", "Fig 1; Table 3", ("vanilla",), "holistic", "early",
        ("excess_structure",),
    ),
    *compared(
        "M7", "alignment ends with the larger gap in likelihood", "no such measure", ("holistic",), "vanilla", "last",
        ("gap",),
    ),
)  # fmt: skip


# C16 on further scores, of studies of the built-in scenes.
TEXT = (
    *compared(
        "C16", "it works for text-to-image", "Table 2 has FID alone", ("text_vanilla",), "text_haste", "common",
        ("fd_pixel", "near_data", "structure"),
    ),
    *compared(
        "C16", "images show more of what their captions say", "no such measure", ("text_haste",), "text_vanilla",
        "common", ("caption_seen", "caption_unseen"),
    ),
)  # fmt: skip

# C15 for a pretrained teacher beside one trained on the study's own labels, of studies with arms of both.
PRETRAINED = tuple(
    claim
    for id, arm, how in (("C15f", "repa", ""), ("C15m", "similarity", ", its attention made of similarities"))
    for claim in compared(
        id, f"a teacher that has seen ImageNet helps more than one trained on the study's images{how}",
        "no such comparison: every teacher is pretrained", (arm,), f"{arm}_imagenet", "last",
        ("fid", "fd_pixel", "near_data", "structure"),
    )
)  # fmt: skip


def claims_of(study: StudySettings) -> tuple[Claim, ...]:
    """The claims that a study's report judges."""
    more = MECHANISM if study.data.kind == "textured" else TEXT if study.data.has_scenes else ()
    return (*CLAIMS, *more, *(PRETRAINED if "repa_imagenet" in study.arms else ()))


def rules_of(study: StudySettings) -> str:
    """The commits that fixed the rules of `claims_of`."""
    mechanism = f", M1 to M7 {MECHANISM_RULES}" if study.data.kind == "textured" else ""
    return RULES + mechanism + (f", C15f and C15m {PRETRAINED_RULES}" if "repa_imagenet" in study.arms else "")


# The analysis tables that claims are read from.
TABLES = tuple(
    sorted({claim.table for claim in CLAIMS if claim.table is not None} | {"termination_sweep", "termination_fired"})
)
