"""The notebooks run in batch from top to bottom, leave what they promise, and stop when they are told to."""

from __future__ import annotations

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
from test_study import copy_of, finished_study, once

from haste_core.errors import HasteError
from haste_core.study import config, evaluation, notebook
from haste_core.study.notebook import BATCH, explore
from haste_core.study.runs import Run

ROOT = Path(__file__).parents[1]
HASTE = str(Path(sys.executable).with_name("haste"))
IN_ORDER = ("00_data_and_teacher", "01_train", "02_fid")
# Each with the tables it leaves beside the report.
ANALYSES = {
    "03_gradient_conflict": ("gradient_conflict", "gradient_conflict_online", "online_cost"),
    "04_representation_similarity": ("similarity", "probing"),
    "05_attention_similarity": ("attention_similarity", "attention_statistics", "cross_effects"),
    "06_capacity": ("capacity", "spectrum", "help_consists_of"),
    "07_termination": ("termination_logs", "termination_sweep"),
    "08_ablations": ("ablations", "late_gain", "grid"),
}

pytestmark = pytest.mark.timeout(900)
together = pytest.mark.xdist_group("notebooks")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output folder after 00, 01 and 02, the executed notebooks beside runs/."""

    def run(place):
        with pytest.MonkeyPatch.context() as patch:
            set_up(patch, place)
            for name in IN_ORDER:
                own = {"01_train": {"arm": "haste", "seeds": [0]}, "02_fid": {"arm": "haste", "seed": 0}}.get(name, {})
                notebook.execute(name, place / f"{name}.ipynb", {"profile": "smoke", **own})
                assert kernels() == []

    return once(tmp_path_factory, "notebooks", run)


def set_up(patch, place):
    patch.setenv("HASTE_OUTPUT", str(place))
    patch.setenv("ACCELERATE_USE_CPU", "true")
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def executed(folder, monkeypatch):
    monkeypatch.setenv("HASTE_OUTPUT", str(folder))
    return folder


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source]


def outputs(path, kind):
    """The outputs of a kind ("error", "stream", ...) of an executed notebook."""
    return [output for cell in code_cells(path) for output in cell.outputs if output.output_type == kind]


def pictures(path):
    return [out for cell in code_cells(path) for out in cell.outputs if "image/png" in out.get("data", {})]


def assert_ran_through(path):
    assert outputs(path, "error") == []
    assert all(cell.execution_count for cell in code_cells(path))


def kernels():
    """Kernels that this process started and that are still alive."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "ipykernel_launcher" in child.cmdline()]


# -- each notebook ----------------------------------------------------------------------------------------------------


@together
@pytest.mark.parametrize("name", IN_ORDER)
def test_a_notebook_runs_from_top_to_bottom_and_shows_its_pictures(executed, name):
    assert_ran_through(executed / f"{name}.ipynb")
    assert len(pictures(executed / f"{name}.ipynb")) == 2


@together
# One of them is quick.
@pytest.mark.parametrize("name", ["07_termination", *(pytest.param(n, marks=SLOW) for n in ANALYSES if n[:2] != "07")])
def test_an_analysis_shows_pictures_and_leaves_tables_with_their_origin(name, tmp_path, tmp_path_factory, monkeypatch):
    study = copy_of(finished_study(tmp_path_factory), tmp_path / "output")
    set_up(monkeypatch, study.dir)
    small = ["seeds=[0]", "analysis.n=24", "analysis.resamples=20", "analysis.timesteps=[0.1, 0.5]"]
    smaller = {"chunks": 4} if name.startswith("03") else {"levels": [0.5]} if name.startswith("05") else {}
    notebook.execute(name, tmp_path / "out.ipynb", {"profile": "smoke", "overrides": small, **smaller})
    assert_ran_through(tmp_path / "out.ipynb")
    assert len(pictures(tmp_path / "out.ipynb")) >= 3
    for table in ANALYSES[name]:
        stem = study.dir / "reports" / "digits-smoke" / "tables" / table
        rows, facts = pd.read_csv(f"{stem}.csv"), json.loads(Path(f"{stem}.json").read_text())
        assert len(rows) == facts["rows"] > 0
        assert facts["card"]["analysis"]["n"] == 24
        named = {whose.split()[0] for whose in facts["runs"]}
        # The gain of an arm over its baseline has no row for the baseline itself.
        assert {*rows["arm"], *(rows["baseline"] if table == "late_gain" else ())} == named


@together
def test_a_loop_of_ones_own_runs_through_the_switch(tmp_path, monkeypatch):
    set_up(monkeypatch, tmp_path)
    settings = {"profile": "smoke", "steps": 40, "stop_at": 20, "batch_size": 16}
    notebook.execute("09_your_own_trainer", tmp_path / "out.ipynb", settings)
    assert_ran_through(tmp_path / "out.ipynb")
    assert len(pictures(tmp_path / "out.ipynb")) == 2
    assert kernels() == []


