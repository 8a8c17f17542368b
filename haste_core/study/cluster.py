"""Where the jobs of a study run when not here: on a cluster, as the folder of a Snakemake profile describes it.

A profile's `set-resources` names kinds of job (KINDS), since rules have an arm's name: the jobs of arms are `train`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from haste_core.errors import HasteError, unknown
from haste_core.files import output_root, project_root

KINDS = ("prepare", "train", "analyse", "step_time", "report")
# What a value of a profile says until somebody who knows the cluster has filled it in.
BLANK = "FILL_IN"
# What a training job of several processes asks for once for each of them.
_EACH = ("gpu", "mem_mb")
_OWN_EXECUTORS = ("local", "dryrun", "touch")


@dataclass(frozen=True)
class Cluster:
    """A profile: its folder, and what its config.yaml says."""

    folder: Path
    settings: dict[str, Any]

    @property
    def path(self) -> Path:
        """The profile's file."""
        return self.folder / "config.yaml"

    @property
    def executor(self) -> str:
        """Snakemake's name for what runs the jobs."""
        return str(self.settings.get("executor", "local"))

    @property
    def remote(self) -> bool:
        """Whether jobs are handed to something else; a profile may also describe how they run on this machine."""
        return self.executor not in _OWN_EXECUTORS

    def resources(self, processes: int = 1) -> dict[str, dict[str, Any]]:
        """What each kind of job asks for; a training job asks for memory and GPUs once for each of its processes."""
        given = self.settings.get("set-resources", {})
        found = {kind: dict(given[kind]) for kind in KINDS if kind in given}
        for name in _EACH:
            if name in found.get("train", {}):
                found["train"][name] *= processes
        return found

    def missing_plugins(self) -> list[str]:
        """Packages of the profile's executor and storage that are not installed."""
        wanted = [f"snakemake-executor-plugin-{self.executor}"] if self.remote else []
        if "default-storage-provider" in self.settings:
            wanted.append(f"snakemake-storage-plugin-{self.settings['default-storage-provider']}")
        return [package for package in wanted if importlib.util.find_spec(package.replace("-", "_")) is None]

    def options(self, dry_run: bool = False) -> list[str]:
        """Snakemake's options for running jobs here, after a look at whether it can; a dry run may have blanks.

        Raises:
            HasteError: a plugin is not installed, a value is still to be filled in, or the output lies where jobs that
                get the project's files sent cannot find it.
        """
        missing = self.missing_plugins()
        if missing:
            raise HasteError(
                f"{self.path} needs {' and '.join(missing)}, not installed here; possible: pip install "
                f"{' '.join(missing)}"
            )
        blanks = list(_blanks(self.settings))
        if blanks and not dry_run:
            raise HasteError(
                f"{self.path} still says {BLANK} for {', '.join(blanks)}; possible: this cluster's own values, in that "
                f"file or in a copy of its folder that --on names"
            )
        return [*self._storage(), "--workflow-profile", str(self.folder)]

    def _storage(self) -> list[str]:
        """Where files are kept for jobs that share no file system with Snakemake as far as it knows."""
        if "default-storage-provider" not in self.settings:
            return []
        if output_root() != project_root().resolve():
            raise HasteError(
                f"HASTE_OUTPUT is {output_root()}, but jobs on {self.executor} find their files below the project; "
                f"possible: {project_root()}, or no HASTE_OUTPUT"
            )
        return ["--default-storage-prefix", str(output_root())]


def profiles() -> list[str]:
    """Names of the profiles that come with the project."""
    return sorted(path.parent.name for path in (project_root() / "workflow").glob("*/config.yaml"))


def find(name: str) -> Cluster:
    """The profile of a name (workflow/NAME of the project) or of a folder's path.

    Raises:
        HasteError: there is none, or its file cannot be used.
    """
    folder = project_root() / "workflow" / name if name in profiles() else Path(name).resolve()
    path = folder / "config.yaml"
    if not path.is_file():
        raise unknown("place to run on", name, [*profiles(), "a folder with a Snakemake profile, config.yaml"])
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise HasteError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise HasteError(f"{path} holds no settings; possible: a Snakemake profile, for instance executor: slurm")
    _check(path, settings)
    return Cluster(folder, settings)


def _check(path: Path, settings: dict[str, Any]) -> None:
    """Raise HasteError where what we read of a profile ourselves is not of its form."""
    asked = settings.get("set-resources", {})
    if not isinstance(asked, dict) or not all(isinstance(values, dict) for values in asked.values()):
        raise HasteError(
            f"{path}: set-resources is no mapping of kinds of job to resources; possible: {', '.join(KINDS)}"
        )
    for name in _EACH:
        value = asked.get("train", {}).get(name, 0)
        if type(value) is not int or value < 0:
            raise HasteError(f"{path}: set-resources.train.{name} is {value!r}; possible: a whole number, 0 and above")


def _blanks(value: Any, name: str = "") -> Iterator[str]:
    """Names of the values below `value` that nobody has filled in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _blanks(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _blanks(inner, name)
    elif isinstance(value, str) and BLANK in value:
        yield name


def as_config(cluster: Cluster | None, processes: int) -> dict[str, str]:
    """What the Snakefile is told by --config about where its jobs run."""
    asked = cluster.resources(processes) if cluster else {}
    away = cluster is not None and cluster.remote
    return {"processes": str(processes), "on_cluster": "yes" if away else "", "resources": json.dumps(asked)}
