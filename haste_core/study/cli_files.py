"""Commands on files: images (sample, score), latents, and checkpoints of other projects (convert)."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from haste_core.errors import HasteError, number_of, unknown
from haste_core.files import write_json
from haste_core.study import config
from haste_core.study.presets import SAMPLERS
from haste_core.study.runs import Run

# Commands import what they need: torch alone takes seconds.
if TYPE_CHECKING:
    from haste_core import released
    from haste_core.study.images import Images

# -- sample ------------------------------------------------------------------------------------------------------

# What --sampler decides; of the rest of `sample`, batch size and VAE stay the study's.
_PRESET_FIELDS = ("sampler", "solver_steps", "grid", "guidance", "guidance_low", "guidance_high", "guidance_channels")


def add_sample(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of haste sample."""
    presets = (f"  {name:16}{', '.join(f'{k} {v}' for k, v in fields.items())}\n" for name, fields in SAMPLERS.items())
    sub.epilog = f"""samplers (Tables 1, 13, 15 and 16, arXiv 2505.16792):
{"".join(presets)}
A folder, or a .npz of more images than --shard-size, is drawn in shards: the same command resumes after
an interruption. torchrun ... -m -- haste_core.study.cli sample ... divides it among several machines."""
    sub.add_argument("--step", type=int, help="which checkpoint (default: the last)")
    sub.add_argument("--n", type=int, default=100, help="number of images (default: %(default)s)")
    sub.add_argument("--first-seed", type=int, default=0, help="seed of the first image; the i-th has the next and the "
                     "i-th label (default: %(default)s)")  # fmt: skip
    sub.add_argument("--sampler", metavar="PRESET", help="one of the settings below; --set sample.KEY=VALUE wins")
    sub.add_argument("--out", type=Path, default=Path("samples.png"), help="a .png sheet, a .npz of uint8 images arr_0 "
                     "(n, S, S, C), or a folder for shards and FOLDER/samples.npz with 3 channels, the format of ADM's "
                     "tools (default: %(default)s)")  # fmt: skip
    sub.add_argument("--processes", type=int, default=1, help="processes that draw (default: %(default)s)")
    sub.add_argument("--shard-size", type=int, default=1000,
                     help="images that are drawn and saved at a time (default: %(default)s)")  # fmt: skip


def sample(arguments: argparse.Namespace) -> None:
    """haste sample: draw the images and print where they are."""
    from haste_core.processes import launched

    out, processes = arguments.out, arguments.processes
    if out.suffix not in (".png", ".npz", ""):
        raise HasteError(f"--out {out}; expected a name ending in .png or .npz, or a folder")
    if out.suffix == ".png" and max(processes, launched()) > 1:
        raise HasteError(f"--processes {processes} with --out {out}; expected .npz or a folder")
    if arguments.sampler is not None and arguments.sampler not in SAMPLERS:
        raise unknown("--sampler", arguments.sampler, SAMPLERS)
    many = processes > 1 or arguments.n > arguments.shard_size or launched() > 1
    result = out if out.suffix else out / "samples.npz"
    with tempfile.TemporaryDirectory() as temporary:
        shards = out.with_suffix(".shards") if out.suffix == ".npz" and many else Path(temporary)
        folder = shards if out.suffix else out
        if processes > 1:
            _draw_by_processes(arguments, folder)
        elif not _draw(arguments, folder, result):
            return
    print(result)


def preset_overrides(name: str | None) -> list[str]:
    """Overrides that set everything a sampler preset decides; what it does not name goes to its default."""
    if name is None:
        return []
    chosen = config.SampleSettings(preset=name).model_dump()
    values = {field: "null" if chosen[field] is None else chosen[field] for field in _PRESET_FIELDS}
    return [f"sample.preset={name}", *(f"sample.{field}={value}" for field, value in values.items())]


