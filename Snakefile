# A study as a graph: prepare -> train (arms x seeds) -> evaluate -> report. Started by `haste study NAME`.
#
# Every job is a notebook run by papermill. Checkpoints and scores stay in run directories that no rule lists as
# output, so a job that failed or was stopped resumes; what a rule lists is a stamp. Paths hold the hash of the
# settings, so changed settings need other files and only what they touch runs again.
import json
import shlex
import sys
from pathlib import Path

from haste_core import config as haste
from haste_core.runs import Run, report_dir, study_dir
from haste_core.workflow import stamp_hash

PROFILE = config.get("profile") or None
# Snakemake reads a value that looks like a list as one.
OVERRIDES = config.get("overrides") or []
OVERRIDES = json.loads(OVERRIDES) if isinstance(OVERRIDES, str) else OVERRIDES
STUDY = haste.load(config["study"], PROFILE, OVERRIDES)
RUNS = study_dir(STUDY)
REPORT = report_dir(STUDY, PROFILE)
EXECUTED = REPORT / "notebooks"


def words(*parts):
    """Words of a shell command, quoted, with braces kept from Snakemake's own formatting."""
    return shlex.join(str(part) for part in parts).replace("{", "{{").replace("}", "}}")


# Relative paths in the settings are seen from where the study was started.
HASTE = words("cd", config["here"]) + " && " + words(sys.executable, "-m", "haste_core.cli")
# A job's libraries take the threads it was given: more of them than cores wait for each other, ten times as long.
NOTEBOOK = "export OMP_NUM_THREADS={threads} && " + HASTE + " notebook"
# What every notebook needs to load the same study again.
COMMON = words(
    "-p", f"study={json.dumps(config['study'])}",
    "-p", f"profile={json.dumps(PROFILE or '')}",
    "-p", f"overrides={json.dumps(OVERRIDES)}",
)
SETTINGS = words(
    config["study"], *(["--profile", PROFILE] if PROFILE else []), *(w for o in OVERRIDES for w in ("--set", o))
)
PREPARED = RUNS / f"prepared-{haste.digest([STUDY.teacher_hash(t) for t in STUDY.teachers()] + [STUDY.extractor_hash])}.json"


def stamp(arm, seed, kind):
    run = Run(STUDY, arm, seed)
    mark = stamp_hash(run.config) + (f"-{run.evaluation_hash}" if kind == "evaluated" else "")
    return str(run.dir / f"{kind}-{mark}.stamp")


def trained(arm, seed):
    return stamp(arm, seed, "trained")


def needs(arm, seed):
    """What must exist before a run: its teacher if it is aligned, and the run it branches from if there is one."""
    donor = STUDY.donor(arm)
    teacher = [str(PREPARED)] if STUDY.run(arm).alignment.active else []
    return teacher + ([trained(donor, seed)] if donor else [])


def scores_needed(arm, seed):
    # Scores of a shared checkpoint are taken over, so the donor is scored first.
    donor = STUDY.donor(arm)
    return [str(PREPARED), trained(arm, seed)] + ([stamp(donor, seed, "evaluated")] if donor else [])


def analysed(name):
    """The stamp of an analysis: it changes with all that the notebook looks at."""
    mark = haste.digest([STUDY.analyses[name], STUDY.evaluation_hash, STUDY.analysis.model_dump(mode="json"),
                         STUDY.groups, {n: t.model_dump(mode="json") for n, t in STUDY.triggers.items()},
                         [(stamp_hash(STUDY.run(a)), STUDY.run(a).hash, STUDY.seeds) for a in STUDY.arms]])
    return str(RUNS / f"analysed-{name}-{mark}.stamp")


localrules: all

rule all:
    # Stamps are asked for by name too: a run directory that was removed is made again, report or no report.
    input:
        REPORT / "report.html",
        PREPARED,
        [analysed(name) for name in STUDY.analyses],
        [stamp(arm, seed, kind) for arm in STUDY.arms for seed in STUDY.seeds for kind in ("trained", "evaluated")],

rule prepare:
    output: PREPARED
    log: notebook=EXECUTED / "00_data_and_teacher.ipynb"
    threads: STUDY.train.threads
    priority: 100
    retries: 1
    shell: NOTEBOOK + " 00_data_and_teacher {log.notebook:q} " + COMMON + " && cp {RUNS:q}/prepared.json {output:q}"

for arm in STUDY.arms:
    for seed in STUDY.seeds:
        rule:
            name: f"train_{arm}_{seed}"
            input: needs(arm, seed)
            output: trained(arm, seed)
            log: notebook=EXECUTED / f"01_train_{arm}_seed{seed}.ipynb"
            params: arm=arm, seed=seed
            threads: STUDY.train.threads
            # Runs that others branch from go first.
            priority: 60 if any(STUDY.donor(a) == arm for a in STUDY.arms) else 50
            retries: 1
            shell: NOTEBOOK + " 01_train {log.notebook:q} " + COMMON + " -p arm={params.arm} -p seed={params.seed} && touch {output:q}"

        rule:
            name: f"evaluate_{arm}_{seed}"
            input: scores_needed(arm, seed)
            output: stamp(arm, seed, "evaluated")
            log: notebook=EXECUTED / f"02_fid_{arm}_seed{seed}.ipynb"
            params: arm=arm, seed=seed
            threads: STUDY.train.threads
            priority: 10
            retries: 1
            shell: NOTEBOOK + " 02_fid {log.notebook:q} " + COMMON + " -p arm={params.arm} -p seed={params.seed} && touch {output:q}"

# Analyses of finished and scored runs, one notebook each; their tables go into the report.
for name, parameters in STUDY.analyses.items():
    rule:
        name: f"analyse_{name}"
        input: [stamp(arm, seed, "evaluated") for arm in STUDY.arms for seed in STUDY.seeds]
        output: analysed(name)
        log: notebook=EXECUTED / f"{name}.ipynb"
        params: notebook=name, words=words(*(w for k, v in parameters.items() for w in ("-p", f"{k}={json.dumps(v)}")))
        threads: STUDY.train.threads
        retries: 1
        shell: NOTEBOOK + " {params.notebook:q} {log.notebook:q} " + COMMON + " {params.words} && touch {output:q}"

# Times steps of all main arms side by side, so it has the machine to itself.
rule step_time:
    input: PREPARED
    output: RUNS / f"step_time-{haste.digest([STUDY.run(a).hash for a in STUDY.main])}.stamp"
    threads: workflow.cores
    shell: HASTE + " cost " + SETTINGS + " && touch {output:q}"

rule report:
    input:
        [stamp(arm, seed, "evaluated") for arm in STUDY.arms for seed in STUDY.seeds],
        rules.step_time.output,
        PREPARED,
        [analysed(name) for name in STUDY.analyses],
    output: REPORT / "report.html"
    log: notebook=EXECUTED / "10_report.ipynb"
    params: settings=haste.digest(STUDY.model_dump(mode="json"))
    shell: NOTEBOOK + " 10_report {log.notebook:q} " + COMMON
