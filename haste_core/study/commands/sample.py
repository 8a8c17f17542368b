"""haste sample: images of a trained run, a sheet of a few or a set of many thousands in shards."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste_core.errors import HasteError, unknown
from haste_core.processes import launched
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
        help="a .png sheet, a .npz of uint8 images arr_0 (n, S, S, C), or a folder for shards and FOLDER/samples.npz "
        "with 3 channels, the format of ADM's tools (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument("--processes", type=int, default=1, help="processes that draw (default: %(default)s)")
    sub.add_argument(
        "--shard-size", type=int, default=SHARD_SIZE,
        help="images that are drawn and saved at a time (default: %(default)s)",
    )  # fmt: skip
    sub.set_defaults(action=run)


def _presets() -> str:
    lines = [f"  {name:16}{', '.join(f'{k} {v}' for k, v in fields.items())}" for name, fields in SAMPLERS.items()]
    return "\n".join(
        [
            "samplers (Tables 1, 13, 15 and 16, arXiv 2505.16792):",
            *lines,
            "",
            "A folder, or a .npz of more images than --shard-size, is drawn in shards: the same command resumes after",
            "an interruption. torchrun ... -m -- haste_core.study.cli sample ... divides it among several machines.",
        ]
    )


def run(arguments: argparse.Namespace) -> None:
    """Draw the images and print where they are."""
    _check(arguments)
    if arguments.processes > 1:
        _launch(arguments)
    elif _in_shards(arguments):
        if not _draw_set(arguments, _find_run(arguments)):
            return
    else:
        _draw_few(arguments, _find_run(arguments))
    print(_result(arguments))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix not in (".png", ".npz", ""):
        raise HasteError(f"--out {arguments.out}; expected a name ending in .png or .npz, or a folder")
    for name, least in (("n", 1), ("first_seed", 0), ("processes", 1), ("shard_size", 1)):
        if getattr(arguments, name) < least:
            raise HasteError(f"--{name.replace('_', '-')} {getattr(arguments, name)}; expected {least} and above")
    if arguments.out.suffix == ".png" and arguments.processes > 1:
        raise HasteError(f"--processes {arguments.processes} with --out {arguments.out}; expected .npz or a folder")
    if arguments.sampler is not None and arguments.sampler not in SAMPLERS:
        raise unknown("--sampler", arguments.sampler, SAMPLERS)


def _in_shards(arguments: argparse.Namespace) -> bool:
    many = arguments.n > arguments.shard_size or launched() > 1
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

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    step = arguments.step if arguments.step is not None else max(found.steps(), default=found.config.train.steps)
    return *evaluation.generator_at(found, step), step


def _draw_few(arguments: argparse.Namespace, found: Run) -> None:
    """A sheet, or an .npz file that fits into memory."""
    import numpy as np

    from haste_core import sampling
    from haste_core.files import write_bytes
    from haste_core.study import images, latents

    model, _, _ = _generator(arguments, found)
    study = found.study
    labels = sampling.sample_labels(arguments.n, model.classes, study.evaluate.labels, arguments.first_seed)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.n)
    x = sampling.draw(model, labels, seeds, found.sample.options, "sampling")
    drawn = sampling.to_uint8(latents.to_images(x, study.data, found.sample))
    if arguments.out.suffix == ".png":
        images.save_grid(drawn, arguments.out, columns=min(10, arguments.n))
        return
    stream = io.BytesIO()
    np.savez(stream, arr_0=drawn.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    write_bytes(arguments.out, stream.getvalue())


def _draw_set(arguments: argparse.Namespace, found: Run) -> bool:
    """Draw this process's shards; the process that finds all of them writes the .npz file and returns True."""
    import torch

    from haste_core.study.launching import rank
    from haste_core.study.samples import SampleSet, drawer, plan

    # The same bits for any number of processes.
    torch.set_num_threads(found.config.train.threads)
    model, fingerprint, step = _generator(arguments, found)
    sizes = (arguments.n, arguments.first_seed, arguments.shard_size)
    samples = SampleSet(_folder(arguments), plan(found, step, fingerprint, model.classes, *sizes))
    merged = not arguments.out.suffix and samples.merged.is_file()
    if not merged:
        draw = drawer(model, found.study.data, found.sample)
        samples.fill(draw, found.sample.batch_size, "sampling", rank(), launched())
        if samples.missing():
            return False
    samples.merge(_result(arguments), None if arguments.out.suffix else 3)
    return True


def _launch(arguments: argparse.Namespace) -> None:
    """Draw a set by several processes."""
    from tqdm.auto import tqdm

    from haste_core.study.launching import launch

    words = ["sample", arguments.study, arguments.arm]
    for name in ("seed", "profile", "step", "n", "first_seed", "sampler", "out", "shard_size"):
        value = getattr(arguments, name)
        words += [f"--{name.replace('_', '-')}={value}"] if value is not None else []
    words += [f"--set={override}" for override in arguments.overrides]
    folder, n = _folder(arguments), arguments.n

    def drawn() -> tuple[int, int]:
        return min(n, arguments.shard_size * len(list(folder.glob("shards/[0-9]*.npy")))), n

    bar = tqdm(desc=f"sampling by {arguments.processes}", unit="image", mininterval=1.0)
    launch(words, arguments.processes, folder.parent, drawn, bar)
