"""The command line: its parser, and commands on studies and runs; those on files are in `cli_files`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from haste_core import __version__
from haste_core.errors import HasteError, Interrupted, is_disk_full, unknown
from haste_core.files import output_root, unwritable
from haste_core.study import cli_files, config
from haste_core.study.runs import Run, machine, peak_memory_gib, study_dir

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
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
# Smallest values of options, whichever command they belong to.
_COUNTS = ("processes", "cores", "gpus", "rounds", "n", "shard_size", "batch_size", "resize")
_LEAST = dict.fromkeys(_COUNTS, 1) | {"first_seed": 0}


class _Parser(argparse.ArgumentParser):
    """A parser that keeps line breaks of descriptions and reports an error in one line, with status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line's parser; the namespace it returns has the function `action` to call with it."""
    top = _Parser(
        prog="haste",
        description="Study early-stopped representation alignment (HASTE, arXiv 2505.16792) of diffusion transformers.",
        epilog=_EXAMPLES,
    )
    top.add_argument("--version", action="version", version=f"haste {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, action: Callable[[argparse.Namespace], None], text: str, on: str = "") -> Any:
        """A parser for a command on a "study", on a "run" of it, or on neither."""
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(action=action)
        if on:
            names = ", ".join(config.studies())
            sub.add_argument("study", help=f"a study's name ({names}) or the path of a .yaml file")
        if on == "run":
            sub.add_argument("arm", help="an arm of the study, for instance vanilla, repa, atta, holistic or haste")
            sub.add_argument("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
        if on or name in ("score", "report"):
            sub.add_argument("--profile", help="a named set of overrides in the study file, for instance smoke")
            text = "override a setting of the study, for instance train.steps=200; may be repeated"
            sub.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=text)
        if on == "study":
            sub.add_argument("--arms", metavar="ARM,ARM", help="these arms alone, for instance vanilla,haste")
        return sub

    sub = add("train", train, "train one arm with one seed, or go on where it stopped", on="run")
    processes = "number of processes that train a run together, each on a GPU of its own or on the CPU (default: 1)"
    sub.add_argument("--processes", type=int, default=1, metavar="N", help=processes)
    text = "check settings, data, teacher and disk, estimate memory and time, say what is missing; train nothing"
    sub.add_argument("--dry-run", action="store_true", help=text)

    sub = add("sample", cli_files.sample, "draw images from a trained run's averaged weights", on="run")
    cli_files.add_sample(sub)

    add("evaluate", evaluate, "score every kept checkpoint of a trained run", on="run")

    text = "score any images by the ADM protocol: FID, sFID, IS, precision, recall, and a distance on DINOv2"
    cli_files.add_score(add("score", cli_files.score, text))

    sub = add("study", run_study, "run a whole study: teacher, every arm and seed, scores and report", on="study")
    sub.epilog = "Any other option is Snakemake's own and goes to it unchanged, for instance --keep-incomplete."
    sub.add_argument("--processes", type=int, default=1, metavar="N", help=processes)
    sub.add_argument("--cores", type=int, metavar="N", help="jobs at a time on this machine (default: all cores)")
    text = "Snakemake profile of a cluster that runs the jobs: workflow/slurm, workflow/kubernetes, or a copy of one"
    sub.add_argument("--workflow-profile", metavar="FOLDER", help=f"{text} (default: this machine)")
    sub.add_argument("--dry-run", action="store_true", help="list the jobs that would run, and run none")

    sub = add("report", make_report, "write a report again from its tables, and reports/index.html with all of them")
    sub.add_argument("study", nargs="?", help="as elsewhere; with --index none is needed")
    sub.add_argument("--index", action="store_true", help="write the index alone")

    sub = add("new", new_study, "write a study of your own labelled images, sized for them and for this machine")
    sub.add_argument("file", type=Path, help="the study file to write, such as my-study.yaml")
    sub.add_argument("--images", required=True, metavar="PLACE", help="a folder with one sub-folder per class, a "
                     ".parquet file or a folder of them, or a hub name")  # fmt: skip
    sub.add_argument("--minutes", type=float, default=10.0, help="that the study may take here (default: %(default)s)")

    add("teacher", teacher, "prepare a study's teacher and feature extractor, and print their facts", on="study")

    text = "prepare latents: encode labelled images by a VAE into a folder for data.kind 'latents'"
    cli_files.add_latents(add("latents", cli_files.encode, text))

    add("contexts", contexts, "prepare the text tokens of a study's captions by its frozen text encoder", on="study")

    text = "convert a checkpoint of DiT, SiT, REPA, HASTE or of a run, and say what it holds"
    cli_files.add_convert(add("convert", cli_files.convert, text))

    sub = add("cost", measure_cost, "measure the time of a training step in every arm and phase", on="study")
    sub.add_argument("--rounds", type=int, default=12, help="interleaved rounds (default: %(default)s)")

    text = "estimate memory, time and disk space of every arm, from a short measurement here"
    sub = add("plan", plan, text, on="study")
    sub.add_argument("--gpus", type=int, default=1, help="devices that share the batch of a run (default: %(default)s)")
    text = "FLOP/s of matrix products of one device in the run's precision (default: training steps are timed here)"
    sub.add_argument("--rate", type=float, metavar="FLOPS", help=text)
    text = "share of --rate that a training step reaches, in (0, 1] (default: 0.4)"
    sub.add_argument("--utilisation", type=float, metavar="SHARE", help=text)
    sub.add_argument("--json", action="store_true", help="print one JSON object: figures by arm and phase, and sums")

    sub = add("notebook", run_notebook, "run one of the notebooks by papermill, with parameters")
    sub.add_argument("name", help="a notebook's name, for instance 01_train, or its path")
    sub.add_argument("out", type=Path, help="where the executed notebook goes")
    text = "a parameter of the notebook, read as YAML; may be repeated"
    sub.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help=text)
    return top


