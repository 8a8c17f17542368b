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
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from haste_core import _torchvision_guard, checkpoint  # noqa: F401  (the guard must come before diffusers)
from haste_core.devices import default_device
from haste_core.errors import HasteError, Interrupted, is_disk_full
from haste_core.files import locked, write_json, write_text
from haste_core.study import config, signals
from haste_core.study.data.base import to_signed
from haste_core.study.data.latents import (
    IMAGES,
    LATENTS,
    SCALE,
    SHIFT,
    Folder,
    Manifest,
    Posterior,
    name_of,
    read_manifest,
)
from haste_core.study.sections import validate

if TYPE_CHECKING:
    from haste_core.study.data.images import Split

_SIDES = (IMAGES, LATENTS)
_PACKAGES = ("torch", "diffusers", "datasets", "numpy", "pillow")  # their versions are in the manifest
_FILES = "config.json and diffusion_pytorch_model.safetensors"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Vae:
    """A frozen VAE in float32. The generator models x = (latent - shift) scale.

    Attributes:
        name: a hub name or folder. scale, shift, channels: of the latents. factor: width of one latent in pixels.

    Raises:
        HasteError: its latents are not scaled by one number.
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

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 32) -> Posterior:
        """The posterior of images (n, 3, S, S) in [-1, 1]: mean and std (n, C, S / factor, S / factor), unscaled.

        Float32 on the device of `images`; `batch_size` images are encoded at a time.

        Raises:
            HasteError: S is not a multiple of `factor`.
        """
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            raise HasteError(
                f"VAE {self.name} takes images whose sides are multiples of {self.factor}, these are "
                f"{images.shape[-1]}x{images.shape[-2]}"
            )
        with _exact():
            found = [self.model.encode(part.to(self.model.device, torch.float32), return_dict=False)[0]
                     for part in images.split(batch_size)]  # fmt: skip
        mean, std = (torch.cat([getattr(d, which) for d in found]).to(images.device) for which in ("mean", "std"))
        return Posterior(mean, std)

    @torch.no_grad()
    def decode(self, x: Tensor, batch_size: int = 32) -> Tensor:
        """Images (n, 3, S factor, S factor) in [-1, 1] of what the generator models, x (n, C, S, S).

        Float32 on the device of `x`; `batch_size` images are decoded at a time.

        Raises:
            HasteError: x has other channels than the VAE's latents.
        """
        if x.shape[1] != self.channels:
            raise HasteError(f"VAE {self.name} has latents of {self.channels} channels, these have {x.shape[1]}")
        latents = x.float() / self.scale + self.shift
        with _exact():
            found = [self.model.decode(part.to(self.model.device), return_dict=False)[0].clamp(-1, 1)
                     for part in latents.split(batch_size)]  # fmt: skip
        return torch.cat(found).to(x.device)


@contextmanager
def _exact() -> Iterator[None]:
    """Convolutions in real float32, by kernels that give the same bits every time (cuDNN's default is TF32)."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def load_vae(name: str, device: str | torch.device = "cpu", fingerprint: str | None = None) -> Vae:
    """The VAE in a local folder or of a hub name such as "stabilityai/sd-vae-ft-mse", from safetensors alone.

    Args:
        name: the folder (config.json, diffusion_pytorch_model.safetensors), or owner/name.
        device: of the weights.
        fingerprint: expected hash of the weights; None accepts any.

    Raises:
        HasteError: it is missing, damaged, cannot be downloaded, or its weights are not the expected ones.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and not _HUB_NAME.fullmatch(name):
        raise HasteError(f"VAE {name!r} is no folder; expected a folder with {_FILES}, or a hub name (owner/name)")
    model = _from_folder(folder) if local else _from_hub(name)
    vae = Vae(model.to(device), name)
    if fingerprint not in (None, vae.fingerprint):
        raise HasteError(
            f"VAE {name} has weights {vae.fingerprint}, expected are {fingerprint}; use the VAE that the latents "
            f"were made with"
        )
    return vae


def _from_folder(folder: Path) -> Any:
    for needed in _FILES.split(" and "):
        if not (folder / needed).is_file() and not list(folder.glob(f"{Path(needed).stem}-*.safetensors")):
            raise HasteError(f"VAE folder {folder} has no {needed}; expected a folder with {_FILES}")
    return _pretrained(str(folder), local_files_only=True)


def _from_hub(name: str) -> Any:
    """The VAE from the local cache, or downloaded if it is not there."""
    try:
        return _pretrained(name, local_files_only=True)
    except HasteError:
        return _pretrained(name)


def _pretrained(name: str, **options: Any) -> Any:
    from diffusers import AutoencoderKL  # takes seconds to import

    try:
        model, report = AutoencoderKL.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32, **options
        )
    except Exception as error:  # diffusers, the hub, safetensors and torch each raise their own
        cause = " ".join(str(error).split())[:300]
        raise HasteError(
            f"VAE {name!r} cannot be loaded: {cause}; download {_FILES} of a VAE (such as "
            f"https://huggingface.co/stabilityai/sd-vae-ft-mse/tree/main) into a folder and give its path"
        ) from error
    # diffusers draws missing weights at random and only logs it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise HasteError(
            f"VAE {name!r}: the file has no weights for {len(missing)} tensors of its config.json ({missing[0]}, ...)"
        )
    return model


def to_images(x: Tensor, data: config.DataSettings, sample: config.SampleSettings) -> Tensor:
    """Images (n, C, S, S) in [-1, 1] of generated x (n, C', S', S'): x in pixel space, latents decoded by the VAE."""
    if data.kind != "latents":
        return x
    return _cached_vae(*vae_of(data, sample)).decode(x.to(default_device())).to(x.device)


def vae_facts(data: config.DataSettings, sample: config.SampleSettings) -> dict[str, Any] | None:
    """Name of the decoder and hash of its weights, for cards and manifests; None in pixel space."""
    if data.kind != "latents":
        return None
    vae = _cached_vae(*vae_of(data, sample))
    return {"name": vae.name, "weights": vae.fingerprint}


def vae_of(data: config.DataSettings, sample: config.SampleSettings) -> tuple[str, str | None]:
    """Name of the VAE that decodes (`sample.vae`, else the one that made the latents), and its hash where it is known.

    Raises:
        HasteError: neither is known.
    """
    if sample.vae is not None:
        return sample.vae, None
    manifest = read_manifest(Path(str(data.path)))
    if manifest is None:
        raise HasteError(f"the latents in {data.path} name no VAE; set sample.vae to a hub name or a folder")
    return manifest.vae.name, manifest.vae.fingerprint


@lru_cache(maxsize=1)
def _cached_vae(name: str, fingerprint: str | None) -> Vae:
    return load_vae(name, default_device(), fingerprint)


@dataclass(frozen=True)
class Job:
    """Settings of `haste latents`.

    source: as `data.path` of kind images. out: the folder to make. vae: hub name or folder. size: side of the square
    images in pixels. split: of the source. batch_size: images encoded at a time. shard_size: images in a sub-folder.
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

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise HasteError(f"--{name.replace('_', '-')} {getattr(self, name)}; expected 1 and above")

    def compute_device(self) -> str:
        """The device of this process.

        Raises:
            HasteError: there is no such device.
        """
        gpus = torch.cuda.device_count()
        wanted = ("cuda" if gpus else "cpu") if self.device == "auto" else self.device
        try:
            kind = torch.device(wanted).type
        except RuntimeError as error:
            raise HasteError(f"--device {wanted}; expected one of: auto, cpu, cuda, cuda:0, ...") from error
        if kind == "cuda" and not gpus:
            raise HasteError(f"--device {wanted}: this machine has no GPU; use cpu")
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if wanted == "cuda" else wanted


class Preparation:
    """The preparation of one folder: source and VAE, each opened at first use, and the state of the shards.

    A shard is a sub-folder of `shard_size` images. It is written to a temporary folder, renamed when it is complete
    and then recorded in OUT/.work, so an interruption loses at most one shard of each process. Its content depends on
    the images, the VAE and the settings alone, not on the number of processes or on interruptions.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.out = job, Path(job.out)
        self.work, self.manifest_path = self.out / ".work", self.out / "manifest.json"

    @cached_property
    def split(self) -> Split:
        """The source's images and labels."""
        from haste_core.study.data.images import Split, load_splits, pick_split

        job = self.job
        return Split(pick_split(load_splits(job.source), job.split, job.source), job.size, job.source)

    @cached_property
    def vae(self) -> Vae:
        """The VAE on the job's device."""
        return load_vae(self.job.vae, self.job.compute_device())

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.split.labels)

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(-(-self.count // self.job.shard_size))

    def members(self, shard: int) -> range:
        """Numbers of the images in a shard."""
        return range(shard * self.job.shard_size, min(self.count, (shard + 1) * self.job.shard_size))

    def record_path(self, shard: int) -> Path:
        """The file that is written last for a shard: number of images, hashes, sums for the statistics."""
        return self.work / f"{shard:05d}.json"

    def is_complete(self, shard: int) -> bool:
        """True when a shard is complete on disk."""
        return self.record_path(shard).is_file() and all((self.out / side / f"{shard:05d}").is_dir() for side in _SIDES)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the folder's content, under the manifest's names."""
        vae, job, labels = self.vae, self.job, self.split.labels
        if job.size % vae.factor:
            raise HasteError(f"--size {job.size}; expected with VAE {job.vae}: a multiple of {vae.factor}")
        side = job.size // vae.factor
        return {
            "count": self.count,
            "image_size": job.size,
            "latent_shape": [vae.channels, side, side],
            "classes": max(self.split.classes, int(labels.max()) + 1),
            "class_names": self.split.class_names,
            "vae": {"name": vae.name, "fingerprint": vae.fingerprint, "scale": vae.scale, "shift": vae.shift},
            "source": {"path": job.source, "split": job.split, "labels": labels_hash(labels)},
            "shard_size": job.shard_size,
            "versions": {package: version(package) for package in _PACKAGES},
        }

    def begin(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings that the folder was begun with; `settings` in a new one.

        Raises:
            HasteError: the folder was begun with other settings.
        """
        path = self.work / "settings.json"
        if not path.is_file():
            write_json(path, settings)
        begun = json.loads(path.read_text())
        check_same(self.job.out, begun, settings)
        return begun

    def encode_shards(self, rank: int, processes: int, stopping: threading.Event, progress: bool) -> None:
        """Encode the missing shards of process `rank`: rank, rank + processes, ...

        Raises:
            Interrupted: `stopping` was set. HasteError: an image cannot be read, or the VAE gives no finite latents.
        """
        mine = self.shards[rank::processes]
        with tqdm(
            total=sum(len(self.members(shard)) for shard in mine), desc="latents", unit="image", disable=not progress,
            mininterval=1.0,
        ) as bar:  # fmt: skip
            for shard in mine:
                # Records vanish after the manifest has appeared, hence this order.
                if self.is_complete(shard) or self.manifest_path.is_file():
                    bar.update(len(self.members(shard)))
                else:
                    self.encode(shard, stopping, bar)

    def interrupted(self) -> Interrupted:
        """The exception that ends an interrupted preparation."""
        done = sum(map(self.is_complete, self.shards))
        return Interrupted(f"{done} of {len(self.shards)} shards of {self.job.out} are complete; run again to go on")

    def encode(self, shard: int, stopping: threading.Event, bar: Any) -> None:
        """Write one shard, complete or not at all; raises as `encode_shards`."""
        folder = f"{shard:05d}"
        temporary = self.work / f"{folder}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        try:
            for side in _SIDES:
                (temporary / side).mkdir(parents=True)
            record = self._fill(temporary, self.members(shard), stopping, bar)
            for side in _SIDES:
                final = self.out / side / folder
                final.parent.mkdir(exist_ok=True)
                if final.exists():  # left by a process that was killed before it recorded the shard
                    shutil.rmtree(final)
                (temporary / side).rename(final)
            write_json(self.record_path(shard), {"folder": folder, **record})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _fill(self, folder: Path, members: range, stopping: threading.Event, bar: Any) -> dict[str, Any]:
        """Write a shard's files and return its record; reading ahead, encoding and writing overlap."""
        parts = [members[i : i + self.job.batch_size] for i in range(0, len(members), self.job.batch_size)]
        sums = torch.zeros(2, self.vae.channels, dtype=torch.float64)
        written: dict[str, list[Future[bytes]]] = {IMAGES: [], LATENTS: []}
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(4) as writer:
            ahead = reader.submit(self.split.decode, parts[0])
            for i, part in enumerate(parts):
                pixels = ahead.result()
                if stopping.is_set():
                    raise self.interrupted()
                if i + 1 < len(parts):
                    ahead = reader.submit(self.split.decode, parts[i + 1])
                posterior = self.vae.encode(to_signed(pixels), len(part))
                sums += moments(posterior, part)
                for j, index in enumerate(part):
                    array = torch.cat([posterior.mean[j], posterior.std[j]]).numpy()
                    written[IMAGES].append(writer.submit(_write, folder / IMAGES / _file(IMAGES, index), pixels[j]))
                    written[LATENTS].append(writer.submit(_write, folder / LATENTS / _file(LATENTS, index), array))
                bar.update(len(part))
            hashes = {
                side: combined((_file(side, i), f.result()) for i, f in zip(members, written[side], strict=True))
                for side in _SIDES
            }
        return {"count": len(members), "images": hashes[IMAGES], "latents": hashes[LATENTS], "sums": sums.tolist()}

    def finish(self, settings: dict[str, Any]) -> Manifest:
        """Write dataset.json of both sides and, last of all, the manifest; read the first and the last pair back."""
        records = [json.loads(self.record_path(shard).read_text()) for shard in self.shards]
        sums = torch.zeros(2, self.vae.channels, dtype=torch.float64)
        for record in records:
            sums += torch.tensor(record.pop("sums"), dtype=torch.float64)
        mean, square = sums / (self.count * settings["latent_shape"][1] * settings["latent_shape"][2])
        labels = self.split.labels.tolist()
        for side in _SIDES:
            entries = [
                [f"{shard:05d}/{_file(side, index)}", labels[index]]
                for shard in self.shards for index in self.members(shard)
            ]  # fmt: skip
            write_text(self.out / side / "dataset.json", json.dumps({"labels": entries}))
        spread = (square - mean.square()).clamp_min(0).sqrt()
        content = {**settings, "latent_mean": mean.tolist(), "latent_std": spread.tolist(), "shards": records}
        manifest = validate(Manifest, content, "manifest")
        write_json(self.manifest_path, manifest.model_dump(mode="json"))
        folder, ends = Folder(self.out), torch.tensor([0, self.count - 1])
        folder.pixels(ends)
        folder.posterior(ends)
        return manifest


def prepare(job: Job, rank: int = 0, processes: int = 1, progress: bool = True) -> Manifest | None:
    """Encode the missing shards of process `rank` out of `processes`.

    Process 0 waits for the shards of the others and writes the manifest. On the CPU every process computes on one
    thread.

    Returns:
        The manifest of a finished folder; None in the other processes.

    Raises:
        HasteError: the source, the VAE or the folder cannot be used. InUse: another call makes this folder.
        Interrupted: SIGINT or SIGTERM arrived; complete shards stay, and the same call resumes.
    """
    task = Preparation(job)
    out, work = task.out, task.work
    if out.is_dir() and any(out.iterdir()) and not (work.is_dir() or task.manifest_path.is_file()):
        raise HasteError(f"{job.out} holds other files; use a new folder, or one that haste latents began")
    if job.compute_device() == "cpu":
        torch.set_num_threads(1)
    settings = task.settings()
    finished = read_manifest(out)
    if finished is not None:
        check_same(job.out, finished.model_dump(mode="json"), settings)
    else:
        # The first process holds the lock for all of them.
        alone = locked(work / "lock", f"the folder {job.out}") if rank == 0 else nullcontext()
        with alone, signals.catch() as stopping:
            settings = task.begin(settings)
            task.encode_shards(rank, processes, stopping, progress)
            if rank == 0:
                while not all(map(task.is_complete, task.shards)):
                    if stopping.wait(0.2):
                        raise task.interrupted()
                finished = task.finish(settings)
    if task.manifest_path.is_file():
        shutil.rmtree(work, ignore_errors=True)
    return finished


def check_same(out: str, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise HasteError if a folder was made with other settings; the names of VAE and source may differ."""

    def flat(settings: dict[str, Any]) -> dict[str, Any]:
        rows = {key: value for key, value in settings.items() if key in asked}
        for key in ("vae", "source", "versions"):
            rows |= {f"{key}.{name}": value for name, value in rows.pop(key).items() if name not in ("name", "path")}
        return rows

    first, second = flat(there), flat(json.loads(json.dumps(asked)))
    for key in second:
        if first.get(key) != second[key]:
            raise HasteError(
                f"{out} was begun with {key} {first.get(key)!r}, now it is {second[key]!r}; use the same as "
                f"before, or another folder"
            )


def check(out: str | Path, progress: bool = True) -> Manifest:
    """The manifest of a prepared folder, checked against every file: hashes, counts, labels and pairing must agree.

    Raises:
        HasteError: the folder has no manifest, or anything differs; the message names the first shards.
    """
    folder = Folder(out)
    manifest = folder.manifest
    if manifest is None:
        raise HasteError(f"{out} has no manifest.json to check against; expected a folder made by haste latents")
    wrong: list[str] = []
    if labels_hash(folder.pairs.labels) != manifest.source.labels:
        wrong.append("labels")
    if sum(shard.count for shard in manifest.shards) != manifest.count:
        wrong.append("number of images")
    start = 0
    for shard in tqdm(manifest.shards, desc="checking", unit="shard", disable=not progress, mininterval=1.0):
        members = range(start, start + shard.count)
        for side, expected in ((IMAGES, shard.images), (LATENTS, shard.latents)):
            names = [name_of(side, f"{index:08d}") for index in members]
            if shard_hash(folder.path / side / shard.folder, names) != expected:
                wrong.append(f"{side}/{shard.folder}")
        start = members.stop
    if wrong:
        raise HasteError(
            f"{out}: {len(wrong)} of its parts are not as manifest.json says ({', '.join(wrong[:5])}"
            f"{', ...' if len(wrong) > 5 else ''}); make the folder again"
        )
    return manifest


def shard_hash(folder: Path, names: Iterable[str]) -> str | None:
    """The hash over exactly these files of a folder; None where it holds others."""
    names = list(names)
    if not folder.is_dir() or set(os.listdir(folder)) != set(names):
        return None
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda name: hashlib.sha256((folder / name).read_bytes()).digest(), names)
        return combined(zip(names, digests, strict=True))


def moments(posterior: Posterior, which: range) -> Tensor:
    """Sums over images and positions of E[z] and E[z^2] for latents z drawn from their posteriors, (2, C) float64.

    Raises:
        HasteError: a value is not finite.
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
    try:
        path.write_bytes(stream.getvalue())
    except OSError as error:
        if is_disk_full(error):
            raise HasteError(f"no room to write {path} ({error}); complete shards are intact, free some space and run "
                             f"again") from error  # fmt: skip
        raise
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
