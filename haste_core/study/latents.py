"""Latents of images by a VAE: the VAE itself, decoding of generated latents, and preparation of folders to train on.

Reading a prepared folder for training is `haste_core.study.data.latents`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from haste_core import checkpoint
from haste_core.devices import default_device, exact
from haste_core.errors import HasteError, Interrupted, number_of, one_line
from haste_core.files import locked, write_json, write_text
from haste_core.processes import local_rank
from haste_core.study import config, signals
from haste_core.study.data.base import parts, say, to_signed
from haste_core.study.data.latents import (
    CAPTIONS,
    IMAGES,
    LATENTS,
    SCALE,
    SHIFT,
    SIDES,
    Folder,
    Manifest,
    Posterior,
    VaeFacts,
    name_of,
    read_manifest,
)

if TYPE_CHECKING:
    from haste_core.study.data.images import Split

_PACKAGES = ("torch", "diffusers", "datasets", "numpy", "pillow")  # their versions are in the manifest
_FREE = ("vae.name", "source.path")  # may differ between the calls that make one folder
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Vae:
    """A frozen VAE in float32. The generator models x = (latent - shift) scale.

    name: a hub name or folder. scale, shift, channels: of the latents. factor: width of one latent in pixels. Raises
    HasteError where its latents are not scaled by one number.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model.float().eval().requires_grad_(False), name
        settings = self.model.config
        if settings.get("latents_mean") is not None or settings.get("latents_std") is not None:
            raise HasteError(f"VAE {name} normalises latents per channel; expected one scaling_factor for all channels")
        scale, shift = settings.get("scaling_factor"), settings.get("shift_factor")
        self.scale = SCALE if scale is None else float(scale)
        self.shift = SHIFT if shift is None else float(shift)
        self.channels = int(settings["latent_channels"])
        self.factor = 2 ** (len(settings["block_out_channels"]) - 1)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return checkpoint.fingerprint(self.model.state_dict())

    @cached_property
    def encoder(self) -> str:
        """Hash of the weights that encode, which VAEs with decoders of their own can share (sd-vae-ft-mse and -ema)."""
        weights = self.model.state_dict().items()
        return checkpoint.fingerprint({n: v for n, v in weights if n.startswith(("encoder.", "quant_conv."))})

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """The posterior of images (n, 3, S, S) in [-1, 1]: mean and std (n, C, S / factor, S / factor), unscaled.

        Float32 on the device of `images`; S is a multiple of `factor`.
        """
        with exact():
            found = self.model.encode(images.to(self.model.device, torch.float32), return_dict=False)[0]
        return Posterior(found.mean.to(images.device), found.std.to(images.device))

    @torch.no_grad()
    def decode(self, x: Tensor, batch_size: int = 32) -> Tensor:
        """Images (n, 3, S factor, S factor) in [-1, 1] of generated x (n, C, S, S), `batch_size` of them at a time.

        Raises HasteError where x has other channels than the VAE's latents.
        """
        if x.shape[1] != self.channels:
            raise HasteError(f"latents of {x.shape[1]} channels for VAE {self.name}; expected {self.channels}")
        latents = x.float() / self.scale + self.shift
        with exact():
            found = [
                self.model.decode(part.to(self.model.device), return_dict=False)[0].clamp(-1, 1)
                for part in latents.split(batch_size)
            ]
        return torch.cat(found).to(x.device)


