"""The notebooks run in batch from top to bottom, leave what they promise, and stop when they are told to.

A finished study has run 00, 01 and 10 already; the others run on a copy of it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ipywidgets
import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from test_study import copy_of, finished_study

from haste_core.errors import HasteError
from haste_core.study import config, evaluation, notebook
from haste_core.study.notebook import BATCH, explore
from haste_core.study.runs import Run
from haste_core.study.train import fit

ROOT = Path(__file__).parents[1]
HASTE = str(Path(sys.executable).with_name("haste"))
# Number of pictures of the notebooks that a study executes.
EXECUTED = {"00_data_and_teacher": 2, "01_train_vanilla": 2, "01_train_haste": 2, "10_report": 9}
SMALL = ["seeds=[0]", "analysis.n=24", "analysis.resamples=20", "analysis.timesteps=[0.1, 0.5]"]
TWO_ARMS = [*SMALL, "groups={main: [vanilla, haste]}"]
# Each with its parameters and the tables it leaves beside the report.
ANALYSES = {
    "03_gradient_conflict": (
        {"chunks": 2, "arms": ["holistic"]}, ("gradient_conflict", "gradient_conflict_online", "online_cost"),
    ),
    "04_representation_similarity": ({"train": 200, "arms": [], "overrides": TWO_ARMS}, ("similarity", "probing")),
    "05_attention_similarity": (
        {"levels": [0.5], "overrides": TWO_ARMS}, ("attention_similarity", "attention_statistics", "cross_effects"),
    ),
    "06_capacity": ({"arms": ["haste"], "fit_images": 50}, ("capacity", "spectrum", "help_consists_of")),
    "07_termination": ({}, ("termination_logs", "termination_sweep")),
    "08_ablations": (
        {"overrides": [*TWO_ARMS, *(f"arms.{arm}=null" for arm in ("repa", "atta", "holistic"))]},
        ("ablations", "late_gain", "grid"),
    ),
}  # fmt: skip

# Where there are Chromium and Playwright, analyses are run in JupyterLab.
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAB = BROWSER is not None and importlib.util.find_spec("playwright") is not None

pytestmark = [pytest.mark.timeout(1800), pytest.mark.xdist_group("notebooks")]


def set_up(patch, place):
    patch.setenv("HASTE_OUTPUT", str(place))
    patch.setenv("ACCELERATE_USE_CPU", "true")
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def study(tmp_path_factory, tmp_path, monkeypatch):
    """A copy of the finished study, where HASTE_OUTPUT points to."""
    copy = copy_of(finished_study(tmp_path_factory), tmp_path / "copy")
    set_up(monkeypatch, copy.dir)
    return copy


@pytest.fixture
def execute(tmp_path):
    """A function that runs a notebook at smoke size, checks that it ran through, and returns the executed one."""

    def run(name, **parameters):
        notebook.execute(name, tmp_path / f"{name}.ipynb", {"profile": "smoke"} | parameters)
        children = psutil.Process().children(recursive=True)
        assert not any("ipykernel_launcher" in child.cmdline() for child in children)
        return Executed(tmp_path / f"{name}.ipynb")

    return run


class Executed:
    """An executed notebook, which must have run through."""

    def __init__(self, path):
        self.cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and c.source]
        assert all(cell.execution_count for cell in self.cells)
        self.outputs = [output for cell in self.cells for output in cell.outputs]
        assert "error" not in {output.output_type for output in self.outputs}

    @property
    def pictures(self):
        return len([output for output in self.outputs if "image/png" in output.get("data", {})])

    @property
    def text(self):
        return "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in self.outputs)


# -- each notebook ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
def test_notebooks_of_a_study_ran_from_top_to_bottom_and_show_their_pictures(study, name):
    executed = Executed(study.report / "notebooks" / f"{name}.ipynb")
    assert executed.pictures == EXECUTED[name]
    if name == "01_train_haste":
        (cell,) = (cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", []))
        assert {'profile = "smoke"', 'arm = "haste"', "seeds = []"} <= set(cell.source.splitlines())
        assert str(study.run("haste").dir.relative_to(study.dir)) in executed.text


@pytest.mark.slow
def test_the_score_notebook_shows_the_scores_of_every_checkpoint(study, execute):
    run = study.run("haste")
    run.evaluation_path.unlink()
    executed = execute("02_fid", arm="haste", seed=0)
    assert executed.pictures == 2
    assert [row["step"] for row in evaluation.rows(run)] == [4, 8, 12]
    assert all(f"{row['fid']:.4f}"[:4] in executed.text for row in evaluation.rows(run))


@pytest.mark.slow
@pytest.mark.skipif(LAB, reason="test_browser.py runs the analyses, in JupyterLab")
@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_shows_pictures_and_leaves_tables_with_their_origin(study, execute, name):
    parameters, _ = ANALYSES[name]
    assert execute(name, **({"overrides": SMALL} | parameters)).pictures >= 3
    check_tables(study.report, name)


def check_tables(report, name):
    """An analysis has left its tables, with rows of the runs that they name."""
    for table in ANALYSES[name][1]:
        stem = report / "tables" / table
        rows, facts = pd.read_csv(f"{stem}.csv"), json.loads(Path(f"{stem}.json").read_text())
        assert len(rows) == facts["rows"] > 0
        assert facts["card"]["analysis"]["n"] == 24
        named = {whose.split()[0] for whose in facts["runs"]}
        # The gain of an arm over its baseline has no row for the baseline itself.
        assert {*rows["arm"], *(rows["baseline"] if table == "late_gain" else ())} == named


@pytest.mark.slow
def test_the_mechanism_is_shown_from_the_tables_that_came_with_the_project(study, execute):
    shutil.copytree(ROOT / "reports" / "textured", study.dir / "reports" / "textured")
    assert execute("11_mechanism", profile="").pictures == 6


@pytest.mark.slow
def test_a_loop_of_ones_own_runs_through_the_switch(study, execute):
    assert execute("09_your_own_trainer", steps=40, stop_at=20, batch_size=16).pictures == 3


@pytest.mark.slow
def test_the_training_notebook_scores_all_seeds_and_leaves_finished_ones_alone(study, execute, forget_accelerator):
    # Another sampler than the study's, so seed 0 is scored again; seed 1 is new.
    other = ["sample.solver_steps=3"]
    runs = [Run(config.load("digits", "smoke", other), "haste", seed) for seed in (0, 1)]
    trained = {p: p.stat().st_mtime_ns for p in [*runs[0].dir.glob("checkpoints/*"), runs[0].metrics_path]}
    executed = execute("01_train", overrides=other, arm="haste", seeds=[0, 1], score=True)
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert [run.steps() for run in runs] == [[4, 8, 12]] * 2
    rows = [row for run in runs for row in evaluation.rows(run)]
    assert [(row["seed"], row["step"]) for row in rows] == [(seed, step) for seed in (0, 1) for step in (4, 8, 12)]
    assert all(f"{row['fid']:.4f}"[:4] in executed.text for row in rows)
    # Several seeds in one process end in the bits of one alone.
    together = json.loads(runs[1].evaluation_path.read_text())["steps"]["12"]
    shutil.rmtree(runs[1].dir)
    forget_accelerator()
    fit(runs[1], progress=False)
    assert runs[1].load(12)[1]["ema_fingerprint"] == together


def test_a_notebook_is_found_by_its_path_too(tmp_path):
    cells = [nbformat.v4.new_code_cell("size = 1", metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell("print(size + 1)"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "mine.ipynb")
    notebook.execute(str(tmp_path / "mine.ipynb"), tmp_path / "deep" / "out.ipynb", {"size": 41})
    assert Executed(tmp_path / "deep" / "out.ipynb").text == "42\n"


@pytest.mark.slow
def test_the_report_notebook_reports_plain_training_alone(study, tmp_path, execute):
    shutil.copytree(study.dir / "runs" / "digits", study.dir / "runs" / "alone")
    content = yaml.safe_load((config.STUDIES / "digits.yaml").read_text()) | {"name": "alone"}
    content["arms"], content["profiles"]["smoke"]["arms"] = {"vanilla": {}}, {}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(content))
    executed = execute("10_report", study=str(tmp_path / "alone.yaml"), overrides=["seeds=[0]"])
    assert executed.pictures == 6
    tables = study.report.with_name("alone-smoke") / "tables"
    assert len(pd.read_csv(tables / "fid.csv")) == 3
    assert "data:image/svg+xml;base64," in (tables.parent / "report.html").read_text()
    assert "written from 1 runs" in executed.text
    assert str(tables.parent / "report.html") in executed.text


# -- figures to move --------------------------------------------------------------------------------------------------


def test_explore_draws_once_under_papermill_and_anew_with_every_move_of_a_control(monkeypatch):
    monkeypatch.setenv(BATCH, "1")
    choices = {"t": [0.1, 0.5], "arm": ["repa", "haste"]}
    assert explore(dict, {"t": 0.5}, **choices) == {"t": 0.5, "arm": "repa"}
    monkeypatch.delenv(BATCH)
    seen = []
    made = explore(lambda **chosen: seen.append(chosen), {"t": 0.5}, **choices)
    slider, menu = made.children[0].children
    assert isinstance(slider, ipywidgets.SelectionSlider)
    assert isinstance(menu, ipywidgets.Dropdown)
    slider.value = 0.1
    assert seen == [{"t": 0.5, "arm": "repa"}, {"t": 0.1, "arm": "repa"}]
    with pytest.raises(HasteError, match=r"start value of t '0.3'.*0.1, 0.5"):
        explore(dict, {"t": 0.3}, **choices)


# -- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_exits_143_and_leaves_no_kernel(tmp_path, monkeypatch):
    set_up(monkeypatch, tmp_path)
    overrides = ["train.steps=100000", "train.keep=[]", "train.checkpoint_every=100000", "train.sample_every=100000"]
    child = subprocess.Popen(
        [HASTE, "notebook", "01_train", str(tmp_path / "out.ipynb"),
         "-p", "profile=smoke", "-p", "arm=vanilla", "-p", f"overrides={json.dumps(overrides)}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    run = Run(config.load("digits", "smoke", overrides), "vanilla", 0)
    below: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 200
        while not (run.metrics_path.is_file() and run.metrics_path.read_text().count("\n") > 2):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        below = psutil.Process(child.pid).children(recursive=True)
        assert any("ipykernel_launcher" in process.cmdline() for process in below)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=100)
        _, alive = psutil.wait_procs(below, timeout=10)
    finally:
        for process in [child, *below]:
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()
    assert child.returncode == 143
    assert alive == []
    (step,) = run.steps()
    assert 6 <= step < 100_000
    lines = [line for line in said.splitlines() if line.strip()]
    assert lines == [f"haste: vanilla seed 0 stopped at step {step}, saved; run again to go on"]
    assert run.load(step)[1]["step"] == step
