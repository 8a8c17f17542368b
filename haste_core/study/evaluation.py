"""Scores of runs: each checkpoint's images, drawn and scored the same way, with the card of how it came about."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste_core import sampling
from haste_core.devices import default_device
from haste_core.errors import HasteError
from haste_core.files import locked, write_bytes, write_json
from haste_core.models import DiffusionTransformer
from haste_core.state import build_generator
from haste_core.study import config, latents
from haste_core.study.data import open_dataset
from haste_core.study.runs import Run, session, study_dir
from haste_core.study.samples import SampleSet, drawer, plan
from haste_core.study.scoring.denoising import SUMMARIES, summaries
from haste_core.study.scoring.metrics import METRICS, CopyCheck, ImageSet, nearest_distances, register_extractor, score
from haste_core.study.scoring.scorers import Scorer, Scoring, card, card_of, columns, metrics_of, open_scorer

__all__ = [
    "DENOISING_COLUMNS", "METRICS", "SUMMARIES", "CopyCheck", "ImageSet", "Scorer", "card", "columns", "denoising_rows",
    "evaluate_run", "evaluation_samples", "evaluation_set", "find_samples", "floor", "generator_at", "is_scored",
    "metrics_of", "nearest_distances", "open_scorer", "register_extractor", "rows", "score",
]  # fmt: skip

SHARD_SIZE = 1000
KEPT = 100  # images kept beside the scores of every checkpoint
DENOISING_COLUMNS = ("arm", "seed", "step", "t", "split", "loss", "nats", "n", "draws", "card")
# A checkpoint's scores by name, and the rows of its denoising loss under "levels".
Scores = dict[str, Any]


def generator_at(run: Run, step: int) -> tuple[DiffusionTransformer, str]:
    """The EMA generator of a checkpoint in eval mode, on the GPU if there is one, and its fingerprint."""
    tensors, state = run.load(step, prefixes=("ema.",))
    model = build_generator(run.config, open_dataset(run.config.data), seed=0)
    model.load_state_dict({name.removeprefix("ema."): value for name, value in tensors.items()})
    return model.requires_grad_(False).eval().to(default_device()), state["ema_fingerprint"]


def evaluation_samples(
    run: Run, step: int, classes: int, progress: str | None = None, sample: config.Sample | None = None
) -> tuple[Tensor, str]:
    """uint8 images (n, C, S, S) of a checkpoint from the study's evaluation noise, and the generator's fingerprint.

    Image i has label and seed of its own, the same for every arm, training seed and step. They are drawn as the run's
    study says, unless `sample` says otherwise.
    """
    study, sample = run.study, sample or run.sample
    model, fingerprint = generator_at(run, step)
    labels = sampling.sample_labels(study.evaluate.n, classes, study.evaluate.labels, study.evaluate.seed)
    seeds = range(study.evaluate.seed, study.evaluate.seed + study.evaluate.n)
    drawn = sampling.draw(model, labels, seeds, sample, progress)
    return sampling.to_uint8(latents.to_images(drawn, study.data, sample)), fingerprint


def evaluation_set(run: Run, step: int, progress: str | None = None) -> SampleSet:
    """The same images as a set on disk, in shards that stay: for more of them than memory holds.

    Other processes that draw the same set at the same time share the work.
    """
    model, fingerprint = generator_at(run, step)
    evaluate = run.study.evaluate
    manifest = plan(run, step, fingerprint, model.classes, evaluate.n, evaluate.seed, SHARD_SIZE)
    samples = SampleSet(samples_path(run, fingerprint).with_suffix(""), manifest)
    samples.fill(drawer(model, run.study.data, run.sample), run.sample.batch_size, progress)
    return samples


def evaluate_run(run: Run, progress: bool = True, scorer: Scoring | None = None) -> list[dict[str, Any]]:
    """Score every kept checkpoint of a finished run; what is scored already is not scored again.

    Args:
        run: finished. progress: show bars.
        scorer: of the run's study, where one is open already; it holds the features of all real images.

    Returns:
        One row per step: arm, seed, step, images_seen, the scores, n, and `card`, the card's id. The rows, the card
        and the first images of each step are kept in the run's directory.

    Raises:
        HasteError: a checkpoint is missing; the scores made before stay.
    """
    missing = run.missing_steps()
    if missing:
        raise HasteError(
            f"run {run.arm} seed {run.seed} has no checkpoint at step(s) {missing}; possible: "
            f"haste train {run.study.name} {run.arm} --seed {run.seed}"
        )
    torch.set_num_threads(run.config.train.threads)
    with locked(run.dir / "evaluation.lock", f"the evaluation of {run.arm} seed {run.seed}"):
        scorer = scorer or open_scorer(run.study, progress)
        own = card_of(scorer.card, run)
        known = known_scores(run, own["card_id"])
        with session(run.dir, what="evaluation"):
            for step in run.config.train.kept_steps:
                fingerprint = run.load(step, prefixes=("none",))[1]["ema_fingerprint"]
                if fingerprint not in known:
                    label = f"{run.arm} seed {run.seed} step {step}" if progress else None
                    known[fingerprint], first = _drawn_and_scored(run, step, scorer, label)
                    save_samples(samples_path(run, fingerprint), first)
                    save_scores(run, own, known)
        save_scores(run, own, known)
        return rows(run)


def floor(scorer: Scoring, study: config.Study) -> list[dict[str, Any]]:
    """What real images score against real ones (`Scoring.floor`), measured once for a card and kept in runs/<study>."""
    path = study_dir(study) / f"floor-{scorer.card['card_id']}.json"
    if not path.is_file():
        write_json(path, scorer.floor())
    return json.loads(path.read_text())


def _drawn_and_scored(run: Run, step: int, scorer: Scoring, progress: str | None) -> tuple[Scores, Tensor]:
    """The scores of a checkpoint, and its first images."""
    levels = scorer.probe.measure(generator_at(run, step)[0])
    measured: Scores = {**summaries(levels), "levels": levels}
    if run.study.evaluate.suite == "adm":
        samples = evaluation_set(run, step, progress)
        return scorer.score(samples) | measured, next(samples.batches(KEPT))
    generated, _ = evaluation_samples(run, step, scorer.classes, progress)
    return scorer.score(generated) | measured, generated


def known_scores(run: Run, card_id: str) -> dict[str, Scores]:
    """Scores by generator fingerprint, from this run and the runs that may share checkpoints with it."""
    found: dict[str, Scores] = {}
    for arm in run.study.arms:
        path = Run(run.study, arm, run.seed).evaluation_path
        if path.is_file():
            content = json.loads(path.read_text())
            if content["card"]["card_id"] == card_id:
                found |= content["scores"]
    return found


def save_scores(run: Run, card: dict[str, Any], scores: dict[str, Scores]) -> None:
    """Keep the scores of this run's own checkpoints with their card."""
    prints = {step: run.load(step, prefixes=("none",))[1]["ema_fingerprint"] for step in run.config.train.kept_steps}
    steps = {str(step): fingerprint for step, fingerprint in prints.items() if fingerprint in scores}
    write_json(run.evaluation_path, {"card": card, "steps": steps, "scores": {f: scores[f] for f in steps.values()}})