def load_vae(name: str, device: str | torch.device = "cpu") -> Vae:
    """The VAE in a local folder or of a hub name such as "stabilityai/sd-vae-ft-mse", from safetensors alone.

    Raises HasteError where it is missing, damaged, or cannot be downloaded. name: the folder (config.json,
    diffusion_pytorch_model.safetensors), or owner/name. device: of the weights.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        model = _pretrained(str(folder), local_files_only=True)
    elif not _HUB_NAME.fullmatch(name):
        raise HasteError(f"VAE {name!r} is no folder; expected a folder with a VAE, or a hub name (owner/name)")
    else:
        try:
            model = _pretrained(name, local_files_only=True)
        except HasteError:  # not in the local cache
            model = _pretrained(name)
    return Vae(model.to(device), name)


def _pretrained(name: str, **options: Any) -> Any:
    from diffusers import AutoencoderKL  # takes seconds to import

    try:
        model, report = AutoencoderKL.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32, **options
        )
    except Exception as error:  # diffusers, the hub, safetensors and torch each raise their own
        raise HasteError(
            f"VAE {name!r} cannot be loaded: {one_line(error)[:300]}; give a folder with config.json and "
            f"diffusion_pytorch_model.safetensors of a VAE, such as those of "
            f"https://huggingface.co/stabilityai/sd-vae-ft-mse/tree/main"
        ) from error
    # diffusers draws missing weights at random and only logs it.
    if missing := sorted(report["missing_keys"]):
        raise HasteError(f"VAE {name!r} lacks the weights of {len(missing)} tensors ({missing[0]}, ...); expected all")
    return model


def to_images(x: Tensor, data: config.DataSettings, sample: config.SampleSettings) -> Tensor:
    """Images (n, C, S, S) in [-1, 1] of generated x (n, C', S', S'): x in pixel space, else decoded by the VAE."""
    if data.kind != "latents":
        return x
    return _decoder(data, sample).decode(x.to(default_device())).to(x.device)


def vae_facts(data: config.DataSettings, sample: config.SampleSettings) -> dict[str, Any] | None:
    """Name of the decoder and hash of its weights, for cards and manifests; None in pixel space."""
    if data.kind != "latents":
        return None
    vae = _decoder(data, sample)
    facts = {"name": vae.name, "weights": vae.fingerprint}
    encoder = read_manifest(Path(str(data.path)))
    if encoder is None or vae.fingerprint == encoder.vae.fingerprint:
        return facts
    return facts | {"latents_by": encoder.vae.model_dump()}


def vae_of(data: config.DataSettings, sample: config.SampleSettings) -> str:
    """Name of the VAE that decodes: `sample.vae`, else that of the latents; raises HasteError if neither is known."""
    if sample.vae is not None:
        return sample.vae
    manifest = read_manifest(Path(str(data.path)))
    if manifest is None:
        raise HasteError(f"the latents in {data.path} name no VAE; set sample.vae to a hub name or a folder")
    return manifest.vae.name


def _decoder(data: config.DataSettings, sample: config.SampleSettings) -> Vae:
    """The VAE that decodes generated latents.

    Raises HasteError where it has another encoder, scale or shift than the one that made the latents, and
    `sample.any_vae` is not set.
    """
    vae, manifest = _cached_vae(vae_of(data, sample)), read_manifest(Path(str(data.path)))
    scaling = vae.scale, vae.shift
    if manifest is None and not sample.any_vae and scaling != (SCALE, SHIFT):
        raise HasteError(
            f"VAE {vae.name} has scale {vae.scale:g} and shift {vae.shift:g}, but latents without a manifest are taken "
            f"to have {SCALE} and {SHIFT:g}; set sample.any_vae=true to decode them nevertheless"
        )
    if manifest is None or sample.any_vae:
        return vae
    made = manifest.vae
    same = vae.fingerprint == made.fingerprint or vae.encoder == made.encoder
    if not same or scaling != (made.scale, made.shift):
        raise HasteError(
            f"VAE {vae.name} has weights {vae.fingerprint}, scale {vae.scale:g}, shift {vae.shift:g}; expected "
            f"{made.fingerprint}, {made.scale:g}, {made.shift:g}, those of {made.name} that made the latents in "
            f"{data.path}; set sample.any_vae=true to decode them nevertheless"
        )
    return vae


@lru_cache(maxsize=1)
def _cached_vae(name: str) -> Vae:
    return load_vae(name, default_device())


@dataclass(frozen=True)
class Job:
    """Settings of `haste latents`.

    source: as `data.path` of kind images. out: the folder to make. vae: hub name or folder. size: side of the square
    images in pixels. split: of the source. batch_size: images encoded at a time. shard_size: images in a sub-folder.
    image_column, label_column: of the source, where more than one could be meant. caption_column: of texts; they become
    captions, as do those of a folder with a file of captions.
    device: "auto" (GPUs in turn by the process's number, else the CPU), "cpu", "cuda", "cuda:1", ...
    """

    source: str
    out: str
    vae: str
    size: int
    split: str = "train"
    batch_size: int = 32
    shard_size: int = 1000
    device: str = "cpu"
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise HasteError(f"--{name.replace('_', '-')} {getattr(self, name)}; expected 1 and above")

    def compute_device(self) -> str:
        """The device of this process; raises HasteError where there is no such device."""
        gpus = torch.cuda.device_count()
        wanted = ("cuda" if gpus else "cpu") if self.device == "auto" else self.device
        if not re.fullmatch(r"cpu|cuda(:\d+)?" if gpus else "cpu", wanted):
            raise HasteError(f"--device {wanted} with {gpus} GPUs here; expected one of: auto, cpu, cuda, cuda:0, ...")
        return f"cuda:{local_rank() % gpus}" if wanted == "cuda" else wanted


class Preparation:
    """The preparation of one folder: source and VAE, each opened at first use, and the state of the shards.

    A shard is a sub-folder of `shard_size` images. It counts as complete once its record is in OUT/.work, and is made
    anew otherwise, so an interruption loses at most one shard of each process. Its content depends on the images, the
    VAE and the settings alone, not on the number of processes or on interruptions.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.out = job, Path(job.out)
        self.work, self.manifest_path = self.out / ".work", self.out / "manifest.json"
        self.captions: list[list[str]] = []

    @cached_property
    def split(self) -> Split:
        """The source's images and labels."""
        from haste_core.study.data import captions
        from haste_core.study.data.images import Split, load_splits, pick_split

        job = self.job
        if job.caption_column or captions.has_captions(job.source):
            found, groups, note = captions.load(job.source, job.caption_column, job.image_column)
            split = Split(found[pick_split(found, job.split, job.source)], job.size, job.source)
            self.captions = [groups[label] for label in split.labels.tolist()]
            split.labels, split.classes, split.class_names = torch.arange(len(split.labels)), len(split.labels), None
        else:
            found, note = load_splits(job.source, job.label_column)
            rows = found[pick_split(found, job.split, job.source)]
            split = Split(rows, job.size, job.source, job.image_column, job.label_column)
        say(f"{job.source}: {number_of(len(split.labels), 'image')} of split {job.split}{note}")
        return split

    @cached_property
    def vae(self) -> Vae:
        """The VAE on the job's device."""
        return load_vae(self.job.vae, self.job.compute_device())

    @cached_property
    def shards(self) -> list[range]:
        """Numbers of the images in each shard."""
        return parts(range(len(self.split.labels)), self.job.shard_size)

    def _record(self, shard: int) -> Path:
        """The file that is written last for a shard: number of images, hashes, sums for the statistics."""
        return self.work / f"{shard:05d}.json"

    def is_complete(self, shard: int) -> bool:
        """True when a shard is complete on disk."""
        return self._record(shard).is_file() and all((self.out / side / f"{shard:05d}").is_dir() for side in SIDES)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the folder's content, under the manifest's names."""
        vae, job, labels = self.vae, self.job, self.split.labels
        if job.size % vae.factor:
            raise HasteError(f"--size {job.size}; expected a multiple of {vae.factor} with VAE {job.vae}")
        side = job.size // vae.factor
        return {
            "count": len(labels),
            "image_size": job.size,
            "latent_shape": [vae.channels, side, side],
            "classes": self.split.classes,
            "class_names": self.split.class_names,
            "vae": {name: getattr(vae, name) for name in VaeFacts.model_fields},
            "source": {"path": job.source, "split": job.split, "labels": labels_hash(labels)},
            "shard_size": job.shard_size,
            "versions": {package: version(package) for package in _PACKAGES},
        }

    def encode_shards(self, mine: Sequence[int], stopping: threading.Event, progress: bool) -> None:
        """Encode those of the shards `mine` that are missing.

        Raises Interrupted where `stopping` was set, HasteError where an image cannot be read or a latent is not finite.
        """
        total = sum(len(self.shards[shard]) for shard in mine)
        with tqdm(total=total, desc="latents", unit="image", disable=not progress, mininterval=1.0) as bar:
            for shard in mine:
                # Records vanish after the manifest has appeared, hence this order.
                if self.is_complete(shard) or self.manifest_path.is_file():
                    bar.update(len(self.shards[shard]))
                else:
                    self._encode(shard, stopping, bar)

    def interrupted(self) -> Interrupted:
        """The exception that ends an interrupted preparation."""
        done, n = sum(map(self.is_complete, range(len(self.shards)))), len(self.shards)
        return Interrupted(f"{done} of {n} shards of {self.job.out} are complete; run again to go on")

    def _encode(self, shard: int, stopping: threading.Event, bar: Any) -> None:
        """Write a shard's files and then its record; reading ahead, encoding and writing overlap."""
        members, folder = self.shards[shard], f"{shard:05d}"
        self._record(shard).unlink(missing_ok=True)
        for side in SIDES:
            shutil.rmtree(self.out / side / folder, ignore_errors=True)  # left by a stopped process
            (self.out / side / folder).mkdir(parents=True)
        batches = parts(members, self.job.batch_size)
        sums = torch.zeros(2, self.vae.channels, dtype=torch.float64)
        digests: dict[str, list[Future[bytes]]] = {IMAGES: [], LATENTS: []}
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(4) as writer:
            ahead = reader.submit(self.split.decode, batches[0])
            for batch, following in zip_longest(batches, batches[1:]):
                pixels = ahead.result()
                if stopping.is_set():
                    raise self.interrupted()
                if following is not None:
                    ahead = reader.submit(self.split.decode, following)
                posterior = self.vae.encode(to_signed(pixels))
                sums += moments(posterior, batch)
                for j, index in enumerate(batch):
                    array = torch.cat([posterior.mean[j], posterior.std[j]]).numpy()
                    for side, content in ((IMAGES, pixels[j]), (LATENTS, array)):
                        path = self.out / side / folder / _file(side, index)
                        digests[side].append(writer.submit(_write, path, content))
                bar.update(len(batch))
            hashes = {
                side: combined((_file(side, i), f.result()) for i, f in zip(members, digests[side], strict=True))
                for side in SIDES
            }
        record = {"count": len(members), "images": hashes[IMAGES], "latents": hashes[LATENTS], "sums": sums.tolist()}
        write_json(self._record(shard), {"folder": folder, **record})

    def finish(self, settings: dict[str, Any]) -> Manifest:
        """Write dataset.json of both sides and, last of all, the manifest; read them and the first pair back."""
        records = [json.loads(self._record(shard).read_text()) for shard in range(len(self.shards))]
        sums = torch.zeros(2, self.vae.channels, dtype=torch.float64)
        for record in records:
            sums += torch.tensor(record.pop("sums"), dtype=torch.float64)
        count, (_, height, width) = settings["count"], settings["latent_shape"]
        mean, square = sums / (count * height * width)
        for side in SIDES:
            entries = [
                [f"{i // self.job.shard_size:05d}/{_file(side, i)}", label]
                for i, label in enumerate(self.split.labels.tolist())
            ]
            write_text(self.out / side / "dataset.json", json.dumps({"labels": entries}))
        if self.captions:
            write_json(self.out / CAPTIONS, {"captions": self.captions})
        std = (square - mean.square()).clamp_min(0).sqrt()
        content = {**settings, "latent_mean": mean.tolist(), "latent_std": std.tolist(), "shards": records}
        manifest = Manifest.model_validate(content)
        write_json(self.manifest_path, manifest.model_dump(mode="json"))
        Folder(self.out)
        return manifest


def prepare(job: Job, rank: int = 0, processes: int = 1, progress: bool = True) -> Manifest | None:
    """Encode the missing shards of process `rank` out of `processes`: rank, rank + processes, ...

    Process 0 waits for the shards of the others and writes the manifest, which comes back; None comes back in another
    process while it is missing. On the CPU every process computes on one thread.

    Raises:
        HasteError: the source, the VAE or the folder cannot be used. InUse: another call makes this folder.
        Interrupted: SIGINT or SIGTERM arrived; complete shards stay, and the same call resumes.
    """
    task = Preparation(job)
    out, work = task.out, task.work
    if out.is_dir() and any(out.iterdir()) and not (work.is_dir() or task.manifest_path.is_file()):
        raise HasteError(f"{job.out} holds other files; expected a new folder, or one that haste latents began")
    if job.compute_device() == "cpu":
        torch.set_num_threads(1)
    settings, finished = task.settings(), read_manifest(out)
    if finished is not None:
        check_same(out, finished.model_dump(mode="json", include=set(settings)), settings, _FREE)
    else:
        # The first process holds the lock for all of them.
        alone = locked(work / "lock", f"the folder {job.out}") if rank == 0 else nullcontext()
        with alone, signals.catch() as stopping:
            path, shards = work / "settings.json", range(len(task.shards))
            if not path.is_file():
                write_json(path, settings)
            begun = json.loads(path.read_text())
            check_same(out, begun, settings, _FREE)
            task.encode_shards(shards[rank::processes], stopping, progress)
            if rank == 0:
                while not all(map(task.is_complete, shards)):
                    if stopping.wait(0.2):
                        raise task.interrupted()
                finished = task.finish(begun)
    if task.manifest_path.is_file():
        shutil.rmtree(work, ignore_errors=True)
    return finished


def check_same(folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any], free: Sequence[str] = ()) -> None:
    """Raise HasteError if a folder was begun with other settings; those named in `free` ("vae.name") may differ."""
    first, second = (_flat(json.loads(json.dumps(settings))) for settings in (there, asked))
    for key in second | first:
        if key not in free and first.get(key) != second.get(key):
            raise HasteError(
                f"{folder} was begun with {key} {first.get(key)!r}, now it is {second.get(key)!r}; use the same as "
                f"before, or another folder"
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def check(out: str | Path, progress: bool = True) -> Manifest:
    """The manifest of a prepared folder, checked against every file: hashes, counts, labels and pairing must agree.

    Raises HasteError where the folder has no manifest, or anything differs; the message names the first shards.
    """
    folder = Folder(out)
    manifest = folder.manifest
    if manifest is None:
        raise HasteError(f"{out} has no manifest.json to check against; expected a folder made by haste latents")
    wrong = []
    if labels_hash(folder.pairs.labels) != manifest.source.labels:
        wrong.append("labels")
    if sum(shard.count for shard in manifest.shards) != manifest.count:
        wrong.append("number of images")
    start = 0
    for shard in tqdm(manifest.shards, desc="checking", unit="shard", disable=not progress, mininterval=1.0):
        members = range(start, start + shard.count)
        for side, expected in ((IMAGES, shard.images), (LATENTS, shard.latents)):
            if _shard_hash(folder.path / side / shard.folder, [_file(side, i) for i in members]) != expected:
                wrong.append(f"{side}/{shard.folder}")
        start = members.stop
    if wrong:
        raise HasteError(
            f"{out}: {len(wrong)} of its parts are not as manifest.json says ({', '.join(wrong[:5])}"
            f"{', ...' if len(wrong) > 5 else ''}); make the folder again"
        )
    return manifest


def _shard_hash(folder: Path, names: list[str]) -> str | None:
    """The hash over exactly these files of a folder; None where it holds others."""
    if not folder.is_dir() or set(os.listdir(folder)) != set(names):
        return None
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda name: hashlib.sha256((folder / name).read_bytes()).digest(), names)
        return combined(zip(names, digests, strict=True))


