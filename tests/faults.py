"""Faults on purpose, and what they leave: killed processes, full and read-only disks, collisions, hostile input.

    python tests/faults.py [--rounds N] [--seed S] [--only KIND ...] [--commands COMMAND ...]

Prints a row for each command and fault, as in the table of docs/reliability.md. A problem is anything but this: the
same files as without the fault once the command was run again, and one line for the user in between. `test_faults.py`
runs a few rounds of it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from haste_core.study import config
from haste_core.study.cli import main

ROOT = Path(__file__).parents[1]
# Facts of one particular run, which no other run repeats.
OWN = {"provenance.json", "step_time.csv", "step_time.json", "step_time.png", "step_time.svg", "minutes.json"}
MOMENTARY = {"written", "steps_per_s", "seconds", "start", "sessions", "minutes", "peak_memory_gib", "resumed"}


@dataclass
class Row:
    """One line of the table: what was tried how often, how many results were compared, and what went wrong."""

    what: str
    fault: str
    tried: int = 0
    compared: int = 0
    problems: list[str] = field(default_factory=list)


class Done(NamedTuple):
    status: int
    text: str


class Command(NamedTuple):
    """A command line for a folder, and the folder that it starts from."""

    words: Callable[[Path], list[str]]
    start: Path


# -- what is tried ----------------------------------------------------------------------------------------------------


def tiny_study(path: Path, **changes: Any) -> Path:
    """The file of a study that trains for seconds."""
    study = config.load("digits", overrides=[*TINY, "seeds=[0]"]).model_dump(mode="json", exclude_unset=True)
    arms = {name: study["arms"][name] for name in ("vanilla", "holistic", "haste")}
    study |= {"name": path.stem, "arms": arms, "profiles": {}, "analyses": {"06_capacity": {"seeds": [0]}}} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def image_folder(root: Path, images: int = 24) -> Path:
    """Two classes of small noise images."""
    draw = np.random.default_rng(0)
    for i in range(images):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / "ab"[i % 2] / f"{i:03d}.png")
    return root


def vae_folder(root: Path) -> Path:
    """A VAE with few random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, **kinds).save_pretrained(root)
    return root


def commands(place: Path) -> dict[str, Command]:
    """Every command that writes, each with a folder in the state before it."""
    study, pictures, vae = tiny_study(place / "faults.yaml"), image_folder(place / "images"), vae_folder(place / "vae")
    whole = tiny_study(place / "whole.yaml", analyses={})
    empty, trained = place / "empty", place / "trained"
    empty.mkdir()
    shutil.copytree(empty, trained)
    assert run(["train", str(study), "holistic"], trained).status == 0
    return {
        "train": Command(lambda out: ["train", str(study), "haste"], empty),
        "evaluate": Command(lambda out: ["evaluate", str(study), "holistic"], trained),
        "sample": Command(
            lambda out: ["sample", str(study), "holistic", "--n", "60", "--shard-size", "10", "--out", f"{out}/drawn"],
            trained,
        ),
        "latents": Command(
            lambda out: ["latents", str(pictures), f"{out}/latents", "--vae", str(vae), "--size", "16", "--shard-size",
                         "4", "--batch-size", "2", "--device", "cpu"],
            empty,
        ),
        "study": Command(lambda out: ["study", str(whole), "--arms", "vanilla,haste", "--cores", "2"], empty),
    }  # fmt: skip


