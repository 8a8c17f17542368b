"""Run directories (configuration, metrics, checkpoints of one arm with one seed) and the provenance kept in them.

    runs/<study>/<arm>-<hash>/seed<k>/      config.yaml, metrics.jsonl, provenance.json, checkpoints/, samples/
    runs/<study>/teacher-<hash>/            the study's own teacher
    runs/<study>/extractor-<hash>/          the network behind FID;  autoencoder-<hash>/  one trained without labels

The hash covers everything that changes a number, so changed settings get a directory of their own and nothing that
was computed before is lost.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

from haste_core.errors import HasteError
from haste_core.files import output_root, write_json, write_text
from haste_core.study.config import RunSettings, SampleSettings, StudySettings, TeacherSettings

_PACKAGES = ("torch", "torchvision", "timm", "torch-fidelity", "accelerate", "numpy", "scikit-learn", "snakemake",
             "papermill")  # fmt: skip


def study_dir(study: StudySettings) -> Path:
    """runs/<study>."""
    return output_root() / "runs" / study.name


def teacher_path(study: StudySettings, teacher: TeacherSettings) -> Path:
    """Weights of a teacher that the study pretrains."""
    return study_dir(study) / f"teacher-{study.teacher_hash(teacher)}" / "teacher.safetensors"


def extractor_path(study: StudySettings) -> Path:
    """Weights of the feature extractor trained on labels."""
    return study_dir(study) / f"extractor-{study.extractor_hash}" / "extractor.safetensors"


def autoencoder_path(study: StudySettings) -> Path:
    """Weights of the feature extractor trained without labels."""
    return study_dir(study) / f"autoencoder-{study.autoencoder_hash}" / "autoencoder.safetensors"


def report_dir(study: StudySettings, profile: str | None = None) -> Path:
    """reports/<study>, or reports/<study>-<profile>."""
    return output_root() / "reports" / (f"{study.name}-{profile}" if profile else study.name)


@dataclass(frozen=True)
class Run:
    """One arm of a study with one seed, and its directory."""

    study: StudySettings
    arm: str
    seed: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise HasteError(f"seed {self.seed}; expected 0 and above")
        self.study.run(self.arm)  # an arm that does not exist is an error here and now

    @cached_property
    def config(self) -> RunSettings:
        """Resolved settings of the arm."""
        return self.study.run(self.arm)

    @cached_property
    def sample(self) -> SampleSettings:
        """Sampler settings of the arm."""
        return self.study.sample_of(self.arm)

    @cached_property
    def evaluation_hash(self) -> str:
        """Hash of everything that affects a score of this run except its weights."""
        return self.study.evaluation_hash_of(self.sample)

    @cached_property
    def dir(self) -> Path:
        """runs/<study>/<arm>-<hash>/seed<k>."""
        return study_dir(self.study) / f"{self.arm}-{self.config.hash}" / f"seed{self.seed}"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.dir / "metrics.jsonl"

    @property
    def evaluation_path(self) -> Path:
        """The file of scores under the study's present evaluation settings."""
        return self.dir / f"evaluation-{self.evaluation_hash}.json"

    def checkpoint_path(self, step: int) -> Path:
        """The checkpoint after `step` steps."""
        return self.dir / "checkpoints" / f"step_{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        found = (re.fullmatch(r"step_(\d{8})\.safetensors", p.name) for p in (self.dir / "checkpoints").glob("*"))
        return sorted(int(match[1]) for match in found if match)

    def missing_steps(self) -> list[int]:
        """Kept steps without a checkpoint; empty when the run is complete."""
        return sorted(set(self.config.train.kept_steps) - set(self.steps()))

    def resume_step(self) -> int | None:
        """Step of the latest checkpoint from which all missing steps can be reached, or None."""
        limit = min(self.missing_steps(), default=self.config.train.steps)
        return max((s for s in self.steps() if s <= limit), default=None)

    def load(self, step: int, prefixes: tuple[str, ...] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors whose names start with one of `prefixes`, by default all, and state of the checkpoint at `step`.

        Raises:
            HasteError: there is none, it is damaged, or it belongs to another run.
        """
        from haste_core import checkpoint  # torch takes seconds to import

        tensors, state = checkpoint.load(self.checkpoint_path(step), prefixes)
        if (state["lineage"], state["seed"]) != (self.config.lineage, self.seed):
            raise HasteError(
                f"checkpoint {self.checkpoint_path(step)} belongs to lineage {state['lineage']} seed {state['seed']}, "
                f"this run is lineage {self.config.lineage} seed {self.seed}; delete the checkpoint"
            )
        return tensors, state

    def metrics(self) -> list[dict[str, Any]]:
        """The logged measurements up to the run's last step, one dict per logged step.

        Raises:
            HasteError: there are none, or they were removed.
        """
        text = self.metrics_path.read_text() if self.metrics_path.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not lines:
            way = f"delete {self.dir} and run" if self.steps() else "run"  # checkpoints without a log: it was removed
            raise HasteError(f"no metrics at {self.metrics_path}; {way} haste train {self.study.name} {self.arm}")
        return [line for line in lines if line["step"] <= self.config.train.steps]

    def tidy_metrics(self, repeated: range = range(0)) -> None:
        """Sort the lines of metrics by step, without steps that will be repeated and a line that a crash cut short.

        Lines beyond the steps of this run stay: they belong to a longer run in the same directory.
        """
        lines = self.metrics_path.read_text().splitlines(keepends=True) if self.metrics_path.is_file() else []
        whole = {json.loads(line)["step"]: line for line in lines if line.endswith("}\n")}
        write_text(self.metrics_path, "".join(whole[step] for step in sorted(whole) if step not in repeated))

    def describe(self) -> None:
        """Write the resolved configuration beside the run."""
        content = {"study": self.study.name, "arm": self.arm, "seed": self.seed}
        content |= self.config.model_dump(mode="json")
        write_text(self.dir / "config.yaml", yaml.safe_dump(content, sort_keys=False))


# -- provenance ------------------------------------------------------------------------------------------------------


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def commit() -> str:
    """The commit of the code, with "+changes" when tracked code differs from it, or "unknown" outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.ipynb", "*.yaml", "*Snakefile")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@cache
def environment() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


@cache
def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine, and its GPU if it has one."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    name = models[0] if models else platform.processor() or platform.machine()
    gib = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(gib, 1), "gpu": gpu}


def peak_memory_gib() -> float:
    """The largest resident memory this process has had, in GiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent held when it started this process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if platform.system() == "Darwin" else 2**20)


def provenance(folder: Path) -> dict[str, Any]:
    """The provenance recorded in `folder`, empty if there is none."""
    path = folder / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def note(folder: Path, **facts: Any) -> None:
    """Add facts to the provenance of `folder`."""
    write_json(folder / "provenance.json", provenance(folder) | facts)


@contextmanager
def session(folder: Path, **facts: Any) -> Iterator[dict[str, Any]]:
    """Record a stretch of work in `folder`, however it ends: start, seconds, memory, code, versions, machine.

    Yields a dict to which the block can add facts.
    """
    record: dict[str, Any] = {"start": now(), "commit": commit(), "environment": environment(), "machine": machine()}
    record |= facts
    begun = time.perf_counter()
    try:
        yield record
    finally:
        record |= {"seconds": round(time.perf_counter() - begun, 2), "peak_memory_gib": round(peak_memory_gib(), 3)}
        note(folder, sessions=[*provenance(folder).get("sessions", []), record])


def recorded_seconds(folder: Path) -> float:
    """Sum over all sessions recorded in `folder`."""
    return sum(s["seconds"] for s in provenance(folder).get("sessions", []))
