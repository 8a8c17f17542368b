"""What a whole study takes: parameters, operations, memory, time and checkpoint space of every arm and phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from haste_core import sampling
from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.preflight import checks, estimates
from haste_core.study.preflight.checks import Check
from haste_core.study.preflight.estimates import Estimate, Traced
from haste_core.study.preflight.tracing import Example, networks_of

COLUMNS = (
    "arm", "phase", "seeds", "shared_with", "shared_steps", "steps", "student", "projector", "teacher", "forward",
    "step_flops", "run_flops", "micro_batch", "memory_bytes", "images_per_s", "days", "days_all_seeds",
    "checkpoint_bytes", "writing_bytes",
)  # fmt: skip


def planned(
    study: config.Study,
    gpus: int,
    rate: float,
    utilisation: float | Mapping[int, float],
    micro_batch: int | None = None,
) -> pd.DataFrame:
    """What every arm of a study takes in each of its phases, by arithmetic.

    Steps that an arm takes over from another (`Study.donor`) are counted there alone. Not counted: what GPUs wait for
    each other, a teacher or extractor that the study trains, drawing and scoring, readings of triggers, logs.

    Args:
        study: the study.
        gpus: devices that share the batch of a run evenly; `train.batch_size` is that of all of them together.
        rate: FLOP/s of matrix products of one device.
        utilisation: the share of it that a training step reaches, for both phases or by phase (1, 2).
        micro_batch: images on a device at a time, which memory goes by; by default what `train.accumulate`
            leaves of those that come to it.

    Returns:
        A row for each arm and phase: arm, phase (1 or 2), seeds (how many), shared_with (the arm that takes the first
        steps, or ""), shared_steps, steps (beyond those), student, projector, teacher (parameters), forward (operations
        of the student for one image), step_flops (of the whole batch), run_flops (of `steps`), micro_batch,
        memory_bytes (at a step's peak on one device), images_per_s (of all devices together), days, days_all_seeds,
        checkpoint_bytes (that stay, of one seed), writing_bytes (the two more that are there while a run writes). All
        but the totals over seeds are of one run.

    Raises:
        HasteError: a figure is out of range, the data's size is unknown, or an arm's networks do not fit.
    """
    if not rate > 0:
        raise HasteError(f"a rate of {rate:g} FLOP/s; possible: above 0")
    shares = dict(utilisation) if isinstance(utilisation, Mapping) else {1: utilisation, 2: utilisation}
    for share in shares.values():
        if not share > 0:
            raise HasteError(f"a utilisation of {share:g}; possible: above 0")
    example, found, rows = example_of(study)[0], dict[str, Traced](), []
    for arm in tqdm(study.arms, desc="arithmetic", unit="arm", mininterval=1.0):
        run = study.run(arm)
        images = images_of(arm, run, gpus)
        donor, shared = shared_part(study, arm)
        at_once = micro_batch or -(-images // run.train.accumulate)
        estimated = _estimate(run, example, at_once, shared, found, gpus)
        # The device with the most images decides how long a step takes.
        together = rate * run.train.batch_size / images
        named = {"arm": arm, "seeds": len(study.seeds_of(arm)), "shared_with": "", "shared_steps": 0}
        named["micro_batch"] = at_once
        taken = [named | row for row in _rows(estimated, run.train.batch_size, together, shares)]
        taken[0] |= {"shared_with": donor or "", "shared_steps": shared}
        rows += taken
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["days_all_seeds"] = table["days"] * table["seeds"]
    return table


def images_of(arm: str, run: config.RunConfig, gpus: int) -> int:
    """How many images of a run's batch come to one of `gpus` devices, at most.

    Raises:
        HasteError: there are more devices than images.
    """
    batch = run.train.batch_size
    if not 1 <= gpus <= batch:
        raise HasteError(f"{gpus} GPUs for arm {arm!r} with train.batch_size {batch}; possible: 1 to {batch}")
    return -(-batch // gpus)


def example_of(study: config.Study) -> tuple[Example, Check]:
    """One example of a study's data, and whether the data are there; as the settings suggest it where they are not.

    Raises:
        HasteError: the settings do not say how large the images are.
    """
    check, example = checks.data(study.data, 1)
    if example is None:
        raise HasteError(f"{check.found}; so the size of the data is unknown; possible: data.image_size")
    return example, check


def shared_part(study: config.Study, arm: str) -> tuple[str | None, int]:
    """The arm whose checkpoints this one begins with, and the steps it is spared; (None, 0) where it trains them all.

    As `haste_core.training.adopt_shared_part` does: the donor must keep every checkpoint that this arm keeps up to its
    switch.
    """
    donor, run = study.donor(arm), study.run(arm)
    if donor is None:
        return None, 0
    wanted = {step for step in run.train.kept_steps if step <= run.tau}
    if not wanted <= set(study.run(donor).train.kept_steps):
        return None, 0
    return donor, int(min(run.tau, run.train.steps))


def sums(table: pd.DataFrame) -> dict[str, Any]:
    """What a whole study takes, over arms, phases and seeds.

    Args:
        table: of `planned`.

    Returns:
        runs, flops, days, checkpoint_bytes (that stay), writing_bytes (more, while a run writes) and memory_bytes (the
        largest peak on one device).
    """
    taken = table[table["steps"] > 0]
    return {
        "runs": int(table.groupby("arm")["seeds"].first().sum()),
        "flops": float((table["run_flops"].astype(float) * table["seeds"]).sum()),
        "days": float(table["days_all_seeds"].sum()),
        "checkpoint_bytes": int((table["checkpoint_bytes"] * table["seeds"]).sum()),
        "writing_bytes": int(table["writing_bytes"].max()),
        "memory_bytes": int(taken["memory_bytes"].max()),
    }


def drawing(study: config.Study, table: pd.DataFrame) -> dict[str, Any]:
    """What it takes to draw the images that a study scores: some for every kept checkpoint of every run.

    Args:
        table: of `planned`; the time goes by the operations per second of the last phase of every arm.

    Returns:
        images (of one checkpoint), checkpoints, passes (of the network for one image; the most that an arm makes),
        flops, days (of all devices together). Decoding latents and scoring are not in it.
    """
    checkpoints, most, flops, days = 0, 0, 0.0, 0.0
    for arm in study.arms:
        run = study.run(arm)
        row = table[table["arm"] == arm].iloc[-1]
        kept = len(run.train.kept_steps) * len(study.seeds_of(arm))
        passes = sampling.passes(run.model.kind, study.sample_of(arm).options)
        needed = float(row["forward"]) * kept * study.evaluate.n * passes
        rate = row["images_per_s"] * row["step_flops"] / run.train.batch_size
        checkpoints, most = checkpoints + kept, max(most, passes)
        flops, days = flops + needed, days + needed / rate / 86400
    return {"images": study.evaluate.n, "checkpoints": checkpoints, "passes": most, "flops": flops, "days": days}


def _estimate(
    run: config.RunConfig, example: Example, micro_batch: int, shared: int, found: dict[str, Traced], gpus: int
) -> Estimate:
    """The estimate of a run, its time as of one device.

    found: steps followed so far, which arms of the same networks share. gpus: that weights may be divided among.
    """
    nets = networks_of(run, example)
    # Weights of losses and of teachers change no operation; whether a loss is there does.
    aligned = run.alignment.model_dump(exclude={"lambda_feature", "lambda_attention"})
    losses = [run.alignment.lambda_feature > 0, run.alignment.lambda_attention > 0]
    taught = [run.teacher.model_dump(exclude={"weights", "fitting"}), aligned] if any(losses) else None
    key = config.digest([run.model.model_dump(), run.train.precision, losses, taught])
    if key not in found:
        found[key] = estimates.follow(run, example, nets)
    return estimates.estimate(run, example, nets, micro_batch, shared, found[key], shards=gpus)


def _rows(estimated: Estimate, batch: int, rate: float, shares: Mapping[int, float]) -> list[dict[str, Any]]:
    """A row for each phase. rate: FLOP/s of all devices together."""
    rows = []
    for phase, steps in estimated.steps.items():
        taught = phase == 1
        rows.append({
            "phase": phase,
            "steps": steps,
            "student": estimated.student,
            "projector": estimated.projector if taught else 0,
            "teacher": estimated.teacher if taught else 0,
            "forward": estimated.forward,
            "step_flops": estimated.step_flops[phase],
            "run_flops": estimated.step_flops[phase] * steps,
            "memory_bytes": estimated.memory[phase].peak,
            "images_per_s": batch * rate * shares[phase] / estimated.step_flops[phase],
            "days": estimated.hours(rate, shares[phase])[phase] / 24,
            "checkpoint_bytes": estimated.checkpoint[phase] * estimated.kept[phase],
            "writing_bytes": 2 * max(estimated.checkpoint.values()),
        })  # fmt: skip
    return rows
