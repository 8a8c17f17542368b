"""haste score: the ADM scores of any .npz file of images, of this project or not."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste_core.errors import HasteError
from haste_core.study import config

if TYPE_CHECKING:
    from haste_core.study.images import Images


def add(commands: Any) -> None:
    """Add the command to the command line."""
    text = "score any images by the ADM protocol: FID, sFID, IS, precision, recall, and a distance on DINOv2"
    defaults = config.Evaluate(suite="adm")
    sub = commands.add_parser("score", help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument(
        "samples", type=Path, help="an .npz file with uint8 images arr_0 (n, S, S, 3), or a folder of haste sample"
    )
    sub.add_argument(
        "--reference", required=True, metavar="REF",
        help="an ADM .npz with mu, sigma, mu_s, sigma_s or images arr_0, or a study, whose training images it is",
    )  # fmt: skip
    sub.add_argument("--profile", help="a profile of that study")
    sub.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting of that study, for instance data.path=FOLDER; may be repeated",
    )  # fmt: skip
    sub.add_argument(
        "--inception", default=defaults.inception, metavar="PATH",
        help="local weights of torch-fidelity's Inception; hub downloads them (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--dinov2", default=defaults.dinov2, metavar="PATH",
        help="local DINOv2 weights; hub downloads them, none leaves that score out (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument("--dinov2-model", default=defaults.dinov2_model, help="timm's name (default: %(default)s)")
    sub.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, help="images at a time, on a CPU at most 50"
    )
    sub.add_argument("--out", type=Path, metavar="FILE.json", help="also write scores and card there")
    sub.set_defaults(action=run)


def run(arguments: argparse.Namespace) -> None:
    """Score, print, and write if asked to."""
    if arguments.out is not None and arguments.out.suffix != ".json":
        raise HasteError(f"--out {arguments.out}; possible: a name ending in .json")
    if arguments.batch_size < 1:
        raise HasteError(f"--batch-size {arguments.batch_size}; possible: 1 and above")
    from haste_core.files import write_json
    from haste_core.study.adm import AdmScorer

    is_file = arguments.reference.endswith(".npz")
    data = None if is_file else config.load(arguments.reference, arguments.profile, arguments.overrides).data
    evaluate = config.Evaluate(
        suite="adm",
        reference=arguments.reference if is_file else None,
        inception=arguments.inception,
        dinov2=arguments.dinov2,
        dinov2_model=arguments.dinov2_model,
        batch_size=arguments.batch_size,
    )
    images, facts = open_samples(arguments.samples)
    scorer = AdmScorer(evaluate, data)
    scores = scorer.score(images)
    card = {"suite": "adm", "n": len(images), **facts, **scorer.facts}
    card["card_id"] = config.digest(card)
    for name, value in scores.items():
        print(f"{name:>10}  " + ("not available" if math.isnan(value) else f"{value:.4f}"))
    for name in ("n", "samples", "reference", "card_id"):
        print(f"{name:>10}  {card[name]}")
    if arguments.out is not None:
        # JSON knows no nan.
        known = {name: None if math.isnan(value) else value for name, value in scores.items()}
        write_json(arguments.out, {"scores": known, "card": card})


def open_samples(path: Path) -> tuple[Images, dict[str, Any]]:
    """The images of an .npz file or of a folder of `haste sample`, and what the card says of them.

    Raises:
        HasteError: there are none, or the folder's set is not finished.
    """
    from haste_core.study.images import NpzImages, file_hash

    if not path.is_dir():
        return NpzImages(path), {"samples": path.name, "samples_hash": file_hash(path)}
    from haste_core.study.samples import SampleSet, read_manifest

    manifest = read_manifest(path)
    samples = SampleSet(path, manifest)
    facts = {"samples": path.name, "manifest": manifest}
    if samples.merged.is_file():
        return NpzImages(samples.merged), facts
    if samples.missing():
        raise HasteError(f"{path}: {samples.drawn()} of {samples.n} images are drawn; possible: finish haste sample")
    return samples, facts
