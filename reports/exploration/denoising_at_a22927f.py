"""Held-out denoising loss of the runs of `make study` at commit a22927f, by arm, seed, step and noise level.

Run it in a checkout of that commit whose default study is finished: `.venv/bin/python denoising_at_a22927f.py OUT.csv`.
All 450 held-out digits, three noise draws common to all arms, seeds and steps, EMA weights.
"""

import csv
import sys

import torch
from tqdm.auto import tqdm

from haste_core import config, evaluation, interpolant
from haste_core.data import open_dataset
from haste_core.runs import Run

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
DRAWS = 3

study = config.load("digits")
x, y = open_dataset(study.data).images("test")
noise = torch.randn(DRAWS, *x.shape, generator=torch.Generator().manual_seed(0))
rows = []
with torch.no_grad():
    for arm in tqdm(study.arms):
        for seed in study.seeds:
            run = Run(study, arm, seed)
            for step in run.config.train.kept_steps:
                model, _ = evaluation.generator_at(run, step)
                for level in LEVELS:
                    t, squared = torch.full((len(x),), level), 0.0
                    for eps in noise:
                        error = model(interpolant.interpolate(x, eps, t), t, y) - interpolant.velocity(x, eps)
                        squared += float(error.double().square().mean()) / DRAWS
                    rows.append((arm, seed, step, level, "held-out", squared, len(x), DRAWS))
with open(sys.argv[1], "w", newline="") as stream:
    writer = csv.writer(stream)
    writer.writerow(("arm", "seed", "step", "t", "split", "loss", "n", "draws"))
    writer.writerows(rows)