def _in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package without the line of code that Python shows below one."""
    return f"haste: warning: {message}\n" if "haste_core" in filename else f"{filename}:{lineno}: {message}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 an error the user can mend, 143 stopped and saved."""
    top, words = parser(), sys.argv[1:] if argv is None else list(argv)
    arguments, others = top.parse_known_args(words)
    if others and arguments.command != "study":
        top.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.words, arguments.snakemake = words, others
    warnings.formatwarning = _in_one_line
    try:
        for name, least in _LEAST.items():
            value = getattr(arguments, name, None)
            if value is not None and value < least:
                raise HasteError(f"--{name.replace('_', '-')} {value}; expected {least} and above")
        action = arguments.action
        if "WORLD_SIZE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import record

            action = record(action)  # torch's launcher reads the errors of its processes from files
        action(arguments)
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
        if not (said := _worded(error)):
            raise
        print(f"haste: error: {said}", file=sys.stderr)
        return 2
    return 0


def _worded(error: OSError) -> str:
    """A fault of a place that a user can mend, in words; empty for others."""
    if is_disk_full(error):
        return f"no room left ({error}); what was saved before is intact"
    if error.filename is not None and error.errno in _NO_PLACE:
        return str(unwritable(error.filename, error))
    return ""


def study_of(arguments: argparse.Namespace) -> config.StudySettings:
    """The study that a command is about; arms that `--arms` does not name are left out by further overrides."""
    study = config.load(arguments.study, arguments.profile, arguments.overrides)
    if getattr(arguments, "arms", None) is None:
        return study
    named = [arm.strip() for arm in arguments.arms.split(",")]
    for arm in named:
        if arm not in study.arms:
            raise unknown("arm", arm, study.arms)
    arguments.overrides += [f"arms.{arm}=null" for arm in study.arms if arm not in named]
    return config.load(arguments.study, arguments.profile, arguments.overrides)


# Each command imports what it needs: a job that trains waits for neither papermill nor pandas.


def train(arguments: argparse.Namespace) -> None:
    """haste train."""
    run = Run(study_of(arguments), arguments.arm, arguments.seed)
    if arguments.dry_run:
        return _dry_run(run, arguments.processes)
    from haste_core.processes import rank
    from haste_core.study import launching

    launching.fit(run, arguments.processes)
    if rank() == 0:  # one of the processes of a launch reports
        last = run.metrics()[-1]
        print(f"{run.dir}: step {last['step']}, denoising loss {last['denoising']:.4f}")


def _dry_run(run: Run, processes: int) -> None:
    from haste_core.study.dry_run import dry_run

    checks, estimate = dry_run(run, processes)
    print(f"{run.study.name} {run.arm}, seed {run.seed}: dry run, nothing is trained or downloaded")
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"  {'ok' if check.ok else 'problem':<7}  {check.name:<{width}}  {check.found}")
    if estimate:
        print(f"\nEstimated from the settings, not a measurement:\n{estimate}\n")
    lacking = [check.name for check in checks if not check.ok]
    if lacking:
        raise HasteError(f"not ready to train: {', '.join(lacking)}; the lines above say what to do")
    print("nothing is missing")


