"""Scores of runs: each checkpoint's images, drawn and scored the same way, with the card of how it came about."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste_core import config, provenance, sampling
from haste_core.data import Batches, Dataset, open_dataset
from haste_core.errors import HasteError
from haste_core.files import locked, write_bytes, write_json
from haste_core.metrics import METRICS, ImageSet, copy_check, nearest_distances, register_extractor, score
from haste_core.models import DiffusionTransformer
from haste_core.preparation import load_extractor
from haste_core.runs import Run
from haste_core.state import build_generator

__all__ = [
    "METRICS", "ImageSet", "Scorer", "card", "copy_check", "evaluate_run", "evaluation_samples", "find_samples",
    "generator_at", "is_scored", "nearest_distances", "register_extractor", "rows", "score",
]  # fmt: skip


def card(study: config.Study, extractor: str, ema_decay: float | None = None) -> dict[str, Any]:
    """Everything that changes a score, apart from the weights that are scored; `card_id` names it.

    ema_decay: of the run, where it is not the study's.
    """
    sample, evaluate = study.sample, study.evaluate
    content = {
        "sampler": sample.sampler,
        "solver_steps": sample.solver_steps,
        "guidance": sample.guidance,
        "guidance_interval": [sample.guidance_low, sample.guidance_high],
        "integrator_dtype": "float64",
        "n": evaluate.n,
        "seeds": [evaluate.seed, evaluate.seed + evaluate.n - 1],
        "labels": evaluate.labels,
        "ema_decay": study.train.ema_decay if ema_decay is None else ema_decay,
        "vae": None,
        "uint8_rule": "clip(127.5 x + 128), truncated",
        "extractor": extractor,
        "evaluator": f"torch-fidelity {provenance.environment()['torch-fidelity']}",
        "kid": [evaluate.kid_subsets, evaluate.kid_subset_size],
        "neighborhood": evaluate.neighborhood,
        "reference": f"{study.data.kind} train split (held-in), not augmented",
        "reference_heldout": f"{study.data.kind} test split (held-out)",
        "reference_hash": config.digest(study.data.model_dump(mode="json")),
    }
    return content | {"card_id": config.digest(content)}


class Scorer:
    """Scores sets of images of one study: holds the real images, the extractor and the card."""

    def __init__(self, study: config.Study) -> None:
        self.study = study
        dataset = open_dataset(study.data)
        self.classes = dataset.classes
        self.real = {split: sampling.to_uint8(dataset.images(split)[0]) for split in ("train", "test")}
        self.augmented = _augmented(dataset, study.evaluate.seed)
        self.extractor = register_extractor(*load_extractor(study))
        self.card = card(study, self.extractor)

    def score(self, generated: Tensor) -> dict[str, float]:
        """All scores of uint8 images: against held-in images, with `_heldout` against held-out ones, and copies."""
        evaluate = self.study.evaluate
        held_in = score(generated, self.real["train"], self.extractor, evaluate)
        held_out = score(generated, self.real["test"], self.extractor, evaluate)
        copies = copy_check(generated, self.real["test"], self.real["train"])
        return held_in | {f"{k}_heldout": v for k, v in held_out.items()} | copies

    def floor(self) -> list[dict[str, Any]]:
        """What real images score against real ones: the value a perfect generator could reach at these sizes."""
        pairs = {
            "held-out against held-in": (self.real["test"], self.real["train"]),
            "augmented held-in against held-in": (self.augmented, self.real["train"]),
            "augmented held-in against held-out": (self.augmented, self.real["test"]),
        }
        return [
            {"pair": name, "n": len(a), "n_reference": len(b), **score(a, b, self.extractor, self.study.evaluate)}
            for name, (a, b) in pairs.items()
        ]


def _augmented(dataset: Dataset, seed: int, limit: int = 10000) -> Tensor:
    """uint8 training images under one draw of the augmentation, at most `limit` of them."""
    return sampling.to_uint8(Batches(dataset, min(len(dataset), limit), seed).next().images)


def generator_at(run: Run, step: int) -> tuple[DiffusionTransformer, str]:
    """The EMA generator of a checkpoint in eval mode, on the GPU if there is one, and its fingerprint."""
    tensors, state = run.load(step, prefixes=("ema.",))
    model = build_generator(run.config, open_dataset(run.config.data), seed=0)
    model.load_state_dict({name.removeprefix("ema."): value for name, value in tensors.items()})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.requires_grad_(False).eval().to(device), state["ema_fingerprint"]


def evaluation_samples(run: Run, step: int, classes: int, progress: str | None = None) -> tuple[Tensor, str]:
    """uint8 images (n, C, S, S) of a checkpoint from the study's evaluation noise, and the generator's fingerprint.

    Image i has label and seed of its own, the same for every arm, training seed and step.
    """
    study = run.study
    model, fingerprint = generator_at(run, step)
    labels = sampling.sample_labels(study.evaluate.n, classes, study.evaluate.labels, study.evaluate.seed)
    seeds = range(study.evaluate.seed, study.evaluate.seed + study.evaluate.n)
    return sampling.to_uint8(sampling.draw(model, labels, seeds, study.sample, progress)), fingerprint


def evaluate_run(run: Run, progress: bool = True) -> list[dict[str, Any]]:
    """Score every kept checkpoint of a finished run; what is scored already is not scored again.

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
        scorer = Scorer(run.study)
        own = card(run.study, scorer.extractor, run.config.train.ema_decay)
        known = known_scores(run, own["card_id"])
        with provenance.session(run.dir, what="evaluation"):
            for step in run.config.train.kept_steps:
                fingerprint = run.load(step, prefixes=("none",))[1]["ema_fingerprint"]
                if fingerprint not in known:
                    label = f"{run.arm} seed {run.seed} step {step}" if progress else None
                    generated, _ = evaluation_samples(run, step, scorer.classes, label)
                    known[fingerprint] = scorer.score(generated)
                    save_samples(samples_path(run, fingerprint), generated)
                    save_scores(run, own, known)
        save_scores(run, own, known)
        return rows(run)


