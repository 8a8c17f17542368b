"""haste latents: encode a labelled set of images by a VAE, or check a folder that was made so."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste_core.errors import HasteError

if TYPE_CHECKING:
    from haste_core.study.data.latents import Manifest
    from haste_core.study.latents import Job


def add(commands: Any) -> None:
    """Add the sub-parser."""
    text = "prepare latents: encode labelled images by a VAE into a folder for data.kind 'latents'"
    sub = commands.add_parser("latents", help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument(
        "source", nargs="?",
        help="images: a folder with one sub-folder per class, a .parquet file or a folder of them, or a hub name",
    )  # fmt: skip
    sub.add_argument("out", nargs="?", help="the folder to make; an interrupted one is resumed")
    sub.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="hub name or folder (default: %(default)s)")
    sub.add_argument("--size", type=int, default=256, help="side of the images in pixels (default: %(default)s)")
    sub.add_argument("--split", default="train", help="which split of the source (default: %(default)s)")
    sub.add_argument("--processes", type=int, default=1, help="processes side by side (default: %(default)s)")
    sub.add_argument("--batch-size", type=int, default=32, help="images encoded at a time (default: %(default)s)")
    sub.add_argument("--shard-size", type=int, default=1000, help="images per sub-folder (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    sub.add_argument("--check", metavar="FOLDER", help="read a folder again and compare it with its manifest")
    sub.set_defaults(action=run)


def run(arguments: argparse.Namespace) -> None:
    """Encode or check, and print one line about the folder."""
    from haste_core.study import latents
    from haste_core.study.launching import launched, rank

    if arguments.processes < 1:
        raise HasteError(f"--processes {arguments.processes}; expected 1 and above")
    if arguments.check is not None:
        if arguments.source is not None:
            raise HasteError("haste latents --check FOLDER takes no source; expected: haste latents --check FOLDER")
        out = arguments.check
        manifest: Manifest | None = latents.check(out)
    else:
        if arguments.source is None or arguments.out is None:
            raise HasteError("haste latents needs a source and a folder to make; expected: haste latents SOURCE OUT")
        out = arguments.out
        job = latents.Job(
            arguments.source, out, arguments.vae, arguments.size, arguments.split, arguments.batch_size,
            arguments.shard_size, arguments.device,
        )  # fmt: skip
        if arguments.processes > 1:
            _launch(job, arguments.processes)
            manifest = latents.read_manifest(Path(out))
        else:
            manifest = latents.prepare(job, rank(), launched())
    if manifest is None:  # the first process prints it
        return
    channels, side, _ = manifest.latent_shape
    print(f"{out}: {manifest.count} images of {manifest.image_size} pixels in {manifest.classes} classes, latents "
          f"{channels}x{side}x{side} of {manifest.vae.name}, scale {manifest.vae.scale}")  # fmt: skip


def _launch(job: Job, processes: int) -> None:
    """Make the folder by several processes."""
    from tqdm.auto import tqdm

    from haste_core.study.launching import launch

    work = Path(job.out) / ".work"

    def encoded() -> tuple[int, int]:
        try:
            count = json.loads((work / "settings.json").read_text())["count"]
        except OSError:  # not begun, or finished
            return 0, 0
        return min(count, job.shard_size * len(list(work.glob("[0-9]*.json")))), count

    words = ["latents", job.source, job.out]
    words += [
        f"--{name.replace('_', '-')}={value}" for name, value in vars(job).items() if name not in ("source", "out")
    ]
    bar = tqdm(desc=f"latents by {processes}", unit="image", mininterval=1.0)
    launch(words, processes, Path(job.out).parent, encoded, bar)
