"""Committed reports and all notebooks as people see them, in Chromium; reports on laptop and phone, light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import papermill
import pytest
from test_notebooks import ANALYSES, BROWSER, SMALL, check_tables
from test_study import copy_of, finished_study

ROOT = Path(__file__).parents[1]
REPORTS = sorted((ROOT / "reports").glob("*/report.html"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; Debian's package is chromium"),
]

# A page of its own with the report in a frame as wide as the screen that is meant; what it finds becomes its title.
FRAME = """<!doctype html><iframe width="{width}" height="844" src="{source}"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow, told = page.querySelector("#told");
  const found = {{ width: page.documentElement.clientWidth, scrolls: page.documentElement.scrollWidth }};
  found.errors = view.eval("failed");
  found.background = view.getComputedStyle(page.body).backgroundColor;
  found.dead = [...page.querySelectorAll("a[href^='#']")].map(a => a.getAttribute("href"))
    .filter(link => !page.getElementById(link.slice(1)));
  const ids = [...page.querySelectorAll("[id]")].map(part => part.id);
  found.twice = ids.filter((id, i) => ids.indexOf(id) !== i);
  const buttons = [...page.querySelectorAll("#arms button")];
  found.arms = buttons.map(button => button.textContent);
  const own = [...page.querySelectorAll(`svg [data-arm="${{found.arms[0]}}"]`)];
  const hidden = () => own.filter(part => part.style.display === "none").length;
  buttons[0].click();
  found.gone = hidden() === own.length;
  buttons[0].click();
  found.back = hidden() === 0;
  const line = page.querySelector("svg [data-points*=';']"), svg = line.closest("svg[role=img]");
  svg.scrollIntoView();
  const [x, y] = line.querySelector("path[d]").getAttribute("d").match(/[\\d.]+/g).map(Number);
  const at = new view.DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new view.PointerEvent("pointermove", {{ clientX: at.x, clientY: at.y }}));
  found.told = told.textContent;
  found.point = line.dataset.points.split(";")[0];
  const head = page.querySelector("th.n"), column = [...head.parentNode.children].indexOf(head);
  const cells = () => [...head.closest("table").rows].slice(1).map(row => parseFloat(row.children[column].textContent));
  head.click();
  found.sorted = cells().every((value, i, all) => isNaN(value) || !i || isNaN(all[i - 1]) || all[i - 1] <= value);
  document.title = JSON.stringify(found);
}};
</script>"""


def seen(report: Path, folder: Path, width: int, dark: bool) -> dict:
    """What a reader finds; the screen is kept as a picture in `folder`."""
    copy = folder / "report.html"
    watch = "<head><script>const failed = []; onerror = message => { failed.push(message); };</script>"
    copy.write_text(report.read_text().replace("<head>", watch, 1))
    (folder / "frame.html").write_text(FRAME.format(width=width, source=copy.as_uri()))
    words = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=8000", f"--window-size={width + 60},900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]  # fmt: skip
    page = (folder / "frame.html").as_uri()
    subprocess.run(
        [*words, f"--screenshot={folder / 'screen.png'}", page], capture_output=True, timeout=120, check=True
    )
    shown = subprocess.run([*words, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", shown, re.DOTALL)[1]))


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.parent.name)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["laptop", "phone in the dark"])
def test_a_report_is_read_and_played_with(report, width, dark, tmp_path):
    found = seen(report, tmp_path, width, dark)
    assert found["scrolls"] <= found["width"] <= width
    assert found["errors"] == found["dead"] == found["twice"] == []
    assert found["arms"][0] == "vanilla"
    assert found["gone"]
    assert found["back"]
    x, y = found["point"].split(",")
    assert found["told"].endswith(f": {y} at {x}")
    assert found["sorted"]
    dim = sum(map(int, re.findall(r"\d+", found["background"])[:3])) < 200
    assert dim == dark


# -- notebooks in JupyterLab ------------------------------------------------------------------------------------------

# Parameters at which each notebook is short, beside the profile and the settings of the finished study.
NOTEBOOKS = {
    "00_data_and_teacher": {}, "01_train": {"arm": "haste"}, "02_fid": {"arm": "haste"},
    **{name: parameters for name, (parameters, _) in ANALYSES.items()},
    "09_your_own_trainer": {"steps": 40, "stop_at": 20, "batch_size": 16}, "10_report": {"overrides": ["seeds=[0]"]},
    "11_mechanism": {"profile": "", "overrides": []},
}  # fmt: skip
OPENED = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  return Boolean(panel?.content?.widgets?.length && panel.sessionContext?.session?.kernel?.status === 'idle');
}"""
WIDGET = "application/vnd.jupyter.widget-view+json"  # as a cell's result; bars of progress are displayed
OUTPUTS = """window.jupyterapp.shell.currentWidget.content.model.toJSON().cells.flatMap(cell => cell.outputs ?? [])"""


