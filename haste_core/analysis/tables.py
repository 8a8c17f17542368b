"""Tables of analyses: measured once for the runs they name, kept beside the report with where they come from.

reports/<study>/tables/NAME.csv     tidy rows
reports/<study>/tables/NAME.json    runs, settings (the card of the analysis), commit, versions, seconds
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
    progress: bool = True,
) -> pd.DataFrame:
    """The rows of the table `name`: `measure` of every run, under columns `arm` and `seed`.

    A table that is there already for the same runs and settings is read, not measured again. Where the runs are not on
    this machine the table that came with the project is read, and a line says so.

    Args:
        folder: of the report's tables.
        name: of the files.
        measure: from a finished run to tidy rows; whatever moves its numbers must be in `settings`.
        runs: of one study.
        settings: what was looked at and how; `analysis` of the study is always part of it.
        progress: show a bar over the runs.

    Raises:
        HasteError: runs are missing and there is no such table.
    """

    def whole() -> pd.DataFrame:
        parts = []
        for run in tqdm(runs, desc=name, unit="run", disable=not progress, mininterval=1.0):
            rows = measure(run)
            rows.insert(0, "seed", run.seed)
            rows.insert(0, "arm", run.arm)
            parts.append(rows)
        return pd.concat(parts, ignore_index=True)

    return obtain_whole(folder, name, whole, runs, settings)


def scores_card(study: config.Study, scores: pd.DataFrame) -> dict[str, Any]:
    """What a table made from scores depends on beside its runs: how they were scored, and what came out.

    Scores may be those that came with the project until all runs are there; a table made from the one is no table of
    the other.
    """
    rows = zip(scores["arm"], scores["seed"], scores["step"], scores["fid"], strict=True)
    known = [[str(arm), int(seed), int(step), f"{fid:.5g}"] for arm, seed, step, fid in rows]
    return {"evaluation": study.evaluation_hash, "scores": config.digest(known)}


def obtain_whole(
    folder: Path,
    name: str,
    measure: Callable[[], pd.DataFrame],
    runs: Sequence[Run],
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The same for a table that comes from all runs at once: `measure` returns it whole.

    Raises:
        HasteError: runs are missing and there is no such table.
    """
    path = folder / f"{name}.csv"
    card = {"analysis": runs[0].study.analysis.model_dump(mode="json"), **(settings or {})}
    whose = {
        f"{run.arm} seed {run.seed}": {"hash": run.config.hash, "steps": run.config.train.kept_steps} for run in runs
    }
    key = config.digest([name, card, whose])
    known = read_facts(folder, name)
    if path.is_file() and known.get("key") == key:
        return pd.read_csv(path)
    waiting = [f"{run.arm} seed {run.seed}" for run in runs if run.missing_steps()]
    if waiting:
        if not path.is_file():
            raise HasteError(
                f"table {name} needs runs that are not trained: {', '.join(waiting)}; possible: haste study "
                f"{runs[0].study.name}"
            )
        print(
            f"{len(waiting)} runs are not on this machine: {path.name} as it came with the project, {known['written']}"
        )
        return pd.read_csv(path)
    begun = time.perf_counter()
    table = measure()
    write_table(path, table.to_dict("records"), list(table.columns))  # type: ignore[arg-type]
    facts = {"table": name, "key": key, "card": card, "runs": whose, "rows": len(table)}
    facts |= {"commit": commit(), "environment": environment(), "written": now()}
    write_json(folder / f"{name}.json", facts | {"seconds": round(time.perf_counter() - begun, 1)})
    return pd.read_csv(path)


def read_facts(folder: Path, name: str) -> dict[str, Any]:
    """What is known of a table: its key, card, runs, commit and when it was written; empty where there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
