"""How long a newcomer waits: every notebook in JupyterLab, a study of own images, the reports' size and looks.

    python tests/first_hour.py OUTPUT --write

OUTPUT is a folder in which `haste study digits` has finished, with the reports that came with the project. The machine
has to be idle. `--write` puts the tables into docs/first-hour.md and the pictures beside it. Needs Chromium and
`pip install -e ".[browser]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import Page, sync_playwright
from test_browser import BROWSER, OPENED, OUTPUTS, REPORTS, ROOT, WIDGET, controls_of, move, served

from haste_core.study.runs import commit, machine, now

RUN_ALL = """() => {
  window.done = false;
  window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.done = true; });
}"""
STARTED = f"""() => {{
  const outputs = {OUTPUTS};
  const kinds = outputs.flatMap(output => Object.keys(output.data ?? {{}}));
  const figures = outputs.filter(output => output.output_type === 'execute_result' && '{WIDGET}' in output.data);
  return [kinds.includes('image/png') || figures.length > 0, window.done];
}}"""


def notebooks(place: Path, output: Path, page: Page, address: str) -> Iterator[dict[str, Any]]:
    """Seconds from running all cells to the first picture and to the end, and those of the slowest control."""
    for source in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(source, place / source.name)
        page.goto(address.format(source.name))
        page.wait_for_function(OPENED)
        begun, first = time.monotonic(), None
        page.evaluate(RUN_ALL)
        done = False
        while not done:
            shown, done = page.evaluate(STARTED)
            first = first or (time.monotonic() - begun if shown else None)
            time.sleep(0.1)
        whole = time.monotonic() - begun
        wrong = [o["evalue"] for o in page.evaluate(OUTPUTS) if o["output_type"] == "error"]
        slowest, moved = 0.0, 0
        for figure in page.locator(".jp-OutputArea .widget-vbox", has=page.locator("img")).all():
            figure.scroll_into_view_if_needed()
            for name, control in controls_of(figure):
                begun = time.monotonic()
                wrong += [found] if (found := move(figure, name, control)) else []
                slowest, moved = max(slowest, time.monotonic() - begun), moved + 1
        yield {
            "notebook": source.stem, "first picture, s": f"{first:.0f}" if first else "-", "end, s": f"{whole:.0f}",
            "controls": moved, "slowest control, s": f"{slowest:.1f}" if moved else "-",
            "errors": "; ".join(wrong) or "none",
        }  # fmt: skip
        page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def shapes(folder: Path) -> Path:
    """200 PNG files of 32x32 pixels in four classes: shapes in random colours and places on noise."""
    draw = np.random.default_rng(0)
    for i in range(200):
        kind = ("circle", "square", "cross", "triangle")[i % 4]
        image = Image.fromarray(draw.integers(0, 60, (32, 32, 3), dtype=np.uint8))
        pen, colour = ImageDraw.Draw(image), tuple(draw.integers(100, 256, 3).tolist())
        x, y, r = *draw.integers(10, 22, 2).tolist(), int(draw.integers(5, 10))
        box = (x - r, y - r, x + r, y + r)
        if kind == "circle":
            pen.ellipse(box, colour)
        elif kind == "square":
            pen.rectangle(box, colour)
        elif kind == "cross":
            pen.line((x - r, y, x + r, y), colour, 3)
            pen.line((x, y - r, x, y + r), colour, 3)
        else:
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], colour)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        image.save(folder / kind / f"{i:03d}.png")
    return folder


def own_images(place: Path) -> Iterator[dict[str, Any]]:
    """Minutes of the commands from a folder of images to its report."""
    study, folder = place / "shapes.yaml", shapes(place / "shapes")
    for words in (["new", str(study), "--images", str(folder)], ["study", str(study)]):
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "haste_core.study.cli", *words], cwd=place, capture_output=True, text=True,
            env=os.environ | {"HASTE_OUTPUT": str(place / "own"), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        command = " ".join(["haste", words[0], "shapes.yaml", *(["--images", "shapes"] if words[0] == "new" else [])])
        yield {"command": f"`{command}`", "minutes": f"{(time.monotonic() - begun) / 60:.1f}"}


def reports(browser: Any, pictures: Path) -> Iterator[dict[str, Any]]:
    """Size of the committed reports; the first screen of each on a laptop and on a phone goes to `pictures`."""
    for report in REPORTS:
        for name, width, scheme in (("laptop", 1280, "light"), ("phone", 390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page.goto(report.as_uri())
            page.screenshot(path=pictures / f"{report.parent.name}-{name}.png")
            page.close()
        yield {"report": report.parent.name, "MB": f"{report.stat().st_size / 1e6:.2f}"}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    lines = [rows[0], {name: "---" for name in rows[0]}, *rows]
    return "\n".join(
        "| " + " | ".join(map(str, line if i == 0 else line.values())) + " |" for i, line in enumerate(lines)
    )


def main() -> None:
    """Measure, print the tables, and with --write put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    page_path = ROOT / "docs" / "first-hour.md"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        place = Path(folder)
        pictures = ROOT / "docs" / "pictures" if arguments.write else place
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        with served(place, {"HASTE_OUTPUT": str(arguments.output.resolve())}) as address:
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.set_default_timeout(120_000)
            found = [list(notebooks(place, arguments.output, page, address))]
        found += [list(reports(browser, pictures)), list(own_images(place))]
    where = json.dumps(machine())
    text = f"Commit {commit()}, {now()[:10]}, {where}.\n\n" + "\n\n".join(table(rows) for rows in found)
    print(text)
    if arguments.write:
        begin, end = "<!-- first hour: begin -->", "<!-- first hour: end -->"
        before, _, rest = page_path.read_text().partition(begin)
        page_path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
