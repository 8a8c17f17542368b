"""haste plan: what every arm of a study takes, from arithmetic and a short calibration on the device at hand."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.commands.common import add_study, study_of

if TYPE_CHECKING:
    import pandas as pd

    from haste_core.study.preflight.calibration import Calibration, Share
    from haste_core.study.preflight.tracing import Example

_LEFT_OUT = (
    "not counted: waiting of GPUs for each other, training a teacher or extractor, decoding and scoring, triggers' "
    "readings"
)


def add(commands: Any) -> None:
    """Add the command to the command line."""
    sub = add_study(
        commands, "plan", "foretell memory, time and space of every arm, by arithmetic and a short measurement here"
    )
    sub.add_argument(
        "--gpus", type=int, default=1, help="devices that share the batch of a run evenly (default: %(default)s)"
    )
    sub.add_argument(
        "--rate", type=float, metavar="FLOPS",
        help="FLOP/s of matrix products of one device in the run's precision (default: measured here)",
    )  # fmt: skip
    sub.add_argument(
        "--utilisation", type=float, metavar="SHARE",
        help="share of that rate which a training step reaches, in (0, 1] (default: measured here on a small stand-in)",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="print one JSON object: figures by arm and phase, and sums")
    sub.set_defaults(action=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure what is not given, and print the plan."""
    _check(arguments)
    from haste_core.study.preflight import calibration, planning

    study = study_of(arguments)
    for arm in study.arms:
        planning.images_of(arm, study.run(arm), arguments.gpus)
    example, data = planning.example_of(study)
    measured, rate, utilisation = None, arguments.rate, arguments.utilisation
    if rate is None or utilisation is None:
        measured = calibration.calibrate(study, example, arguments.gpus, with_shares=utilisation is None)
        rate = measured.rate if rate is None else rate
        utilisation = measured.utilisation if utilisation is None else utilisation
    table = planning.planned(study, arguments.gpus, rate, utilisation)
    said = _basis(study, arguments, measured)
    said += _triggers(study)
    if data.state != "ok":
        said.append(f"data: {data.found}; {_size(example)} assumed")
    if arguments.json:
        print(json.dumps(_content(study, arguments, measured, table, said), indent=2))
    else:
        print("\n".join([*said, "", *_table(table), "", *_sums(table), _drawing(study, table), _LEFT_OUT]))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.gpus < 1:
        raise HasteError(f"--gpus {arguments.gpus}; possible: 1 and above")
    if arguments.rate is not None and not 0 < arguments.rate < float("inf"):
        raise HasteError(f"--rate {arguments.rate:g}; possible: FLOP/s above 0, for instance 3e14")
    if arguments.utilisation is not None and not 0 < arguments.utilisation <= 1:
        raise HasteError(f"--utilisation {arguments.utilisation:g}; possible: above 0, at most 1")


def _basis(study: config.Study, arguments: argparse.Namespace, measured: Calibration | None) -> list[str]:
    """Lines that say of every figure behind the times whether it was given or measured, and on what."""
    from haste_core.study.preflight.units import flops_text, phase_name

    gpus, seeds = arguments.gpus, len(study.seeds)
    devices = f"{gpus} devices share the batch of a run" if gpus > 1 else "one device"
    said = [f"{study.name}: {len(study.arms)} arms, {seeds} seed{'s' * (seeds > 1)}, {devices}"]
    if measured is None:
        rate = f"{flops_text(arguments.rate)}/s a device, given"
        return [*said, f"rate: {rate}", f"share of it: {arguments.utilisation:.0%}, given; nothing was measured"]
    on = f"measured here on {measured.device} in {_precision(measured.precision)}"
    rate = f"{flops_text(measured.rate)}/s a device, {on}"
    said.append(f"rate: {rate}" if arguments.rate is None else f"rate: {flops_text(arguments.rate)}/s a device, given")
    if arguments.utilisation is not None:
        said.append(f"share of it: {arguments.utilisation:.0%}, given")
    else:
        shares = "; ".join(f"{phase_name(phase)} {_share(share)}" for phase, share in measured.shares.items())
        said += [f"share of it: {shares}", f"  by steps of {measured.timed}, of {flops_text(measured.rate)}/s, {on}"]
    return [*said, *_warnings(study, arguments, measured)]


def _warnings(study: config.Study, arguments: argparse.Namespace, measured: Calibration) -> list[str]:
    """Lines on what was measured elsewhere than where the study would run."""
    said = []
    if measured.precision != study.train.precision:
        said.append(f"note: precision {study.train.precision} needs a GPU and there is none here")
    if arguments.rate is not None and arguments.utilisation is None:
        said.append("note: the share is this device's, not one of the device whose rate was given: --utilisation")
    if any(share.median > 1 for share in measured.shares.values()):
        said.append("note: a share above 100% says that this machine was busy: measure again when it is idle")
    if arguments.rate is None and measured.device_type == "cpu" and (arguments.gpus > 1 or said):
        said.append("note: the times are those of such CPUs, not of any GPU: --rate and --utilisation give a GPU's")
    return said


