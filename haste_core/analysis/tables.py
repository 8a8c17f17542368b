"""Tables of analyses: measured once for the runs they name, stored beside the report with their origin.

reports/<study>/tables/NAME.csv     tidy rows
reports/<study>/tables/NAME.json    runs, settings (the card of the analysis), commit, versions, seconds
<run>/analyses/NAME-DIGEST.csv      the rows of one run, under the digest of what was measured and how
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from haste_core.errors import HasteError
from haste_core.files import write_json, write_table
from haste_core.study import config
from haste_core.study.runs import Run, commit, environment, now


def obtain(
    folder: Path,
    name: str,
    measure: Callable[[Run], pd.DataFrame],
    runs: Sequence[Run],
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Rows of the table `name`: `measure` of every run, with columns `arm` and `seed` in front.

    An existing table of the same runs and settings is read, not measured again, and so are the rows of a run that
    another table holds or an interrupt left. If the runs are not on this machine, the table that came with the project
    is read, and a printed line says so.

    Args:
        folder: the report's tables. name: of the files.
        measure: maps a finished run to tidy rows; all that affects its numbers must be in `settings`.
        runs: of one study. settings: what was measured and how, beside `analysis` of the study.

    Raises:
        HasteError: runs are missing and there is no such table.
    """

    def whole() -> pd.DataFrame:
        parts = []
        for run in tqdm(runs, desc=name, unit="run", mininterval=1.0):
            digest = config.digest([name, _card(runs, settings), run.config.train.kept_steps])
            path = run.dir / "analyses" / f"{name}-{digest}.csv"
            if not path.is_file():
                _write(path, measure(run))
            rows = pd.read_csv(path)
            rows.insert(0, "seed", run.seed)
            rows.insert(0, "arm", run.arm)
            parts.append(rows)
        return pd.concat([rows for rows in parts if len(rows)] or parts, ignore_index=True)

    return obtain_whole(folder, name, whole, runs, settings)


def _card(runs: Sequence[Run], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"analysis": runs[0].study.analysis.model_dump(mode="json"), **(settings or {})}


def _write(path: Path, table: pd.DataFrame) -> None:
    write_table(path, table.to_dict("records"), list(table.columns))  # type: ignore[arg-type]


def obtain_whole(
    folder: Path,
    name: str,
    measure: Callable[[], pd.DataFrame],
    runs: Sequence[Run],
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Like `obtain`, for a table made from all runs at once: `measure` returns it whole."""
    path, facts_path = folder / f"{name}.csv", folder / f"{name}.json"
    card = _card(runs, settings)
    whose = {
        f"{run.arm} seed {run.seed}": {"hash": run.config.hash, "steps": run.config.train.kept_steps} for run in runs
    }
    key = config.digest([name, card, whose])
    known = json.loads(facts_path.read_text()) if facts_path.is_file() else {}
    if path.is_file() and known.get("key") == key:
        return pd.read_csv(path)
    waiting = [f"{run.arm} seed {run.seed}" for run in runs if run.missing_steps()]
    if waiting and not path.is_file():
        raise HasteError(
            f"table {name} needs runs that are not trained: {', '.join(waiting)}; train them with: haste study "
            f"{runs[0].study.name}"
        )
    if waiting:
        print(
            f"{len(waiting)} runs are not on this machine: {path.name} as it came with the project, {known['written']}"
        )
        return pd.read_csv(path)
    begun = time.perf_counter()
    table = measure()
    _write(path, table)
    facts = {"table": name, "key": key, "card": card, "runs": whose, "rows": len(table)}
    facts |= {"commit": commit(), "environment": environment(), "written": now()}
    write_json(facts_path, facts | {"seconds": round(time.perf_counter() - begun, 1)})
    return pd.read_csv(path)


def scores_card(study: config.StudySettings, scores: pd.DataFrame) -> dict[str, Any]:
    """Settings of a table made from scores: the hash of the evaluation settings and a digest of the scores.

    Scores may be those that came with the project until all runs exist; the digest keeps the two apart.
    """
    rows = zip(scores["arm"], scores["seed"], scores["step"], scores["fid"], strict=True)
    known = [[str(arm), int(seed), int(step), f"{fid:.5g}"] for arm, seed, step, fid in rows]
    return {"evaluation": study.evaluation_hash, "scores": config.digest(known)}