def moments(posterior: Posterior, which: range) -> Tensor:
    """Sums over images and positions of E[z] and E[z^2] for latents z drawn from their posteriors, (2, C) float64.

    Raises HasteError where a value is not finite; `which`: the images' numbers.
    """
    mean, std = posterior.mean.double(), posterior.std.double()
    found = torch.stack([mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))])
    if not found.isfinite().all():
        raise HasteError(f"the VAE gives no finite latents for the images {which.start} to {which.stop - 1}")
    return found


def _file(side: str, index: int) -> str:
    return name_of(side, f"{index:08d}")


def _write(path: Path, content: Tensor | np.ndarray) -> bytes:
    """Write an image (3, S, S) or an array, and return the SHA-256 of the file."""
    stream = io.BytesIO()
    if isinstance(content, Tensor):
        picture = Image.fromarray(content.permute(1, 2, 0).contiguous().numpy())
        # Fast to write and to read in training; a higher level saves a few percent of the space.
        picture.save(stream, format="PNG", compress_level=1)
    else:
        np.save(stream, content, allow_pickle=False)
    path.write_bytes(stream.getvalue())
    return hashlib.sha256(stream.getvalue()).digest()


def labels_hash(labels: Tensor) -> str:
    """Hash of labels (n,) int64 in order."""
    return hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]


def combined(files: Iterable[tuple[str, bytes]]) -> str:
    """One SHA-256 over names and the SHA-256 of each file, in order."""
    sha = hashlib.sha256()
    for name, digest in files:
        sha.update(name.encode() + b"\0" + digest)
    return sha.hexdigest()


def drawing_facts(data: config.DataSettings, sample: config.SampleSettings) -> dict[str, Any]:
    """Sampler settings that affect the images, for cards and manifests."""
    return {
        "sampler": sample.sampler,
        "solver_steps": sample.solver_steps,
        # SDE and DDPM have a grid of their own.
        **({"grid": sample.grid} if sample.sampler in ("euler", "heun") else {}),
        "guidance": sample.guidance,
        "guidance_interval": [sample.guidance_low, sample.guidance_high],
        "guidance_channels": sample.guidance_channels,
        "integrator_dtype": "float64",
        # Defaults are left out, so that cards made before there was a choice stay the same.
        **({"precision": sample.precision} if sample.precision != "no" else {}),
        **({"compiled": True} if sample.compile else {}),
        "vae": vae_facts(data, sample),
        "uint8_rule": "clip(127.5 x + 128), truncated",
    }
