"""Claims C1 to C20 of arXiv 2505.16792, each with the paper's number, our statistic and the rule that decides it.

An id ends in `d` where the claim is read on held-out denoising loss near the data, in `s` at structure (t >= 0.3), in
`p` and `r` on precision and recall, and holds a `w` where it is read on arms with alignment weights of 2 or 4, which
are outside of the paper's. A bundle of the paper is split (C13a, C13b). C18 has a row for each horizon.
"""

from __future__ import annotations

import math
from functools import partial

from haste_core.study.claims import statistics as of
from haste_core.study.claims.judging import MEASURES, Claim, Contrast

ABOVE_ZERO = "supported if the interval is above 0, contradicted if below"
EVERY = "supported if every interval is above 0, contradicted if one is below"
POSITIVE = (0.0, math.inf)
OTHERS = ("vanilla", "repa", "atta", "holistic")
STRONGER = ("haste_attention_1", "haste_attention_1.5", "haste_attention_3")
SUFFIX = {"fid": "", "near_data": "d", "structure": "s", "precision": "p", "recall": "r"}
BOTH = ("fid", "near_data")


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
    """One claim a measure: every arm of `worse` has more of it than `better`.

    when: "early", "last" or "common" (the last step that two arms share). size: the paper's, on the first measure.
    """
    statistic = {"early": of.early_difference, "last": of.last_difference, "common": of.difference}[when]
    contrasts = tuple(Contrast(f"{arm} minus {better}", partial(statistic, worse=arm, better=better)) for arm in worse)
    step = {"early": "mean of the early steps", "last": "last step", "common": "last common step"}[when]
    own = (measures[0],)  # the one that the paper's size is of
    names = worse[0] if len(worse) == 1 else "each of " + ", ".join(worse)
    return [
        Claim(
            id + SUFFIX[measure], text, paper, (*worse, better),
            f"{MEASURES[measure].name}, {names} minus {better}, {step}",
            ABOVE_ZERO if len(worse) == 1 else EVERY, POSITIVE, contrasts, size if measure in own else None, measure,
            early=when == "early", last=when == "last", needs=needs,
        )
        for measure in measures
    ]  # fmt: skip


