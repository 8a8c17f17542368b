"""Tables to matplotlib figures, in one style. Nothing is measured here.

Every function takes rows of a table (pandas) and returns a Figure; `save` writes it as PNG and SVG.
"""

from haste_core.figures.attention import (
    attention_similarity,
    cross_effects,
    head_map,
    head_statistics,
    query_maps,
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
    summary,
    training_curves,
)
from haste_core.figures.style import Figure, save, style

__all__ = [
    "Figure", "attention_maps", "attention_similarity", "claims_forest", "cross_effects", "fid_against_steps",
    "gain_over_vanilla", "head_map", "head_statistics", "image_rows", "one_card", "query_maps", "sample_sheet", "save",
    "step_cost", "style", "summary", "training_curves",
]  # fmt: skip
