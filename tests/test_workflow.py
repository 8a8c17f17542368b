"""Where a study's jobs run and what they are told: the graph with jobs that do nothing, profiles, errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from haste_core import files
from haste_core.errors import HasteError
from haste_core.study import cluster, config, workflow
from haste_core.study.cli import main

ROOT = Path(__file__).parents[1]
NAMES = ("slurm", "kubernetes")

# What every job starts with, in place of its work: write down how it was called, leave what its rule looks for.
STAND_IN = """
import json, os, sys
words = getattr(sys, "orig_argv", [])
if "haste_core.study.cli" in words:
    words, out = words[words.index("haste_core.study.cli") + 1 :], os.environ["HASTE_OUTPUT"]
    told = {"words": words, "cwd": os.getcwd(), "out": out, "threads": os.environ.get("OMP_NUM_THREADS")}
    with open(os.environ["CALLS"], "a") as log:
        log.write(json.dumps(told) + "\\n")
    left = {"00_data_and_teacher": "runs/small/prepared.json", "10_report": "reports/small/report.html"}
    if words[1] in left:
        os.makedirs(os.path.join(out, os.path.dirname(left[words[1]])), exist_ok=True)
        open(os.path.join(out, left[words[1]]), "w").close()
    os._exit(0)
"""


@pytest.fixture
def small(tmp_path):
    """The file of a study of two arms and one analysis."""
    content = yaml.safe_load((ROOT / "haste_core" / "studies" / "digits.yaml").read_text())
    arms = {name: content["arms"][name] for name in ("vanilla", "repa")}
    content |= {"name": "small", "seeds": [0], "arms": arms, "profiles": {}, "claims": {"early": 640}}
    content |= {"analyses": {"08_ablations": {"groups": ["main"]}, "06_capacity": {"seeds": [0]}}}
    path = tmp_path / "here" / "small.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def filled(tmp_path):
    """Copies of the project's profiles with every blank filled in, by name."""
    for name in NAMES:
        text = (ROOT / "workflow" / name / "config.yaml").read_text()
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(re.sub(rf"(?<!^# ){cluster.BLANK}", "mine", text))
    return {name: tmp_path / name for name in NAMES}


