# A study as a graph: prepare -> arms (each trains and scores its seeds) -> report. Started by `haste study NAME`.
#
# Every job is a notebook run by papermill. Checkpoints and scores stay in run directories that no rule lists as
# output, so a job that failed or was stopped resumes; what a rule lists is a stamp. Paths hold the hash of the
# settings, so changed settings need other files and only what they touch runs again.
#
# On a cluster every job reads this file again on its own node: what decides the graph comes with --config, and paths
# are relative to --directory, the root of all output, which is what a storage provider asks for. What jobs ask a cluster
# for is in its profile (workflow/slurm, workflow/kubernetes): default-resources, and set-resources by rule.
import json
import os
import shlex
import sys
from pathlib import Path

from haste_core.study import config as haste
from haste_core.study.jobs import priorities, stamp_hash
from haste_core.study.runs import Run, report_dir, study_dir

# The environment of the node that a job runs on may lack it.
os.environ["HASTE_OUTPUT"] = OUTPUT = str(config["output"])
PROFILE = config.get("profile") or None
# JSON, which Snakemake itself reads in some cases.
OVERRIDES = config.get("overrides") or []
OVERRIDES = json.loads(OVERRIDES) if isinstance(OVERRIDES, str) else OVERRIDES
STUDY = haste.load(config["study"], PROFILE, OVERRIDES)
PROCESSES = int(config.get("processes", 1))


def below(path):
    """A path in the output's root, relative to it."""
    return Path(os.path.relpath(path, OUTPUT))


RUNS = below(study_dir(STUDY))
REPORT = below(report_dir(STUDY, PROFILE))
# Executed notebooks are written by their jobs into the output itself, wherever Snakemake keeps its copies.
EXECUTED = report_dir(STUDY, PROFILE) / "notebooks"


def words(*parts):
    """Words of a shell command, quoted, with braces kept from Snakemake's own formatting."""
    return shlex.join(str(part) for part in parts).replace("{", "{{").replace("}", "}}")


# Relative paths in the settings are seen from where the study was started; what Snakemake names, from its own folder.
HASTE = words("cd", config["here"]) + " && exec " + words(sys.executable, "-m", "haste_core.study.cli")
# Libraries take the threads of their job, divided by its processes: more threads than cores slow each other down tenfold.
THREADS = "export OMP_NUM_THREADS=$(({threads} > %d ? {threads} / %d : 1))"
# A scheduler sends SIGTERM to all processes of a job at once. The shell ignores it until the notebook has saved, because
# the scheduler kills the rest of a job whose shell has ended.
OUTLIVE = "trap : TERM; "


def notebook(name, more="", processes=1, then="touch {output:q}"):
    """The shell command of a job: run a notebook, then `then` beside Snakemake's own files.

    Snakemake asks for it when a job begins, after all loops over rules: what differs in them comes by {params}, {log}.
    """
    run = f"{HASTE} notebook {name} {{log.notebook:q}} {COMMON} {more}"
    return f"{OUTLIVE}{THREADS % (processes, processes)}; ( {run}) && {then}"


# What every notebook needs to load the same study again.
COMMON = words(
    "-p", f"study={json.dumps(config['study'])}",
    "-p", f"profile={json.dumps(PROFILE or '')}",
    "-p", f"overrides={json.dumps(OVERRIDES)}",
)
SETTINGS = words(
    config["study"], *(["--profile", PROFILE] if PROFILE else []), *(w for o in OVERRIDES for w in ("--set", o))
)
NETWORKS = [*map(STUDY.teacher_hash, STUDY.teachers()), STUDY.extractor_hash, STUDY.autoencoder_hash]
PREPARED = RUNS / f"prepared-{haste.digest(NETWORKS)}.json"
DONORS = {arm: STUDY.donor(arm) for arm in STUDY.arms}
PRIORITIES = priorities(STUDY, DONORS)


def stamps(arm):
    """Stamps of an arm's job, one in each seed's run directory; kept steps and evaluation settings are in the name."""
    runs = [Run(STUDY, arm, seed) for seed in STUDY.seeds_of(arm)]
    return [str(below(r.dir) / f"trained-{stamp_hash(r.config)}-{r.evaluation_hash}.stamp") for r in runs]