def environment(out: Path) -> dict[str, str]:
    own = {"HASTE_OUTPUT": str(out), "HF_HOME": str(out / "hf"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return os.environ | own | {"PYTHONPATH": str(ROOT)}


def start(words: Sequence[str], out: Path, log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """`haste WORDS` in a group of its own, writing to `log`."""
    # As the installed script does, which takes no modules from the current folder either.
    command = [sys.executable, "-P", "-m", "haste_core.study.cli", *words]
    options = {"env": environment(out), "cwd": log.parent, "start_new_session": True} | options
    with log.open("wb") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, **options)


def run(words: Sequence[str], out: Path, log: Path | None = None, **options: Any) -> Done:
    """`haste WORDS` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        log = log or Path(folder) / "log"
        process = start(words, out, log, **options)
        return Done(process.wait(timeout=900), log.read_text(errors="replace"))


# -- what is compared -------------------------------------------------------------------------------------------------


def content(out: Path) -> dict[str, Any]:
    """What a command leaves by file name, without times and temporary files."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if path.name in OWN or path.suffix in (".lock", ".html", ".ipynb", ".log", ".tmp") or name.startswith("hf/"):
            continue
        if ".snakemake" in path.parts or "/jobs/" in name:
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            found[name] = without_moments(json.loads(data))
        elif path.suffix == ".jsonl":
            found[name] = [without_moments(json.loads(line)) for line in data.splitlines()]
        else:
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def without_moments(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_moments(v) for k, v in value.items() if k not in MOMENTARY}
    return [without_moments(v) for v in value] if isinstance(value, list) else value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Names that differ, or nothing."""
    names = [n for n in sorted({*found, *expected}) if found.get(n, "-") != expected.get(n, "-")]
    return ", ".join(names[:5])


def one_line(done: Done) -> str:
    """What is wrong with the answer to a fault that a user can mend, or nothing."""
    if "Traceback" in done.text:
        return "a traceback: " + " ".join(done.text.strip().splitlines()[-1:])
    errors = [line for line in done.text.splitlines() if line.startswith("haste: ")]
    if done.status == 0 or len(errors) != 1:
        return f"status {done.status} with {len(errors)} lines of error: {done.text[-200:]!r}"
    return ""


class Bench:
    """The commands with what each leaves when nothing happens to it."""

    def __init__(self, place: Path, names: Sequence[str]) -> None:
        self.place, self.log = place, place / "log.txt"
        self.commands = {name: command for name, command in commands(place).items() if name in names}
        self.expected: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        for name, command in self.commands.items():
            out, begun = self.fresh(name), time.monotonic()
            done = run(command.words(out), out, self.log)
            assert done.status == 0, done.text
            self.seconds[name], self.expected[name] = time.monotonic() - begun, content(out)
            self.bytes[name] = size(out) - size(command.start)

    def fresh(self, name: str, under: Path | None = None) -> Path:
        """A copy of the folder that a command starts from, always at the same path."""
        out = (under or self.place) / "out"
        shutil.rmtree(out, ignore_errors=True)
        return Path(shutil.copytree(self.commands[name].start, out))

    def finish(self, name: str, out: Path, row: Row) -> None:
        """Run a command to its end after a fault, and compare."""
        done = run(self.commands[name].words(out), out, self.log)
        row.compared += 1
        print(f"{row.what}, {row.fault}: {row.tried} tried, {row.compared} compared", file=sys.stderr)
        if done.status:
            row.problems.append(f"run again: status {done.status}: {done.text[-300:]!r}")
        elif differs := differences(content(out), self.expected[name]):
            row.problems.append(f"other files than without the fault: {differs}")


def size(folder: Path) -> int:
    """Bytes that the files below a folder take; one that has several names counts once."""
    files = {(s.st_dev, s.st_ino): s.st_size for p in folder.rglob("*") if p.is_file() and (s := p.stat())}
    return sum(-(-length // 4096) * 4096 for length in files.values())


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def killed(bench: Bench, rounds: int, draw: random.Random) -> Iterator[Row]:
    """Kill each command with everything it started at random moments, then let it finish."""
    for name, command in bench.commands.items():
        row = Row(name, "kill -9 at a random moment")
        while row.tried < rounds:
            out, ended = bench.fresh(name), False
            while row.tried < rounds and not ended:
                process = start(command.words(out), out, bench.log)
                ended = wait_for_moment(process, out, draw, bench.seconds[name])
                if not ended:
                    os.killpg(process.pid, signal.SIGKILL)
                    row.tried += 1
                status = process.wait()
                if ended and status:
                    row.problems.append(f"on its own: status {status}: {bench.log.read_text()[-300:]!r}")
                ended = ended or draw.random() < 0.5  # the next call is left alone, or killed like this one
            bench.finish(name, out, row)
        yield row


def wait_for_moment(process: subprocess.Popen[bytes], out: Path, draw: random.Random, seconds: float) -> bool:
    """Wait until a random moment, or a random change of the files; True where the process ended before it."""
    deadline = time.monotonic() + draw.uniform(0.2, 1.0) * seconds
    changes = draw.randint(1, 40) if draw.random() < 0.5 else 10**9
    before = None
    while process.poll() is None and time.monotonic() < deadline and changes > 0:
        # Folders that vanish meanwhile end `Path.rglob`; `os.walk` leaves them out.
        there = (Path(folder, name) for folder, folders, files in os.walk(out) for name in (*folders, *files))
        now = {p: s.st_mtime_ns for p in there if (s := stat(p))}
        changes -= before is not None and now != before
        before = now
        time.sleep(0.002)
    return process.poll() is not None


def stat(path: Path) -> os.stat_result | None:
    """Facts on a file that may vanish while it is looked at."""
    try:
        return path.stat()
    except OSError:
        return None


# -- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def disk(place: Path) -> Iterator[Callable[[str], None]]:
    """A small file system at `place`; yields a function that mounts it anew with other options."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True, capture_output=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def full_disks(bench: Bench, rounds: int, draw: random.Random) -> Iterator[Row]:
    """Run each command on a disk with room for a random part of what it writes, then on one with enough."""
    for name, command in bench.commands.items():
        row = Row(name, "a disk that fills up")
        for _ in range(rounds):
            with disk(bench.place / "disk") as remount:
                out = bench.fresh(name, bench.place / "disk")
                used = shutil.disk_usage(bench.place / "disk").used
                remount(f"size={used + int(draw.random() * 0.9 * bench.bytes[name])}")
                done = run(command.words(out), out, bench.log)
                row.tried += 1
                if wrong := one_line(done) if name != "study" else (done.status == 0 and "status 0"):
                    row.problems.append(wrong)
                remount("size=256m")
                bench.finish(name, out, row)
        yield row


def read_only_disks(bench: Bench, rounds: int, draw: random.Random) -> Iterator[Row]:
    """Run each command where nothing can be written, then where it can."""
    for name, command in bench.commands.items():
        row = Row(name, "a read-only file system")
        with disk(bench.place / "disk") as remount:
            out = bench.fresh(name, bench.place / "disk")
            remount("ro")
            row.tried += 1
            if wrong := one_line(run(command.words(out), out, bench.log)):
                row.problems.append(wrong)
            remount("rw")
            bench.finish(name, out, row)
        yield row


# -- collisions -------------------------------------------------------------------------------------------------------


def two_at_once(bench: Bench, rounds: int, draw: random.Random) -> Iterator[Row]:
    """Start a command twice on the same files."""
    for name, command in bench.commands.items():
        row = Row(name, "two processes at once")
        for _ in range(max(1, rounds // 4)):
            out, logs = bench.fresh(name), [bench.log.with_suffix(f".{i}") for i in range(2)]
            both = []
            for log in logs:
                both.append(start(command.words(out), out, log))
                time.sleep(draw.uniform(0, 1))
            statuses = [process.wait(timeout=900) for process in both]
            texts = [log.read_text() for log in logs]
            row.tried += 1
            if 0 not in statuses or any("Traceback" in text for text in texts):
                row.problems.append(f"statuses {statuses}: {' / '.join(text[-200:] for text in texts)!r}")
            bench.finish(name, out, row)
        yield row


def removed_folders(bench: Bench, rounds: int, draw: random.Random) -> Iterator[Row]:
    """Remove what a command has written while it works."""
    for name, command in bench.commands.items():
        row = Row(name, "its folder removed while it works")
        for _ in range(max(1, rounds // 4)):
            out = bench.fresh(name)
            process = start(command.words(out), out, bench.log)
            wait_for_moment(process, out, draw, bench.seconds[name])
            victim = out / ("drawn" if name == "sample" else "latents" if name == "latents" else "runs")
            shutil.rmtree(victim, ignore_errors=True)
            status = process.wait(timeout=900)
            row.tried += 1
            text = bench.log.read_text()
            if "Traceback" in text:
                row.problems.append(f"status {status}: {text.strip().splitlines()[-1]}")
            if bench.commands[name].start.name == "empty":
                bench.finish(name, out, row)
        yield row


# -- malformed input --------------------------------------------------------------------------------------------------


def call(*words: str) -> Done:
    """`haste WORDS` in this process."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        try:
            status = main(words)
        except SystemExit as exit:
            status = int(exit.code or 0)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return Done(1, f"Traceback of {type(error).__name__}: {error}")
    return Done(status, said.getvalue())


def works(done: Done) -> None:
    """Refuse to look for faults where the input without one is refused too."""
    assert done.status == 0, done.text


def refused_or_done(done: Done) -> str:
    """What is wrong with the answer to an input that may be in order, or nothing."""
    return "" if done.status == 0 and "Traceback" not in done.text else one_line(done)


ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-3, 3), max_size=3),
    st.sampled_from([[], {}, "1e3", "yes", "..", "/", "\x00", "é" * 300, "-1", "nan"]),
)  # fmt: skip


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a nested mapping."""
    for key, part in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places_in(part, (*path, key))


def study_files(place: Path, rounds: int) -> Row:
    """Study files with one odd value, an odd key or a missing one, before and after being text."""
    row, base = Row("study files, settings", "odd, missing and doubled values, broken text"), place / "odd.yaml"
    original = yaml.safe_load(tiny_study(base).read_text())
    paths = list(places_in(original))
    works(call("train", str(base), "vanilla", "--dry-run"))

    @settings(max_examples=rounds, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        study = yaml.safe_load(yaml.safe_dump(original))
        *parents, last = data.draw(st.sampled_from(paths))
        inner = study
        for key in parents:
            inner = inner[key]
        change = data.draw(st.sampled_from(["value", "key", "missing", "twice", "text"]))
        if change == "missing":
            del inner[last]
        elif change == "key":
            inner[str(data.draw(ODD))] = inner.pop(last)
        else:
            inner[last] = data.draw(ODD)
        text = yaml.safe_dump(study, sort_keys=False, allow_unicode=True)
        if change == "twice":
            text += f"{data.draw(st.sampled_from(list(original)))}: {{}}\n"
        content = text.encode()
        if change == "text":
            at = data.draw(st.integers(0, len(content)))
            odd = [b"\t", b"\r\n", b"\x00", b"\xff\xfe", b"&a [*a]", b"!!python/object/apply:os.system [touch hit]\n"]
            content = content[:at] + data.draw(st.sampled_from(odd)) + content[at:]
        base.write_bytes(content)
        row.tried += 1
        if wrong := refused_or_done(call("train", str(base), "vanilla", "--dry-run")):
            row.problems.append(f"{change} of {'.'.join(map(str, (*parents, last)))}: {wrong}")

    attempt()
    return row


def folders(place: Path, rounds: int) -> Row:
    """Folders of images with names of every kind: each image is counted."""
    row = Row("folders of images", "names with spaces, quotes, newlines, any letters, words for splits")
    root = place / "tree"
    names = st.one_of(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/\x00"), min_size=1, max_size=12),
        st.sampled_from(["train", "test_1", "val", "a b", "a\nb", "it's", '"', "100%", "{x}", "latest", "-n", "*"]),
    ).filter(lambda name: name not in (".", "..") and not name.startswith(".") and len(name.encode()) < 200)

    @settings(max_examples=rounds, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.dictionaries(names, st.sets(names, min_size=4, max_size=8), min_size=2, max_size=4))
    def attempt(tree: dict[str, set[str]]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        for i, (folder, files) in enumerate(tree.items()):
            (root / folder).mkdir(parents=True)
            for file in files:
                Image.new("RGB", (16, 16), (i, 0, 0)).save(root / folder / f"{file}.png")
        images = sum(len(files) for files in tree.values())
        data = {"kind": "images", "path": str(root), "image_size": 16, "test_fraction": 0.3, "validation_fraction": 0.3}
        model = {"kind": "sit", "depth": 1, "width": 16, "heads": 1, "patch": 4}
        study = tiny_study(place / "folders.yaml", data=data, model=model)
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
            status = main(["train", str(study), "vanilla", "--dry-run"])
        row.tried += 1
        text = said.getvalue()
        words = {"train", "validation", "val", "valid", "test"}
        if set(tree) <= words:
            return  # a top level of splits has another meaning
        if "Traceback" in text or (status == 0 and not (f"{len(tree)} classes" in text and f"{images} images" in text)):
            row.problems.append(f"{tree}: status {status}, {images} images: {text[-200:]!r}")

    attempt()
    return row


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.mark}'",))


def files_of_weights(place: Path, trained: Path, draw: random.Random, rounds: int) -> Iterator[Row]:
    """Checkpoints cut short, with flipped bytes, of another kind, or made to run code."""
    source = next(iter(sorted(trained.rglob("step_*12.safetensors"))))
    whole, mark = source.read_bytes(), place / "executed"

    def convert(name: str, content: bytes) -> Done:
        path = place / name
        path.write_bytes(content)
        return call("convert", str(path), str(place / "converted.safetensors"), "--family", "sit", "--heads", "4")

    works(convert("whole.safetensors", whole))
    row = Row("checkpoints", "cut at every tenth")
    for tenth in range(10):
        row.tried += 1
        if wrong := one_line(convert("cut.safetensors", whole[: len(whole) * tenth // 10])):
            row.problems.append(f"{tenth} tenths: {wrong}")
    yield row
    header = 8 + int.from_bytes(whole[:8], "little")
    row = Row("checkpoints", "a flipped byte in the header")
    for _ in range(rounds):
        damaged, at = bytearray(whole), draw.randrange(header)
        damaged[at] ^= 1 << draw.randrange(8)
        row.tried += 1
        if wrong := refused_or_done(convert("flipped.safetensors", bytes(damaged))):
            row.problems.append(f"byte {at}: {wrong}")
    yield row
    row = Row("pickles", "made to run a command, plain and inside of weights")
    for kind in ("plain", "inside", "list", "old"):
        content = {"plain": Hostile(mark), "list": [Hostile(mark)]}.get(kind, {"model": {"w": Hostile(mark)}})
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=kind != "old")
        row.tried += 1
        if wrong := one_line(convert(f"{kind}.pt", buffer.getvalue())):
            row.problems.append(f"{kind}: {wrong}")
    hostile = place / "hostile.npz"
    np.savez(hostile, arr_0=np.array([Hostile(mark)], dtype=object))
    row.tried += 1
    if wrong := one_line(call("score", str(hostile), "--reference", str(hostile))):
        row.problems.append(f"npz of objects: {wrong}")
    if mark.exists():
        row.problems.append("A COMMAND WAS EXECUTED")
    yield row


def archives(place: Path) -> Row:
    """Archives that claim more than they hold, and manifests that lead outside of their folder."""
    row = Row("archives, manifests", "sizes that are not there, paths with ..")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**7, 512, 512, 3)}
    )
    for name in ("bomb.npz", "empty.npz", "text.npz"):
        path = place / name
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            if name == "bomb.npz":
                archive.writestr("arr_0.npy", header.getvalue() + bytes(2**26))
            elif name == "text.npz":
                archive.writestr("../arr_0.npy", "no array")
        row.tried += 1
        done = call("score", str(path), "--reference", str(path))
        if wrong := one_line(done) or ("arr_0" not in done.text and done.text):
            row.problems.append(f"{name}: {wrong}")
    secret = place / "secret"
    secret.mkdir()
    for outside in ("../../secret/x.png", f"{secret}/x.png", "00000/../../../secret/x.png"):
        folder = place / "prepared"
        shutil.rmtree(folder, ignore_errors=True)
        for side, last in (("images", outside), ("vae-sd", outside.replace("png", "npy"))):
            (folder / side / "00000").mkdir(parents=True)
            entries = [[last, 0], *([f"00000/{i}.png" if side == "images" else f"00000/{i}.npy", 0] for i in range(8))]
            (folder / side / "dataset.json").write_text(json.dumps({"labels": entries}))
            for i in range(8):
                if side == "images":
                    Image.new("RGB", (16, 16)).save(folder / side / "00000" / f"{i}.png")
                else:
                    np.save(folder / side / "00000" / f"{i}.npy", np.ones((8, 2, 2), np.float32))
        study = tiny_study(place / "outside.yaml", data={"kind": "latents", "path": str(folder)})
        row.tried += 1
        done = call("train", str(study), "vanilla")
        if wrong := one_line(done) or ("names within the folder" not in done.text and done.text):
            row.problems.append(f"{outside}: {wrong}")
    return row


def malformed(bench: Bench, rounds: int, draw: random.Random) -> Iterator[Row]:
    """Inputs that are wrong in every way but one."""
    out = bench.place / "malformed"
    out.mkdir()
    before = dict(os.environ)
    os.environ |= environment(out)
    try:
        yield study_files(out, 10 * rounds)
        yield folders(out, 2 * rounds)
        yield from files_of_weights(out, bench.place / "trained", draw, rounds)
        yield archives(out)
    finally:
        os.environ.clear()
        os.environ.update(before)


# -- places -----------------------------------------------------------------------------------------------------------


def places(bench: Bench, rounds: int, draw: random.Random) -> Iterator[Row]:
    """Another directory, a read-only checkout, no home, and a wheel without its repository."""
    words, row = bench.commands["train"].words, Row("train, study", "another directory, no HOME, read-only, wheel only")

    def attempt(what: str, words: Sequence[str], out: Path, **options: Any) -> None:
        done = run(words, out, bench.log, **options)
        row.tried += 1
        if done.status:
            errors = [line for line in done.text.splitlines() if "rror" in line]
            row.problems.append(f"{what}: status {done.status}: {' / '.join(errors[:3])[:600]}")

    out = bench.fresh("train")
    no_home = {k: v for k, v in environment(out).items() if k not in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    attempt("no HOME", words(out), out, env=no_home)
    with disk(bench.place / "disk") as remount:
        copy = bench.place / "disk" / "checkout"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "reports", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        remount("ro")
        out = bench.fresh("train")
        attempt("read-only checkout", words(out), out, env=environment(out) | {"PYTHONPATH": str(copy)}, cwd=copy)
        out = bench.fresh("train")
        attempt("read-only checkout", ["study", "digits", "--profile", "smoke", "--dry-run"], out,
                env=environment(out) | {"PYTHONPATH": str(copy)}, cwd=copy)  # fmt: skip
    wheel, source = bench.place / "wheel", bench.place / "source"  # building writes beside the source
    shutil.copytree(ROOT, source, ignore=ignored)
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(wheel)]
    subprocess.run([*install, str(source)], check=True, capture_output=True)
    other = bench.place / "elsewhere"
    for module in ("random", "haste_core", "yaml", "torch", "snakemake"):  # what a user may call a file or a folder
        (other / module).mkdir(parents=True)
        (other / module / "__init__.py").write_text("raise SystemExit('imported from the current folder')")
    before = sorted(other.rglob("*"))
    out = bench.fresh("train")
    installed = environment(out) | {"PYTHONPATH": str(wheel)}
    attempt("a wheel", words(out), out, env=installed, cwd=other)
    # From a folder to a report without an edit, with fewer steps than anybody would choose.
    study, images = str(bench.place / "own.yaml"), str(image_folder(bench.place / "images", 120))
    attempt("a wheel", ["new", study, "--images", images, "--minutes", "0.01"], out, env=installed, cwd=other)
    settings = ["train.steps=8", "train.keep=[2,4]", "claims.early=[2,4]", "arms.haste.termination.at=4", "seeds=[0]",
                "teacher.fitting.steps=5", "evaluate.extractor.steps=5", "evaluate.autoencoder.steps=5",
                "sample.solver_steps=2"]  # fmt: skip
    attempt("a wheel", ["study", study, "--arms", "vanilla,haste", "--cores", "2",
                        *(word for setting in settings for word in ("--set", setting))],
            out, env=installed, cwd=other)  # fmt: skip
    if not list((out / "reports").rglob("report.html")):
        row.problems.append("a wheel: no report")
    if sorted(other.rglob("*")) != before:
        row.problems.append("a wheel: something was written into the current folder")
    yield row


KINDS: dict[str, Callable[[Bench, int, random.Random], Iterator[Row]]] = {
    "kill": killed, "full": full_disks, "read-only": read_only_disks, "two": two_at_once, "removed": removed_folders,
    "malformed": malformed, "places": places,
}  # fmt: skip
COMMANDS = ("train", "evaluate", "sample", "latents", "study")


def line(row: Row) -> str:
    """A row in Markdown, with today's date."""
    cells = (row.what, row.fault, row.tried, row.compared or "-", len(row.problems), date.today().isoformat())
    return f"| {' | '.join(map(str, cells))} |"


def cli() -> int:
    """Run the program; the status is 1 where there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="tries of each command and fault (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    arguments = parser.parse_args()
    problems = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        bench = Bench(Path(place), arguments.commands)
        for kind in arguments.only:
            for row in KINDS[kind](bench, arguments.rounds, random.Random(f"{arguments.seed} {kind}")):
                print(line(row), *row.problems, sep="\n  ", flush=True)
                problems += len(row.problems)
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(cli())
