"""Does one alignment do the other's work: attention and features of every arm, side by side (Fig. 6, arXiv 2505.16792).

The features' side here is how much of the teacher's tokens a linear map of the student's explains.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from haste_core.alignment import resample_tokens
from haste_core.analysis.attention_similarity import compared, references
from haste_core.analysis.scene import Scene, other_images
from haste_core.errors import HasteError
from haste_core.study.runs import Run
from haste_core.taps import QK, Taps

# Of the regression, per token fitted on and for features of unit variance: too small to be felt where they are free of
# each other, and enough where they are not.
RIDGE = 1e-4


def feature_fit(student_tokens: Tensor, teacher_tokens: Tensor) -> float:
    """The share of the teacher tokens' variance that a linear map of the student tokens explains, R^2, at most 1.

    Not in the paper. Ridge regression in float64 with an intercept, one map for all places, fitted on the images at
    even places of the batch and scored on the others; 0 is what the mean of the scored tokens would reach, and a map
    that does worse on them is negative. R^2 is over all features together: 1 - sum of squares left / sum of squares.

    Args:
        student_tokens: (B, N, D) on the teacher's grid. teacher_tokens: (B, N, D').

    Raises:
        HasteError: images or tokens differ, or there are fewer than two images.
    """
    if student_tokens.shape[:2] != teacher_tokens.shape[:2] or len(student_tokens) < 2:
        raise HasteError(
            f"student tokens {tuple(student_tokens.shape)} and teacher tokens {tuple(teacher_tokens.shape)}; "
            "possible: the same two or more images and the same token grid"
        )
    (x, y), (x_scored, y_scored) = (
        tuple(tokens[half::2].flatten(0, 1).double().numpy() for tokens in (student_tokens, teacher_tokens))
        for half in (0, 1)
    )
    fit = make_pipeline(StandardScaler(), Ridge(alpha=RIDGE * len(x), solver="cholesky")).fit(x, y)
    return float(r2_score(y_scored, fit.predict(x_scored), multioutput="variance_weighted"))


def cross_effects(run: Run) -> pd.DataFrame:
    """Attention and features of a run beside the teacher's, over steps and noise levels, in one table.

    Returns:
        step (0: before training), t, n (images scored), side, measure, baseline, value. Side `attention`: the measures
        of `attention_similarity`, mean over aligned pairs and heads, with its baselines. Side `features`: `r2`, from
        `feature_fit` of the student's tokens after the aligned depth (the study's for arms without their own), on the
        teacher's grid, to the teacher's final tokens; baseline `shuffled` takes the teacher's tokens of another image,
        so it is what the place of a token tells. The untrained student is step 0: its tokens are a linear map of
        noised patches and places.
    """
    scene = Scene(run)
    depth = min(run.config.alignment.depth, run.config.model.depth)
    rows = _attention_rows([references(scene, t) for _, t in scene.pairs], scene.facts(0, 0.0))
    for step, t in product(scene.steps, run.study.analysis.timesteps):
        seen = scene.student(step, t, Taps((depth,), scene.student_blocks))
        rows += _attention_rows(_compared_pairs(scene, seen.qk), scene.facts(step, t))
        rows += _feature_rows(scene, seen.tokens[depth], scene.facts(step, t))
    return pd.DataFrame(rows)


def _compared_pairs(scene: Scene, qk: dict[int, QK]) -> list[dict[str, dict[str, Tensor]]]:
    return [compared(scene, qk[student_block], teacher_block) for student_block, teacher_block in scene.pairs]


def _attention_rows(pairs: list[dict[str, dict[str, Tensor]]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        facts
        | {"side": "attention", "measure": measure, "baseline": baseline}
        | {"value": float(torch.stack([pair[baseline][measure] for pair in pairs]).mean())}
        for baseline, measures in pairs[0].items()
        for measure in measures
    ]


def _feature_rows(scene: Scene, tokens: Tensor, facts: dict[str, Any]) -> list[dict[str, Any]]:
    mine, theirs = resample_tokens(tokens, scene.grid, scene.teacher_grid), scene.teacher.tokens
    other = other_images(len(theirs), scene.run.study.analysis.seed)
    described = facts | {"n": len(theirs) // 2, "side": "features", "measure": "r2"}
    return [
        described | {"baseline": "none", "value": feature_fit(mine, theirs)},
        described | {"baseline": "shuffled", "value": feature_fit(mine, theirs[other])},
    ]
