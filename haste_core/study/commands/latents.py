"""haste latents: encode a labelled set of images by a VAE, or check a folder that was made so."""

from __future__ import annotations

import argparse
from typing import Any

from haste_core.errors import HasteError


def add(commands: Any) -> None:
    """Add the sub-parser."""
    text = "prepare latents: encode labelled images by a VAE into a folder for data.kind 'latents'"
    sub = commands.add_parser("latents", help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument(
        "source", nargs="?",
        help="images: a folder with one sub-folder per class, a .parquet file or a folder of them, or a hub name",
    )  # fmt: skip
    sub.add_argument("out", nargs="?", help="the folder to make; one that was stopped goes on where it was")
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
    from haste_core.study.latents import encode
    from haste_core.study.latents.workspace import Job

    if arguments.check is not None:
        if arguments.source is not None:
            raise HasteError("haste latents --check FOLDER takes no source; possible: haste latents --check FOLDER")
        out, manifest = arguments.check, encode.check(arguments.check)
    else:
        if arguments.source is None or arguments.out is None:
            raise HasteError("haste latents needs a source and a folder to make; possible: haste latents SOURCE OUT")
        out = arguments.out
        job = Job(
            arguments.source, out, arguments.vae, arguments.size, arguments.split, arguments.batch_size,
            arguments.shard_size, arguments.device,
        )  # fmt: skip
        manifest = encode.prepare(job, arguments.processes)
    channels, side, _ = manifest.latent_shape
    print(f"{out}: {manifest.count} images of {manifest.image_size} pixels in {manifest.classes} classes, latents "
          f"{channels}x{side}x{side} of {manifest.vae.name}, scale {manifest.vae.scale}")  # fmt: skip
