"""Tables to matplotlib figures, in one style. Nothing is measured here.

Every function takes rows of a table (pandas) and returns a Figure; `save` writes it as PNG and SVG.
"""

from haste_core.figures.ablations import (
    gain_by_setting,
    group_effects,
    weight_and_switch,
)
from haste_core.figures.attention import (
    attention_similarity,
    cross_effects,
    head_map,
    head_statistics,
    query_maps,
)
from haste_core.figures.capacity import (
    capacity_over_depth,
    capacity_over_training,
    error_by_arm,
    error_per_band,
)
from haste_core.figures.denoising import (
    NEAR_DATA,
    STRUCTURE,
    compared,
    denoising_levels,
    denoising_over_training,
    loss_ratio,
    panel_steps,
    summary,
)
from haste_core.figures.gradients import (
    conflict_by_arm,
    conflict_over_t,
    conflict_over_training,
    online_against_exact,
)
from haste_core.figures.scores import (
    attention_maps,
    claims_forest,
    fid_against_steps,
    gain_over_vanilla,
    image_rows,
    one_card,
    sample_sheet,
    step_cost,
    training_curves,
)
from haste_core.figures.similarity import (
    aligned_similarity,
    probing_over_depth,
    probing_over_training,
    similarity_maps,
    similarity_over_t,
)
from haste_core.figures.style import (
    VERDICT_COLOUR,
    Figure,
    save,
    style,
)
from haste_core.figures.termination import (
    fid_over_tau,
    regret_by_trigger,
    sweep_over_steps,
    trigger_logs,
)

__all__ = [
    "NEAR_DATA", "STRUCTURE", "VERDICT_COLOUR", "Figure", "aligned_similarity", "attention_maps",
    "attention_similarity", "capacity_over_depth", "capacity_over_training", "claims_forest", "compared",
    "conflict_by_arm", "conflict_over_t", "conflict_over_training", "cross_effects", "denoising_levels",
    "denoising_over_training", "error_by_arm", "error_per_band", "fid_against_steps", "fid_over_tau",
    "gain_by_setting", "gain_over_vanilla", "group_effects", "head_map", "head_statistics", "image_rows", "loss_ratio",
    "one_card", "online_against_exact", "panel_steps", "probing_over_depth", "probing_over_training", "query_maps",
    "regret_by_trigger", "sample_sheet", "save", "similarity_maps", "similarity_over_t", "step_cost", "style",
    "summary", "sweep_over_steps", "training_curves", "trigger_logs",
    "weight_and_switch",
]  # fmt: skip
