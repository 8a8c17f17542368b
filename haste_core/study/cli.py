"""The command line: commands on studies and runs; those on files are in `haste_core.study.cli_files`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from haste_core import __version__
from haste_core.errors import HasteError, Interrupted, is_disk_full
from haste_core.study import cli_files, config

if TYPE_CHECKING:
    from haste_core.study.estimate import Speed
    from haste_core.study.runs import Run

_EXAMPLES = """examples:
  haste study digits                                    the whole default study, ending in reports/digits/report.html
  haste train digits haste --seed 1                     one run; stop it with Ctrl-C, the same command goes on
  haste train digits haste --set train.steps=200        with another setting
  haste sample digits haste --n 64 --out digits.png     images from a trained run
  haste evaluate digits haste                           FID, precision, recall, held-out denoising loss
  haste train imagenet256 haste --dry-run               what is missing for the paper's own scale, and what it takes
  haste plan imagenet256 --gpus 8                       time, memory and space of every arm, measured on this device
  haste convert 0400000.pt haste.safetensors            a released checkpoint of DiT, SiT, REPA or HASTE
"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, with status 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line's parser; the namespace it returns has the function `action` to call with it."""
    top = _Parser(
        prog="haste",
        description="Study early-stopped representation alignment (HASTE, arXiv 2505.16792) of diffusion transformers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"haste {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, action: Callable[[argparse.Namespace], None], text: str, arm: bool = False) -> Any:
        """A parser for a command on a study, or on one run of it (`arm`)."""
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("study", help=f"a study's name ({', '.join(config.studies())}) or the path of a .yaml file")
        if arm:
            sub.add_argument("arm", help="an arm of the study, for instance vanilla, repa, atta, holistic or haste")
            sub.add_argument("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
        sub.add_argument("--profile", help="a named set of overrides in the study file, for instance smoke")
        sub.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                         help="override a setting, for instance train.steps=200; may be repeated")  # fmt: skip
        sub.set_defaults(action=action)
        return sub

    processes = {"type": int, "default": 1, "metavar": "N"}
    sub = add("train", train, "train one arm with one seed, or go on where it stopped", arm=True)
    sub.add_argument("--processes", **processes, help="number of processes that train the run together, each on a GPU "
                     "of its own or on the CPU (default: %(default)s)")  # fmt: skip
    sub.add_argument("--dry-run", action="store_true", help="check settings, data, teacher and disk, estimate memory "
                     "and time, say what is missing; train nothing")  # fmt: skip
    cli_files.add_sample(add)
    add("evaluate", evaluate, "score every kept checkpoint of a trained run", arm=True)
    cli_files.add_score(commands)
    sub = add("study", run_study, "run a whole study: teacher, every arm and seed, scores and report")
    sub.epilog = "Any other option is Snakemake's own and goes to it unchanged, for instance --keep-incomplete."
    sub.add_argument("--processes", **processes,
                     help="number of processes that train each run together (default: %(default)s)")  # fmt: skip
    sub.add_argument("--cores", type=int, metavar="N", help="jobs at a time on this machine (default: all cores)")
    sub.add_argument("--workflow-profile", metavar="FOLDER", help="Snakemake profile of a cluster that runs the "
                     "jobs: workflow/slurm, workflow/kubernetes, or a copy of one (default: this machine)")  # fmt: skip
    sub.add_argument("--dry-run", action="store_true", help="list the jobs that would run, and run none")
    add("teacher", teacher, "prepare a study's teacher and feature extractor, and print their facts")
    cli_files.add_latents(commands)
    cli_files.add_convert(commands)
    sub = add("cost", measure_cost, "measure the time of a training step in every arm and phase")
    sub.add_argument("--rounds", type=int, default=12, help="interleaved rounds (default: %(default)s)")
    sub = add("plan", plan, "estimate memory, time and disk space of every arm, from a short measurement here")
    sub.add_argument("--gpus", type=int, default=1, help="devices that share the batch of a run (default: %(default)s)")
    sub.add_argument("--rate", type=float, metavar="FLOPS", help="FLOP/s of matrix products of one device in the run's "
                     "precision (default: the speed of training steps is measured here)")  # fmt: skip
    sub.add_argument("--utilisation", type=float, metavar="SHARE",
                     help="share of --rate that a training step reaches, in (0, 1] (default: 0.4)")  # fmt: skip
    sub.add_argument("--json", action="store_true", help="print one JSON object: figures by arm and phase, and sums")
    sub = commands.add_parser("notebook", help="run one of the notebooks by papermill, with parameters",
                              description="Run one of the notebooks by papermill, with parameters.")  # fmt: skip
    sub.add_argument("name", help="a notebook's name, for instance 01_train, or its path")
    sub.add_argument("out", type=Path, help="where the executed notebook goes")
    sub.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE",
                     help="a parameter of the notebook, read as YAML; may be repeated")  # fmt: skip
    sub.set_defaults(action=run_notebook)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 an error the user can mend, 143 stopped and saved."""
    top = parser()
    arguments, arguments_left = top.parse_known_args(argv)
    if arguments_left and arguments.command != "study":
        top.error(f"unrecognized arguments: {' '.join(arguments_left)}")
    arguments.snakemake = arguments_left
    try:
        arguments.action(arguments)
    except HasteError as error:
        print(f"haste: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"haste: {stop}", file=sys.stderr)
        return 143
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"haste: error: no room left ({error}); what was saved before is intact", file=sys.stderr)
        return 2
    return 0


def study_of(arguments: argparse.Namespace) -> config.StudySettings:
    """The study that a command is about."""
    return config.load(arguments.study, arguments.profile, arguments.overrides)


def run_of(arguments: argparse.Namespace) -> Run:
    """The run that a command is about."""
    from haste_core.study.runs import Run

    return Run(study_of(arguments), arguments.arm, arguments.seed)


def train(arguments: argparse.Namespace) -> None:
    """haste train."""
    run = run_of(arguments)
    if arguments.dry_run:
        from haste_core.study.dry_run import dry_run

        found = dry_run(run, arguments.processes)
        print(found.text)
        if found.lacking:
            raise HasteError(f"not ready to train: {', '.join(found.lacking)}; the lines above say what to do")
        return
    from haste_core.study import launching

    launching.fit(run, arguments.processes)
    if os.environ.get("RANK", "0") == "0":  # one of the processes of a launch reports
        last = run.metrics()[-1]
        print(f"{run.dir}: step {last['step']}, denoising loss {last['denoising']:.4f}")


def evaluate(arguments: argparse.Namespace) -> None:
    """haste evaluate."""
    from haste_core.study import evaluation, pretrain

    run = run_of(arguments)
    if run.missing_steps():
        profile = ["--profile", arguments.profile] if arguments.profile else []
        words = [arguments.study, run.arm, "--seed", str(run.seed), *profile]
        words += [word for override in arguments.overrides for word in ("--set", override)]
        raise HasteError(
            f"run {run.arm} seed {run.seed} has no checkpoint at step(s) {run.missing_steps()}; run "
            f"haste train {shlex.join(words)}"
        )
    pretrain.prepare_extractors(run.study)
    rows = evaluation.evaluate_run(run)
    further = () if run.study.evaluate.suite == "adm" else ("fid_heldout", "nearest", "copies")
    scores = ("step", *evaluation.metrics_of(run.study), *further, *evaluation.SUMMARIES, "n", "card")
    for name in scores:
        cells = (f"{row[name]:>11.4f}" if isinstance(row[name], float) else f"{row[name]:>11}" for row in rows)
        print(f"{name:<16}" + "  ".join(cells))
    levels = [level for level in evaluation.denoising_rows(run) if level["split"] == "held-out"]
    print(f"held-out denoising loss ({levels[0]['n']} images, {levels[0]['draws']} draws)")
    for t in dict.fromkeys(level["t"] for level in levels):
        print(f"  t = {t:<10}" + "  ".join(f"{level['loss']:>11.4f}" for level in levels if level["t"] == t))


def run_study(arguments: argparse.Namespace) -> None:
    """haste study."""
    from haste_core.study import jobs

    options = list(arguments.snakemake)
    if arguments.cores is not None:
        if arguments.cores < 1:
            raise HasteError(f"--cores is {arguments.cores}; expected 1 and above")
        options += ["--cores", str(arguments.cores)]
    if arguments.workflow_profile is not None:
        options += ["--workflow-profile", arguments.workflow_profile]
    options += ["--dry-run"] if arguments.dry_run else []
    print(jobs.run_study(
        study_of(arguments), arguments.study, arguments.profile, arguments.overrides, arguments.processes, options
    ))  # fmt: skip


def teacher(arguments: argparse.Namespace) -> None:
    """haste teacher."""
    from haste_core.study import pretrain
    from haste_core.study.runs import study_dir

    study = study_of(arguments)
    facts = pretrain.write_facts(study, study_dir(study) / "prepared.json")
    print(yaml.safe_dump(facts, sort_keys=False), end="")


def measure_cost(arguments: argparse.Namespace) -> None:
    """haste cost."""
    from haste_core.study import cost, pretrain

    study = study_of(arguments)
    if arguments.rounds < 1:
        raise HasteError(f"--rounds is {arguments.rounds}; expected 1 and above")
    for teacher in study.teachers():
        pretrain.prepare_teacher(study, teacher)
    for row in cost.write(study, arguments.rounds):
        print(
            f"{row['arm']:>10} phase {row['phase']}  {1000 * row['median_step_s']:7.1f} ms  "
            f"{row['ratio_to_vanilla']:.3f} of vanilla ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        )


def plan(arguments: argparse.Namespace) -> None:
    """haste plan."""
    gpus, rate, share = arguments.gpus, arguments.rate, arguments.utilisation
    if gpus < 1:
        raise HasteError(f"--gpus is {gpus}; expected 1 and above")
    if rate is not None and not 0 < rate < float("inf"):
        raise HasteError(f"--rate is {rate:g}; expected FLOP/s above 0, for instance 3e14")
    if share is not None and not 0 < share <= 1:
        raise HasteError(f"--utilisation is {share:g}; expected above 0, at most 1")
    if share is not None and rate is None:
        raise HasteError("--utilisation is a share of --rate, which is not given; expected both, or --rate alone")
    from haste_core.study import estimate
    from haste_core.study.dry_run import example_of

    study = study_of(arguments)
    example, data = example_of(study)
    if rate is None:
        speed = estimate.measured_speed(study, example, gpus)
    else:
        assumed = "given" if share is not None else "an assumption"
        speed = estimate.given_speed(rate, share or estimate.UTILISATION, assumed)
    table = estimate.plan(study, example, speed.flops, gpus)
    total = estimate.sums(study, table)
    notes = _notes(study, gpus, speed)
    if data.state != "ok":
        notes.append(f"data: {data.found}; {example.channels}x{example.size}x{example.size} and {example.classes} "
                     f"classes assumed")  # fmt: skip
    if arguments.json:
        rows = json.loads(table.to_json(orient="records", double_precision=15))
        print(json.dumps({"study": study.name, "gpus": gpus, "speed": speed._asdict(), "notes": notes, "rows": rows,
                          "sums": total}, indent=2))  # fmt: skip
    else:
        print("\n".join([*notes, "", estimate.plan_text(table, total)]))


def _notes(study: config.StudySettings, gpus: int, speed: Speed) -> list[str]:
    """Lines on what the figures of a plan rest on."""
    from haste_core.study.estimate import PHASES, si

    seeds, each = len(study.seeds), ", ".join(f"{si(f, 'FLOP')}/s in {PHASES[p]}" for p, f in speed.flops.items())
    devices = f"{gpus} devices share the batch of a run" if gpus > 1 else "one device"
    notes = [f"{study.name}: {len(study.arms)} arms, {seeds} seed{'s' * (seeds > 1)}, {devices}"]
    notes.append(f"speed of one device: {each}, {speed.source}")
    runs = {arm: study.run(arm) for arm in study.arms}
    open_ended = [a for a, r in runs.items() if r.alignment.active and r.termination.kind not in ("never", "iteration")]
    if open_ended:
        notes.append(f"note: a trigger ends phase I of {', '.join(open_ended)}; counted as if it never fired")
    return notes


def run_notebook(arguments: argparse.Namespace) -> None:
    """haste notebook."""
    from haste_core.study import notebook

    parameters = {}
    for text in arguments.parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise HasteError(f"parameter {text!r} is not of the form name=value")
        try:
            parameters[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise HasteError(f"parameter {text!r}: the value is not valid YAML, for instance name=[1, 2]") from error
    notebook.execute(arguments.name, arguments.out, parameters)


if __name__ == "__main__":
    sys.exit(main())
