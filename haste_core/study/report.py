"""From runs to tables, from tables to figures and one HTML file that opens without network."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from haste_core import figures
from haste_core.analysis import attention
from haste_core.errors import HasteError
from haste_core.files import write_bytes, write_json, write_table, write_text
from haste_core.study import claims, config, cost, evaluation, runs
from haste_core.study.data import open_dataset
from haste_core.study.report_sections import sections
from haste_core.study.runs import Run
from haste_core.study.wording import (
    VERDICTS,
    answers,
    chips,
    denoising_table,
    grid_table,
    lacking,
    measured,
    readme_block,
    score_table,
    sensitivity_table,
    sentences,
    verdict_groups,
)
from haste_core.training import find_teacher

__all__ = [
    "Report", "answer", "collect_samples", "draw_figures", "open_report", "readme_block", "refresh", "score_table",
    "study_provenance", "write_report", "write_tables",
]  # fmt: skip

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """A finished study's folder, reports/<study>: tables, figures and report.html."""

    study: config.Study
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
            raise HasteError(f"no table {path}; possible: haste study {self.study.name}")
        table = pd.read_csv(path)
        # A card's id may be digits alone.
        return pd.read_csv(path, dtype={"card": str}) if "card" in table else table

    def has(self, name: str) -> bool:
        """True where the table exists."""
        return (self.tables / f"{name}.csv").is_file()

    def has_current(self, name: str) -> bool:
        """True where an analysis' table of scores exists and was made under the study's present evaluation settings."""
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

    def main_runs(self) -> list[Run]:
        """Every main arm with every seed."""
        return [run for run in self.all_runs() if run.arm in self.study.main]

    def shown_runs(self) -> list[Run]:
        """Every main arm with the first seed, for pictures."""
        return [Run(self.study, arm, self.study.seeds[0]) for arm in self.study.main]

    def main(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of a table that belong to main arms."""
        return table[table["arm"].isin(self.study.main)]

    def denoising(self) -> pd.DataFrame | None:
        """The rows of denoising.csv that belong to main arms; None for a report from before that score."""
        return self.main(self.table("denoising")) if self.has("denoising") else None

    def detailed_steps(self) -> list[int]:
        """The steps that score tables and samples are shown at: an early one, before the switch, and the last."""
        kept = sorted(figures.panel_steps(self.main(self.table("fid"))["step"], self.tau, self.study.claims.early))
        return list(dict.fromkeys((kept[0], kept[-1])))

    def scores(self) -> pd.DataFrame:
        """The rows of fid.csv: from the runs where all of them are scored, else as they came with the project."""
        if all(evaluation.is_scored(run) for run in self.all_runs()):
            return pd.DataFrame([row for run in self.all_runs() for row in evaluation.rows(run)])
        return self.table("fid")

    def samples(self) -> dict[tuple[str, int], np.ndarray]:
        """The first evaluation images by arm and step, first seed, uint8 (n, C, S, S), from tables/samples.npz."""
        with np.load(self.dir / "tables" / "samples.npz", allow_pickle=False) as stored:
            keys = {tuple(name.rsplit("@", 1)): name for name in stored.files}
            return {(arm, int(step)): stored[name] for (arm, step), name in keys.items()}

    def test_image(self) -> np.ndarray:
        """The held-out image that attention is shown on, (S, S) or (S, S, 3)."""
        image = open_dataset(self.study.data).images("test", 1)[0][0].permute(1, 2, 0).numpy()
        return image[..., 0] if image.shape[-1] == 1 else (image + 1) / 2


def open_report(study: config.Study, profile: str | None = None) -> Report:
    """The report of a study, finished or not."""
    return Report(study, runs.report_dir(study, profile))


def refresh(report: Report) -> str:
    """Write the tables anew if every run of the study is scored; says in a sentence which tables there are now.

    Raises:
        HasteError: runs are missing and there are no tables from before.
    """
    waiting = [f"{r.arm} seed {r.seed}" for r in report.all_runs() if not evaluation.is_scored(r)]
    if not waiting:
        write_tables(report)
        return f"Tables in {report.dir / 'tables'} written from {len(report.all_runs())} runs."
    facts = report.dir / "tables" / "provenance.json"
    if not facts.is_file():
        raise HasteError(f"not scored yet: {', '.join(waiting)}; possible: haste study {report.study.name}")
    known = json.loads(facts.read_text())
    return (
        f"{len(waiting)} runs of this study are not here, so these are the tables that came with the project: study "
        f"{known['study_hash']}, commit {', '.join(known['commits'])}, written {known['written']}."
    )


def collect_samples(report: Report, count: int = 10) -> dict[str, np.ndarray]:
    """The first evaluation images of each arm and kept step, first seed, uint8 (count, C, S, S), by "arm@step"."""
    found = {}
    for run in report.shown_runs():
        for step in run.config.train.kept_steps:
            found[f"{run.arm}@{step}"] = np.load(evaluation.find_samples(run, step), allow_pickle=False)[:count]
    return found


def write_tables(report: Report) -> None:
    """Write every table of the study from what lies in runs/.

    Raises:
        HasteError: a run is not trained or not scored yet.
    """
    study, folder = report.study, report.dir / "tables"
    fid = [row for run in report.all_runs() for row in evaluation.rows(run)]
    write_table(folder / "fid.csv", fid, evaluation.columns(study))
    denoising = [row for run in report.all_runs() for row in evaluation.denoising_rows(run)]
    write_table(folder / "denoising.csv", denoising, evaluation.DENOISING_COLUMNS)
    scorer = evaluation.open_scorer(study)
    write_table(
        folder / "floor.csv",
        evaluation.floor(scorer, study),
        ("pair", "n", "n_reference", *evaluation.metrics_of(study)),
    )
    cards = [json.loads(run.evaluation_path.read_text())["card"] for run in report.all_runs()]
    for card in cards:
        write_json(folder / "cards" / f"{card['card_id']}.json", card)
    # A card of earlier scores would explain numbers that are no longer there.
    for old in (folder / "cards").glob("*.json"):
        if old.stem not in {card["card_id"] for card in cards}:
            old.unlink()
    times = json.loads((runs.study_dir(study) / "step_time.json").read_text())
    write_table(folder / "step_time.csv", times, cost.COLUMNS)
    write_table(folder / "claims.csv", judge(report, pd.DataFrame(fid)), claims.COLUMNS)
    sensitive = claims.sensitivity(claims.CLAIMS, evidence(report, pd.DataFrame(fid)), study.claims.confidence)
    write_table(folder / "sensitivity.csv", sensitive, claims.SENSITIVITY)
    maps = attention.token_maps(report.shown_runs(), find_teacher(study, study.teacher))
    write_table(folder / "attention.csv", maps, tuple(maps[0]))
    names = ("arm", "seed", "step", "phase", "loss", "denoising", "feature", "attention", "grad_norm")
    curves = [
        {"arm": run.arm, "seed": run.seed, **{k: line.get(k) for k in names[2:]}}
        for run in report.main_runs()
        for line in run.metrics()
    ]
    write_table(folder / "metrics.csv", curves, names)
    stream = io.BytesIO()
    np.savez_compressed(stream, **collect_samples(report))  # type: ignore[arg-type]
    write_bytes(folder / "samples.npz", stream.getvalue())
    write_json(folder / "provenance.json", study_provenance(report))


def evidence(report: Report, fid: pd.DataFrame) -> claims.Evidence:
    """The evidence that claims are judged on: the rows of fid.csv and the tables of analyses that there are."""
    study = report.study
    study.check_claims()
    tables = {name: report.table(name) for name in claims.TABLES if report.has(name)}
    return claims.Evidence(fid, study.claims.early, study.train.steps, study.claims.roles, tables)


def judge(report: Report, fid: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of claims.csv, from the rows of fid.csv and the tables of analyses that there are."""
    return claims.judge_all(claims.CLAIMS, evidence(report, fid), report.study.claims.confidence)


def study_provenance(report: Report) -> dict[str, Any]:
    """Where the report's numbers come from: commits, hashes, versions, machine, minutes and memory."""
    study = report.study
    teachers = [runs.teacher_path(study, teacher).parent for teacher in study.teachers()]
    # A study scored by Inception has no extractors of its own; their folders are missing and tell nothing.
    extractors = [runs.extractor_path(study).parent, runs.autoencoder_path(study).parent]
    folders = [*teachers, *extractors, *(run.dir for run in report.all_runs())]
    sessions = [s for folder in folders for s in runs.provenance(folder).get("sessions", [])]
    facts = json.loads((runs.study_dir(study) / "prepared.json").read_text())
    invocation = runs.study_dir(study) / "invocation.json"
    return {
        "study": study.name,
        "study_hash": config.digest(study.model_dump(mode="json")),
        "main": study.main,
        "claims": study.claims.model_dump(mode="json"),
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
        **facts,
    }


def draw_figures(report: Report) -> dict[str, Any]:
    """Every figure of the report by name, drawn from its tables (and the sample images)."""
    fid, samples, tau = report.main(report.table("fid")), report.samples(), report.tau
    denoising = report.denoising()
    judged = report.table("claims")
    judged = judged[measured(judged)]
    floor = report.table("floor").set_index("pair")["fid"]["augmented held-in against held-in"]
    return {
        "summary": figures.summary(fid, denoising, samples, tau, report.study.claims.early),
        "fid": figures.fid_against_steps(fid, tau, float(floor)),
        "samples": figures.sample_sheet(samples, report.detailed_steps()),
        "attention": figures.attention_maps(report.table("attention"), report.test_image()),
        "curves": figures.training_curves(report.table("metrics"), tau),
        "step_time": figures.step_cost(report.table("step_time")),
        # Plain training by itself has nothing to compare, and not every study can read a claim.
        **(
            {"denoising": figures.denoising_over_training(denoising, tau)}
            if denoising is not None and figures.compared(denoising)
            else {}
        ),
        **({"gain": figures.gain_over_vanilla(fid, tau)} if fid["arm"].nunique() > 1 else {}),
        **({"claims": figures.claims_forest(judged)} if len(judged) else {}),
        **{name: draw(report) for section in sections(report) for name, draw in section.pictures.items()},
    }


def write_report(report: Report) -> Path:
    """Write figures and report.html from the tables; returns the path of report.html."""
    drawn = draw_figures(report)
    for name, figure in drawn.items():
        figures.save(figure, report.dir / "figures", name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    facts = json.loads((report.dir / "tables" / "provenance.json").read_text())
    study, fid, judged = report.study, report.main(report.table("fid")), report.table("claims")
    steps = report.detailed_steps()
    card = json.loads((report.dir / "tables" / "cards" / f"{figures.one_card(fid)}.json").read_text())
    html = environment.get_template("report.html").render(
        study=study,
        tau=report.tau,
        facts=facts,
        card=card,
        answers=answers(fid, report.denoising(), study.claims, report.tau, study.train.steps),
        sentences=answer(report),
        chips=chips(judged),
        verdicts=verdict_groups(judged),
        lacking=lacking(judged),
        meanings=VERDICTS,
        rules=claims.RULES,
        sensitivity=sensitivity_table(report.table("sensitivity")) if report.has("sensitivity") else [],
        scores=[(step, score_table(fid, step)) for step in steps],
        denoising=denoising_table(fid, steps, study.claims.confidence),
        floor=report.table("floor").to_dict("records"),
        grid=grid_table(report.table("grid")) if report.has_current("grid") else [],
        times=report.table("step_time").to_dict("records"),
        attention=report.table("attention"),
        sections=sections(report),
        drawn=set(drawn),
        picture=lambda name: _picture(report.dir / "figures" / f"{name}.png"),
    )
    path = report.dir / "report.html"
    write_text(path, html)
    return path


def answer(report: Report) -> list[str]:
    """The study's outcome in plain sentences, put together from the tables alone."""
    study = report.study
    return sentences(report.table("fid"), report.table("claims"), study.main, study.claims.confidence)


def _picture(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
