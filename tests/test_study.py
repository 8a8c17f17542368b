"""One whole study at smoke size, started as a user starts it, and what a second call does."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest

from haste_core.study import config
from haste_core.study.cli import main
from haste_core.study.runs import Run

ROOT = Path(__file__).parents[1]
HASTE = str(Path(sys.executable).with_name("haste"))
ANALYSES = "analyses={08_ablations: {groups: [main]}}"
SETTINGS = ["digits", "--profile", "smoke", "--set", "seeds=[0]", "--set", ANALYSES]
ARMS = ("vanilla", "repa", "atta", "holistic", "haste")

pytestmark = [pytest.mark.xdist_group("study"), pytest.mark.timeout(1800), pytest.mark.slow]


@dataclass(frozen=True)
class Finished:
    """A study that ran: where, and what it printed."""

    dir: Path
    out: str

    @property
    def report(self) -> Path:
        return self.dir / "reports" / "digits-smoke"

    def run(self, arm: str) -> Run:
        return Run(config.load("digits", "smoke", ["seeds=[0]"]), arm, 0)


def once(factory, name, make):
    """The folder `name`, filled by `make(folder)` in the first worker that asks; the others wait for it.

    Groups of pytest-xdist would do, where they work: https://github.com/pytest-dev/pytest-xdist/issues/1386.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            assert not place.exists(), f"{name} failed in another worker"
            place.mkdir()
            make(place)
            done.touch()
    return place


def finished_study(factory):
    """The study, run once however many workers and test files ask for it."""

    def run(place):
        done = subprocess.run(
            [HASTE, "study", *SETTINGS, "--cores", "2"],
            capture_output=True, text=True, cwd=ROOT, timeout=1800,
            env=os.environ | {"HASTE_OUTPUT": str(place), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        place.with_suffix(".out").write_text(done.stdout)

    place = once(factory, "study", run)
    return Finished(place, place.with_suffix(".out").read_text())


def copy_of(study, place):
    """The study's output folder at another place; files are linked, since none is ever changed in place."""
    shutil.copytree(study.dir, place, copy_function=os.link)
    return replace(study, dir=place)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finished_study(tmp_path_factory)


@pytest.fixture
def study(whole, output, monkeypatch):
    """The finished study, where HASTE_OUTPUT points to; not to be changed."""
    monkeypatch.setenv("HASTE_OUTPUT", str(whole.dir))
    return whole


def jobs(capfd, *more):
    """Names of the jobs that a dry run lists."""
    assert main(["study", *SETTINGS, *more, "--dry-run"]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    first, *listed = said.out.splitlines()
    assert first == f"study digits: {len(listed) or 'no'} jobs to run"
    return {line.strip() for line in listed}


def moments(folder):
    """When each file was written, apart from Snakemake's own notes, locks and what it tells of the last call."""
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and ".snakemake" not in path.parts and path.suffix != ".lock"
        and path.name not in ("invocation.json", "study.log")
    }  # fmt: skip


# -- what it leaves ---------------------------------------------------------------------------------------------------


def test_it_leaves_a_report_whose_tables_have_rows_and_nothing_else(study):
    path = Path(study.out.splitlines()[-1])
    assert path == study.report / "report.html"
    assert path.stat().st_size > 10_000
    assert "Which choices matter?" in path.read_text()
    for name in ("fid", "floor", "step_time", "claims", "attention", "metrics", "ablations"):
        assert len(pd.read_csv(study.report / "tables" / f"{name}.csv")) > 0, name
    for name in ("provenance.json", "samples.npz"):
        assert (study.report / "tables" / name).stat().st_size > 0
    fid = pd.read_csv(study.report / "tables" / "fid.csv")
    assert set(zip(fid["arm"], fid["seed"], fid["step"], strict=True)) == {(a, 0, s) for a in ARMS for s in (4, 8, 12)}
    assert fid["fid"].notna().all()
    assert len(list((study.report / "tables" / "cards").glob("*.json"))) == fid["card"].nunique() == 1
    names = {path.stem for path in (study.report / "notebooks").glob("*.ipynb")}
    assert names == {"00_data_and_teacher", "08_ablations", "10_report", *(f"01_train_{arm}" for arm in ARMS)}
    assert {path.name for path in study.dir.iterdir()} == {".snakemake", "reports", "runs"}
    for run in map(study.run, ARMS):
        assert run.steps() == [4, 8, 12]
        assert [line["step"] for line in run.metrics()] == [2, 4, 6, 8, 10, 12]


def test_haste_says_that_it_shares_its_first_part_with_holistic(study):
    provenance = json.loads((study.run("haste").dir / "provenance.json").read_text())
    assert (provenance["shared_with"], provenance["shared_until_step"]) == ("holistic seed 0", 8)
    assert provenance["sessions"][0]["first_step"] == 8
    for step in (4, 8):
        assert study.run("haste").checkpoint_path(step).samefile(study.run("holistic").checkpoint_path(step))
    assert "shared_with" not in json.loads((study.run("vanilla").dir / "provenance.json").read_text())


# -- what a second call does ------------------------------------------------------------------------------------------


def test_a_second_call_runs_no_job_and_ends_with_the_same_path(study, capfd):
    before = moments(study.dir)
    assert main(["study", *SETTINGS, "--cores", "2"]) == 0
    said = capfd.readouterr()
    assert (said.out.splitlines(), said.err) == (["nothing was left to do", study.out.splitlines()[-1]], "")
    assert moments(study.dir) == before


@pytest.mark.parametrize(
    ("settings", "listed"),
    [
        # Finished work is not repeated by more processes, nor that of arms that did not change.
        (
            ("arms.haste.alignment.lambda_attention=1.0",),
            {"arm haste", "time of a step", "notebook 08_ablations", "report"},
        ),
        # That jobs of finished runs train nothing is tested with the notebook.
        (("seeds=[0, 1]",), {*(f"arm {arm}" for arm in ARMS), "notebook 08_ablations", "report"}),
        (("arms.vanilla.sample.solver_steps=3",), {"arm vanilla", "notebook 08_ablations", "report"}),
    ],
)
def test_a_changed_setting_runs_the_jobs_it_touches(study, capfd, settings, listed):
    words = [word for setting in settings for word in ("--set", setting)]
    assert jobs(capfd, *words, "--processes", "2") == listed


def test_a_deleted_run_and_what_depends_on_it_are_made_again(study, tmp_path, monkeypatch, capfd):
    copy = copy_of(study, tmp_path / "copy")
    monkeypatch.setenv("HASTE_OUTPUT", str(copy.dir))
    shutil.rmtree(copy.run("holistic").dir)
    # haste branches from holistic, so it is looked at again and found complete.
    assert jobs(capfd) == {"arm holistic", "arm haste", "notebook 08_ablations", "report"}
