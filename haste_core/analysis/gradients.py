"""Gradient conflict in a run's checkpoints: the exact cosine, and the online estimate at the same places.

Eq. 2 and Figs. 3, 4, 9, Tables 7, 8, arXiv 2505.16792. Gradients are those of the training weights, not of their
average: the question is the direction of the next training step.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch

from haste_core import checkpoint
from haste_core.analysis.probe import BATCH, checkpoints, held_out
from haste_core.devices import default_device
from haste_core.errors import unknown
from haste_core.gradient_angle import CHUNKS, OnlineAngle, gradient_cosine, losses_at, noise, reaching, split
from haste_core.haste import HASTE
from haste_core.models import DiffusionTransformer
from haste_core.paths import Objective, objective_of
from haste_core.study import config
from haste_core.study.data import open_dataset
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.train import build_generator, build_haste
from haste_core.teacher import Teacher

# The paper's weight of both losses (Table 16), for a study that sets none.
WEIGHT = 0.5
COLUMNS = ["step", "t", "loss", "block", "rho", "low", "high", "rho_corrected", "norm_ratio", "n", "chunks"]
ONLINE_COLUMNS = ["step", "t", "loss", "online", "n"]


class Moment(NamedTuple):
    """A run at one step: its training weights, and the losses it has or would have there."""

    model: DiffusionTransformer
    haste: HASTE
    objective: Objective


def conflict(run: Run, chunks: int = CHUNKS) -> pd.DataFrame:
    """Exact cosine between denoising and alignment gradients, by checkpoint, noise level and loss.

    Held-out images (`analysis.n`) with their true labels; the teacher sees them clean. A loss the arm does not have is
    measured as if it were switched on now, with the study's weight or the paper's 0.5. The feature loss uses the run's
    own projector, which only checkpoints of phase I hold: elsewhere (vanilla, attention alone, after the switch) there
    are no rows of "feature" and "holistic", nor of a loss read below the block. Untrained weights are left out: with
    adaLN-Zero no gradient reaches a block.

    Columns: step; t, the noise level; loss, of "feature", "attention", "holistic"; block, from 0; rho, in [-1, 1]; low,
    high, the ends of its bootstrap interval over chunks; rho_corrected (`Products.rho_corrected`); norm_ratio,
    |grad L_R| / |grad L_diff| with the losses' weights; n, images; chunks, groups of images with a gradient each.

    Raises:
        HasteError: no loss reaches the block (`block_of`), or a checkpoint is missing.
    """
    analysis, batch = run.study.analysis, held_out(run)
    block, teacher = block_of(run), find_teacher(run.study, run.config.teacher)
    rows = []
    for step in checkpoints(run, run.config.train.kept_steps):
        now = moment(run, step, teacher)
        if now is None or not reaching(now.haste, block):
            continue
        for t in analysis.timesteps:
            found = gradient_cosine(*now, batch, t, block, chunks=chunks, seed=analysis.seed)
            for loss, products in found.items():
                low, high = products.interval(analysis.resamples, analysis.confidence, analysis.seed)
                rows.append((step, t, loss, block, float(products.rho()), low, high, products.rho_corrected,
                             products.norm_ratio, len(batch.x), len(products.cross)))  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def block_of(run: Run) -> int:
    """Block, from 0, on whose parameters gradients are compared: `analysis.block`, or the last below the depth.

    Raises:
        HasteError: the block does not exist, or lies above everything that is aligned.
    """
    alignment, chosen = run.config.alignment, run.study.analysis.block
    block = alignment.depth - 1 if chosen is None else chosen
    highest = max(alignment.depth - 1, *(student for student, _ in alignment.layer_pairs), 0)
    blocks = range(min(highest + 1, run.config.model.depth))
    if block not in blocks:
        raise unknown("analysis.block (from 0; by default the last below alignment.depth)", block, blocks)
    return block


def online_conflict(run: Run) -> pd.DataFrame:
    """Readings of `OnlineAngle` at checkpoints of phase I, on the images, noise and noise levels of `conflict`.

    One backward pass of the run's own loss a noise level. A step outside of phase I has no rows: it has no alignment
    loss to read from. Columns: step, t, loss ("feature", "attention": those the run has), online (a cosine, in
    [-1, 1]), n (images).
    """
    analysis, batch, rows = run.study.analysis, held_out(run), []
    eps, parts = noise(batch.x, analysis.seed), -(-len(batch.x) // BATCH)
    for step in checkpoints(run, run.config.train.kept_steps):
        _, state = run.load(step, prefixes=("none",))
        if state["termination"]["phase"] != 1:
            continue
        now = moment(run, step, find_teacher(run.study, run.config.teacher), own=True)
        if now is None:
            continue
        angle = OnlineAngle(next(now.model.parameters()).device, edges=(0.0, 1.0))
        now.haste.angle = angle
        for t in analysis.timesteps:
            angle.reset()
            for part, part_eps in split(batch, eps, parts):
                losses = losses_at(*now, part, part_eps, t, watch=True)
                total = torch.stack(list(losses.values())).sum() * len(part_eps) / len(eps)
                torch.autograd.grad(total, list(now.model.parameters()), allow_unused=True)
            rows += [(step, t, row["loss"], row["cosine"], row["count"]) for row in angle.read()]
    return pd.DataFrame(rows, columns=ONLINE_COLUMNS)


def moment(run: Run, step: int, teacher: Teacher, own: bool = False) -> Moment | None:
    """Training weights of a checkpoint with the alignment to measure; None if nothing can be aligned.

    own: only the losses the run itself has; otherwise both, as far as there are layer pairs and a projector.
    """
    tensors, _ = run.load(step, prefixes=("model.", "alignment.projector."))
    weights, projector = (checkpoint.under(tensors, p) for p in ("model.", "alignment.projector."))
    device = default_device()
    model = build_generator(run.config, open_dataset(run.config.data), seed=0)
    model.load_state_dict(weights)
    settings = run.config.alignment if own else _switched_on(run, bool(projector))
    if not settings.active:
        return None
    haste = build_haste(run.config.model_copy(update={"alignment": settings}), model, teacher.to(device), seed=0)
    if haste.projector is not None:
        haste.projector.load_state_dict(projector)
        haste.projector.eval().to(device)
    return Moment(model.eval().to(device), haste, objective_of(model.kind))


def _switched_on(run: Run, projector: bool) -> config.AlignmentSettings:
    """The run's alignment with the study's weight, or the paper's, if the arm has none."""
    own, base = run.config.alignment, run.study.alignment
    feature = own.lambda_feature or base.lambda_feature or WEIGHT
    attention = own.lambda_attention or base.lambda_attention or WEIGHT
    weights = {"lambda_feature": feature * projector, "lambda_attention": attention * bool(own.layer_pairs)}
    return own.model_copy(update=weights)
