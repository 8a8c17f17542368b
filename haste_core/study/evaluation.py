"""Scores of runs: each checkpoint's images, drawn and scored in the same way, with the card that describes how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from haste_core import checkpoint, sampling
from haste_core.devices import default_device
from haste_core.errors import HasteError
from haste_core.files import atomic, locked, write_json
from haste_core.models import DiffusionTransformer
from haste_core.study import caption_scores, config
from haste_core.study.data import check_same, open_dataset
from haste_core.study.denoising import EXCESS, LAW_SUMMARIES, SUMMARIES, summaries
from haste_core.study.runs import Run, session, study_dir
from haste_core.study.samples import SampleSet, drawer, plan
from haste_core.study.scores import ADM_METRICS, LAW_METRICS, STUDY_METRICS, StudyScorer, card_of
from haste_core.study.train import build_generator

if TYPE_CHECKING:
    from haste_core.study.adm import AdmStudyScorer

SHARD_SIZE = 1000
KEPT = 100  # images kept beside the scores of every checkpoint
DENOISING_COLUMNS = ("arm", "seed", "step", "t", "split", "loss", "nats", "n", "draws", "card")
_HEAD, _TAIL = ("arm", "seed", "step", "images_seen"), ("n", "card")
# A checkpoint's scores by name, and the rows of its denoising loss under "levels".
Scores = dict[str, Any]
Scorer: TypeAlias = "StudyScorer | AdmStudyScorer"


def metrics_of(study: config.StudySettings) -> tuple[str, ...]:
    """Names of the scores of the study's suite, without those against held-out images."""
    return ADM_METRICS if study.evaluate.suite == "adm" else STUDY_METRICS


def columns(study: config.StudySettings) -> tuple[str, ...]:
    """Columns of the study's table of scores, the keys of `rows`."""
    if study.evaluate.suite == "adm":
        return (*_HEAD, *ADM_METRICS, *_TAIL, *SUMMARIES)
    held_out = (f"{name}_heldout" for name in STUDY_METRICS)
    captions = caption_scores.COLUMNS if study.data.has_scenes else ()
    known = (*LAW_SUMMARIES, *LAW_METRICS) if study.data.kind == "textured" else ()
    return (*_HEAD, *STUDY_METRICS, *_TAIL, *held_out, "nearest", "copies", *SUMMARIES, *known, *captions)


def denoising_columns(study: config.StudySettings) -> tuple[str, ...]:
    """Columns of the study's table of denoising loss, the keys of `denoising_rows`."""
    return (*DENOISING_COLUMNS, *(EXCESS if study.data.kind == "textured" else ()))


def open_scorer(study: config.StudySettings, progress: bool = True) -> Scorer:
    """The scorer of the study's suite."""
    if study.evaluate.suite == "study":
        return StudyScorer(study)
    from haste_core.study.adm import AdmStudyScorer  # with Inception, which takes seconds to import

    return AdmStudyScorer(study, progress)


def floor(scorer: Scorer, study: config.StudySettings) -> list[dict[str, Any]]:
    """Scores of real images, measured once for a card and kept in runs/<study>; the `floor` of a scorer."""
    path = study_dir(study) / f"floor-{scorer.card['card_id']}.json"
    if not path.is_file():
        write_json(path, scorer.floor())
    return json.loads(path.read_text())


def generator_at(run: Run, step: int) -> tuple[DiffusionTransformer, str]:
    """The EMA generator of a checkpoint in eval mode, on the GPU if there is one, and its fingerprint.

    Raises:
        HasteError: there is no such checkpoint, or the data changed since the run was begun.
    """
    tensors, state = run.load(step, prefixes=("ema.",))
    dataset = open_dataset(run.config.data)
    check_same(run.dir, run.config.data, dataset.identity())
    model = build_generator(run.config, dataset, seed=0)
    model.load_state_dict(checkpoint.under(tensors, "ema."))
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise HasteError(f"{run.checkpoint_path(step)} holds weights that are not finite; expected a sound checkpoint")
    return model.requires_grad_(False).eval().to(default_device()), state["ema_fingerprint"]


def _fingerprint(run: Run, step: int) -> str:
    return run.load(step, prefixes=())[1]["ema_fingerprint"]