def samples_path(run: Run, fingerprint: str) -> Path:
    """Where the first images of an evaluation are kept, by its settings and the generator's fingerprint."""
    return run.dir / "samples" / f"evaluation-{run.evaluation_hash}-{fingerprint}.npy"


def find_samples(run: Run, step: int) -> Path:
    """The images kept when a checkpoint was scored, by this run or by one that shares the checkpoint.

    Raises:
        HasteError: it was not scored under the study's present settings.
    """
    fingerprint = run.load(step, prefixes=("none",))[1]["ema_fingerprint"]
    for arm in (run.arm, *run.study.arms):
        path = samples_path(Run(run.study, arm, run.seed), fingerprint)
        if path.is_file():
            return path
    raise not_scored(run)


def not_scored(run: Run) -> HasteError:
    """The error for a run without scores under the study's present settings."""
    return HasteError(
        f"run {run.arm} seed {run.seed} has no complete scores at {run.evaluation_path}; possible: "
        f"haste evaluate {run.study.name} {run.arm} --seed {run.seed}"
    )


def is_scored(run: Run) -> bool:
    """True when every kept step of the run has its scores under the study's present settings."""
    if not run.evaluation_path.is_file():
        return False
    scored = json.loads(run.evaluation_path.read_text())["steps"]
    return all(str(step) in scored for step in run.config.train.kept_steps)


def save_samples(path: Path, generated: Tensor, count: int = KEPT) -> None:
    """Keep the first `count` of uint8 images (n, C, S, S) as a .npy file."""
    stream = io.BytesIO()
    np.save(stream, generated[:count].numpy(), allow_pickle=False)
    write_bytes(path, stream.getvalue())


def rows(run: Run) -> list[dict[str, Any]]:
    """The scores of an evaluated run, one row per step.

    Raises:
        HasteError: the run is not evaluated under the study's present settings.
    """
    return [
        {
            "arm": run.arm,
            "seed": run.seed,
            "step": step,
            "images_seen": step * run.config.train.batch_size,
            **{name: value for name, value in scores.items() if name != "levels"},
            "n": run.study.evaluate.n,
            "card": card_id,
        }
        for step, scores, card_id in _by_step(run)
    ]


def denoising_rows(run: Run) -> list[dict[str, Any]]:
    """The denoising loss of an evaluated run by step, split and noise level, rows of DENOISING_COLUMNS.

    Raises:
        HasteError: the run is not evaluated under the study's present settings.
    """
    return [
        {"arm": run.arm, "seed": run.seed, "step": step, **level, "card": card_id}
        for step, scores, card_id in _by_step(run)
        for level in scores["levels"]
    ]


def _by_step(run: Run) -> list[tuple[int, Scores, str]]:
    """Step, scores and card of every kept step of an evaluated run."""
    if not is_scored(run):
        raise not_scored(run)
    content = json.loads(run.evaluation_path.read_text())
    card_id = content["card"]["card_id"]
    steps = run.config.train.kept_steps
    return [(step, content["scores"][content["steps"][str(step)]], card_id) for step in steps]
