"""Preparing latents: a labelled set of images, encoded once by a VAE into a folder that `data.latents` reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from tqdm.auto import tqdm

from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked, write_json, write_text
from haste_core.study import signals
from haste_core.study.data.latents import Folder
from haste_core.study.data.manifest import Manifest, read_manifest
from haste_core.study.data.pairs import IMAGES, LATENTS, name_of
from haste_core.study.latents.shards import Encoder, combined, labels_hash
from haste_core.study.latents.workspace import Job, Workspace
from haste_core.study.validation import validate


def prepare(job: Job, processes: int = 1, progress: bool = True) -> Manifest:
    """Encode what is not encoded yet, and describe the whole folder in its manifest.

    On the CPU every process computes on one thread; on GPUs the processes take turns at the devices.

    Raises:
        HasteError: the source, the VAE or the folder cannot be used, or another process failed.
        Interrupted: SIGINT or SIGTERM arrived; whole shards stay, and the same call goes on.
    """
    if processes < 1:
        raise HasteError(f"--processes {processes}; possible: 1 and above")
    space = Workspace(job)
    if space.out.is_dir() and any(space.out.iterdir()) and not (space.work.is_dir() or space.manifest_path.is_file()):
        raise HasteError(f"{job.out} holds other files; possible: a new folder, or one that haste latents began")
    devices = devices_of(job.device, processes)
    if devices[0] == "cpu":
        torch.set_num_threads(1)
    encoder = Encoder(Job(**{**vars(job), "device": devices[0]}))
    settings = encoder.settings()
    finished = read_manifest(space.out)
    if finished is not None:
        check_same(job.out, finished.model_dump(mode="json"), settings)
    else:
        with locked(space.work / "lock", f"the folder {job.out}"):
            settings = begin(space, settings)
            with signals.catch() as stopping, helpers(job, devices[1:]) as others:
                whole = encode_all(encoder, others, stopping, progress)
            if not whole:
                done = sum(map(space.is_whole, encoder.shards))
                raise Interrupted(f"{done} of {len(encoder.shards)} shards of {job.out} are whole; run again to go on")
            finished = finish(space, encoder, settings)
    shutil.rmtree(space.work, ignore_errors=True)
    return finished


def devices_of(wanted: str, processes: int) -> list[str]:
    """A device for each process: "auto" takes the GPUs in turn if there are some."""
    gpus = torch.cuda.device_count()
    if wanted == "auto":
        wanted = "cuda" if gpus else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError as error:
        raise HasteError(f"--device {wanted}; possible: auto, cpu, cuda, cuda:0, ...") from error
    if kind == "cuda" and not gpus:
        raise HasteError(f"--device {wanted}: there is no GPU here; possible: cpu")
    return [f"cuda:{i % gpus}" if wanted == "cuda" else wanted for i in range(processes)]


def begin(space: Workspace, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the folder was begun with, which are `settings` where nothing is there yet."""
    if not space.settings_path.is_file():
        write_json(space.settings_path, settings)
    begun = json.loads(space.settings_path.read_text())
    check_same(space.job.out, begun, settings)
    return begun


