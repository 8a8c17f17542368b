"""The report of a study: tables from runs, figures and sentences from tables, one HTML file that opens offline."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from haste_core import figures
from haste_core.analysis import attention, law, switching
from haste_core.analysis.statistics import one_card
from haste_core.errors import HasteError
from haste_core.figures import Figure, compared
from haste_core.files import atomic, write_json, write_table, write_text
from haste_core.study import caption_scores, claims, config, cost, evaluation, judging, report_text, runs
from haste_core.study.data import open_dataset
from haste_core.study.pretrain import find_teacher
from haste_core.study.report_text import answers, effect, lacking, measured
from haste_core.study.runs import Run
from haste_core.study.sections import ClaimsSettings

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).parent
STYLE = HERE / "report.css"
FLOOR = "augmented held-in against held-in"  # the pair of floor.csv that FID is compared with


@dataclass(frozen=True)
class Report:
    """The folder of a study's report, reports/<study>: tables, figures and report.html."""

    study: config.StudySettings
    dir: Path

    @property
    def tables(self) -> Path:
        """The folder of the report's tables."""
        return self.dir / "tables"

    def table(self, name: str) -> pd.DataFrame:
        """A table by name, such as "fid".

        Raises:
            HasteError: it has not been written yet.
        """
        path = self.tables / f"{name}.csv"
        if not path.is_file():
            raise HasteError(f"no table {path}; expected after a finished study; run: haste study {self.study.name}")
        return pd.read_csv(path, dtype={"card": str})  # a card's id may be digits alone

    def has(self, name: str) -> bool:
        """True if the table exists."""
        return (self.tables / f"{name}.csv").is_file()

    def has_current(self, name: str) -> bool:
        """True if an analysis table exists and was made under the present evaluation settings of the study."""
        facts = self.tables / f"{name}.json"
        known = json.loads(facts.read_text()) if self.has(name) and facts.is_file() else {}
        return known.get("card", {}).get("evaluation") == self.study.evaluation_hash

    @property
    def tau(self) -> int | None:
        """The switch of the study's first arm that has one."""
        taus = [self.study.run(arm).tau for arm in self.study.arms]
        return next((int(t) for t in taus if 0 < t < float("inf")), None)

    def all_runs(self) -> list[Run]:
        """Every arm with every seed."""
        return [Run(self.study, arm, seed) for arm in self.study.arms for seed in self.study.seeds_of(arm)]

    def shown_runs(self) -> list[Run]:
        """Every main arm with the first seed, for pictures."""
        return [Run(self.study, arm, self.study.seeds[0]) for arm in self.study.main]

    def main(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of a table that belong to main arms."""
        return table[table["arm"].isin(self.study.main)]

    def denoising(self) -> pd.DataFrame:
        """The rows of denoising.csv that belong to main arms."""
        return self.main(self.table("denoising"))

    def detailed_steps(self) -> list[int]:
        """The steps of score tables and samples: an early one, before the switch, and the last."""
        kept = sorted(figures.panel_steps(self.main(self.table("fid"))["step"], self.tau, self.study.claims.early))
        return list(dict.fromkeys((kept[0], kept[-1])))

    def scores(self) -> pd.DataFrame:
        """The rows of fid.csv: from the runs if all are scored, else from the table that came with the project."""
        if all(evaluation.is_scored(run) for run in self.all_runs()):
            return pd.DataFrame([row for run in self.all_runs() for row in evaluation.rows(run)])
        return self.table("fid")

    def samples(self) -> dict[tuple[str, int], np.ndarray]:
        """The first ten evaluation images by arm and step, first seed, uint8 (n, C, S, S), from tables/samples.npz."""
        with np.load(self.tables / "samples.npz", allow_pickle=False) as stored:
            names = {name: name.rsplit("@", 1) for name in stored.files}
            return {(arm, int(step)): stored[name] for name, (arm, step) in names.items()}

    def test_image(self) -> np.ndarray:
        """The held-out image of the attention maps, (S, S) in [-1, 1] or (S, S, 3) in [0, 1]."""
        image = open_dataset(self.study.data).images("test", 1)[0][0].permute(1, 2, 0).numpy()
        return image[..., 0] if image.shape[-1] == 1 else (image + 1) / 2


def open_report(study: config.StudySettings, profile: str | None = None) -> Report:
    """The report of a study, finished or not."""
    return Report(study, runs.report_dir(study, profile))


def refresh(report: Report) -> str:
    """Rewrite the tables if every run of the study is scored; returns a sentence on their origin.

    Raises:
        HasteError: runs are missing and there are no earlier tables, or only of other evaluation settings.
    """
    waiting = [f"{r.arm} seed {r.seed}" for r in report.all_runs() if not evaluation.is_scored(r)]
    if not waiting:
        write_tables(report)
        return f"Tables in {report.tables} written from {len(report.all_runs())} runs."
    facts = report.tables / "provenance.json"
    if not facts.is_file():
        raise HasteError(
            f"not scored yet: {', '.join(waiting)}, and no tables from before; run: haste study {report.study.name}"
        )
    known = json.loads(facts.read_text())
    if known.get("evaluation", report.study.evaluation_hash) != report.study.evaluation_hash:
        raise HasteError(
            f"not scored: {', '.join(waiting)}, and {report.tables} is of other evaluation settings; run again: haste "
            f"study {report.study.name}"
        )
    return (
        f"{len(waiting)} runs of this study are not here, so these are the tables that came with the project: study "
        f"{known['study_hash']}, commit {', '.join(known['commits'])}, written {known['written']}."
    )


def write_tables(report: Report) -> None:
    """Write every table of the study from the files in runs/.

    Raises:
        HasteError: a run is not trained or not scored yet.
    """
    study, folder, every = report.study, report.tables, report.all_runs()
    fid = [row for run in every for row in evaluation.rows(run)]
    write_table(folder / "fid.csv", fid, evaluation.columns(study))
    denoising = [row for run in every for row in evaluation.denoising_rows(run)]
    write_table(folder / "denoising.csv", denoising, evaluation.denoising_columns(study))
    floor = evaluation.floor(evaluation.open_scorer(study), study)
    write_table(folder / "floor.csv", floor, ("pair", "n", "n_reference", *evaluation.metrics_of(study)))
    cards = [json.loads(run.evaluation_path.read_text())["card"] for run in every]
    for card in cards:
        write_json(folder / "cards" / f"{card['card_id']}.json", card)
    # Cards of earlier scores belong to no number in the tables.
    for old in (folder / "cards").glob("*.json"):
        if old.stem not in {card["card_id"] for card in cards}:
            old.unlink()
    times = json.loads((runs.study_dir(study) / "step_time.json").read_text())
    write_table(folder / "step_time.csv", times, cost.COLUMNS)
    found, confidence = evidence(report, pd.DataFrame(fid)), study.claims.confidence
    write_table(folder / "claims.csv", judging.judge_all(claims.claims_of(study), found, confidence), judging.COLUMNS)
    sensitive = judging.sensitivity(claims.claims_of(study), found, confidence)
    write_table(folder / "sensitivity.csv", sensitive, judging.SENSITIVITY)
    maps = attention.token_maps(report.shown_runs(), find_teacher(study, study.teacher))
    write_table(folder / "attention.csv", maps, tuple(maps[0]))
    names = ("arm", "seed", "step", "phase", "loss", "denoising", "feature", "attention", "grad_norm")
    mains = [run for run in every if run.arm in study.main]
    curves = [{name: line.get(name) for name in names} | {"arm": run.arm, "seed": run.seed}
              for run in mains for line in run.metrics()]  # fmt: skip
    write_table(folder / "metrics.csv", curves, names)
    if study.data.has_scenes and study.evaluate.suite == "study":
        _write_captions(report)
    samples = {
        f"{run.arm}@{step}": np.load(evaluation.find_samples(run, step), allow_pickle=False)[:10]
        for run in report.shown_runs()
        for step in run.config.train.kept_steps
    }
    if "excess" in fid[0]:
        pairs = {arm: plain for arm in study.arms if (plain := study.baseline(arm)) not in (None, arm)}
        table = law.gain_and_harm(pd.DataFrame(fid), pairs, study.claims.early, study.train.steps)
        for name, written in (("gain_and_harm", table), ("factors", law.factors(table, confidence))):
            write_table(folder / f"{name}.csv", written.to_dict("records"), tuple(written.columns))  # type: ignore[arg-type]
    _write_images(folder / "samples.npz", samples)
    write_json(folder / "provenance.json", study_provenance(report))


def _write_captions(report: Report) -> None:
    """Write the captions of the sample sheet, and its images by arm, (sets, images, C, S, S), of the last step."""
    write_table(report.tables / "captions.csv", caption_scores.shown(report.study), ("set", "caption"))
    shown = {
        run.arm: np.load(evaluation.find_samples(run, run.config.train.steps, "captions"), allow_pickle=False)
        for run in report.shown_runs()
    }
    _write_images(report.tables / "captions.npz", shown)


def _write_images(path: Path, images: Mapping[str, np.ndarray]) -> None:
    with atomic(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **images)  # type: ignore[arg-type]


def _caption_sheet(report: Report) -> Figure:
    texts = report.table("captions").groupby("set", sort=False)["caption"].apply(list)
    with np.load(report.tables / "captions.npz", allow_pickle=False) as stored:
        return figures.caption_sheet(dict(stored), {report_text.CAPTIONS[name]: texts[name] for name in texts.index})


def evidence(report: Report, fid: pd.DataFrame) -> judging.Evidence:
    """The evidence for judging claims: the rows of fid.csv, those of reports that roles name, and analysis tables."""
    study = report.study
    study.check_claims()
    for name, other in beside(report).items():
        scores = other.table("fid")
        fid = pd.concat([fid, scores.assign(arm=f"{name}/" + scores["arm"])], ignore_index=True)
    tables = {name: report.table(name) for name in claims.TABLES if report.has(name)}
    return judging.Evidence(fid, study.claims.early, study.train.steps, study.claims.roles, tables)


def beside(report: Report) -> dict[str, Report]:
    """The reports that roles of claims name, as REPORT/ARM, by name; those that are there."""
    names = sorted({role.rpartition("/")[0] for role in report.study.claims.roles.values() if "/" in role})
    found = {name: Report(report.study, report.dir.parent / name) for name in names}
    return {name: other for name, other in found.items() if other.has("fid")}


def study_provenance(report: Report) -> dict[str, Any]:
    """Origin of the report's numbers: commits, hashes, versions, machine, minutes and memory."""
    study = report.study
    teachers = [runs.teacher_path(study, teacher).parent for teacher in study.teachers()]
    # A study scored by Inception has no extractors of its own, so their folders are missing.
    extractors = [runs.extractor_path(study).parent, runs.autoencoder_path(study).parent]
    folders = [*teachers, *extractors, *(run.dir for run in report.all_runs())]
    sessions = [s for folder in folders for s in runs.provenance(folder).get("sessions", [])]
    facts = json.loads((runs.study_dir(study) / "prepared.json").read_text())
    invocation = runs.study_dir(study) / "invocation.json"
    others = {
        name: {key: known[key] for key in ("study_hash", "commits", "written")}
        for name, other in beside(report).items()
        for known in [json.loads((other.tables / "provenance.json").read_text())]
    }
    return {
        "study": study.name,
        "title": study.title,
        "study_hash": config.digest(study.model_dump(mode="json")),
        "main": study.main,
        "claims": study.claims.model_dump(mode="json"),
        "evaluation": study.evaluation_hash,
        "tau": report.tau,
        "steps": study.train.steps,
        "commits": sorted({s["commit"] for s in sessions}),
        "environment": runs.environment(),
        "machine": runs.machine(),
        "written": runs.now(),
        "compute_minutes": round(sum(s["seconds"] for s in sessions) / 60, 2),
        "largest_process_gib": max(s["peak_memory_gib"] for s in sessions),
        "invocation": json.loads(invocation.read_text()) if invocation.is_file() else None,
        "runs": {
            f"{r.arm} seed {r.seed}": {
                "hash": r.config.hash,
                "minutes": round(runs.recorded_seconds(r.dir) / 60, 2),
                **{k: v for k, v in runs.provenance(r.dir).items() if k.startswith("shared")},
            }
            for r in report.all_runs()
        },
        **({"beside": others} if others else {}),
        **facts,
    }


def draw_figures(report: Report) -> dict[str, Figure]:
    """Every figure of the report by name, drawn from its tables and sample images.

    Plain training alone has no "gain" and no "denoising", a study that tests no claim has no "claims".
    """
    fid, samples, tau = report.main(report.table("fid")), report.samples(), report.tau
    denoising, judged = report.denoising(), report.table("claims")
    judged = judged[measured(judged)]
    floor = report.table("floor").set_index("pair")["fid"][FLOOR]
    found = {
        "summary": figures.summary(fid, denoising, samples, tau, report.study.claims.early),
        "fid": figures.fid_against_steps(fid, tau, float(floor)),
        "samples": figures.sample_sheet(samples, report.detailed_steps()),
        "attention": figures.attention_maps(report.table("attention"), report.test_image()),
        "curves": figures.training_curves(report.table("metrics"), tau),
        "step_time": figures.step_cost(report.table("step_time")),
    }
    if compared(denoising):
        found["denoising"] = figures.denoising_over_training(denoising, tau)
    if report.has("captions"):
        found["captions"] = _caption_sheet(report)
    if fid["arm"].nunique() > 1:
        found["gain"] = figures.gain_over_vanilla(fid, tau)
    if len(judged):
        found["claims"] = figures.claims_forest(judged)
    return found


# Figures of analyses: functions from a report and its tables to figures by name.


def _conflict(report: Report, exact: pd.DataFrame, online: pd.DataFrame) -> dict[str, Figure]:
    arm = "repa" if "repa" in set(exact["arm"]) else exact["arm"][0]
    return {
        "conflict": figures.conflict_over_training(exact, report.tau, arm),
        "online": figures.online_against_exact(exact, online),
    }


def _capacity(report: Report, capacity: pd.DataFrame, spectrum: pd.DataFrame) -> dict[str, Figure]:
    level, block = float(capacity.loc[capacity["who"] == "student", "t"].min()), report.study.alignment.depth - 1
    return {
        "capacity": figures.capacity_over_training(capacity, block=block, t=level, kind="tokens", tau=report.tau),
        "spectrum": figures.error_by_arm(spectrum, step=int(spectrum["step"].max())),
    }


def _termination(
    report: Report, swept: pd.DataFrame, fired: pd.DataFrame, near: pd.DataFrame, logs: pd.DataFrame
) -> dict[str, Figure]:
    # The always-on arm whose log most triggers can read, of these the one with most switches.
    read = fired[fired["readings"] > 0].groupby("family")["trigger"].nunique()
    switches = swept.groupby("family", sort=False)["tau"].nunique()
    family = max(switches.index, key=lambda name: (read.get(name, 0), switches[name]))
    ranking = switching.ranking(near, report.study.claims.confidence)
    return {
        "termination": figures.fid_over_tau(swept, fired, family),
        "triggers": figures.trigger_logs(logs, report.study.triggers, family),
        "regret": figures.regret_by_trigger(near, ranking, family),
    }


def _mechanism(report: Report, pairs: pd.DataFrame) -> dict[str, Figure]:
    scores, denoising = report.main(report.table("fid")), report.denoising()
    groups = {name: arms for name, arms in report.study.groups.items() if name != "main"}
    means = law.factors(pairs, report.study.claims.confidence)
    factors = {"factors": figures.harm_by_factor(pairs, means, groups)} if groups else {}
    return {
        "excess": figures.excess_by_level(denoising, int(denoising["step"].max())),
        "direction": figures.direction_used(scores, report.tau),
        "gain_and_harm": figures.gain_and_harm(pairs),
    } | factors


def _effects(name: str, report: Report, rows: pd.DataFrame) -> dict[str, Figure]:
    return {name: figures.group_effects(rows, switching.effects(rows, report.study.claims.confidence))}


def _teachers(report: Report, _: pd.DataFrame) -> dict[str, Figure]:
    from haste_core.analysis import capacity

    # Those of the reports beside this one, too: one study has few teachers.
    every = pd.concat(pd.read_csv(path) for path in sorted(report.dir.parent.glob("*/tables/teachers.csv")))
    return {"predicted_harm": figures.predicted_harm(every, capacity.prediction(every))}


# By section: its figures, and its tables. The section is left out if a table is missing or empty.
ANALYSES: dict[str, tuple[Callable[..., dict[str, Figure]], tuple[str, ...]]] = {
    "mechanism": (_mechanism, ("gain_and_harm",)),
    "teachers": (_teachers, ("teachers",)),
    "conflict": (_conflict, ("gradient_conflict", "gradient_conflict_online")),
    "similarity": (
        lambda report, rows: {"similarity": figures.aligned_similarity(rows, report.tau, "cka")}, ("similarity",)
    ),
    "cross-effects": (
        lambda report, rows: {"cross_effects": figures.cross_effects(rows, report.tau)}, ("cross_effects",)
    ),
    "capacity": (_capacity, ("capacity", "spectrum")),
    "help": (partial(_effects, "help"), ("help_consists_of",)),
    "termination": (
        _termination, ("termination_sweep", "termination_fired", "termination_nearest", "termination_logs")
    ),
    "ablations": (partial(_effects, "ablations"), ("ablations",)),
    "late": (
        lambda _, rows: {
            "late": figures.gain_by_setting(rows), "late_near_data": figures.gain_by_setting(rows, "near_data"),
        },
        ("late_gain",),
    ),
    "plane": (lambda _, rows: {"plane": figures.weight_and_switch(rows)}, ("plane",)),
}  # fmt: skip


def draw_analyses(report: Report) -> dict[str, dict[str, Figure]]:
    """The figures of each analysis that has its tables, by section and name."""
    return {
        section: draw(report, *(report.table(name) for name in tables))
        for section, (draw, tables) in ANALYSES.items()
        if all(report.has(name) and len(report.table(name)) for name in tables)
    }


def embedded(svg: str, name: str, shown: str) -> str:
    """HTML of a figure inside of a page: as part of it where a script is to find the lines of arms, else as an image.

    shown: what is to be seen, in words.
    """
    if "data-arm" not in svg:
        source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        return f'<img src="{source}" alt="{html.escape(shown)}">'
    # A page has an id once.
    own = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return own.replace("<svg", f'<svg role="img" aria-label="{html.escape(shown)}"', 1)


def shares_target(run: Run) -> bool:
    """False for an arm aligned with another teacher than the study's, or with another kind of attention."""
    study, own = run.study, run.config
    return own.teacher == study.teacher and own.alignment.similarity == study.alignment.similarity


def write_report(report: Report) -> Path:
    """Write figures and report.html from the tables; returns the path of report.html."""
    drawn, analyses = draw_figures(report), draw_analyses(report)
    for figures_by_name in (drawn, *analyses.values()):
        for name, figure in figures_by_name.items():
            figures.save(figure, report.dir / "figures", name)
    study, fid, judged = report.study, report.main(report.table("fid")), report.table("claims")
    steps, floor = report.detailed_steps(), report.table("floor")

    def picture(name: str, shown: str) -> str:
        return embedded((report.dir / "figures" / f"{name}.svg").read_text(encoding="utf-8"), name, shown)

    page = _template("report.html").render(
        style=STYLE.read_text(encoding="utf-8"),
        folder=report.dir.name,
        study=study,
        tau=report.tau,
        facts=json.loads((report.tables / "provenance.json").read_text()),
        card=json.loads((report.tables / "cards" / f"{one_card(fid)}.json").read_text()),
        answers=answers(fid, report.denoising(), study.claims, report.tau, study.train.steps)
        + report_text.further_answers(judged),
        sentences=sentences(report),
        verdicts=report_text.verdicts(judged),
        lacking=lacking(judged),
        rules=claims.rules_of(study),
        sensitivity=report_text.sensitivity_cells(report.table("sensitivity")),
        scores=[(step, report_text.score_cells(fid, step)) for step in steps],
        denoising=report_text.denoising_cells(fid, steps, study.claims.confidence),
        floor_images=int(floor.set_index("pair")["n"][FLOOR]),
        floor=[
            {"pair": row["pair"], "n": row["n"], "n reference": row["n_reference"]} | report_text.scores_of(row)
            for row in floor.to_dict("records")
        ],
        captions=report_text.caption_cells(fid, steps[-1]) if report.has("captions") else [],
        grid=report_text.grid_cells(report.table("grid")) if report.has_current("grid") else [],
        times=report_text.time_cells(report.table("step_time")),
        attention=report.table("attention"),
        others=[run.arm for run in report.shown_runs() if not shares_target(run)],
        analyses=analyses,
        drawn=drawn,
        picture=picture,
    )
    path = report.dir / "report.html"
    write_text(path, page)
    write_index(report.dir.parent)
    return path


def _template(name: str) -> Template:
    # Imported here: most notebooks read reports and write none.
    from jinja2 import StrictUndefined, Template

    return Template(
        (HERE / name).read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip


def write_index(folder: Path) -> Path:
    """Write index.html of a folder of reports, with the answers and verdicts of each; returns its path."""
    cards = []
    for path in sorted(folder.glob("*/report.html")):
        tables = path.parent / "tables"
        # A report that another version left behind must not keep a new one from being written.
        if not all((tables / name).is_file() for name in ("provenance.json", "fid.csv", "denoising.csv", "claims.csv")):
            continue
        facts = json.loads((tables / "provenance.json").read_text())
        if not {"main", "claims", "tau", "steps", "runs", "written"} <= facts.keys():
            continue
        told, verdicts, _ = _told(tables, facts)
        runs_of = {tuple(name.split(" seed ")) for name in facts["runs"]}
        cards.append({
            "folder": path.parent.name, "title": facts.get("title") or facts["study"], "answers": told,
            "verdicts": verdicts, "steps": facts["steps"], "written": facts["written"][:10],
            "arms": len({arm for arm, _ in runs_of}), "seeds": len({seed for _, seed in runs_of}),
        })  # fmt: skip
    target = folder / "index.html"
    write_text(target, _template("index.html").render(cards=cards, style=STYLE.read_text(encoding="utf-8")))
    return target


def _told(folder: Path, facts: Mapping[str, Any]) -> tuple[list[tuple[str, str]], str, str]:
    """Answers with their questions, number of claims by verdict, and origin, from the tables in a folder."""
    fid, denoising = (
        table[table["arm"].isin(facts["main"])]
        for table in (pd.read_csv(folder / f"{name}.csv", dtype={"card": str}) for name in ("fid", "denoising"))
    )
    told = answers(fid, denoising, ClaimsSettings(**facts["claims"]), facts["tau"], facts["steps"])
    judged = pd.read_csv(folder / "claims.csv")
    told += report_text.further_answers(judged)
    counts = judged["verdict"].value_counts(sort=False)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in report_text.VERDICTS if verdict in counts)
    return told, f"Verdicts: {verdicts}.", f"Commit {', '.join(facts['commits'])}, study {facts['study_hash']}."


def sentences(report: Report) -> list[str]:
    """The outcome of the study, from its tables: a sentence for each claim, and for each main arm against vanilla."""
    judged, confidence = report.table("claims"), report.study.claims.confidence
    found = [
        f"{row['id']}, “{row['claim']}”: {effect(row)}, {row['unit']}. {str(row['verdict']).capitalize()}: "
        f"{report_text.VERDICTS[row['verdict']]}."
        for row in judged[measured(judged)].to_dict("records")
    ]
    if missing := "; ".join(f"{identity} ({reason})" for identity, reason in lacking(judged)):
        found.append(f"Not measured or not tested: {missing}.")
    scores = report.main(report.table("fid")).pivot_table(index=["seed", "step"], columns="arm", values="fid")
    for arm in (arm for arm in report.study.main if arm in scores and arm != "vanilla"):
        if "vanilla" in scores and len(both := scores[[arm, "vanilla"]].dropna()):
            step = int(both.index.get_level_values("step").max())
            ratio = report_text.change(report_text.log_ratios(scores, arm, [step]), confidence)
            found.append(f"{arm}: FID against vanilla's at step {step:,} {ratio}.")
    return found