def trigger(id: str, family: str, weights: str) -> Claim:
    """C14 for one family of arms that differ in their switch."""
    return Claim(
        id,
        f"the gradient-angle trigger finds a good tau by itself{weights}",
        "Tables 9, 10: SiT-B/2 at 100K iterations 38.69, without the switch 39.86, that is 0.03 in log FID",
        (family,),
        "log FID at the end, staying on minus the trigger's tau, and 0.05 plus each switch of the sweep minus "
        "the trigger's",
        "better than staying on and within 5 % of every switch: supported if every interval is above 0, contradicted "
        "if one is below; not tested where the trigger fires for no seed",
        POSITIVE,
        partial(of.against_switches, family=family, allowed=0.05),
        table="termination_nearest",
        happened=partial(of.never_fired, family=family),
    )


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
        "outside of the paper's weights", ("strong_repa",), "strong_repa_midway", "last", BOTH,
    ),
    *compared(
        "C2w4", "always-on REPA is worse late than REPA stopped midway, weight 4",
        "outside of the paper's weights", ("stronger_repa",), "stronger_repa_midway", "last", BOTH,
    ),
    *compared(
        "C3", "stopping REPA too early costs",
        "Fig 1: the run stopped at 100K iterations ends above the one stopped at 400K",
        ("repa_too_early",), "repa_midway", "last", BOTH,
    ),
    Claim(
        "C4a",
        "the gradient angle falls with training",
        "Table 7: t = 0.02, .007 at 100K, -.12 at 400K, -.21 at 4M iterations, a fall of 0.22",
        ("repa",),
        "rho, first minus last step, feature loss, lowest t",
        ABOVE_ZERO + "; weak evidence of harm, since the two gradients are opposed exactly wherever the summed loss is "
        "stationary",
        POSITIVE,
        (Contrast("first minus last", of.fall_of_angle),),
        size=0.22,
        table="gradient_conflict",
    ),
    Claim(
        "C4b",
        "and ends below zero",
        "Table 7: -.21 at t = 0.02 after 4M iterations",
        ("repa",),
        "rho, last step, feature loss, lowest t",
        "supported if the interval is below 0, contradicted if above",
        (-math.inf, 0.0),
        (Contrast("last", of.last_angle),),
        table="gradient_conflict",
    ),
    Claim(
        "C5",
        "the gradient angle is higher at mid noise than near the data",
        "Fig 4, Table 8",
        ("repa",),
        "rho at t = 0.5 minus rho at t up to 0.1, feature loss, mean over steps",
        ABOVE_ZERO,
        POSITIVE,
        (Contrast("middle minus near the data", of.mid_over_low),),
        table="gradient_conflict",
    ),
    Claim(
        "C6",
        "a teacher that sees only low-pass images gives the same early gain",
        "Fig 5, a curve: SiT-L/2, 200K iterations",
        ("vanilla", "repa", "repa_low_pass"),
        "gain with the low-pass teacher over gain of REPA, both in log FID, mean of the early steps",
        "the same is 0.75 to 1.33 times: supported if the interval is inside, contradicted if wholly outside; not "
        "decided where REPA itself gains nothing for some seed",
        (0.75, 4 / 3),
        (Contrast("share", partial(of.share_of_gain, arm="repa_low_pass")),),
        early=True,
    ),
    Claim(
        "C7",
        "attention alignment alone speeds up about as much as REPA",
        "Table 3: 40 epochs 13.6 against 10.7 (vanilla 24.3), that is 0.71 of REPA's gain in log FID",
        ("vanilla", "repa", "atta"),
        "gain of attention alignment over gain of REPA, both in log FID, mean of the early steps",
        "about as much is 0.5 to 1.5 times: supported if the interval is inside, contradicted if wholly outside; not "
        "decided where REPA itself gains nothing for some seed",
        (0.5, 1.5),
        (Contrast("share", partial(of.share_of_gain, arm="atta")),),
        early=True,
    ),
    Claim(
        "C8a",
        "REPA alone moves attention incompletely",
        "Fig 6, curves without baselines",
        ("vanilla", "repa", "atta"),
        "share of attention alignment's approach to the teacher's maps that REPA alone makes, last step",
        "incompletely is 0 to 0.5: supported if the interval is inside, contradicted if wholly outside",
        (0.0, 0.5),
        (Contrast("share", of.share_of_attention),),
        table="cross_effects",
    ),
    Claim(
        "C8b",
        "attention alignment alone pulls features too",
        "Fig 6, curves without baselines",
        ("vanilla", "atta"),
        "R2 of the teacher's tokens from the student's, attention alignment minus vanilla, last step",
        ABOVE_ZERO,
        POSITIVE,
        (Contrast("atta minus vanilla", of.pull_on_features),),
        table="cross_effects",
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
        "outside of the paper's weights", ("vanilla", "strong_repa", "strong_holistic"), "strong_haste", "last", BOTH,
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
        "C18@",
        "HASTE reaches vanilla's FID in far fewer steps",
        "Table 1: 28 times fewer at XL/2",
        ("vanilla", "haste"),
        "vanilla's steps over HASTE's to the FID that vanilla has at this step",
        "far fewer is at least 2 times: supported if the interval is above 2, contradicted if below; the factor "
        "describes the horizon",
        (2.0, math.inf),
        (Contrast("factor", of.speed_up),),
        log_scale=True,
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
        "outside of the paper's weights", ("strong_haste_too_late",), "strong_haste", "last", BOTH,
    ),
    *compared(
        "C19nw", "staying on is worse at the end than the switch, weights of 2",
        "outside of the paper's weights", ("strong_holistic",), "strong_haste", "last", (*BOTH, "structure"),
    ),
    *compared(
        "C20", "it holds at higher resolution",
        "Table 13: ImageNet 512, 2.62 after 600 epochs, with HASTE 2.34 after 100",
        ("high_resolution_vanilla",), "high_resolution_haste", "common", ("fid",), None,
        "needs images of a higher resolution and their study, such as imagenet512",
    ),
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

# The tables of analyses that claims are read from.
TABLES = tuple(
    sorted({claim.table for claim in CLAIMS if claim.table is not None} | {"termination_sweep", "termination_fired"})
)
