"""The report of a study: tables from runs, figures and sentences from tables, one HTML file that opens offline."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from haste_core import figures
from haste_core.analysis import attention, switching
from haste_core.errors import HasteError
from haste_core.figures import NEAR_DATA, STRUCTURE, VERDICT_COLOUR, Figure, compared, loss_ratio
from haste_core.files import write_bytes, write_json, write_table, write_text
from haste_core.study import claims, config, cost, evaluation, judging, runs
from haste_core.study.data import open_dataset
from haste_core.study.judging import MEASURES
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.sections import ClaimsSettings

TEMPLATE = Path(__file__).parent / "report.html"
FLOOR = "augmented held-in against held-in"  # the pair of floor.csv that FID is compared with
NEAR, HIGH = f"t ≤ {NEAR_DATA}", f"t ≥ {STRUCTURE}"
VERDICTS = {
    "supported": "the interval lies inside the claim's region",
    "contradicted": "the interval lies outside of the region and not inside the margin of no difference",
    "equivalent": "the interval lies inside the margin: 5 % of FID, 1 % of denoising loss, 0.02 of precision or recall",
    "smaller than the paper's": "the interval excludes the size that the paper reports; the sign is open",
    "not decided": "the interval leaves the question open, or there are fewer than two seeds",
    "not tested": "an arm or a table is missing, or the event that the claim is about did not happen",
}
# Columns of fid.csv in score tables: label and number of decimals; the last one is shown in percent.
SCORES = {
    "fid": ("FID", 2), "fid_heldout": ("FID, held-out", 2), "sfid": ("sFID", 2), "is": ("IS", 1), "kid": ("KID", 3),
    "precision": ("precision", 2), "recall": ("recall", 2), "fid_unlabelled": ("FID, no labels", 2),
    "fd_pixel": ("FD, pixels", 2), "near_data": ("loss, t ≤ 0.1", 4), "structure": ("loss, t ≥ 0.3", 4),
    "denoising": ("loss, all t", 4), "nats": ("nats", 2), "fd_dinov2": ("FD, DINOv2", 1), "nearest": ("nearest", 2),
    "copies": ("copies, %", 1),
}  # fmt: skip
# Summaries of the held-out denoising loss, columns of fid.csv; nats are compared as a difference, others in percent.
SUMMARIES = {"near_data": f"near the data ({NEAR})", "structure": HIGH, "denoising": "all t", "nats": "nats an image"}


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
        table = pd.read_csv(path)
        # A card's id may be digits alone.
        return pd.read_csv(path, dtype={"card": str}) if "card" in table else table

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
        """The rows of denoising.csv that belong to main arms; None if there is no such table."""
        return self.main(self.table("denoising")) if self.has("denoising") else None

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
        with np.load(self.dir / "tables" / "samples.npz", allow_pickle=False) as stored:
            keys = {tuple(name.rsplit("@", 1)): name for name in stored.files}
            return {(arm, int(step)): stored[name] for (arm, step), name in keys.items()}

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
        HasteError: runs are missing and there are no earlier tables.
    """
    waiting = [f"{r.arm} seed {r.seed}" for r in report.all_runs() if not evaluation.is_scored(r)]
    if not waiting:
        write_tables(report)
        return f"Tables in {report.dir / 'tables'} written from {len(report.all_runs())} runs."
    facts = report.dir / "tables" / "provenance.json"
    if not facts.is_file():
        raise HasteError(
            f"not scored yet: {', '.join(waiting)}, and no tables from before; run: haste study {report.study.name}"
        )
    known = json.loads(facts.read_text())
    return (
        f"{len(waiting)} runs of this study are not here, so these are the tables that came with the project: study "
        f"{known['study_hash']}, commit {', '.join(known['commits'])}, written {known['written']}."
    )


