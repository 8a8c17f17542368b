"""Commands on files: images (sample, score), latents, and checkpoints of other projects (convert)."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from haste_core.errors import HasteError, unknown
from haste_core.processes import launched
from haste_core.study import config
from haste_core.study.presets import SAMPLERS

if TYPE_CHECKING:
    from haste_core.released import Layout, Reference
    from haste_core.study.data.latents import Manifest
    from haste_core.study.images import Images
    from haste_core.study.latents import Job
    from haste_core.study.runs import Run


# -- sample ------------------------------------------------------------------------------------------------------

SHARD_SIZE = 1000
# What --sampler decides; of the rest of `sample`, batch size and VAE stay the study's.
_PRESET_FIELDS = ("sampler", "solver_steps", "grid", "guidance", "guidance_low", "guidance_high", "guidance_channels")


def add_sample(add: Callable[..., Any]) -> None:
    """Add the command to the command line. add: adds a command on a run (`haste_core.study.cli`)."""
    sub = add("sample", sample, "draw images from a trained run's averaged weights", arm=True)
    sub.epilog, sub.formatter_class = _presets(), argparse.RawDescriptionHelpFormatter
    sub.add_argument("--step", type=int, help="which checkpoint (default: the last)")
    sub.add_argument("--n", type=int, default=100, help="number of images (default: %(default)s)")
    sub.add_argument("--first-seed", type=int, default=0, help="seed of the first image; the i-th has the next and the "
                     "i-th label (default: %(default)s)")  # fmt: skip
    sub.add_argument("--sampler", metavar="PRESET", help="one of the settings below; --set sample.KEY=VALUE wins")
    sub.add_argument("--out", type=Path, default=Path("samples.png"), help="a .png sheet, a .npz of uint8 images arr_0 "
                     "(n, S, S, C), or a folder for shards and FOLDER/samples.npz with 3 channels, the format of ADM's "
                     "tools (default: %(default)s)")  # fmt: skip
    sub.add_argument("--processes", type=int, default=1, help="processes that draw (default: %(default)s)")
    sub.add_argument("--shard-size", type=int, default=SHARD_SIZE,
                     help="images that are drawn and saved at a time (default: %(default)s)")  # fmt: skip


def _presets() -> str:
    lines = (f"  {name:16}{', '.join(f'{k} {v}' for k, v in fields.items())}\n" for name, fields in SAMPLERS.items())
    return f"""samplers (Tables 1, 13, 15 and 16, arXiv 2505.16792):
{"".join(lines)}
A folder, or a .npz of more images than --shard-size, is drawn in shards: the same command resumes after
an interruption. torchrun ... -m -- haste_core.study.cli sample ... divides it among several machines."""


def sample(arguments: argparse.Namespace) -> None:
    """haste sample: draw the images and print where they are."""
    _check_sample(arguments)
    if arguments.processes > 1:
        _launch_sample(arguments)
    elif _in_shards(arguments):
        if not _draw_set(arguments, _find_run(arguments)):
            return
    else:
        _draw_few(arguments, _find_run(arguments))
    print(_result(arguments))


def _check_sample(arguments: argparse.Namespace) -> None:
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
    """The folder of the shards."""
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
    chosen = config.SampleSettings(preset=name).model_dump()
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


def _launch_sample(arguments: argparse.Namespace) -> None:
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


# -- score -------------------------------------------------------------------------------------------------------


def add_score(commands: Any) -> None:
    """Add the command to the command line."""
    text = "score any images by the ADM protocol: FID, sFID, IS, precision, recall, and a distance on DINOv2"
    defaults = config.EvaluateSettings(suite="adm")
    sub = commands.add_parser("score", help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("samples", type=Path,
                     help="an .npz file with uint8 images arr_0 (n, S, S, 3), or a folder of haste sample")  # fmt: skip
    sub.add_argument("--reference", required=True, metavar="REF", help="an ADM .npz with mu, sigma, mu_s, sigma_s or "
                     "images arr_0, or a study, whose training images it is")  # fmt: skip
    sub.add_argument("--profile", help="a profile of that study")
    sub.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                     help="override a setting of that study, such as data.path=FOLDER; may be repeated")  # fmt: skip
    sub.add_argument("--inception", default=defaults.inception, metavar="PATH", help="local weights of "
                     "torch-fidelity's Inception; hub downloads them (default: %(default)s)")  # fmt: skip
    sub.add_argument("--dinov2", default=defaults.dinov2, metavar="PATH", help="local DINOv2 weights; hub downloads "
                     "them, none leaves that score out (default: %(default)s)")  # fmt: skip
    sub.add_argument("--dinov2-model", default=defaults.dinov2_model, help="timm's name (default: %(default)s)")
    sub.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, help="images at a time, at most 50 on a CPU"
    )
    sub.add_argument("--out", type=Path, metavar="FILE.json", help="also write scores and card there")
    sub.set_defaults(action=score)


def score(arguments: argparse.Namespace) -> None:
    """haste score: print the scores, and write them with --out."""
    if arguments.out is not None and arguments.out.suffix != ".json":
        raise HasteError(f"--out is {arguments.out}; expected a name ending in .json")
    if arguments.batch_size < 1:
        raise HasteError(f"--batch-size is {arguments.batch_size}; expected 1 and above")
    from haste_core.files import write_json
    from haste_core.study.adm import AdmScorer

    is_file = arguments.reference.endswith(".npz")
    data = None if is_file else config.load(arguments.reference, arguments.profile, arguments.overrides).data
    evaluate = config.EvaluateSettings(
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
        raise HasteError(
            f"{path}: {samples.drawn()} of {samples.n} images are drawn; run the same haste sample again to finish"
        )
    return samples, facts


# -- latents -----------------------------------------------------------------------------------------------------


def add_latents(commands: Any) -> None:
    """Add the command to the command line."""
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
    sub.set_defaults(action=encode)


def encode(arguments: argparse.Namespace) -> None:
    """haste latents: encode or check, and print one line about the folder."""
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
            _launch_encoding(job, arguments.processes)
            manifest = latents.read_manifest(Path(out))
        else:
            manifest = latents.prepare(job, rank(), launched())
    if manifest is None:  # the first process prints it
        return
    channels, side, _ = manifest.latent_shape
    print(f"{out}: {manifest.count} images of {manifest.image_size} pixels in {manifest.classes} classes, latents "
          f"{channels}x{side}x{side} of {manifest.vae.name}, scale {manifest.vae.scale}")  # fmt: skip


def _launch_encoding(job: Job, processes: int) -> None:
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


# -- convert -----------------------------------------------------------------------------------------------------

_CONVERT = """Convert a checkpoint, executing nothing from it, and say what it holds.