def _triggers(study: config.Study) -> list[str]:
    """A line on the arms whose switch is not known before they run."""
    runs = {arm: study.run(arm) for arm in study.arms}
    kinds = ("never", "iteration")
    left = [arm for arm, run in runs.items() if run.alignment.active and run.termination.kind not in kinds]
    return [f"note: a trigger ends phase I of {', '.join(left)}; counted as if it never fired"] if left else []


def _share(share: Share) -> str:
    return f"{share.median:.1%} (8 in 10 of {share.steps} steps: {share.low:.1%} to {share.high:.1%})"


def _precision(name: str) -> str:
    return "float32" if name == "no" else name


def _size(example: Example) -> str:
    return f"{example.channels}x{example.size}x{example.size} and {example.classes} classes"


def _content(
    study: config.Study, arguments: argparse.Namespace, measured: Calibration | None, table: pd.DataFrame,
    said: list[str],
) -> dict[str, Any]:  # fmt: skip
    """What --json prints. Figures as in `haste_core.study.preflight.planning`."""
    from haste_core.study.preflight import planning

    given = {"gpus": arguments.gpus, "rate": arguments.rate, "utilisation": arguments.utilisation}
    found = None
    if measured is not None:
        shares = {str(phase): share._asdict() for phase, share in measured.shares.items()}
        found = {
            "device": measured.device, "precision": measured.precision, "rate": measured.rate, "shares": shares,
            "timed": measured.timed,
        }  # fmt: skip
    rows = json.loads(table.to_json(orient="records", double_precision=15))
    return {
        "study": study.name, "given": given, "measured": found, "basis": said, "rows": rows,
        "sums": planning.sums(table), "drawing": planning.drawing(study, table), "left_out": _LEFT_OUT,
    }  # fmt: skip


def _table(table: pd.DataFrame) -> list[str]:
    """The plan as aligned columns: a line for each arm and phase, and one for both where there are two."""
    head = (
        "arm", "phase", "steps", "parameters", "FLOP/step", "FLOP", "memory", "images/s", "time", "all seeds",
        "checkpoints",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for arm, rows in table.groupby("arm", sort=False):
        records = rows.to_dict("records")
        lines += [_line(str(arm) if i == 0 else "", record) for i, record in enumerate(records)]
        if len(records) > 1:
            lines.append(_both(rows))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(_padded(line, widths)).rstrip() for line in lines]


def _padded(line: tuple[str, ...], widths: list[int]) -> list[str]:
    """Names to the left, figures to the right."""
    both = zip(line, widths, strict=True)
    return [text.ljust(width) if i < 2 else text.rjust(width) for i, (text, width) in enumerate(both)]


def _line(arm: str, row: dict[Any, Any]) -> tuple[str, ...]:
    from haste_core.study.preflight.units import bytes_text, count_text, flops_text, hours_text

    sizes = [count_text(row[name]) for name in ("student", "projector", "teacher") if row[name]]
    steps = f"{row['steps']:,}"
    if row["shared_steps"]:
        steps = f"{steps} ({row['shared_steps']:,} of {row['shared_with']})"
    return (
        arm, "I" if row["phase"] == 1 else "II", steps, " + ".join(sizes), flops_text(row["step_flops"]),
        flops_text(row["run_flops"]), bytes_text(row["memory_bytes"]), f"{row['images_per_s']:,.4g}",
        hours_text(24 * row["days"]), hours_text(24 * row["days_all_seeds"]), bytes_text(row["checkpoint_bytes"]),
    )  # fmt: skip


def _both(rows: pd.DataFrame) -> tuple[str, ...]:
    from haste_core.study.preflight.units import bytes_text, flops_text, hours_text

    taken = rows[rows["steps"] > 0]
    peak = bytes_text(taken["memory_bytes"].max()) if len(taken) else ""
    return (
        "", "both", f"{rows['steps'].sum():,}", "", "", flops_text(rows["run_flops"].sum()), peak, "",
        hours_text(24 * rows["days"].sum()), hours_text(24 * rows["days_all_seeds"].sum()),
        bytes_text(rows["checkpoint_bytes"].sum()),
    )  # fmt: skip


def _sums(table: pd.DataFrame) -> list[str]:
    from haste_core.study.preflight import planning
    from haste_core.study.preflight.units import bytes_text, flops_text, hours_text

    found = planning.sums(table)
    return [
        f"in all: {found['runs']} runs, {flops_text(found['flops'])}, {hours_text(24 * found['days'])} one after the "
        f"other, {bytes_text(found['checkpoint_bytes'])} of checkpoints and {bytes_text(found['writing_bytes'])} more "
        f"while a run writes, at most {bytes_text(found['memory_bytes'])} of memory on a device",
        "memory is what a step holds at its peak; one block's working memory and CUDA's own come on top",
    ]


def _drawing(study: config.Study, table: pd.DataFrame) -> str:
    from haste_core.study.preflight import planning
    from haste_core.study.preflight.units import flops_text, hours_text

    found = planning.drawing(study, table)
    return (
        f"drawing what is scored: {found['images']:,} images for each of {found['checkpoints']} checkpoints, up to "
        f"{found['passes']} passes an image, {flops_text(found['flops'])}, {hours_text(24 * found['days'])}"
    )