def _draw(arguments: argparse.Namespace, folder: Path, result: Path) -> bool:
    """Draw this process's shards into `folder`; the process that finds all of them writes `result` and returns True."""
    import torch

    from haste_core.processes import launched, local_rank, rank
    from haste_core.study import evaluation
    from haste_core.study.data import open_dataset
    from haste_core.study.images import save_grid
    from haste_core.study.samples import SampleSet, drawer, plan

    overrides = [*preset_overrides(arguments.sampler), *arguments.overrides]
    run = Run(config.load(arguments.study, arguments.profile, overrides), arguments.arm, arguments.seed)
    # The same bits for any number of processes.
    torch.set_num_threads(run.config.train.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    step = arguments.step if arguments.step is not None else max(run.steps(), default=run.config.train.steps)
    model, fingerprint = evaluation.generator_at(run, step)
    sizes = (arguments.n, arguments.first_seed, arguments.shard_size)
    dataset = open_dataset(run.config.data)
    samples = SampleSet(folder, plan(run, step, fingerprint, dataset.sampled, *sizes))
    if arguments.out.suffix or not samples.merged.is_file():
        draw = drawer(model, run.study.data, run.sample)
        samples.fill(draw, run.sample.batch_size, "sampling", rank(), launched())
        if samples.missing():
            return False
    if result.suffix == ".png":
        pictures = torch.cat(list(samples.batches(arguments.shard_size)))
        told = dataset.captions
        texts = None if told is None else [told.texts[i] for i in samples.labels().tolist()]
        save_grid(pictures, result, columns=min(10, arguments.n), captions=texts)
    else:
        samples.merge(result, None if arguments.out.suffix else 3)
    return True


def _draw_by_processes(arguments: argparse.Namespace, folder: Path) -> None:
    from tqdm.auto import tqdm

    from haste_core.study.launching import launch

    def drawn() -> tuple[int, int]:
        shards = len(list(folder.glob("shards/[0-9]*.npy")))
        return min(arguments.n, arguments.shard_size * shards), arguments.n

    bar = tqdm(desc=f"sampling by {arguments.processes}", unit="image", mininterval=1.0)
    launch([*arguments.words, "--processes=1"], arguments.processes, folder.parent, drawn, bar)


# -- score -------------------------------------------------------------------------------------------------------


def add_score(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of haste score."""
    defaults = config.EvaluateSettings(suite="adm")
    sub.add_argument("samples", type=Path,
                     help="a folder of images (PNG, JPEG, WebP), or of haste sample, or an .npz file with uint8 images "
                     "arr_0 (n, S, S, 3)")  # fmt: skip
    sub.add_argument("--reference", required=True, metavar="REF", help="a folder of images, an ADM .npz with mu, "
                     "sigma, mu_s, sigma_s or images arr_0, or a study, whose training images it is")  # fmt: skip
    sub.add_argument("--resize", type=int, metavar="N", help="crop and resize images of folders to N pixels a side")
    sub.add_argument("--inception", default=defaults.inception, metavar="PATH", help="local weights of "
                     "torch-fidelity's Inception; hub downloads them (default: %(default)s)")  # fmt: skip
    sub.add_argument("--dinov2", default=defaults.dinov2, metavar="PATH", help="local DINOv2 weights; hub downloads "
                     "them, none leaves that score out (default: %(default)s)")  # fmt: skip
    sub.add_argument("--dinov2-model", default=defaults.dinov2_model, help="timm's name (default: %(default)s)")
    sub.add_argument("--batch-size", type=int, default=defaults.batch_size,
                     help="images at a time, at most 50 on a CPU (default: %(default)s)")  # fmt: skip
    sub.add_argument("--out", type=Path, metavar="FILE.json", help="also write scores and card there")


def score(arguments: argparse.Namespace) -> None:
    """haste score: print the scores, and write them with --out."""
    if arguments.out is not None and arguments.out.suffix != ".json":
        raise HasteError(f"--out is {arguments.out}; expected a name ending in .json")
    from haste_core.study.adm import AdmScorer

    folders = arguments.samples.is_dir(), Path(arguments.reference).is_dir()
    if arguments.resize is not None and not any(folders):
        raise HasteError(f"--resize {arguments.resize} is for folders of images; expected none for .npz files")
    is_file = arguments.reference.endswith(".npz") or folders[1]
    if not is_file and "/" in arguments.reference and not Path(arguments.reference).exists():
        raise HasteError(f"--reference {arguments.reference} is not there; expected a folder, an .npz or a study")
    data = None if is_file else config.load(arguments.reference, arguments.profile, arguments.overrides).data
    evaluate = config.EvaluateSettings(
        suite="adm",
        reference=arguments.reference if is_file else None,
        resize=arguments.resize,
        inception=arguments.inception,
        dinov2=arguments.dinov2,
        dinov2_model=arguments.dinov2_model,
        batch_size=arguments.batch_size,
    )
    images, facts = _open_samples(arguments.samples, arguments.resize)
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


def _open_samples(path: Path, resize: int | None) -> tuple[Images, dict[str, Any]]:
    """The images of an .npz file, of a folder of `haste sample` or of any folder, and what the card says of them."""
    from haste_core.study.images import FolderImages, NpzImages, file_hash
    from haste_core.study.samples import SampleSet, read_manifest

    if not path.is_dir():
        return NpzImages(path), {"samples": path.name, "samples_hash": file_hash(path)}
    manifest = read_manifest(path) if (path / "manifest.json").is_file() else {}
    if "shard_size" not in manifest:  # no manifest of ours
        images = FolderImages(path, resize)
        facts = images.facts()
        return images, {"samples": path.name, "samples_hash": facts.pop("hash"), **facts}
    if resize is not None:
        raise HasteError(f"--resize {resize}: {path} was drawn by haste sample, which is scored as it is; leave it out")
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


def add_latents(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of haste latents."""
    sub.add_argument("source", nargs="?", help="images: a folder with one sub-folder per class or with captions, a "
                     ".parquet file or a folder of them, or a hub name")  # fmt: skip
    sub.add_argument("out", nargs="?", help="the folder to make; an interrupted one is resumed")
    sub.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="hub name or folder (default: %(default)s)")
    sub.add_argument("--size", type=int, default=256, help="side of the images in pixels (default: %(default)s)")
    sub.add_argument("--split", default="train", help="which split of the source (default: %(default)s)")
    sub.add_argument("--processes", type=int, default=1, help="processes side by side (default: %(default)s)")
    sub.add_argument("--batch-size", type=int, default=32, help="images encoded at a time (default: %(default)s)")
    sub.add_argument("--shard-size", type=int, default=1000, help="images per sub-folder (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    sub.add_argument("--image-column", metavar="NAME", help="of SOURCE, where more than one could be meant")
    sub.add_argument(
        "--label-column", metavar="NAME", help="of SOURCE, where more than one could be meant; may be text"
    )
    sub.add_argument(
        "--caption-column", metavar="NAME", help="of SOURCE, whose texts become captions in place of classes"
    )
    sub.add_argument("--check", metavar="FOLDER", help="read a folder again and compare it with its manifest")


def encode(arguments: argparse.Namespace) -> None:
    """haste latents: encode or check, and print one line about the folder."""
    from haste_core.processes import launched, rank
    from haste_core.study import latents

    given = [place for place in (arguments.source, arguments.out) if place is not None]
    if len(given) != (2 if arguments.check is None else 0):
        raise HasteError(
            f"haste latents got {given}; expected: haste latents SOURCE OUT, or haste latents --check FOLDER"
        )
    out = arguments.check or arguments.out
    if arguments.check is not None:
        manifest: Any = latents.check(out)
    elif arguments.processes > 1:
        _encode_by_processes(arguments)
        manifest = latents.read_manifest(Path(out))
    else:
        names = ("source", "out", "vae", "size", "split", "batch_size", "shard_size", "device", "image_column",
                 "label_column", "caption_column")  # fmt: skip
        manifest = latents.prepare(
            latents.Job(**{name: getattr(arguments, name) for name in names}), rank(), launched()
        )
    if manifest is None:  # the first process prints it
        return
    channels, side, _ = manifest.latent_shape
    captioned = (Path(out) / "captions.json").is_file()
    print(f"{out}: {number_of(manifest.count, 'image')} of {manifest.image_size} pixels "
          f"{'with captions' if captioned else 'in ' + number_of(manifest.classes, 'class')}, latents "
          f"{channels}x{side}x{side} of {manifest.vae.name}, scale {manifest.vae.scale}")  # fmt: skip


def _encode_by_processes(arguments: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from haste_core.study.launching import launch

    work = Path(arguments.out) / ".work"

    def encoded() -> tuple[int, int]:
        try:
            count = json.loads((work / "settings.json").read_text())["count"]
        except OSError:  # not begun, or finished
            return 0, 0
        return min(count, arguments.shard_size * len(list(work.glob("[0-9]*.json")))), count

    bar = tqdm(desc=f"latents by {arguments.processes}", unit="image", mininterval=1.0)
    words = [*arguments.words, "--processes=1"]
    launch(words, arguments.processes, Path(arguments.out).parent, encoded, bar)


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


def add_convert(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of haste convert."""
    sub.description, sub.epilog = _CONVERT, _CONVERT_EXAMPLES
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
    family, heads = _family_and_heads(arguments)
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


def _describe(reference: released.Reference, layout: released.Layout) -> str:
    """One line on a generator: family, sizes, parameters in millions, projectors and the source's convention."""
    sizes, millions = layout.sizes, sum(p.numel() for p in reference.generator.parameters()) / 1e6
    side, text = sizes["image_size"], number_of(sizes["classes"], "class")
    if layout.family == "mmdit":
        text = f"text width {sizes['context_width']}"
    norm = ", q/k norm" if sizes.get("qk_norm") else ""
    shapes = []
    for projector in reference.projectors:
        linear: list[Any] = [m for m in projector.children() if hasattr(m, "out_features")]
        shapes.append("-".join(str(n) for n in [linear[0].in_features, *(m.out_features for m in linear)]))
    return (
        f"{layout.family}, depth {sizes['depth']}, width {sizes['width']}, heads {sizes['heads']}, patch "
        f"{sizes['patch']}{norm}, {sizes['channels']}x{side}x{side}, {text}, {millions:.2f} M parameters, projectors "
        f"{', '.join(shapes) or 'none'}, convention {layout.convention}"
    )


def _family_and_heads(arguments: argparse.Namespace) -> tuple[Any, int | None]:
    """Family and heads: those given, or for a run's checkpoint those in the configuration beside it."""
    source = arguments.source
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