def write_tables(report: Report) -> None:
    """Write every table of the study from the files in runs/.

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
    # Cards of earlier scores belong to no number in the tables.
    for old in (folder / "cards").glob("*.json"):
        if old.stem not in {card["card_id"] for card in cards}:
            old.unlink()
    times = json.loads((runs.study_dir(study) / "step_time.json").read_text())
    write_table(folder / "step_time.csv", times, cost.COLUMNS)
    found, confidence = evidence(report, pd.DataFrame(fid)), study.claims.confidence
    write_table(folder / "claims.csv", judging.judge_all(claims.CLAIMS, found, confidence), judging.COLUMNS)
    sensitive = judging.sensitivity(claims.CLAIMS, found, confidence)
    write_table(folder / "sensitivity.csv", sensitive, judging.SENSITIVITY)
    maps = attention.token_maps(report.shown_runs(), find_teacher(study, study.teacher))
    write_table(folder / "attention.csv", maps, tuple(maps[0]))
    names = ("arm", "seed", "step", "phase", "loss", "denoising", "feature", "attention", "grad_norm")
    curves = [
        {"arm": run.arm, "seed": run.seed, **{k: line.get(k) for k in names[2:]}}
        for run in report.main_runs()
        for line in run.metrics()
    ]
    write_table(folder / "metrics.csv", curves, names)
    samples = {
        f"{run.arm}@{step}": np.load(evaluation.find_samples(run, step), allow_pickle=False)[:10]
        for run in report.shown_runs()
        for step in run.config.train.kept_steps
    }
    stream = io.BytesIO()
    np.savez_compressed(stream, **samples)  # type: ignore[arg-type]
    write_bytes(folder / "samples.npz", stream.getvalue())
    write_json(folder / "provenance.json", study_provenance(report))


def evidence(report: Report, fid: pd.DataFrame) -> judging.Evidence:
    """The evidence for judging claims: the rows of fid.csv and the analysis tables that exist."""
    study = report.study
    study.check_claims()
    tables = {name: report.table(name) for name in claims.TABLES if report.has(name)}
    return judging.Evidence(fid, study.claims.early, study.train.steps, study.claims.roles, tables)


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
    if denoising is not None and compared(denoising):
        found["denoising"] = figures.denoising_over_training(denoising, tau)
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
    family = str(swept.groupby("family")["tau"].nunique().idxmax())
    ranking = switching.ranking(near, report.study.claims.confidence)
    return {
        "termination": figures.fid_over_tau(swept, fired, family),
        "triggers": figures.trigger_logs(logs, report.study.triggers, family),
        "regret": figures.regret_by_trigger(near, ranking, family),
    }


def _effects(report: Report, rows: pd.DataFrame) -> Figure:
    return figures.group_effects(rows, switching.effects(rows, report.study.claims.confidence))


# By section: its figures, and its tables. The section is left out if a table is missing or empty.
ANALYSES: dict[str, tuple[Callable[..., dict[str, Figure]], tuple[str, ...]]] = {
    "conflict": (_conflict, ("gradient_conflict", "gradient_conflict_online")),
    "similarity": (
        lambda report, rows: {"similarity": figures.aligned_similarity(rows, report.tau, "cka")}, ("similarity",)
    ),
    "cross-effects": (
        lambda report, rows: {"cross_effects": figures.cross_effects(rows, report.tau)}, ("cross_effects",)
    ),
    "capacity": (_capacity, ("capacity", "spectrum")),
    "help": (lambda report, rows: {"help": _effects(report, rows)}, ("help_consists_of",)),
    "termination": (
        _termination, ("termination_sweep", "termination_fired", "termination_nearest", "termination_logs")
    ),
    "ablations": (lambda report, rows: {"ablations": _effects(report, rows)}, ("ablations",)),
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


def write_report(report: Report) -> Path:
    """Write figures and report.html from the tables; returns the path of report.html."""
    drawn, analyses = draw_figures(report), draw_analyses(report)
    for name, figure in [*drawn.items(), *(item for one in analyses.values() for item in one.items())]:
        figures.save(figure, report.dir / "figures", name)
    study, fid, judged = report.study, report.main(report.table("fid")), report.table("claims")
    steps, floor = report.detailed_steps(), report.table("floor")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )

    def picture(name: str) -> str:
        content = (report.dir / "figures" / f"{name}.png").read_bytes()
        return "data:image/png;base64," + base64.b64encode(content).decode()

    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        study=study,
        tau=report.tau,
        facts=json.loads((report.tables / "provenance.json").read_text()),
        card=json.loads((report.tables / "cards" / f"{judging.one_card(fid)}.json").read_text()),
        answers=answers(fid, report.denoising(), study.claims, report.tau, study.train.steps),
        sentences=sentences(report),
        verdicts=verdicts(judged),
        lacking=lacking(judged),
        rules=claims.RULES,
        sensitivity=sensitivity_rows(report.table("sensitivity")) if report.has("sensitivity") else [],
        scores=[(step, score_rows(fid, step)) for step in steps],
        denoising=denoising_rows(fid, steps, study.claims.confidence),
        floor_images=int(floor.set_index("pair")["n"][FLOOR]),
        floor=[
            {"pair": row["pair"], "n": row["n"], "n reference": row["n_reference"]} | _scores(row)
            for row in floor.to_dict("records")
        ],
        grid=grid_rows(report.table("grid")) if report.has_current("grid") else [],
        times=[
            {
                "arm": row["arm"],
                "phase": "I" if row["phase"] == 1 else "II",
                "median step": f"{1000 * row['median_step_s']:.1f} ms",
                "over vanilla": f"{row['ratio_to_vanilla']:.3f}",
                "interval": f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
            }
            for row in report.table("step_time").to_dict("records")
        ],
        attention=report.table("attention"),
        analyses=analyses,
        drawn=drawn,
        picture=picture,
    )
    path = report.dir / "report.html"
    write_text(path, html)
    return path


# Sentences


def answers(
    fid: pd.DataFrame, denoising: pd.DataFrame | None, settings: ClaimsSettings, tau: int | None, last: int
) -> list[tuple[str, str]]:
    """Question and answer in numbers: early gain, late cost, and the part of it that the switch gives back.

    A question whose arms or steps are missing is left out. Percentages are exp(mean log ratio) - 1 over seeds.

    Args:
        fid, denoising: rows of fid.csv and denoising.csv (or None). settings: early steps, confidence and roles.
        tau: step of the switch. last: the last step.
    """
    arms = [settings.roles.get(role, role) for role in ("holistic", "repa", "atta")]
    arm = next((arm for arm in arms if arm in set(fid["arm"])), None)
    if arm is None or "vanilla" not in set(fid["arm"]):
        return []
    haste = settings.roles.get("haste", "haste") if arm == arms[0] else None
    gains = {
        "FID": log_ratios(fid.pivot_table(index=["seed", "step"], columns="arm", values="fid"), arm, settings.early)
    }
    if denoising is None or not compared(denoising):
        return _early(gains, settings, arm)
    near, high = loss_ratio(denoising, 0.0, NEAR_DATA), loss_ratio(denoising, STRUCTURE, 1.0)
    gains[f"held-out denoising loss at {HIGH}"] = log_ratios(high, arm, settings.early)
    found = _early(gains, settings, arm)
    if len(cost := log_ratios(near, arm, [last])):
        text = (
            f"Held-out denoising loss of {arm} against vanilla at step {last:,}: near the data ({NEAR}) "
            f"{change(cost, settings.confidence)}; at {HIGH} "
            f"{change(log_ratios(high, arm, [last]), settings.confidence)}."
        )
        found.append(("What does it cost late, and where?", text))
    if haste is not None and tau is not None and len(back := log_ratios(near, arm, [last], base=haste)):
        text = (
            f"Held-out denoising loss near the data ({NEAR}) at step {last:,}, {arm} (alignment stays on) against "
            f"{haste} (off from step {tau:,}): {change(back, settings.confidence)}. "
            f"{_share_of_cost(back, cost, settings.confidence)}."
        )
        found.append(("Does the switch give it back?", text))
    return found


def _early(gains: Mapping[str, np.ndarray], settings: ClaimsSettings, arm: str) -> list[tuple[str, str]]:
    parts = [f"{name} {change(logs, settings.confidence)}" for name, logs in gains.items() if len(logs)]
    steps = [f"{step:,}" for step in sorted(settings.early)]
    when = f"step {steps[0]}" if len(steps) == 1 else f"mean over steps {', '.join(steps[:-1])} and {steps[-1]}"
    return [("Does it help early?", f"{arm} against vanilla, {when}: {'; '.join(parts)}.")] if parts else []


def _share_of_cost(back: np.ndarray, cost: np.ndarray, confidence: float) -> str:
    """The part of the late cost that the switch gives back, as a sentence without its full stop."""
    whole, low, high = judging.interval(cost.tolist(), confidence)
    mean, least, most = judging.interval(back.tolist(), confidence)
    if low <= 0 <= high:
        return "The cost near the data is itself not decided, so no share of it is given"
    if high < 0:
        return "There is no cost near the data to give back"
    if least <= 0 <= most:
        return "So the share of the cost that the switch gives back is not decided"
    return (
        "So the switch gives nothing back"
        if most < 0
        else f"That is {100 * mean / whole:.0f} % of the cost near the data"
    )


def log_ratios(values: pd.DataFrame, arm: str, steps: Iterable[int], base: str = "vanilla") -> np.ndarray:
    """log of an arm's values over those of `base`, mean over steps, (seeds,); only seeds that have all of the steps.

    values: rows (seed, step), one column for each arm.
    """
    if arm not in values or base not in values:
        return np.zeros(0)
    both = values[[arm, base]].clip(lower=1e-12)
    logs = (both[arm] / both[base]).unstack("step").apply(np.log)
    return logs.reindex(columns=list(steps)).dropna().mean(axis=1).to_numpy()


def change(logs: Sequence[float] | np.ndarray, confidence: float) -> str:
    """log ratios over seeds as a change in words: "6.4 % higher (95 % interval +4.7 to +8.1 %, 3 seeds)"."""
    mean, low, high = (100 * np.expm1(v) for v in judging.interval([float(v) for v in logs], confidence))
    size = f"{abs(mean):.1f} % {'higher' if mean > 0 else 'lower'}"
    if len(logs) < 2:
        return f"{size} (one seed)"
    span = f"{100 * confidence:.0f} % interval {low:+.1f} to {high:+.1f} %, {len(logs)} seeds"
    return f"not decided ({mean:+.1f} %, {span})" if low <= 0 <= high else f"{size} ({span})"


def sentences(report: Report) -> list[str]:
    """The outcome of the study, from its tables: a sentence for each claim, and for each main arm against vanilla."""
    judged, main, confidence = report.table("claims"), report.study.main, report.study.claims.confidence
    found = [
        f"{row['id']}, “{row['claim']}”: {effect(row)}, {row['unit']}. {str(row['verdict']).capitalize()}: "
        f"{VERDICTS[row['verdict']]}."
        for row in judged[measured(judged)].to_dict("records")
    ]
    if missing := "; ".join(f"{identity} ({reason})" for identity, reason in lacking(judged)):
        found.append(f"Not measured or not tested: {missing}.")
    scores = report.main(report.table("fid")).pivot_table(index=["seed", "step"], columns="arm", values="fid")
    for arm in (arm for arm in main if arm in scores and arm != "vanilla"):
        if "vanilla" in scores and len(both := scores[[arm, "vanilla"]].dropna()):
            step = int(both.index.get_level_values("step").max())
            ratio = change(log_ratios(scores, arm, [step]), confidence)
            found.append(f"{arm}: FID against vanilla's at step {step:,} {ratio}.")
    return found


# Cells of tables as text: lists of rows, each with its cells by column


def number(value: float) -> str:
    """An effect with three significant digits, two decimals from 1 on."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def p_value(p: float) -> str:
    """A p value with three decimals; "-" for NaN."""
    return "-" if not np.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def effect(row: Mapping[Any, Any]) -> str:
    """Effect and interval of a row of claims.csv: "0.234 (0.043 to 0.426)"."""
    span = f"{number(row['low'])} to {number(row['high'])}" if np.isfinite(row["low"]) else "one seed"
    return f"{number(row['effect'])} ({span})"