SOURCE is a checkpoint of DiT, SiT, REPA or HASTE (.pt, .pth, .safetensors), or one of a run of this package
(runs/<study>/<arm>-<hash>/seed<k>/checkpoints/step_<n>.safetensors). OUT holds plain tensors in float32 and this
package's convention (t=0 is data): a .pt in the released layout, {"model": ..., "ema": ...}, or a .safetensors with
one state dict. Projectors are kept."""
_CONVERT_EXAMPLES = """examples:
  haste convert SiT-XL-2-256x256.pt sit.safetensors --family sit     SiT's own release
  haste convert DiT-XL-2-256x256.pt dit.safetensors --family dit
  haste convert 0400000.pt haste.safetensors                         REPA or HASTE, its averaged weights
  haste convert runs/digits/haste-<hash>/seed0/checkpoints/step_00002000.safetensors haste.pt
"""


def add_convert(commands: Any) -> None:
    """Add the command to the command line."""
    sub = commands.add_parser(
        "convert", help="convert a checkpoint of DiT, SiT, REPA, HASTE or of a run, and say what it holds",
        description=_CONVERT, epilog=_CONVERT_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sub.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint to read")
    sub.add_argument("out", type=Path, metavar="OUT", help="the file to write, ending in .pt or .safetensors")
    sub.add_argument("--family", choices=("sit", "dit", "mmdit"),
                     help="what SOURCE is; needed where DiT and SiT's own release look the same")  # fmt: skip
    sub.add_argument("--heads", type=int, metavar="N", help="attention heads, where SOURCE does not give them away")
    sub.add_argument("--weights", choices=("ema", "model"),
                     help="which weights (default: ema where there are any; both, from a run to a .pt)")  # fmt: skip
    sub.add_argument("--convention", choices=("auto", "haste", "sit"), default="auto",
                     help="where SOURCE has data: haste t=0, sit t=1 (default: %(default)s)")  # fmt: skip
    sub.add_argument("--image-size", type=int, metavar="N",
                     help="side of what is modelled, where SOURCE does not hold positions")  # fmt: skip
    sub.set_defaults(action=convert)


def convert(arguments: argparse.Namespace) -> None:
    """haste convert: convert, and print one line."""
    from haste_core import released

    source, out = arguments.source, arguments.out
    released.check_suffix(out, released.WRITABLE)
    if out.exists() and source.exists() and out.samefile(source):
        raise HasteError(f"{out} is the source itself; expected another name")
    if out.is_dir():
        raise HasteError(f"{out} is a folder; expected a name ending in {' or '.join(released.WRITABLE)}")
    content = released.read(source)
    tensors, which = released.read_weights(content, arguments.weights)
    family, heads = _known(source, arguments)
    layout = released.infer(tensors, family, heads, arguments.convention, arguments.image_size)
    reference = released.Reference(
        released.generator(tensors, layout), released.projectors(tensors, layout.sizes["width"])
    )
    plain = layout.convention == "haste" and not layout.doubled
    if plain and released.is_run(content) and arguments.weights is None and out.suffix.lower() == ".pt":
        which = "ema and model"
        released.export(content, out)
    else:
        released.save_reference(out, *reference)
    print(f"{out}: {_describe(reference, layout)}, weights {which}")


def _describe(reference: Reference, layout: Layout) -> str:
    """One line on a generator: family, sizes, parameters in millions, projectors and the source's convention."""
    sizes, millions = layout.sizes, sum(p.numel() for p in reference.generator.parameters()) / 1e6
    side, text = sizes["image_size"], f"{sizes['classes']} classes"
    if layout.family == "mmdit":
        text = f"text width {sizes['context_width']}"
    norm = ", q/k norm" if sizes.get("qk_norm") else ""
    shapes = ["-".join(str(n) for n in _widths(one)) for one in reference.projectors]
    return (
        f"{layout.family}, depth {sizes['depth']}, width {sizes['width']}, heads {sizes['heads']}, patch "
        f"{sizes['patch']}{norm}, {sizes['channels']}x{side}x{side}, {text}, {millions:.2f} M parameters, projectors "
        f"{', '.join(shapes) or 'none'}, convention {layout.convention}"
    )


def _widths(projector: Any) -> list[int]:
    linear = [m for m in projector if hasattr(m, "out_features")]
    return [linear[0].in_features, *(m.out_features for m in linear)]


def _known(source: Path, arguments: argparse.Namespace) -> tuple[Any, int | None]:
    """Family and heads: those given, or for a run's checkpoint those in the configuration beside it."""
    described = source.resolve().parent.parent / "config.yaml"
    if source.parent.name != "checkpoints" or not described.is_file():
        return arguments.family, arguments.heads
    try:
        model = yaml.safe_load(described.read_text())["model"]
        kind, heads = str(model["kind"]), int(model["heads"])
    except (yaml.YAMLError, OSError, KeyError, TypeError, ValueError) as error:
        raise HasteError(f"{described} is no run's configuration ({type(error).__name__})") from error
    for name, given, found in (("--family", arguments.family, kind), ("--heads", arguments.heads, heads)):
        if given not in (None, found):
            raise HasteError(f"{name} {given} contradicts {described}; expected {found}")
    return kind, heads