def needs(arm):
    """Inputs of an arm's job: the teacher if it is aligned, and the arm it branches from, whose scores it shares.

    An arm without alignment trains beside `prepare`; before scoring it makes the extractors itself, or waits for them.
    """
    teacher = [str(PREPARED)] if STUDY.run(arm).alignment.active else []
    return teacher + (stamps(DONORS[arm]) if DONORS[arm] else [])


def analysed(name):
    """The stamp of an analysis: it changes with all that the notebook looks at."""
    mark = haste.digest([STUDY.analyses[name], STUDY.evaluation_hash, STUDY.claims.model_dump(mode="json"), STUDY.analysis.model_dump(mode="json"),
                         STUDY.groups, {n: t.model_dump(mode="json") for n, t in STUDY.triggers.items()},
                         [(stamp_hash(STUDY.run(a)), STUDY.run(a).hash, STUDY.seeds_of(a)) for a in STUDY.arms]])
    return str(RUNS / f"analysed-{name}-{mark}.stamp")


SCORED = [stamp for arm in STUDY.arms for stamp in stamps(arm)]

localrules: all

rule all:
    # Stamps are asked for by name too: a run directory that was removed is made again, report or no report.
    input:
        REPORT / "report.html",
        PREPARED,
        [analysed(name) for name in STUDY.analyses],
        SCORED,

rule prepare:
    output: PREPARED
    log: notebook=local(str(EXECUTED / "00_data_and_teacher.ipynb"))
    threads: STUDY.train.threads
    priority: 100
    shell: notebook("00_data_and_teacher", then=words("cp", study_dir(STUDY) / "prepared.json") + " {output:q}")

for arm in STUDY.arms:
    rule:
        name: f"arm_{arm}"
        input: needs(arm)
        output: stamps(arm)
        log: notebook=local(str(EXECUTED / f"01_train_{arm}.ipynb"))
        # Neither the seeds (every one has a stamp) nor the number of processes is a parameter to Snakemake.
        params: arm=arm
        threads: STUDY.train.threads * PROCESSES
        # The longest chain of arms first, so that all cores end together.
        priority: PRIORITIES[arm]
        shell: notebook("01_train", f"-p arm={{params.arm}} -p seeds=[] -p score=true -p processes={PROCESSES}", PROCESSES)

# Analyses of finished and scored runs, one notebook each; their tables go into the report.
for name, parameters in STUDY.analyses.items():
    rule:
        name: f"analyse_{name}"
        input: SCORED
        output: analysed(name)
        log: notebook=local(str(EXECUTED / f"{name}.ipynb"))
        priority: 2
        params: notebook=name, words=words(*(w for k, v in parameters.items() for w in ("-p", f"{k}={json.dumps(v)}")))
        threads: STUDY.train.threads
        shell: notebook("{params.notebook:q}", "{params.words}")

# Times steps of all main arms interleaved, so it has the machine to itself; on a cluster it has what it is given. Its
# priority is the lowest, so no arm or analysis that could run waits for it.
rule step_time:
    input: PREPARED
    output: RUNS / f"step_time-{haste.digest([STUDY.run(a).hash for a in STUDY.main])}.stamp"
    threads: workflow.resource_settings.cores or STUDY.train.threads
    priority: 1
    shell: OUTLIVE + "( " + HASTE + " cost " + SETTINGS + " ) && touch {output:q}"

rule report:
    input:
        SCORED,
        rules.step_time.output,
        PREPARED,
        [analysed(name) for name in STUDY.analyses],
    output: REPORT / "report.html"
    log: notebook=local(str(EXECUTED / "10_report.ipynb"))
    params: settings=haste.digest(STUDY.model_dump(mode="json"))
    # The notebook writes the report where it belongs, which is what Snakemake asks for unless it keeps a copy.
    shell: notebook("10_report", then="{{ [ -e {output:q} ] || " + words("cp", report_dir(STUDY, PROFILE) / "report.html") + " {output:q}; }}")
