"""The report of a machine's benchmarks, from its tables alone: one figure and `report.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from benchmarks import machine
from benchmarks.sampling import WAYS
from haste_core.alignment import QUERIES_AT_ONCE
from haste_core.figures import save
from haste_core.figures.style import Figure
from haste_core.files import write_text

UNITS = {"batch": "images in a batch", "depth": "blocks", "tokens": "tokens", "jobs": "jobs of a study"}


def write(folder: Path) -> Path:
    """Draw `figure.png` and write `report.md` in a folder of results; returns the path of the latter."""
    tables = {path.stem: machine.kept(folder, path.stem) for path in sorted(folder.glob("*.csv"))}
    save(draw({name: table for name, (table, _) in tables.items()}), folder, "figure")
    parts = [f"# Benchmarks on {folder.name}", "![time and memory as work grows](figure.png)"]
    for name, (table, facts) in tables.items():
        parts += [f"## {name}", table.to_markdown(index=False, floatfmt=".3g"), _origin(facts)]
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def readme_block(folder: Path) -> str:
    """README's lines on the step and the samplers, from a machine's tables alone."""
    steps, facts = machine.kept(folder, "step")
    if (folder / "compiled.csv").is_file():
        steps = pd.concat([steps, machine.kept(folder, "compiled")[0]])
    lines = [
        _origin(facts),
        "",
        "| a training step | s | over a vanilla step | over vanilla and a teacher forward | images/s | GiB | of the "
        "matrix rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in steps.iterrows():
        ratio, over = _interval(row), _interval(row, ("over_least", "over_low", "over_high"))
        cells = [f"{row['seconds']:.2f}", ratio, over, f"{row['images_per_s']:.2f}",
                 _cell(row["peak_gib"], ".1f"), _cell(row["share"], ".0%")]  # fmt: skip
        images = f", {row['batch']:.0f} images" if "batch" in row and pd.notna(row["batch"]) else ""
        lines.append(f"| {' | '.join([row['what'] + images, *cells])} |")
    drawn, facts = machine.kept(folder, "sampling")
    lines += [
        "",
        _origin(facts),
        "",
        "| sampler | passes an image | images/s | compiled, over that time | bf16, over that time | guided everywhere, "
        "over that time |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in drawn.groupby("sampler", sort=False):
        by_way = {row["way"]: row for _, row in rows.iterrows()}
        plain = by_way["plain"]
        ratios = [_interval(by_way[way]) if way in by_way else "" for way in WAYS if way != "plain"]
        lines.append(f"| {' | '.join([str(name), str(plain['passes']), f'{plain.images_per_s:.2f}', *ratios])} |")
    return "\n".join(lines) + "\n"


def _interval(row: pd.Series, names: tuple[str, str, str] = ("ratio", "low", "high")) -> str:
    """A ratio and its interval, empty where it was not taken."""
    ratio, low, high = (row[name] for name in names)
    return "" if pd.isna(ratio) else f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def _cell(value: float, how: str) -> str:
    return "" if pd.isna(value) else format(value, how)


def _origin(facts: dict[str, Any]) -> str:
    rate = f", {facts['matrix_rate'] / 1e9:.0f} GFLOP/s of matrix products" if "matrix_rate" in facts else ""
    where = facts["machine"]
    cpu = f"{where['cores']} cores of {where['cpu']}"
    return (
        f"Commit {facts['commit']}, {facts['written'][:10]}, torch {facts['environment']['torch']}, "
        f"{where['gpu'] or cpu}, {facts['threads']} threads{rate}."
    )


def draw(tables: dict[str, pd.DataFrame]) -> Figure:
    """Time over the smallest amount's and GiB, for everything that grows; whole maps and chunks side by side."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    # One benchmark may have run by itself: panels of the others stay empty.
    if "growth" in tables:
        for axis, (grows, part) in zip(axes.flat[:4], tables["growth"].groupby("grows", sort=False), strict=False):
            _grown(axis, str(grows), part)
    if "attention" in tables:
        _attention(axes.flat[4], tables["attention"], "seconds", "seconds, both passes")
        _attention(axes.flat[5], tables["attention"], "peak_gib", "GiB of a process alone")
        _attention(axes.flat[5], tables["attention"], "returning_gib", "GiB of a process alone", "in use")
    return figure


def _grown(axis: Axes, grows: str, part: pd.DataFrame) -> None:
    part = part.sort_values("amount")
    axis.fill_between(part["amount"], part["low"], part["high"], color="#0072B2", alpha=0.2, linewidth=0)
    axis.plot(part["amount"], part["ratio"], "o-", color="#0072B2", label="time")
    axis.plot(part["amount"], part["amount"] / part["amount"].min(), ":", color="#555555", label="in proportion")
    axis.set(xscale="log", yscale="log", xlabel=UNITS[grows], ylabel="time over the first")
    if part["peak_gib"].notna().all():
        twin = axis.twinx()
        twin.plot(part["amount"], part["peak_gib"], "s--", color="#D55E00", markersize=4)
        twin.set_ylabel("GiB (orange)")
        twin.set_ylim(bottom=0)
        twin.grid(visible=False)
    axis.set_xticks(part["amount"], [str(amount) for amount in part["amount"]])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="upper left")


def _attention(axis: Axes, table: pd.DataFrame, column: str, label: str, where: str | None = None) -> None:
    if "compiled" in table:
        table = table[~table["compiled"]]
    whole = table[table["queries"] == table["tokens"]]
    chunks = table[(table["queries"] == QUERIES_AT_ONCE) & (table["tokens"] > QUERIES_AT_ONCE)]
    lines = (("whole maps", whole, "#0072B2"), (f"{QUERIES_AT_ONCE} queries at once", chunks, "#D55E00"))
    # Whole maps are large blocks, which the C library gives back in any case.
    for held, part, colour in lines[1:] if where else lines:
        name = f"{held}, {where}" if where else held
        axis.plot(part["tokens"], part[column], "s:" if where else "o-", label=name, color=colour)
    # Memory does not begin at nothing: the process itself takes half a GiB.
    axis.set(xscale="log", yscale="log" if column == "seconds" else "linear", xlabel="tokens", ylabel=label)
    if column != "seconds":
        axis.set_ylim(bottom=0)
    axis.set_xticks(sorted(table["tokens"].unique()), [str(n) for n in sorted(table["tokens"].unique())])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="upper left")
