"""Differences of held-out denoising loss between arms at the last step of denoising.csv, written to pairs.csv."""

from pathlib import Path

import numpy as np
import pandas as pd

from haste_core.analysis.statistics import interval

HERE = Path(__file__).parent
PAIRS = (
    ("holistic", "haste"), ("holistic", "vanilla"), ("holistic", "repa"), ("repa", "vanilla"), ("haste", "vanilla"),
)  # fmt: skip
RANGES = {"all t": (0, 1), "t <= 0.1": (0, 0.1), "t >= 0.3": (0.3, 1)}

losses = pd.read_csv(HERE / "denoising.csv")
rows = []
for step in (800, 1200, 2000):
    for worse, better in PAIRS:
        for name, (low, high) in RANGES.items():
            chosen = losses[(losses["step"] == step) & losses["t"].between(low, high)]
            mean = chosen.groupby(["arm", "seed"])["loss"].mean()
            found = interval([float(r) for r in 100 * (mean[worse] / mean[better] - 1)], 0.95)
            rows.append((step, f"{worse} - {better}", name, *np.round(found, 2), chosen["seed"].nunique()))
columns = ["step", "pair", "levels", "percent", "low", "high", "seeds"]
pd.DataFrame(rows, columns=columns).to_csv(HERE / "pairs.csv", index=False)