def measure_name(measure: Any) -> str:
    """The measure or table of a claim for a reader; FID for tables from before other measures."""
    if not isinstance(measure, str):
        return "FID"
    return MEASURES[measure].name.removeprefix("log ") if measure in MEASURES else measure.replace("_", " ")


def measured(judged: pd.DataFrame) -> pd.Series:
    """True for rows of claims.csv that have a number and were tested."""
    return np.isfinite(judged["effect"]) & (judged["verdict"] != "not tested")


def lacking(judged: pd.DataFrame) -> list[tuple[str, str]]:
    """The claims that were not measured or not tested, and the reason."""
    rows = judged[~measured(judged)].to_dict("records")
    undefined = "its number is undefined in a seed, such as a gain over no gain, or a step before the first kept one"
    return [(str(r["id"]), undefined if r["seeds"] else str(r["rule"]).rpartition("; ")[2]) for r in rows]


def verdicts(judged: pd.DataFrame) -> list[dict[str, Any]]:
    """Every verdict with its `meaning`, `colour`, and the `rows` of the measured claims that have it."""
    rows: dict[str, list[dict[str, str]]] = {verdict: [] for verdict in VERDICTS}
    for row in judged[measured(judged)].to_dict("records"):
        size, _, span = effect(row).removesuffix(")").partition(" (")
        rows[row["verdict"]].append(
            {
                **{name: str(row[name]) for name in ("id", "claim", "unit", "rule", "paper", "seeds")},
                "measure": measure_name(row.get("measure")),
                "effect": size,
                "interval": span,
                **{name: p_value(row.get(name, np.nan)) for name in ("p", "p_holm", "p_bh")},
            }
        )
    return [
        {"verdict": verdict, "meaning": meaning, "colour": VERDICT_COLOUR[verdict], "rows": rows[verdict]}
        for verdict, meaning in VERDICTS.items()
    ]