def check_same(out: str, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise HasteError where a folder was made with other settings; names alone (of VAE and source) may differ."""

    def flat(settings: dict[str, Any]) -> dict[str, Any]:
        rows = {key: value for key, value in settings.items() if key in asked}
        for key in ("vae", "source", "versions"):
            rows |= {f"{key}.{name}": value for name, value in rows.pop(key).items() if name not in ("name", "path")}
        return rows

    first, second = flat(there), flat(json.loads(json.dumps(asked)))
    for key in second:
        if first.get(key) != second[key]:
            raise HasteError(
                f"{out} was begun with {key} {first.get(key)!r}, now it is {second[key]!r}; possible: the same as "
                f"before, or another folder"
            )


@contextmanager
def helpers(job: Job, devices: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Further processes that encode shards, one a device; told to stop and waited for when the block ends."""
    started = []
    try:
        for device in devices:
            text = Job(**{**vars(job), "device": device}).write()
            words = [sys.executable, "-m", "haste_core.study.latents.encode", text, str(os.getpid())]
            # A session of its own: Ctrl-C reaches this process alone, which then ends the others.
            started.append(subprocess.Popen(words, start_new_session=True))
        yield started
    finally:
        signals.terminate(psutil.Process(p.pid) for p in started if p.poll() is None)
        for process in started:
            process.wait()


def encode_all(
    encoder: Encoder, others: list[subprocess.Popen[bytes]], stopping: threading.Event, progress: bool
) -> bool:
    """Encode until every shard is whole; False when told to stop.

    Raises:
        HasteError: another process failed.
    """
    space, finished = encoder.space, set[int]()
    with tqdm(total=encoder.count, desc="latents", unit="image", disable=not progress, mininterval=1.0) as bar:

        def show(own: int) -> None:
            finished.update(s for s in encoder.shards if s not in finished and space.is_whole(s))
            bar.update(sum(len(space.members(s, encoder.count)) for s in finished) + own - bar.n)

        while encoder.work(stopping.is_set, show):
            show(0)
            states = [process.poll() for process in others]
            if any(states) and not stopping.is_set():
                raise HasteError(f"another process of {encoder.job.out} ended with status {max(filter(None, states))}; "
                                 f"whole shards stay, run again to go on")  # fmt: skip
            if None not in states and len(finished) == len(encoder.shards):
                return True
            if stopping.wait(0.2):
                break
    return False


def finish(space: Workspace, encoder: Encoder, settings: dict[str, Any]) -> Manifest:
    """Write dataset.json of both sides and, last of all, the manifest; read a first and a last pair back."""
    records = [space.record(shard) for shard in encoder.shards]
    sums = torch.zeros(2, encoder.vae.channels, dtype=torch.float64)
    for record in records:
        sums += torch.tensor(record.pop("sums"), dtype=torch.float64)
    mean, square = sums / (encoder.count * settings["latent_shape"][1] * settings["latent_shape"][2])
    labels = encoder.split.labels.tolist()
    for side in (IMAGES, LATENTS):
        entries = [
            [name_of(side, f"{space.folder(shard)}/{index:08d}"), labels[index]]
            for shard in encoder.shards
            for index in space.members(shard, encoder.count)
        ]
        write_text(space.out / side / "dataset.json", json.dumps({"labels": entries}))
    spread = (square - mean.square()).clamp_min(0).sqrt()
    content = {**settings, "latent_mean": mean.tolist(), "latent_std": spread.tolist(), "shards": records}
    manifest = validate(Manifest, content, "manifest")
    write_json(space.manifest_path, manifest.model_dump(mode="json"))
    folder, ends = Folder(space.out), torch.tensor([0, encoder.count - 1])
    folder.pixels(ends)
    folder.posterior(ends)
    return manifest


def check(out: str | Path, progress: bool = True) -> Manifest:
    """The manifest of a prepared folder, after reading every file: hashes, counts, labels and pairing must agree.

    Raises:
        HasteError: the folder has no manifest, or anything differs; the message names the first shards.
    """
    folder = Folder(out)
    manifest = folder.manifest
    if manifest is None:
        raise HasteError(f"{out} has no manifest.json to check against; possible: a folder made by haste latents")
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
            f"{', ...' if len(wrong) > 5 else ''}); possible: make the folder again"
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


def worker(text: str, parent: int) -> int:
    """Encode what is left of a job beside other processes; returns the exit status.

    Args:
        text: the job, from `Job.write`. parent: the process that will finish the folder; without it this one stops.
    """
    job = Job.read(text)
    if job.device == "cpu":
        torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with signals.catch() as event:
        try:
            done = Encoder(job).work(lambda: event.is_set() or os.getppid() != parent, lambda _: None)
        except HasteError as error:
            print(f"haste: error: {error}", file=sys.stderr)
            return 2
    return 0 if done else 143


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1], int(sys.argv[2])))