@together
def test_notebooks_leave_networks_a_finished_run_and_its_scores(executed):
    for network in ("teacher", "extractor"):
        assert len(list(executed.glob(f"runs/digits/{network}-*/{network}.safetensors"))) == 1
    facts = json.loads((executed / "runs" / "digits" / "prepared.json").read_text())
    assert facts["teacher"]["grid"] == [4, 4]
    assert 0 <= facts["extractor"]["test_accuracy"] <= 1
    run = Run(config.load("digits", "smoke"), "haste", 0)
    assert run.steps() == [4, 8, 12]
    assert [line["phase"] for line in run.metrics()] == [1, 1, 1, 1, 2, 2]
    printed = "".join(out["text"] for out in outputs(executed / "01_train.ipynb", "stream"))
    assert str(run.dir) in printed
    stored = json.loads(run.evaluation_path.read_text())
    assert sorted(stored["steps"], key=int) == ["4", "8", "12"]
    shown = "".join(out["data"].get("text/plain", "") for out in outputs(executed / "02_fid.ipynb", "execute_result"))
    for fingerprint in stored["steps"].values():
        assert f"{stored['scores'][fingerprint]['fid']:.4f}"[:4] in shown


@together
def test_the_training_notebook_scores_all_seeds_and_leaves_finished_ones_alone(executed, tmp_path, monkeypatch):
    shutil.copytree(executed / "runs", tmp_path / "runs")
    set_up(monkeypatch, tmp_path)
    # Another sampler than in `executed`, so seed 0 is scored again; seed 1 is new.
    other = ["sample.solver_steps=3"]
    runs = [Run(config.load("digits", "smoke", other), "haste", seed) for seed in (0, 1)]
    trained = {p: p.stat().st_mtime_ns for p in [*runs[0].dir.glob("checkpoints/*"), runs[0].metrics_path]}
    given = {"profile": "smoke", "overrides": other, "arm": "haste", "seeds": [0, 1], "score": True}
    notebook.execute("01_train", tmp_path / "out.ipynb", given)
    assert_ran_through(tmp_path / "out.ipynb")
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert [run.steps() for run in runs] == [[4, 8, 12]] * 2
    rows = [row for run in runs for row in evaluation.rows(run)]
    assert [(row["seed"], row["step"]) for row in rows] == [(seed, step) for seed in (0, 1) for step in (4, 8, 12)]
    shown = "".join(out["data"].get("text/plain", "") for out in outputs(tmp_path / "out.ipynb", "execute_result"))
    assert [row["fid"] for row in rows if f"{row['fid']:.4f}"[:4] not in shown] == []
    # Several seeds in one process end in the bits of one alone.
    alone = tmp_path / "alone"
    shutil.copytree(executed / "runs", alone / "runs", ignore=shutil.ignore_patterns("haste-*"))
    monkeypatch.setenv("HASTE_OUTPUT", str(alone))
    notebook.execute("01_train", tmp_path / "alone.ipynb", given | {"seeds": [1], "score": False})
    again = Run(runs[1].study, "haste", 1)
    assert again.load(12)[1]["ema_fingerprint"] == json.loads(runs[1].evaluation_path.read_text())["steps"]["12"]


@together
def test_an_executed_notebook_holds_its_parameters_and_the_notebooks_stay_without_outputs(executed):
    (cell,) = (
        c for c in code_cells(executed / "01_train.ipynb") if "injected-parameters" in c.metadata.get("tags", [])
    )
    assert cell.source.splitlines()[1:] == ['profile = "smoke"', 'arm = "haste"', "seeds = [0]"]
    for name in notebook.notebooks():
        cells = code_cells(ROOT / "notebooks" / f"{name}.ipynb")
        assert [cell.outputs for cell in cells] == [[]] * len(cells)
        assert {cell.execution_count for cell in cells} == {None}


@together
def test_a_notebook_is_found_by_its_path_too(tmp_path, monkeypatch):
    set_up(monkeypatch, tmp_path)
    mine = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("size = 1", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("print(size + 1)"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(mine, tmp_path / "mine.ipynb")
    notebook.execute(str(tmp_path / "mine.ipynb"), tmp_path / "deep" / "out.ipynb", {"size": 41})
    assert [out["text"] for out in outputs(tmp_path / "deep" / "out.ipynb", "stream")] == ["42\n"]


@pytest.mark.xdist_group("study")
@pytest.mark.parametrize(
    ("alone", "runs", "shown"), [pytest.param(False, 5, 9, marks=SLOW), (True, 1, 6)], ids=["all arms", "vanilla alone"]
)
def test_the_report_notebook_writes_tables_and_report(tmp_path_factory, tmp_path, monkeypatch, alone, runs, shown):
    study = copy_of(finished_study(tmp_path_factory), tmp_path / "copy")
    shutil.rmtree(study.report)
    set_up(monkeypatch, study.dir)
    given = {"profile": "smoke", "overrides": ["seeds=[0]"]}
    if alone:
        content = yaml.safe_load((config.STUDIES / "digits.yaml").read_text())
        content["arms"], content["profiles"]["smoke"]["arms"] = {"vanilla": {}}, {}
        (tmp_path / "alone.yaml").write_text(yaml.safe_dump(content))
        given["study"] = str(tmp_path / "alone.yaml")
    notebook.execute("10_report", tmp_path / "10.ipynb", given)
    assert_ran_through(tmp_path / "10.ipynb")
    assert len(pictures(tmp_path / "10.ipynb")) == shown
    assert len(pd.read_csv(study.report / "tables" / "fid.csv")) == 3 * runs
    assert "data:image/png;base64," in (study.report / "report.html").read_text()
    printed = "".join(out["text"] for out in outputs(tmp_path / "10.ipynb", "stream"))
    assert f"written from {runs} runs" in printed
    assert str(study.report / "report.html") in printed


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