def sensitivity_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of sensitivity.csv: claim, measure, early steps, effect with interval, verdict."""
    return [
        {
            "claim": str(row["id"]),
            "measure": measure_name(row["measure"]),
            "early steps": "" if row["early"] != row["early"] else str(row["early"]).removesuffix(".0"),
            "effect (interval)": effect(row) if np.isfinite(row["effect"]) else "-",
            "verdict": str(row["verdict"]),
        }
        for row in table.to_dict("records")
    ]


def _scores(row: Mapping[Any, float]) -> dict[str, str]:
    return {
        label: f"{row[name] * (100 if name == 'copies' else 1):.{digits}f}"
        for name, (label, digits) in SCORES.items()
        if name in row
    }


def score_rows(fid: pd.DataFrame, step: int) -> list[dict[str, str]]:
    """A row for each arm at a step: range of FID over seeds, and means of all scores over seeds."""
    return [
        {"arm": str(arm), "FID, lowest to highest seed": f"{group['fid'].min():.2f} to {group['fid'].max():.2f}"}
        | _scores({name: float(group[name].mean()) for name in SCORES if name in group})
        for arm, group in fid[fid["step"] == step].groupby("arm", sort=False)
    ]


def denoising_rows(fid: pd.DataFrame, steps: Iterable[int], confidence: float) -> list[dict[str, str]]:
    """Difference of every held-out denoising summary to vanilla's, mean and interval, by step and arm.

    In percent of the loss, in nats for `nats`; empty if fid.csv has no such columns or no vanilla.
    """
    names = [name for name in SUMMARIES if name in fid and fid[name].notna().any()]
    arms = [str(arm) for arm in fid["arm"].unique() if arm != "vanilla"]
    rows = []
    for step in steps if names and len(arms) < fid["arm"].nunique() else ():
        at = fid[fid["step"] == step]
        values = {name: at.pivot_table(index="seed", columns="arm", values=name) for name in names}
        for arm in arms:
            row = {"arm": arm, "step": f"{step:,}"}
            rows.append(row | {SUMMARIES[name]: _difference(values[name], arm, name, confidence) for name in names})
    return rows


def _difference(values: pd.DataFrame, arm: str, name: str, confidence: float) -> str:
    if arm not in values or "vanilla" not in values or not len(pair := values[[arm, "vanilla"]].dropna()):
        return "-"
    nats = name == "nats"
    found = pair[arm] - pair["vanilla"] if nats else np.log(pair[arm] / pair["vanilla"])
    numbers = judging.interval(found.tolist(), confidence)
    mean, low, high = numbers if nats else (100 * np.expm1(number) for number in numbers)
    span = f" ({low:+.2f} to {high:+.2f})" if len(found) > 1 else ""
    return f"{mean:+.2f}{' nats' if nats else ' %'}{span}"


def grid_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of grid.csv: a row for each grid and arm, means over seeds."""
    names = {"fid": "FID", "fid_unlabelled": "FID, no labels", "fd_pixel": "FD, pixels", "precision": "precision",
             "recall": "recall"}  # fmt: skip
    return [
        {
            "grid": str(grid),
            "arm": str(arm),
            "calls": str(rows["calls"].iloc[0]),
            "last t": f"{rows['last_t'].iloc[0]:.3f}",
            **{label: f"{rows[name].mean():.3f}" for name, label in names.items()},
            "seeds": str(len(rows)),
        }
        for (grid, arm), rows in table.groupby(["grid", "arm"], sort=False)
    ]


