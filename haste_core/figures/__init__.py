"""Matplotlib figures from tables, in one style. Nothing is measured here.

Every function takes rows of a table (pandas) and returns a Figure; `save` writes it as PNG and SVG.
"""

# ruff: noqa: F401

from haste_core.figures.capacity import (
    best_predictions,
    capacity_over_depth,
    capacity_over_training,
    direction_used,
    draws,
    error_by_arm,
    error_per_band,
    excess_by_level,
    gain_and_harm,
    harm_by_factor,
    predicted_harm,
)
from haste_core.figures.scores import (
    caption_sheet,
    claims_forest,
    compared,
    denoising_levels,
    denoising_over_training,
    fid_against_steps,
    gain_over_vanilla,
    image_rows,
    loss_ratio,
    loss_shown,
    panel_steps,
    sample_sheet,
    step_cost,
    summary,
    training_curves,
)
from haste_core.figures.similarity import (
    aligned_similarity,
    attention_maps,
    attention_similarity,
    cross_effects,
    head_map,
    head_statistics,
    probing_over_depth,
    probing_over_training,
    similarity_maps,
    similarity_over_t,
)
from haste_core.figures.style import VERDICT_COLOUR, Figure, save, style
from haste_core.figures.switching import (
    conflict_by_arm,
    conflict_over_t,
    conflict_over_training,
    fid_over_tau,
    gain_by_setting,
    group_effects,
    online_against_exact,
    regret_by_trigger,
    sweep_over_steps,
    trigger_logs,
    weight_and_switch,
)
