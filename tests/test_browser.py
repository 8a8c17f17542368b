"""Committed reports as people see them: in Chromium, on a laptop and a phone, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPORTS = sorted((Path(__file__).parents[1] / "reports").glob("*/report.html"))
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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