def evaluation_samples(
    run: Run, step: int, progress: str | None = None, sample: config.SampleSettings | None = None
) -> Tensor:
    """uint8 images (n, C, S, S) of a checkpoint from the study's evaluation noise.

    Image i has its own label and seed, the same for every arm, training seed and step. progress: label of the progress
    bar; None shows none. sample: sampler settings, by default the run's.
    """
    study, evaluate = run.study, run.study.evaluate
    model, _ = generator_at(run, step)
    labels = sampling.sample_labels(evaluate.n, open_dataset(study.data).sampled, evaluate.labels, evaluate.seed)
    draw = drawer(model, study.data, sample or run.sample, progress)
    return draw(labels, range(evaluate.seed, evaluate.seed + evaluate.n))


def evaluation_set(run: Run, step: int, progress: str | None = None) -> SampleSet:
    """The images of `evaluation_samples` as shards on disk, for sets larger than memory; processes share the work."""
    model, fingerprint = generator_at(run, step)
    evaluate = run.study.evaluate
    classes = open_dataset(run.study.data).sampled
    manifest = plan(run, step, fingerprint, classes, evaluate.n, evaluate.seed, SHARD_SIZE)
    samples = SampleSet(_samples_path(run, fingerprint).with_suffix(""), manifest)
    samples.fill(drawer(model, run.study.data, run.sample), run.sample.batch_size, progress)
    return samples


def evaluate_run(run: Run, progress: bool = True, scorer: Scorer | None = None) -> list[dict[str, Any]]:
    """Score every kept checkpoint of a finished run that is not scored yet.

    scorer: of the run's study, where one is open already.

    Returns:
        One row per step (`rows`). Scores, card and the first images of each step are kept in the run's directory.

    Raises:
        HasteError: a checkpoint is missing; the scores made before stay.
    """
    missing = run.missing_steps()
    if missing:
        raise HasteError(
            f"run {run.arm} seed {run.seed} has no checkpoint at step(s) {missing}; train it by: "
            f"haste train {run.study.name} {run.arm} --seed {run.seed}"
        )
    torch.set_num_threads(run.config.train.threads)
    with locked(run.dir / "evaluation.lock", f"the evaluation of {run.arm} seed {run.seed}"):
        scorer = scorer or open_scorer(run.study, progress)
        own = card_of(scorer.card, run)
        known = _known_scores(run, own["card_id"])
        # Another profile may keep further checkpoints of the same run: their scores stay.
        others = [step for step in _content(run)["steps"] if run.checkpoint_path(int(step)).is_file()]
        steps = {step: _fingerprint(run, int(step)) for step in [*map(str, run.config.train.kept_steps), *others]}
        with session(run.dir, what="evaluation"):
            for step in map(str, run.config.train.kept_steps):
                fingerprint = steps[step]
                # Scores may come from a run whose images lie with one that another profile names otherwise.
                if fingerprint not in known or _images_of(run, fingerprint) is None:
                    label = f"{run.arm} seed {run.seed} step {step}" if progress else None
                    known[fingerprint], images = _drawn_and_scored(run, int(step), scorer, label)
                    _keep(_samples_path(run, fingerprint), images[:KEPT])
                    _save_scores(run, own, steps, known)
        _save_scores(run, own, steps, known)
        return rows(run)


def _drawn_and_scored(run: Run, step: int, scorer: Scorer, progress: str | None) -> tuple[Scores, Tensor]:
    """The scores of a checkpoint, and its images or the first of them."""
    try:
        levels = scorer.probe.measure(generator_at(run, step)[0])
    except HasteError as error:
        raise HasteError(f"{run.arm} seed {run.seed} step {step}: {error}") from error
    measured: Scores = {**summaries(levels), "levels": levels}
    if not isinstance(scorer, StudyScorer):
        samples = evaluation_set(run, step, progress)
        return scorer.score(samples) | measured, next(samples.batches(KEPT))
    generated = evaluation_samples(run, step, progress)
    if run.study.data.has_scenes:
        model, fingerprint = generator_at(run, step)
        sets = list(caption_scores.drawn(run.study, model, run.sample, generated))
        measured |= caption_scores.accuracies(sets, run.study, scorer.networks[0])
        shown = torch.stack([one.images[: caption_scores.SHOWN] for one in sets])
        _keep(_samples_path(run, fingerprint, "captions"), shown)
    return scorer.score(generated) | measured, generated