def known_scores(run: Run, card_id: str) -> dict[str, dict[str, float]]:
    """Scores by generator fingerprint, from this run and the runs that may share checkpoints with it."""
    found: dict[str, dict[str, float]] = {}
    for arm in run.study.arms:
        path = Run(run.study, arm, run.seed).evaluation_path
        if path.is_file():
            content = json.loads(path.read_text())
            if content["card"]["card_id"] == card_id:
                found |= content["scores"]
    return found


def save_scores(run: Run, card: dict[str, Any], scores: dict[str, dict[str, float]]) -> None:
    """Keep the scores of this run's own checkpoints with their card."""
    prints = {step: run.load(step, prefixes=("none",))[1]["ema_fingerprint"] for step in run.config.train.kept_steps}
    steps = {str(step): fingerprint for step, fingerprint in prints.items() if fingerprint in scores}
    write_json(run.evaluation_path, {"card": card, "steps": steps, "scores": {f: scores[f] for f in steps.values()}})


def samples_path(run: Run, fingerprint: str) -> Path:
    """Where the first images of an evaluation are kept, by its settings and the generator's fingerprint."""
    return run.dir / "samples" / f"evaluation-{run.study.evaluation_hash}-{fingerprint}.npy"


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


def save_samples(path: Path, generated: Tensor, count: int = 100) -> None:
    """Keep the first `count` of uint8 images (n, C, S, S) as a .npy file."""
    stream = io.BytesIO()
    np.save(stream, generated[:count].numpy(), allow_pickle=False)
    write_bytes(path, stream.getvalue())


def rows(run: Run) -> list[dict[str, Any]]:
    """The scores of an evaluated run, one row per step.

    Raises:
        HasteError: the run is not evaluated under the study's present settings.
    """
    if not is_scored(run):
        raise not_scored(run)
    content = json.loads(run.evaluation_path.read_text())
    return [
        {
            "arm": run.arm,
            "seed": run.seed,
            "step": int(step),
            "images_seen": int(step) * run.config.train.batch_size,
            **content["scores"][fingerprint],
            "n": run.study.evaluate.n,
            "card": content["card"]["card_id"],
        }
        for step in run.config.train.kept_steps
        for fingerprint in [content["steps"][str(step)]]
    ]
