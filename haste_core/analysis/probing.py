"""How much of the class a linear classifier reads from the generator's tokens, block by block (REPA's protocol)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from haste_core.analysis import probe
from haste_core.analysis.similarity import middle_level, teacher_means
from haste_core.errors import HasteError
from haste_core.study.data import open_dataset
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run


def linear_probe(features_train: Any, labels_train: Any, features_test: Any, labels_test: Any) -> float:
    """The test accuracy, in [0, 1], of a linear classifier on standardised features.

    REPA's probe is BatchNorm1d under a linear softmax layer trained by SGD. Here its standardisation is that by the
    training features' mean and deviation, and the layer is scikit-learn's `LogisticRegression` (C = 1, a weak L2
    penalty, without which separable classes have no solution). The problem is convex and solved to convergence, so
    there is neither a learning rate to tune nor a seed: the same features give the same accuracy.

    Args:
        features_train, features_test: (n, d), (m, d), tensors or arrays. labels_train, labels_test: (n,), (m,).

    Raises:
        HasteError: fewer than two classes to train on, or a test label that no training image has.
    """
    known, tested = np.unique(np.asarray(labels_train)), np.unique(np.asarray(labels_test))
    if len(known) < 2 or not np.isin(tested, known).all():
        raise HasteError(
            f"a probe trained on {len(known)} classes and tested on {len(tested)}, of which "
            f"{int((~np.isin(tested, known)).sum())} are new; possible: more training images, at least two classes"
        )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-6))
    # So small a problem takes ten times as long when threads are woken for each of its products.
    with threadpool_limits(1):
        classifier.fit(np.asarray(features_train, dtype=np.float64), np.asarray(labels_train))
        return float(classifier.score(np.asarray(features_test, dtype=np.float64), np.asarray(labels_test)))


def wilson(accuracy: float, n: int, confidence: float) -> tuple[float, float]:
    """The Wilson interval of an accuracy over n independent images, within [0, 1]."""
    found = binomtest(round(accuracy * n), n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def measure(run: Run, timesteps: Sequence[float] | None = None, train: int = 2000) -> pd.DataFrame:
    """Probing accuracy after every block over the run's checkpoints, and of the teacher's final tokens.

    Averaged weights, null label, mean over patch tokens; trained on training images without augmentation, tested on
    held-out ones (`analysis.n`). Step 0 is the untrained network.

    Args:
        run: finished. timesteps: noise levels in [0, 1]; by default the one of `analysis.timesteps` nearest to 0.5.
        train: how many training images, or as many as there are.

    Returns:
        Columns: network ("student" or "teacher"), step, t, depth (from 1), accuracy, low, high (Wilson interval over
        the tested images), chance (accuracy of always naming the most frequent class), n (tested), n_train. The
        teacher's one row has step 0 and t 0: it sees clean images, and no training changes it.
    """
    settings = run.study.analysis
    levels = list(timesteps or [middle_level(settings.timesteps)])
    fitted, tested = open_dataset(run.config.data).examples("train", train), probe.held_out(run)
    facts = {"chance": _chance(fitted.y, tested.y), "n": len(tested.y), "n_train": len(fitted.y)}

    def row(network: str, step: int, t: float, depth: int, features: tuple[Any, Any]) -> dict[str, Any]:
        accuracy = linear_probe(features[0], fitted.y, features[1], tested.y)
        low, high = wilson(accuracy, len(tested.y), settings.confidence)
        place = {"network": network, "step": step, "t": t, "depth": depth}
        return place | {"accuracy": accuracy, "low": low, "high": high} | facts

    teacher = find_teacher(run.study, run.config.teacher)
    last = [teacher_means(teacher, part.images)[teacher.blocks - 1] for part in (fitted, tested)]
    rows = [row("teacher", 0, 0.0, teacher.blocks, (last[0], last[1]))]
    for step in (0, *run.config.train.kept_steps):
        model = probe.student_at(run, step)
        depths = range(1, len(model.blocks) + 1)
        for t in levels:
            # Noise of its own on either side: image i of both must not share one.
            trained = probe.patch_means(model, fitted.x, t, depths, settings.seed + 1)
            held = probe.patch_means(model, tested.x, t, depths, settings.seed)
            rows += [row("student", step, t, depth, (trained[depth], held[depth])) for depth in depths]
    return pd.DataFrame(rows)


def _chance(fitted: Any, tested: Any) -> float:
    return float((tested == fitted.mode().values).float().mean())