# README


def readme_block(folder: Path) -> str:
    """The answers, verdicts and origin as README shows them (markdown), from the tables in `folder` alone."""
    fid, judged = pd.read_csv(folder / "fid.csv"), pd.read_csv(folder / "claims.csv")
    facts, times = json.loads((folder / "provenance.json").read_text()), pd.read_csv(folder / "step_time.csv")
    main, denoising = facts.get("main", list(fid["arm"].unique())), None
    if (folder / "denoising.csv").is_file():
        denoising = pd.read_csv(folder / "denoising.csv", dtype={"card": str})
        denoising = denoising[denoising["arm"].isin(main)]
    fid = fid[fid["arm"].isin(main)]
    lines = []
    if "claims" in facts:  # tables of earlier versions do not have it
        found = answers(fid, denoising, ClaimsSettings(**facts["claims"]), facts["tau"], facts["steps"])
        lines = [f"- **{question}** {text}" for question, text in found]
        lines += [""] if found else []
    lines += ["| claim | measure | effect (interval) | verdict |", "|---|---|---|---|"]
    for row in judged[measured(judged)].to_dict("records"):
        cells = (f"{row['id']}: {row['claim']}", measure_name(row.get("measure")), effect(row))
        lines.append(f"| {' | '.join(map(str, cells))} | **{row['verdict']}** |")
    missing = len(list(lacking(judged)))
    if missing:
        lines += [
            "",
            f"{missing} further claims or readings need other arms or tables; the report lists them with units.",
        ]
    ratios = [
        f"{row['arm']} phase {'I' if row['phase'] == 1 else 'II'} {row['ratio_to_vanilla']:.2f}"
        for row in times.to_dict("records")
        if row["arm"] != "vanilla"
    ]
    lines += ["", f"Step time over a vanilla step: {', '.join(ratios)}."]
    run, machine = facts["invocation"], facts["machine"]
    if run and not run["resumed"]:
        installing = f" after {run['install_minutes']:.1f} minutes of installing" if "install_minutes" in run else ""
        lines.append(
            f"From nothing to this report: {run['minutes']:.1f} minutes{installing}, {run['peak_memory_gib']:.1f} GiB "
            f"of memory at most, on {machine['cores']} cores ({machine['cpu']})."
        )
    accuracies = [
        f"{name} {facts[name]['test_accuracy']:.1%}"
        for name in ("teacher", "extractor")
        if (facts[name] or {}).get("test_accuracy") is not None
    ]
    if accuracies:
        lines.append(f"Of held-out images classified correctly: {', '.join(accuracies)}.")
    lines.append(f"Commit {', '.join(facts['commits'])}, study {facts['study_hash']}.")
    return "\n".join(lines) + "\n"
