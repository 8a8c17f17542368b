"""`haste new FILE.yaml --images FOLDER`: a study of somebody's own images, sized for them and for this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from haste_core.errors import HasteError
from haste_core.files import write_text
from haste_core.study import config
from haste_core.study.cost import timed
from haste_core.study.data.images import Images
from haste_core.study.dry_run import check_study
from haste_core.study.pretrain import build_teacher
from haste_core.study.train import create

# Larger images are resized to this side, so that a first study takes minutes.
LARGEST = 32
SEEDS = (0, 1)
# Of the minutes, what training gets: the rest goes to teacher, extractors, scores and report.
TRAINING = 0.5
# Length of all arms of a seed, in steps of `holistic`: plain training and the part after the switch are cheaper.
LENGTH = 2.2
# Length of the longest chain of arms: all of `holistic`, then the part of `haste` after the switch, which begins there.
CHAIN = 1.4

TEMPLATE = """\
# {images:,} images in {classes} classes, {seen}; written by `haste new`.
# Any setting can be changed: docs/study-files.md.
name: "{name}"
title: "Does representation alignment help on {name}, and until when?"

data:
  kind: images
  path: {path}
  image_size: {size}  # the side that is modelled; larger images are cropped and resized to it
  test_fraction: 0.2  # held out for scores
  augment: {{flip: false, shift: {shift}}}

# A small vision transformer, trained on the labels first. For a pretrained one see docs/models-and-teachers.md.
teacher:
  model: vit_tiny_patch16_224
  kwargs: {{img_size: {size}, patch_size: {patch}, in_chans: 3, embed_dim: 64, depth: 4, num_heads: 4}}
  weights: pretrain
  mean: [0.5, 0.5, 0.5]
  std: [0.5, 0.5, 0.5]
  # min_accuracy 0 takes any; the report says what was reached.
  fitting: {{steps: 600, batch_size: {fitted}, lr: 2.0e-3, min_accuracy: 0, augment: {{shift: {shift}}}}}

model: {{kind: sit, depth: 6, width: 64, heads: 4, patch: {patch}}}

alignment: {{depth: 3, layer_pairs: [[1, 2], [2, 3]], projector_width: 128}}

# Steps for about {minutes:g} minutes in all on this machine; more is better.
train:
  steps: {steps}
  batch_size: {batch}
  lr: 1.0e-3
  ema_decay: 0.995
  keep: [{early}, {switch}]
  checkpoint_every: {switch}
  sample_every: {steps}

sample: {{sampler: heun, solver_steps: 8, grid: quadratic}}

evaluate:
  n: {scored}
  kid_subsets: 10
  kid_subset_size: {subset}
  denoising_images: 200
  extractor: {{steps: 300, batch_size: {fitted}, min_accuracy: 0}}
  autoencoder: {{steps: 200, batch_size: {fitted}, min_accuracy: 0}}

claims: {{early: [{early}, {switch}]}}

# vanilla: denoising alone; holistic: features and attention aligned to the end; haste: the same until the switch.
arms:
  vanilla: {{}}
  holistic: {{alignment: {{lambda_feature: 0.5, lambda_attention: 0.5}}}}
  haste:
    alignment: {{lambda_feature: 0.5, lambda_attention: 0.5}}
    termination: {{kind: iteration, at: {switch}}}

seeds: {seeds}
"""


def write_study(path: Path, images: str, minutes: float = 10.0) -> str:
    """Write a study of labelled images; returns what was found and the commands that follow.

    Args:
        path: of the new file; its stem becomes the study's name. images: a folder with a sub-folder for each class, a
            parquet file or a hub name. minutes: that the whole study may take on this machine, roughly.

    Raises:
        HasteError: the file exists or is no .yaml, the images cannot be read, or they have one class alone.
    """
    if path.suffix not in (".yaml", ".yml") or path.exists():
        raise HasteError(f"{path}; expected a path that ends in .yaml and is free")
    if not 0 < minutes < 10_000:
        raise HasteError(f"--minutes {minutes:g}; expected more than 0")
    place = str(Path(images).resolve()) if Path(images).exists() else images
    opened = Images(config.DataSettings(kind="images", path=place, image_size=LARGEST, test_fraction=0.2))
    if opened.classes < 2:
        raise HasteError(
            f"{images} has one class, on which no teacher can be trained; expected a sub-folder for each class, or a "
            f"study file with a pretrained teacher (docs/models-and-teachers.md)"
        )
    sides, seen = _sides(opened)
    size = max(8, min(LARGEST, sides) // 4 * 4)
    trained = len(opened)
    scored = min(500, max(50, 2 * opened.classes))
    facts: dict[str, Any] = {
        "name": path.stem, "path": json.dumps(place), "images": opened.identity()["images"], "seen": seen,
        "classes": opened.classes, "size": size, "patch": 4 if size >= 24 else 2, "shift": round(size / 16, 1),
        "batch": min(32, trained), "fitted": min(64, trained), "minutes": minutes, "scored": scored,
        "subset": max(2, min(200, scored // 2, trained // 2)), "seeds": list(SEEDS),
    }  # fmt: skip
    write_text(path, TEMPLATE.format(**facts, **_lengths(400)))
    try:
        study = config.load(path)
        lengths = _lengths(_steps(study, minutes))
        write_text(path, TEMPLATE.format(**facts, **lengths))
        check_study(config.load(path))
    except BaseException:
        path.unlink()
        raise
    return (
        f"{path}: {facts['images']:,} images ({seen}), modelled at {size}x{size} in {opened.classes} classes; "
        f"{lengths['steps']:,} steps, aligned until {lengths['switch']:,}\n"
        f"next:\n  haste study {path} --dry-run\n  haste study {path}"
    )


def _sides(opened: Images) -> tuple[int, str]:
    """Median of the shorter sides of the first images, and their sizes in words."""
    split = opened._splits["train"]
    first = range(min(64, len(split.labels)))
    split.decode(first)  # names one that cannot be decoded
    shown = [split.rows[i][split.image_column].size for i in first]
    shorter = sorted(min(size) for size in shown)
    low, high = min(shown), max(shown)
    words = f"{low[0]}x{low[1]} pixels" if low == high else f"{low[0]}x{low[1]} to {high[0]}x{high[1]} pixels"
    return shorter[len(shorter) // 2], words


def _lengths(steps: int) -> dict[str, int]:
    switch = max(2, steps // 2 // 50 * 50) if steps >= 100 else steps // 2
    return {"steps": steps, "switch": switch, "early": max(1, switch // 2)}


def _steps(study: config.StudySettings, minutes: float) -> int:
    """Steps of an arm that fit into the minutes, from the time of a few aligned steps here."""
    torch.set_num_threads(study.train.threads)
    teacher = build_teacher(study.teacher.model_copy(update={"weights": "random"}))
    trainer = create(study.run("holistic"), 0, teacher)
    times = timed({"step": trainer.train_step}, rounds=10, device=trainer.accelerator.device)
    step = sum(times["step"]) / 10
    cores = len(os.sched_getaffinity(0))
    length = max(LENGTH / cores, CHAIN)
    fitting = 60 * minutes * TRAINING / (step * length * len(SEEDS))
    return max(100, min(5000, int(fitting) // 100 * 100))
