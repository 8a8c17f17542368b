"""Jobs of a study: the graph with jobs that do nothing, what each is told, and what profiles ask a cluster for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from haste_core import files
from haste_core.study import config, jobs
from haste_core.study.cli import main

ROOT = Path(__file__).parents[1]
NAMES = ("slurm", "kubernetes")
PLUGINS = {"slurm": ["executor_plugin_slurm"], "kubernetes": ["executor_plugin_kubernetes", "storage_plugin_fs"]}

# Each job starts with this in place of its work: record how it was called, write what its rule looks for.
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


class Asked(dict):
    """Resources of a job as Snakemake hands them to plugins."""

    __getattr__ = dict.__getitem__


@pytest.fixture
def small(tmp_path):
    """The file of a study of two arms and two analyses."""
    content = yaml.safe_load((config.STUDIES / "digits.yaml").read_text())
    arms = {name: content["arms"][name] for name in ("vanilla", "repa")}
    content |= {"name": "small", "seeds": [0], "arms": arms, "profiles": {}, "claims": {"early": 640}}
    content |= {"analyses": {"08_ablations": {"groups": ["main"]}, "06_capacity": {"seeds": [0]}}}
    path = tmp_path / "here" / "small.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def rules(command, *options):
    """The lines that Snakemake prints on each job of a graph in a dry run, by the rule's name."""
    done = subprocess.run([*command, *options, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = re.split(r"^(?:local)?rule (\w+):$", done.stdout + done.stderr, flags=re.M)
    return dict(zip(*[iter(printed[1:])] * 2, strict=True))


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


def test_an_arm_waits_for_its_teacher_and_its_donor_and_asks_a_cluster_for_each_of_its_processes(output, tmp_path):
    content = yaml.safe_load((ROOT / "workflow" / "slurm" / "config.yaml").read_text())
    asked = {name: content["default-resources"][name] for name in ("gpu", "mem_mb")}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(yaml.safe_dump({"cores": 4, "default-resources": asked}))
    printed = rules(jobs.graph("digits", "smoke", processes=2), "--workflow-profile", str(tmp_path / "mine"))
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
    for rule, gpus in (("arm_repa", 2), ("prepare", 1)):
        resources = re.search(r"resources: (.*)", printed[rule])[1]
        assert f"gpu={gpus}" in resources
        assert f"mem_mb={64000 * gpus}" in resources


def test_the_longest_chain_of_arms_has_the_highest_priority():
    overrides = ["train.steps=1600", "arms.haste.termination.at=800", "seeds=[0, 1, 2]", "train.keep=[800]"]
    study = config.load("digits", overrides=overrides)
    found = jobs.priorities(study, {arm: study.donor(arm) for arm in study.arms})
    # In steps: holistic 3 * 1600 * 1.5 and haste's 3 * 800 after it, then 7200, 4800 and 2400.
    assert found == {"holistic": 99, "repa": 75, "atta": 75, "vanilla": 51, "haste": 27}
    alone = jobs.priorities(study, dict.fromkeys(study.arms))
    # Without a donor haste trains its first part itself: 3 * (800 * 1.5 + 800).
    assert alone == {"holistic": 99, "repa": 99, "atta": 99, "vanilla": 67, "haste": 83}


def test_a_job_that_is_stopped_outlives_the_signal_to_save(tmp_path):
    saves = "import signal, sys, time; got = []; signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
    saves += "print('ready', flush=True)\nwhile not got: time.sleep(0.01)\n"
    saves += "time.sleep(0.3); open('saved', 'w').close(); sys.exit(143)"
    outlive = re.search(r'^OUTLIVE = "(.*)"$', (ROOT / "haste_core" / "study" / "Snakefile").read_text(), re.M)[1]
    with subprocess.Popen(
        ["bash", "-c", f'{outlive}( exec python -c "{saves}" ) && touch stamp'],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as shell:  # fmt: skip
        assert shell.stdout.readline() == "ready\n"
        os.killpg(shell.pid, 15)
        assert shell.wait(timeout=20) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# -- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_retries_stopped_jobs_and_gives_them_a_gpu(name):
    settings = yaml.safe_load((ROOT / "workflow" / name / "config.yaml").read_text())
    assert settings["executor"] == name
    assert min(settings["jobs"], settings["retries"]) > 1
    assert settings["latency-wait"] >= 60
    asked = settings["default-resources"]
    assert (asked["gpu"], asked["mem_mb"]) == ("threads", "64000 * threads")
    if name == "slurm":  # a preempted job is put back, and a signal comes before the limit
        assert settings["slurm-requeue"] is True
        assert "--signal=TERM@" in asked["slurm_extra"]
        assert asked["nodes"] == 1
    else:  # GPUs by limits, stamps in the volume
        assert (asked["scale"], asked["gpu_manufacturer"], settings["default-storage-provider"]) == (0, "nvidia", "fs")


def test_the_plugin_for_slurm_asks_for_one_task_however_many_gpus_a_job_has():
    submit = pytest.importorskip("snakemake_executor_plugin_slurm.submit_string").get_submit_command
    asked = yaml.safe_load((ROOT / "workflow" / "slurm" / "config.yaml").read_text())["default-resources"]
    wanted = asked | {"gpu": 2, "mem_mb": 128000}
    extra = str(wanted["slurm_extra"]).strip("'")
    job = SimpleNamespace(resources=Asked(wanted | {"slurm_extra": extra}), threads=2)
    told = dict.fromkeys(("run_uuid", "slurm_logfile", "comment_str", "account", "partition", "workdir"), "x")
    words = shlex.split(submit(job, told))
    assert {"--nodes=1", "--cpus-per-gpu=4", "--signal=TERM@600"} <= set(words)
    assert not [word for word in words if "task" in word]  # Slurm's own default is one
    assert asked["tasks_per_gpu"] == 0  # without which plugins before 2.8 ask for as many as GPUs


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_snakemake_reads_a_filled_in_profile(small, output, tmp_path, capfd, name):
    if any(importlib.util.find_spec(f"snakemake_{plugin}") is None for plugin in PLUGINS[name]):
        pytest.skip(f"the plugins for {name} are not installed")
    text = (ROOT / "workflow" / name / "config.yaml").read_text().replace("FILL_IN", "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(text)
    assert main(["study", str(small), "--workflow-profile", str(tmp_path / "mine"), "--dry-run"]) == 0
    assert "arm repa" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--processes", "3"], ["train.batch_size 32", "expected a multiple of 3"]),
        (["--cores", "0"], ["--cores 0; expected 1 and above"]),
    ],
)
def test_numbers_that_no_job_could_work_with_are_refused(output, capfd, words, parts):
    assert main(["study", "digits", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert [part for part in parts if part not in line] == []
    assert not (files.output_root() / "runs").exists()


# -- what the terminal shows ------------------------------------------------------------------------------------------

STARTED = """host: vm
Building DAG of jobs...
Job stats:
job            count
-----------  -------
arm_repa_0.5       1
arm_total          1
arm_vanilla        1
report             1
all                1
total              5

"""
RAN = """
[Thu Nov 26 13:00:00 2026]
rule arm_vanilla:
    output: x.stamp
    jobid: 3
haste: error: 01_train: no room
Finished jobid: 3 (Rule: arm_vanilla)
1 of 4 steps (25%) done
localrule all:
Finished jobid: 0 (Rule: all)
"""


def test_a_study_shows_a_line_for_each_job_and_errors_and_keeps_the_rest_in_its_log(tmp_path, small, capsys):
    study = config.load(str(small))
    arms = study.arms | {"repa_0.5": study.arms["repa"], "total": study.arms["vanilla"]}
    progress = jobs._Progress(study.model_copy(update={"arms": arms}), tmp_path / "study.log")
    progress.follow((STARTED + RAN).splitlines(keepends=True))
    said = capsys.readouterr()
    assert progress.rules == ["arm_repa_0.5", "arm_total", "arm_vanilla", "report"]
    first, job = said.out.splitlines()
    assert first == f"study small: 4 jobs, log {tmp_path / 'study.log'}"
    assert job.startswith("[1/4] arm vanilla: 0.0 min")
    assert said.err == "haste: error: 01_train: no room\n"
    assert (tmp_path / "study.log").read_text() == STARTED + RAN


def test_snakemake_names_its_jobs_as_they_are_read(small, output):
    done = subprocess.run([*jobs.graph(str(small)), "--dry-run"], capture_output=True, text=True)
    assert sorted(jobs.counted(done.stdout + done.stderr)) == [
        "analyse_06_capacity", "analyse_08_ablations", "arm_repa", "arm_vanilla", "prepare", "report", "step_time",
    ]  # fmt: skip
