"""haste sample: images of a trained run, a sheet of a few or a set of many thousands drawn by several processes."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste_core.errors import HasteError, Interrupted, unknown
from haste_core.study import config
from haste_core.study.commands.common import add_study
from haste_core.study.presets import SAMPLERS

if TYPE_CHECKING:
    from haste_core.study.runs import Run

SHARD_SIZE = 1000
# What --sampler decides; of the rest of `sample`, batch size and VAE stay the study's.
_PRESET_FIELDS = ("sampler", "solver_steps", "grid", "guidance", "guidance_low", "guidance_high", "guidance_channels")


def add(commands: Any) -> None:
    """Add the command to the command line."""
    sub = add_study(commands, "sample", "draw images from a trained run's averaged weights", arm=True)
    sub.epilog, sub.formatter_class = _presets(), argparse.RawDescriptionHelpFormatter
    sub.add_argument("--step", type=int, help="which checkpoint (default: the last)")
    sub.add_argument("--n", type=int, default=100, help="number of images (default: %(default)s)")
    sub.add_argument(
        "--first-seed", type=int, default=0,
        help="seed of the first image; the i-th has the next and the i-th label (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument("--sampler", metavar="PRESET", help="one of the settings below; --set sample.KEY=VALUE wins")
    sub.add_argument(
        "--out", type=Path, default=Path("samples.png"),
        help="a .png sheet, a .npz of uint8 images arr_0 (n, S, S, C), or a folder for a set that several processes "
        "draw and that ends in FOLDER/samples.npz, 3 channels, as ADM's tools read it (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument("--processes", type=int, default=1, help="how many processes draw a set (default: %(default)s)")
    sub.add_argument(
        "--shard-size", type=int, default=SHARD_SIZE,
        help="images a process draws and keeps at a time, in a set (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    sub.set_defaults(action=run)


def _presets() -> str:
    lines = [f"  {name:16}{', '.join(f'{k} {v}' for k, v in fields.items())}" for name, fields in SAMPLERS.items()]
    return "\n".join(
        [
            "samplers (Tables 1, 13, 15 and 16, arXiv 2505.16792):",
            *lines,
            "",
            "A folder, or a .npz of more images than --shard-size, is drawn in shards: the same command goes on after",
            "a stop, and the same command started again elsewhere, on the same folder, shares the work.",
        ]
    )


def run(arguments: argparse.Namespace) -> None:
    """Draw what was asked for."""
    _check(arguments)
    if arguments.processes > 1 and arguments.worker is None:
        _lead(arguments)
        return
    found = _find_run(arguments)
    if _in_shards(arguments):
        _draw_set(arguments, found)
    else:
        _draw_few(arguments, found)
    if arguments.worker is None:
        print(_result(arguments))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix not in (".png", ".npz", ""):
        raise HasteError(f"--out {arguments.out}; possible: a name ending in .png or .npz, or a folder")
    for name, least in (("n", 1), ("first_seed", 0), ("processes", 1), ("shard_size", 1)):
        if getattr(arguments, name) < least:
            raise HasteError(f"--{name.replace('_', '-')} {getattr(arguments, name)}; possible: {least} and above")
    if arguments.out.suffix == ".png" and arguments.processes > 1:
        raise HasteError(f"--processes {arguments.processes} with --out {arguments.out}; possible: .npz or a folder")
    if arguments.sampler is not None and arguments.sampler not in SAMPLERS:
        raise unknown("--sampler", arguments.sampler, SAMPLERS)


def _in_shards(arguments: argparse.Namespace) -> bool:
    many = arguments.n > arguments.shard_size or arguments.processes > 1 or arguments.worker is not None
    return not arguments.out.suffix or (arguments.out.suffix == ".npz" and many)


def _folder(arguments: argparse.Namespace) -> Path:
    """Where the shards lie."""
    return arguments.out.with_suffix(".shards") if arguments.out.suffix else arguments.out


def _result(arguments: argparse.Namespace) -> Path:
    return arguments.out if arguments.out.suffix else arguments.out / "samples.npz"


def _find_run(arguments: argparse.Namespace) -> Run:
    from haste_core.study.runs import Run

    study = config.load(
        arguments.study, arguments.profile, [*preset_overrides(arguments.sampler), *arguments.overrides]
    )
    return Run(study, arguments.arm, arguments.seed)


def preset_overrides(name: str | None) -> list[str]:
    """Overrides that set everything a sampler preset decides; what it does not name goes to its default."""
    if name is None:
        return []
    chosen = config.Sample(preset=name).model_dump()
    values = {field: "null" if chosen[field] is None else chosen[field] for field in _PRESET_FIELDS}
    return [f"sample.preset={name}", *(f"sample.{field}={value}" for field, value in values.items())]


def _generator(arguments: argparse.Namespace, found: Run) -> tuple[Any, str, int]:
    """The averaged weights, their fingerprint and their step."""
    import torch

    from haste_core.study import evaluation

    if torch.cuda.is_available() and arguments.worker is not None:
        torch.cuda.set_device(arguments.worker % torch.cuda.device_count())
    step = arguments.step if arguments.step is not None else max(found.steps(), default=found.config.train.steps)
    return *evaluation.generator_at(found, step), step


def _draw_few(arguments: argparse.Namespace, found: Run) -> None:
    """A sheet, or an .npz file that fits into memory."""
    import numpy as np

    from haste_core import sampling
    from haste_core.files import write_bytes
    from haste_core.study import images
    from haste_core.study.latents import decoding

    model, _, _ = _generator(arguments, found)
    study = found.study
    labels = sampling.sample_labels(arguments.n, model.classes, study.evaluate.labels, arguments.first_seed)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.n)
    x = sampling.draw(model, labels, seeds, found.sample.options, "sampling")
    drawn = sampling.to_uint8(decoding.to_images(x, study.data, found.sample))
    if arguments.out.suffix == ".png":
        images.save_grid(drawn, arguments.out, columns=min(10, arguments.n))
        return
    stream = io.BytesIO()
    np.savez(stream, arr_0=drawn.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    write_bytes(arguments.out, stream.getvalue())


def _draw_set(arguments: argparse.Namespace, found: Run) -> None:
    """A set in shards, together with whatever other processes draw the same one, and its .npz file."""
    import torch

    from haste_core.study.sample_set import SampleSet, drawer, plan

    # The same bits however many processes share the cores.
    torch.set_num_threads(found.config.train.threads)
    model, fingerprint, step = _generator(arguments, found)
    sizes = (arguments.n, arguments.first_seed, arguments.shard_size)
    samples = SampleSet(_folder(arguments), plan(found, step, fingerprint, model.classes, *sizes))
    if samples.missing() and (arguments.out.suffix or not samples.merged.is_file()):
        label = "sampling" if arguments.worker is None else None
        samples.fill(drawer(model, found.study.data, found.sample), found.sample.batch_size, label)
    samples.merge(_result(arguments), None if arguments.out.suffix else 3)


def _lead(arguments: argparse.Namespace) -> None:
    """Start the workers, show how far they are together, and pass a stop on to them."""
    import psutil

    from haste_core.study import signals

    folder = _folder(arguments)
    with tempfile.TemporaryDirectory() as place, signals.catch() as stopping:
        logs = [Path(place, f"{i}.log") for i in range(arguments.processes)]
        workers = [_start(arguments, i, log) for i, log in enumerate(logs)]
        try:
            failed = _watch(arguments, folder, workers, stopping)
        finally:
            signals.terminate(psutil.Process(w.pid) for w in workers if w.poll() is None)
            codes = [worker.wait() for worker in workers]
        said = [_last_line(log) for log in logs]
    if stopping.is_set():
        raise Interrupted(f"{folder}: stopped, whole shards are kept; run again to go on")
    if failed or any(codes):
        first = next((line for code, line in zip(codes, said, strict=True) if code not in (0, 143)), said[0])
        raise HasteError(first.removeprefix("haste: error: "))
    print(_result(arguments))


def _start(arguments: argparse.Namespace, worker: int, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "haste_core.study.cli", "sample", arguments.study, arguments.arm]
    for name in ("seed", "profile", "step", "n", "first_seed", "sampler", "out", "processes", "shard_size"):
        value = getattr(arguments, name)
        words += [f"--{name.replace('_', '-')}={value}"] if value is not None else []
    words += [f"--set={override}" for override in arguments.overrides]
    # A stop on the terminal reaches the leader alone, which passes it on.
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*words, f"--worker={worker}"], stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True
        )


def _watch(arguments: argparse.Namespace, folder: Path, workers: list[subprocess.Popen[bytes]], stopping: Any) -> bool:
    """Wait for the workers while a bar shows the images in shards; True when one failed."""
    from tqdm.auto import tqdm

    with tqdm(total=arguments.n, desc=f"sampling by {len(workers)}", unit="image", mininterval=1.0) as bar:
        while any(worker.poll() is None for worker in workers):
            if stopping.wait(0.5):
                return False
            drawn = min(arguments.n, arguments.shard_size * len(list(folder.glob("shards/[0-9]*.npy"))))
            bar.update(drawn - bar.n)
            if any(worker.poll() not in (None, 0) for worker in workers):
                return True
        bar.update(arguments.n - bar.n)
    return any(worker.returncode for worker in workers)


def _last_line(log: Path) -> str:
    """What a worker said of its end: its error if it named one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("haste: error: ")]
    return (named or lines or ["a worker of haste sample ended without a word"])[-1]
