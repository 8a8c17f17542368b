"""The command line: haste train, sample, evaluate, score, study, teacher, latents, convert, cost, plan, notebook."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from haste_core import __version__
from haste_core.errors import HasteError, Interrupted, is_disk_full
from haste_core.study.commands import convert, latents, plan, sample, score
from haste_core.study.commands.common import add_study, run_of, settings, study_of

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
    """Errors in one line, status 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = _Parser(
        prog="haste",
        description="Study early-stopped representation alignment (HASTE, arXiv 2505.16792) of diffusion transformers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"haste {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, action: Callable[[argparse.Namespace], None], text: str, arm: bool = False) -> Any:
        sub = add_study(commands, name, text, arm)
        sub.set_defaults(action=action)
        return sub

    training = add("train", train, "train one arm with one seed, or go on where it stopped", arm=True)
    training.add_argument(
        "--processes", type=int, default=1,
        help="how many processes train it together, each on a GPU of its own or on the CPU (default: %(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--dry-run", action="store_true",
        help="check settings, data, teacher and disk, estimate memory and time, say what is missing; train nothing",
    )  # fmt: skip
    sample.add(commands)
    add("evaluate", evaluate, "score every kept checkpoint of a trained run", arm=True)
    score.add(commands)
    study = add("study", whole, "run a whole study: teacher, every arm and seed, scores and report")
    study.add_argument("--cores", type=int, help="jobs at a time on this machine (default: all cores)")
    study.add_argument(
        "--processes", type=int, default=1,
        help="how many processes train each run together, as of haste train (default: %(default)s)",
    )  # fmt: skip
    study.add_argument(
        "--on", metavar="CLUSTER",
        help="run the jobs on a cluster: slurm, kubernetes, or a folder with a Snakemake profile (default: here)",
    )  # fmt: skip
    study.add_argument("--dry-run", action="store_true", help="list the jobs that would run, and run none")
    add("teacher", teacher, "prepare a study's teacher and feature extractor, and print their facts")
    latents.add(commands)
    convert.add(commands)
    cost = add("cost", measure_cost, "measure the time of a training step in every arm and phase")
    cost.add_argument("--rounds", type=int, default=12, help="interleaved rounds (default: %(default)s)")
    plan.add(commands)

    notebook = commands.add_parser(
        "notebook", help="run one of the notebooks by papermill, with parameters",
        description="Run one of the notebooks by papermill, with parameters.",
    )  # fmt: skip
    notebook.add_argument("name", help="a notebook's name, for instance 01_train, or its path")
    notebook.add_argument("out", type=Path, help="where the executed notebook goes")
    notebook.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE",
                          help="a parameter of the notebook, read as YAML; may be repeated")  # fmt: skip
    notebook.set_defaults(action=run_notebook)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 an error the user can mend, 143 stopped and saved."""
    arguments = parser().parse_args(argv)
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


def train(arguments: argparse.Namespace) -> None:
    """haste train."""
    run = run_of(arguments)
    if arguments.dry_run:
        from haste_core.study import preflight

        found = preflight.check(run.study, run.arm, run.seed, arguments.processes)
        preflight.show(found)
        lacking = [check.name for check in found.checks if check.state != "ok"]
        if lacking:
            raise HasteError(f"not ready to train: {', '.join(lacking)}; possible: what the lines above say")
        return
    from haste_core.study import launching

    launching.fit(run, arguments.processes)
    if os.environ.get("RANK", "0") == "0":  # of the workers of a launch one reports
        last = run.metrics()[-1]
        print(f"{run.dir}: step {last['step']}, denoising loss {last['denoising']:.4f}")


def evaluate(arguments: argparse.Namespace) -> None:
    """haste evaluate."""
    from haste_core.study import evaluation, pretrain

    run = run_of(arguments)
    if run.missing_steps():
        raise HasteError(
            f"run {run.arm} seed {run.seed} has no checkpoint at step(s) {run.missing_steps()}; possible: "
            f"haste train {arguments.study} {run.arm} --seed {run.seed}{settings(arguments)}"
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
        raise HasteError(f"--rounds {arguments.rounds}; possible: 1 and above")
    for teacher in study.teachers():
        pretrain.prepare_teacher(study, teacher)
    for row in cost.write(study, arguments.rounds):
        print(
            f"{row['arm']:>10} phase {row['phase']}  {1000 * row['median_step_s']:7.1f} ms  "
            f"{row['ratio_to_vanilla']:.3f} of vanilla ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        )


def whole(arguments: argparse.Namespace) -> None:
    """haste study."""
    from haste_core.study import workflow

    report = workflow.run_study(
        study_of(arguments), arguments.study, arguments.profile, arguments.overrides, arguments.cores,
        arguments.dry_run, arguments.processes, arguments.on,
    )  # fmt: skip
    print(report)


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