def evaluate(arguments: argparse.Namespace) -> None:
    """haste evaluate."""
    from haste_core.study import evaluation, pretrain

    run = Run(study_of(arguments), arguments.arm, arguments.seed)
    if run.missing_steps():
        profile = ["--profile", arguments.profile] if arguments.profile else []
        words = [arguments.study, run.arm, "--seed", str(run.seed), *profile]
        words += [word for override in arguments.overrides for word in ("--set", override)]
        raise HasteError(
            f"run {run.arm} seed {run.seed} has no checkpoint at step(s) {run.missing_steps()}; run "
            f"haste train {shlex.join(words)}"
        )
    pretrain.check_begun(run.study, [run])  # before extractors are trained on other data
    pretrain.prepare_extractors(run.study)
    rows = evaluation.evaluate_run(run)
    further = () if run.study.evaluate.suite == "adm" else ("fid_heldout", "nearest", "copies")
    for name in ("step", *evaluation.metrics_of(run.study), *further, *evaluation.SUMMARIES, "n", "card"):
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
        options += ["--cores", str(arguments.cores)]
    if arguments.workflow_profile is not None:
        options += ["--workflow-profile", arguments.workflow_profile]
    options += ["--dry-run"] if arguments.dry_run else []
    study = study_of(arguments)
    report = jobs.run_study(
        study, arguments.study, arguments.profile, arguments.overrides, arguments.processes, options
    )
    if report is not None:
        print(report)


def make_report(arguments: argparse.Namespace) -> None:
    """haste report."""
    from haste_core.study import report

    if arguments.index:
        print(report.write_index(output_root() / "reports"))
    elif arguments.study is None:
        raise HasteError("haste report needs a study, or --index for the page that lists all reports")
    else:
        study = config.load(arguments.study, arguments.profile, arguments.overrides)
        print(report.write_report(report.open_report(study, arguments.profile)))


def new_study(arguments: argparse.Namespace) -> None:
    """haste new."""
    from haste_core.study.new import write_study

    print(write_study(arguments.file, arguments.images, arguments.minutes))


def teacher(arguments: argparse.Namespace) -> None:
    """haste teacher."""
    from haste_core.study import dry_run, pretrain

    study = study_of(arguments)
    dry_run.check_study(study, allowed=dry_run.ELSEWHERE)
    facts = pretrain.write_facts(study, study_dir(study) / "prepared.json")
    print(yaml.safe_dump(facts, sort_keys=False), end="")


def contexts(arguments: argparse.Namespace) -> None:
    """haste contexts."""
    from haste_core.errors import number_of
    from haste_core.study import text

    data = study_of(arguments).data
    made = text.prepare(data)
    print(f"{made.path}: {number_of(made.captions, 'caption')} of {made.length} tokens, {made.width} wide, by "
          f"{data.text_encoder}")  # fmt: skip


def measure_cost(arguments: argparse.Namespace) -> None:
    """haste cost."""
    from haste_core.study import cost, dry_run, pretrain

    study = study_of(arguments)
    dry_run.check_study(study, allowed=dry_run.ELSEWHERE)
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
    if rate is not None and not 0 < rate < float("inf"):
        raise HasteError(f"--rate is {rate:g}; expected FLOP/s above 0, for instance 3e14")
    if share is not None and not 0 < share <= 1:
        raise HasteError(f"--utilisation is {share:g}; expected above 0, at most 1")
    if share is not None and rate is None:
        raise HasteError("--utilisation is a share of --rate, which is not given; expected both, or --rate alone")
    from haste_core.study import cost, dry_run, estimate

    study = study_of(arguments)
    study.check_claims()
    remarks = dry_run.check_study(study, gpus, dry_run.ELSEWHERE)
    example, data = dry_run.find_example(study.data)
    if example is None:
        raise HasteError(f"{data.found}; so the size of the data is unknown; expected data.image_size")
    if rate is None:
        speed = cost.measured_speed(study, example, gpus)
    else:
        reached, origin = (estimate.UTILISATION, "an assumption") if share is None else (share, "given")
        source = f"{reached:.0%} ({origin}) of a given rate of {estimate.si(rate, 'FLOP')}/s; nothing was measured"
        speed = estimate.Speed(dict.fromkeys(estimate.PHASES, rate * reached), source)
    table = estimate.plan(study, example, speed.flops, gpus)
    notes = estimate.notes(study, gpus, speed)
    if not data.ok:
        notes.append(f"{example.channels}x{example.size}x{example.size} and {example.classes} classes are assumed")
    notes += [f"not ready here: {remark}" for remark in remarks]
    if arguments.json:
        rows = json.loads(table.to_json(orient="records", double_precision=15))
        print(json.dumps({"study": study.name, "gpus": gpus, "speed": speed._asdict(), "notes": notes, "rows": rows,
                          "sums": estimate.sums(table)}, indent=2))  # fmt: skip
    else:
        here = machine()
        side_by_side = 0 if rate or here["gpu"] else max(1, here["cores"] // study.train.threads)
        print("\n".join([*notes, "", estimate.plan_text(table, side_by_side, peak_memory_gib())]))


def run_notebook(arguments: argparse.Namespace) -> None:
    """haste notebook."""
    from haste_core.study import notebook

    given = (
        config.read_pair(text, "parameter", "name=value, for instance seeds=[1, 2]") for text in arguments.parameters
    )
    notebook.execute(arguments.name, arguments.out, dict(given))


if __name__ == "__main__":
    sys.exit(main())