@contextmanager
def served(place, environment):
    """The address of a notebook in a JupyterLab on the folder `place`, with {} for the notebook's name."""
    folders = {f"JUPYTER_{kind}_DIR": str(place / kind.lower()) for kind in ("CONFIG", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(place / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    words = ["lab", "--no-browser", "--allow-root", "--port=0", "--expose-app-in-browser", f"--notebook-dir={place}"]
    with (place / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", *words], env=os.environ | environment | folders, stdout=log, stderr=log
        )
    try:
        while not (found := [path for path in (place / "runtime").glob("jpserver-*.json") if path.stat().st_size]):
            assert server.poll() is None, (place / "server.log").read_text()
            time.sleep(0.1)
        facts = json.loads(found[0].read_text())
        yield f"{facts['url']}lab/tree/{{}}?reset&token={facts['token']}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder of notebooks, a finished study that they see, the address of each in JupyterLab, and a page."""
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright here; pip install -e .[browser]")
    place = tmp_path_factory.mktemp("lab")
    study = copy_of(finished_study(tmp_path_factory), place / "copy")
    shutil.copytree(ROOT / "reports" / "textured", study.dir / "reports" / "textured")
    environment = {"HASTE_OUTPUT": str(study.dir), "ACCELERATE_USE_CPU": "true"}
    with served(place, environment) as address, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(120_000)
        yield place, study, address, page
        browser.close()


def run_all(page, address):
    """Open a notebook, run all of its cells and return their outputs."""
    page.goto(address)
    page.wait_for_function(OPENED)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    return page.evaluate(OUTPUTS)


def controls_of(figure):
    """The controls above an interactive figure, each with what it is called."""
    for control in figure.locator(".widget-dropdown, .widget-slider").all():
        yield control.locator("label").inner_text(), control


def move(figure, name, control):
    """Set a control to another value and wait until another picture is drawn; what is wrong, or nothing."""
    before, menu, handle = picture(figure), control.locator("select"), control.locator(".noUi-handle")
    if menu.count():
        if menu.locator("option").count() < 2:
            return ""
        menu.select_option(index=0 if menu.evaluate("menu => menu.selectedIndex") else 1)
    else:
        if control.locator(".noUi-target").bounding_box()["width"] < 80:
            return f"{name}: too narrow a slider to be moved by hand"
        at, least = (handle.get_attribute(f"aria-value{which}") for which in ("now", "min"))
        handle.press("End" if at == least else "Home")
    deadline = time.monotonic() + 60
    while picture(figure) == before:
        if time.monotonic() > deadline:
            return f"{name}: the figure stays as it is"
        time.sleep(0.05)
    return f"{name}: an error" if figure.get_by_text("Traceback").count() else ""


def picture(figure):
    """The last picture drawn, once it is there: it is taken away before the next one comes."""
    return figure.locator("img").last.get_attribute("src")


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("notebooks")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_jupyterlab_and_every_control_changes_its_figure(lab, tmp_path, name):
    from playwright.sync_api import expect

    place, study, address, page = lab
    parameters = {"profile": "smoke", "overrides": SMALL} | NOTEBOOKS[name]
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb", place / f"{name}.ipynb", parameters, prepare_only=True
    )
    wrong = []
    try:
        outputs = run_all(page, address.format(f"{name}.ipynb"))
        wrong += [output["evalue"] for output in outputs if output["output_type"] == "error"]
        shown = [
            kind for output in outputs if output["output_type"] != "display_data" for kind in output.get("data", {})
        ]
        assert wrong or {"image/png", WIDGET} & set(shown)
        figures = page.locator(".jp-OutputArea .widget-vbox", has=page.locator("img"))
        expect(figures).to_have_count(shown.count(WIDGET), timeout=60_000)
        for figure in figures.all():
            figure.scroll_into_view_if_needed()
            controls = list(controls_of(figure))
            assert controls
            wrong += [found for name, control in controls if (found := move(figure, name, control))]
    finally:
        page.screenshot(path=tmp_path / "screen.png")
    if name in ANALYSES:
        check_tables(study.report, name)
    assert wrong == [], f"the screen is in {tmp_path / 'screen.png'}"