def _keep(path: Path, images: Tensor) -> None:
    with atomic(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, images.numpy(), allow_pickle=False)


def _known_scores(run: Run, card_id: str) -> dict[str, Scores]:
    """Scores by generator fingerprint, from this run and the runs that may share checkpoints with it."""
    contents = (_content(Run(run.study, arm, run.seed)) for arm in run.study.arms)
    known = (content["scores"] for content in contents if content["card"]["card_id"] == card_id)
    return {fingerprint: found for scores in known for fingerprint, found in scores.items()}


def _content(run: Run) -> dict[str, Any]:
    """Content of the file of a run's scores: `card`, `steps` (their fingerprints) and `scores` by fingerprint."""
    path = run.evaluation_path
    return json.loads(path.read_text()) if path.is_file() else {"card": {"card_id": None}, "steps": {}, "scores": {}}


def _save_scores(run: Run, card: dict[str, Any], steps: dict[str, str], scores: dict[str, Scores]) -> None:
    """Keep the scores of this run's own checkpoints, as far as known, with their card."""
    done = {step: fingerprint for step, fingerprint in steps.items() if fingerprint in scores}
    write_json(run.evaluation_path, {"card": card, "steps": done, "scores": {f: scores[f] for f in done.values()}})


def _samples_path(run: Run, fingerprint: str, kind: str = "evaluation") -> Path:
    """The file of the first images of an evaluation, by its settings and the generator's fingerprint.

    kind: "captions" for those that caption accuracy is read off, (sets, images, C, S, S).
    """
    return run.dir / "samples" / f"{kind}-{run.evaluation_hash}-{fingerprint}.npy"


def find_samples(run: Run, step: int, kind: str = "evaluation") -> Path:
    """The images kept when a checkpoint was scored, by this run or by one that shares the checkpoint.

    kind: as of `_samples_path`.

    Raises:
        HasteError: there are none.
    """
    found = _images_of(run, _fingerprint(run, step), kind)
    if found is None:
        raise _not_scored(run)
    return found


def _images_of(run: Run, fingerprint: str, kind: str = "evaluation") -> Path | None:
    paths = (_samples_path(Run(run.study, arm, run.seed), fingerprint, kind) for arm in (run.arm, *run.study.arms))
    return next((path for path in paths if path.is_file()), None)


def _not_scored(run: Run) -> HasteError:
    return HasteError(
        f"run {run.arm} seed {run.seed} has no complete scores at {run.evaluation_path}; score it by: "
        f"haste evaluate {run.study.name} {run.arm} --seed {run.seed}"
    )


def is_scored(run: Run) -> bool:
    """True when every kept step of the run has its scores under the study's present settings."""
    return set(map(str, run.config.train.kept_steps)) <= _content(run)["steps"].keys()


def rows(run: Run) -> list[dict[str, Any]]:
    """The scores of an evaluated run, one row per step: arm, seed, step, images_seen, the scores, n, card (its id).

    Raises:
        HasteError: the run is not evaluated under the study's present settings.
    """
    return [
        {**place, "images_seen": place["step"] * run.config.train.batch_size}
        | {name: value for name, value in scores.items() if name != "levels"}
        | {"n": run.study.evaluate.n, "card": card_id}
        for place, scores, card_id in _by_step(run)
    ]


def denoising_rows(run: Run) -> list[dict[str, Any]]:
    """The denoising loss of an evaluated run by step, split and noise level, rows of DENOISING_COLUMNS."""
    return [
        {**place, **level, "card": card_id} for place, scores, card_id in _by_step(run) for level in scores["levels"]
    ]


def _by_step(run: Run) -> list[tuple[dict[str, Any], Scores, str]]:
    """Arm, seed and step, scores, and card of every kept step of an evaluated run."""
    if not is_scored(run):
        raise _not_scored(run)
    content = _content(run)
    return [
        (
            {"arm": run.arm, "seed": run.seed, "step": step},
            content["scores"][content["steps"][str(step)]],
            content["card"]["card_id"],
        )
        for step in run.config.train.kept_steps
    ]