def refused(capfd, *words):
    """The one line that a command is refused with."""
    assert main(["study", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def rules(command):
    """The lines that Snakemake prints on each job of a graph in a dry run, by the rule's name."""
    loud = [word for word in command if word not in ("--quiet", "rules")]
    done = subprocess.run([*loud, "--cores", "2", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = re.split(r"^(?:local)?rule (\w+):$", done.stdout + done.stderr, flags=re.M)
    return dict(zip(*[iter(printed[1:])] * 2, strict=True))


# -- the graph --------------------------------------------------------------------------------------------------------


def test_every_job_is_told_its_arm_its_seeds_its_threads_and_its_processes(small, output, tmp_path, monkeypatch):
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "sitecustomize.py").write_text(STAND_IN)
    calls = tmp_path / "calls"
    monkeypatch.chdir(small.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stand-in"), str(ROOT)]))
    monkeypatch.setenv("CALLS", str(calls))
    assert main(["study", "small.yaml", "--cores", "2", "--processes", "2", "--set", "seeds=[0, 2]"]) == 0
    told = [json.loads(line) for line in calls.read_text().splitlines()]
    assert {(job["cwd"], job["out"]) for job in told} == {(str(small.parent), str(files.output_root()))}
    notebooks = {Path(job["words"][2]).name: job for job in told if job["words"][0] == "notebook"}
    arms = ["01_train_vanilla", "01_train_repa"]
    others = ["00_data_and_teacher", "06_capacity", "08_ablations", "10_report"]
    assert set(notebooks) == {f"{name}.ipynb" for name in (*arms, *others)}
    for name, job in notebooks.items():
        assert name.startswith(job["words"][1])
        own = {word for word in job["words"] if word.partition("=")[0] in ("arm", "seeds", "score", "processes")}
        arm = name.removeprefix("01_train_").removesuffix(".ipynb")
        expected = {f"arm={arm}", "seeds=[]", "score=true", "processes=2"}
        assert own == (expected if name.startswith("01_train") else {"seeds=[0]"} if name.startswith("06") else set())
        # A training job has a thread for each of its two processes, not two for each.
        assert job["threads"] == "1"
    # The longest arm first; nothing waits while the machine is timed.
    order = [Path(job["words"][2]).stem if job["words"][0] == "notebook" else job["words"][0] for job in told]
    assert order[:3] == ["00_data_and_teacher", "01_train_repa", "01_train_vanilla"]
    assert set(order[3:5]) == {"06_capacity", "08_ablations"}
    assert order[5:] == ["cost", "10_report"]


def test_an_arm_waits_for_the_teacher_and_for_the_arm_it_branches_from(output):
    printed = rules(workflow.graph("digits", "smoke"))
    inputs = {rule: re.search(r"input: (.*)", text) for rule, text in printed.items()}
    waits = {
        rule: re.findall(r"prepared-|holistic|haste|vanilla|repa|atta", found[1])
        for rule, found in inputs.items()
        if found
    }
    assert "arm_vanilla" not in waits
    assert all(waits[f"arm_{arm}"] == ["prepared-"] for arm in ("repa", "atta", "holistic"))
    # A stamp for each of the two seeds.
    assert waits["arm_haste"] == ["prepared-", "holistic", "holistic"]


def test_the_longest_chain_of_arms_has_the_highest_priority():
    overrides = ["train.steps=1600", "arms.haste.termination.at=800", "seeds=[0, 1, 2]", "train.keep=[800]"]
    study = config.load("digits", overrides=overrides)
    found = workflow.priorities(study, {arm: study.donor(arm) for arm in study.arms})
    # In steps: holistic 3 * 1600 * 1.5 and haste's 3 * 800 after it, then 7200, 4800 and 2400.
    assert found == {"holistic": 99, "repa": 75, "atta": 75, "vanilla": 51, "haste": 27}
    alone = workflow.priorities(study, dict.fromkeys(study.arms))
    # Without a donor haste trains its first part itself: 3 * (800 * 1.5 + 800).
    assert alone == {"holistic": 99, "repa": 99, "atta": 99, "vanilla": 67, "haste": 83}


def test_a_job_that_is_stopped_outlives_the_signal_to_save(tmp_path):
    saves = "import signal, sys, time; got = []; signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
    saves += "print('ready', flush=True)\nwhile not got: time.sleep(0.01)\n"
    saves += "time.sleep(0.3); open('saved', 'w').close(); sys.exit(143)"
    outlive = re.search(r'^OUTLIVE = "(.*)"$', (ROOT / "Snakefile").read_text(), re.M)[1]
    # As Snakemake starts it, as a group of its own, all of which gets the signal.
    line = f'set -euo pipefail; {outlive}( exec {sys.executable} -c "$0") && touch stamp'
    with subprocess.Popen(
        ["bash", "-c", line, saves], cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as shell:
        assert shell.stdout.readline() == "ready\n"
        os.killpg(shell.pid, 15)
        assert shell.wait(timeout=20) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# -- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_of_the_project_says_what_the_page_promises(name):
    found = cluster.find(name)
    assert found.settings == yaml.safe_load((ROOT / "workflow" / name / "config.yaml").read_text())
    assert found.executor == name
    assert found.settings["jobs"] > 1
    assert found.settings["retries"] > 1
    assert found.settings["latency-wait"] >= 60
    asked = found.resources()
    assert set(asked) == {"prepare", "train", "analyse", "step_time"}
    assert {values["gpu"] for values in asked.values()} == {1}
    assert "gpu" not in found.settings["default-resources"]


def test_slurm_puts_back_what_was_preempted_and_warns_before_the_limit():
    settings = cluster.find("slurm").settings
    assert settings["slurm-requeue"] is True
    assert "--signal=TERM@" in settings["default-resources"]["slurm_extra"]
    assert settings["default-resources"]["nodes"] == 1


def test_kubernetes_gives_gpus_by_limits_and_keeps_stamps_in_the_volume():
    settings = cluster.find("kubernetes").settings
    assert settings["default-resources"]["scale"] == 0
    assert settings["default-storage-provider"] == "fs"
    assert {values["gpu_manufacturer"] for values in settings["set-resources"].values()} == {"nvidia"}


def test_a_training_job_asks_for_each_of_its_processes():
    one, four = (cluster.find("slurm").resources(n) for n in (1, 4))
    assert (four["train"]["gpu"], four["train"]["mem_mb"]) == (4, 4 * one["train"]["mem_mb"])
    assert four["train"]["runtime"] == one["train"]["runtime"]
    assert four["analyse"] == one["analyse"]


def test_jobs_of_the_graph_ask_for_what_the_profile_says(small, output):
    printed = rules(workflow.graph(str(small), processes=2, place=cluster.find("slurm")))
    resources = {rule: re.search(r"resources: (.*)", text)[1] for rule, text in printed.items()}
    assert "gpu=2" in resources["arm_repa"]
    assert "mem_mb=128000" in resources["arm_repa"]
    for rule in ("prepare", "analyse_06_capacity", "step_time"):
        assert "gpu=1" in resources[rule]
        assert "mem_mb=64000" in resources[rule]
    assert "gpu=" not in resources["report"]


def test_a_dry_run_needs_neither_plugin_nor_filled_in_values(small, output, capfd, monkeypatch):
    monkeypatch.setattr(cluster.Cluster, "missing_plugins", lambda self: ["snakemake-executor-plugin-slurm"])
    assert main(["study", str(small), "--on", "slurm", "--processes", "8", "--dry-run"]) == 0
    said = capfd.readouterr()
    assert "arm_repa" in said.out + said.err
    assert said.out.splitlines()[-1].endswith("report.html")


def test_snakemake_reads_the_profile_of_slurm(small, filled, output, capfd):
    missing = cluster.find(str(filled["slurm"])).missing_plugins()
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    assert main(["study", str(small), "--on", str(filled["slurm"]), "--dry-run"]) == 0
    assert "arm_repa" in capfd.readouterr().out


def test_a_profile_may_describe_this_machine(tmp_path):
    (tmp_path / "config.yaml").write_text("executor: local\ncores: 2\n")
    found = cluster.find(str(tmp_path))
    assert found.options() == ["--workflow-profile", str(tmp_path)]
    assert cluster.as_config(found, 3) == {"processes": "3", "on_cluster": "", "resources": "{}"}


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--on", "slrum"], ["unknown place to run on 'slrum' (did you mean 'slurm'?)", "kubernetes, slurm, a folder"]),
        (["--processes", "0"], ["--processes 0; possible: 1 and above"]),
        (["--processes", "3"], ["train.batch_size 32", "possible: a multiple of 3"]),
        (["--cores", "0"], ["--cores 0; possible: 1 and above"]),
        (["--cores", "2", "--on", "slurm"], ["--cores 2 with --on slurm", "possible: one of them"]),
    ],
)
def test_what_no_job_could_work_with_is_refused(output, capfd, words, parts):
    line = refused(capfd, "digits", *words)
    assert [part for part in parts if part not in line] == []
    assert not (files.output_root() / "runs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no valid YAML"),
        ("", "holds no settings"),
        ("set-resources: [train]", "set-resources is no mapping"),
        ("set-resources: {train: 1}", "set-resources is no mapping"),
        ("set-resources: {train: {gpu: two}}", "set-resources.train.gpu is 'two'; possible: a whole number"),
    ],
)
def test_a_profile_that_cannot_be_read_is_refused(tmp_path, text, said):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(HasteError, match=re.escape(said)):
        cluster.find(str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_that_is_not_installed_is_named_with_its_command(name, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(HasteError, match=f"possible: pip install snakemake-executor-plugin-{name}"):
        cluster.find(name).options()


@pytest.mark.parametrize(
    ("name", "blanks"),
    [
        ("slurm", ["default-resources.slurm_account", "default-resources.slurm_partition", "set-resources.train"]),
        ("kubernetes", ["kubernetes-namespace", "container-image", "kubernetes-persistent-volumes"]),
    ],
)
def test_values_to_be_filled_in_are_named(name, blanks, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda module: module)
    with pytest.raises(HasteError, match="still says FILL_IN") as caught:
        cluster.find(name).options()
    assert [blank for blank in blanks if blank not in str(caught.value)] == []


def test_kubernetes_wants_the_output_where_the_project_is(filled, output, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda module: module)
    found = cluster.find(str(filled["kubernetes"]))
    with pytest.raises(HasteError, match="find their files below the project"):
        found.options()
    monkeypatch.delenv("HASTE_OUTPUT")
    assert found.options()[:2] == ["--default-storage-prefix", str(ROOT)]
    assert config.studies()
