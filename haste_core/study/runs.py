"""Run directories: where one arm with one seed keeps its configuration, metrics and checkpoints.

    runs/<study>/<arm>-<hash>/seed<k>/      config.yaml, metrics.jsonl, provenance.json, checkpoints/, samples/
    runs/<study>/teacher-<hash>/            the study's own teacher
    runs/<study>/extractor-<hash>/          the network behind FID;  autoencoder-<hash>/  one trained without labels

The hash covers everything that changes a number, so changed settings get a directory of their own and nothing that
was computed before is lost.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from haste_core import checkpoint
from haste_core.errors import HasteError
from haste_core.files import output_root, write_text
from haste_core.study.config import RunConfig, Sample, Study, Teacher


def study_dir(study: Study) -> Path:
    """runs/<study>."""
    return output_root() / "runs" / study.name


def teacher_path(study: Study, teacher: Teacher) -> Path:
    """The weights of a teacher that the study pretrains."""
    return study_dir(study) / f"teacher-{study.teacher_hash(teacher)}" / "teacher.safetensors"


def extractor_path(study: Study) -> Path:
    """The weights of the feature extractor."""
    return study_dir(study) / f"extractor-{study.extractor_hash}" / "extractor.safetensors"


def autoencoder_path(study: Study) -> Path:
    """The weights of the feature extractor that is trained without labels."""
    return study_dir(study) / f"autoencoder-{study.autoencoder_hash}" / "autoencoder.safetensors"


def report_dir(study: Study, profile: str | None = None) -> Path:
    """reports/<study>, or reports/<study>-<profile>."""
    return output_root() / "reports" / (f"{study.name}-{profile}" if profile else study.name)


@dataclass(frozen=True)
class Run:
    """One arm of a study with one seed, and its directory."""

    study: Study
    arm: str
    seed: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise HasteError(f"seed {self.seed}; possible: 0 and above")
        self.study.run(self.arm)  # an arm that does not exist is an error here and now

    @cached_property
    def config(self) -> RunConfig:
        """The arm's resolved configuration."""
        return self.study.run(self.arm)

    @cached_property
    def sample(self) -> Sample:
        """How the arm's images are drawn."""
        return self.study.sample_of(self.arm)

    @cached_property
    def evaluation_hash(self) -> str:
        """Hash of everything that moves a score of this run except its weights."""
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
        """Scores of this run under the study's present evaluation settings."""
        return self.dir / f"evaluation-{self.evaluation_hash}.json"

    def checkpoint_path(self, step: int) -> Path:
        """The checkpoint after `step` steps."""
        return self.dir / "checkpoints" / f"step_{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        found = (re.fullmatch(r"step_(\d{8})\.safetensors", p.name) for p in (self.dir / "checkpoints").glob("*"))
        return sorted(int(match[1]) for match in found if match)

    def missing_steps(self) -> list[int]:
        """Steps the configuration asks for and that have no checkpoint yet; empty when the run is complete."""
        return sorted(set(self.config.train.kept_steps) - set(self.steps()))

    def resume_step(self) -> int | None:
        """The latest checkpoint from which everything missing can still be reached, or None."""
        limit = min(self.missing_steps(), default=self.config.train.steps)
        return max((s for s in self.steps() if s <= limit), default=None)

    def load(self, step: int, prefixes: tuple[str, ...] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors and state of the checkpoint at `step`, after checking that it belongs to this run."""
        tensors, state = checkpoint.load(self.checkpoint_path(step), prefixes)
        if (state["lineage"], state["seed"]) != (self.config.lineage, self.seed):
            raise HasteError(
                f"checkpoint {self.checkpoint_path(step)} belongs to lineage {state['lineage']} seed {state['seed']}, "
                f"this run is lineage {self.config.lineage} seed {self.seed}; possible: delete it"
            )
        return tensors, state

    def metrics(self) -> list[dict[str, Any]]:
        """The logged measurements, one dict per logged step."""
        if not self.metrics_path.is_file():
            raise HasteError(f"no metrics at {self.metrics_path}; possible: haste train {self.study.name} {self.arm}")
        return [json.loads(line) for line in self.metrics_path.read_text().splitlines() if line.strip()]

    def keep_metrics_until(self, step: int) -> None:
        """Drop metrics of steps that will be repeated, and a last line that a crash cut short."""
        if not self.metrics_path.is_file():
            return
        kept = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                continue  # only the line being written when a process died can be partial
        write_text(self.metrics_path, "".join(kept))

    def describe(self) -> None:
        """Write the resolved configuration beside the run."""
        content = {"study": self.study.name, "arm": self.arm, "seed": self.seed}
        content |= self.config.model_dump(mode="json")
        write_text(self.dir / "config.yaml", yaml.safe_dump(content, sort_keys=False))
