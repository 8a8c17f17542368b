from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import haste_core
from haste_core.alignment import projector
from haste_core.models import SiT
from haste_core.study import config
from haste_core.study.cli import parser, study_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "haste_core"
MODULES = sorted(PACKAGE.rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK_LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.strip()]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree(path):
    return ast.parse(path.read_text())


# The three files that say what is installed


def pins():
    """Version by canonical name, from requirements.lock."""
    found = {}
    for line in LOCK_LINES:
        name, _, version = line.partition("==")
        found[canonicalize_name(name)] = version
    return found


def environment():
    return yaml.safe_load((ROOT / "env.yml").read_text())


def conda_python():
    """The version of Python in env.yml."""
    entry = next(e for e in environment()["dependencies"] if isinstance(e, str) and re.match(r"python\b", e))
    return re.fullmatch(r"python=+([\d.]+)", entry)[1]


def test_the_lock_pins_each_package_once_to_an_exact_version():
    pin = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.!]*")
    assert [line for line in LOCK_LINES if not pin.fullmatch(line)] == []
    assert len(pins()) == len(LOCK_LINES)


def test_every_dependency_is_pinned_to_a_version_that_fits():
    project = PYPROJECT["project"]
    # The package itself is installed without build isolation, so its build backend is pinned too.
    wanted = [
        *project["dependencies"], *project["optional-dependencies"]["test"], *PYPROJECT["build-system"]["requires"]
    ]  # fmt: skip
    unfit = [r for r in map(Requirement, wanted) if pins().get(canonicalize_name(r.name), "0") not in r.specifier]
    assert unfit == []


def test_the_package_and_its_pins_run_on_the_python_of_the_conda_environment():
    assert conda_python() in SpecifierSet(PYPROJECT["project"]["requires-python"])
    unfit = {}
    for name, version in pins().items():
        try:
            found = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a pin for another platform
        if found["Version"].split("+")[0] != version:
            continue  # another version is installed here; it says nothing about the pin
        if f"{conda_python()}.99" not in SpecifierSet(found["Requires-Python"] or ""):
            unfit[name] = found["Requires-Python"]
    assert unfit == {}


def test_tests_run_with_the_pinned_versions():
    # A lock that nobody ever ran is a guess. Builds for a device differ in their local part only.
    versions = {}
    for requirement in map(Requirement, PYPROJECT["project"]["dependencies"]):
        name = canonicalize_name(requirement.name)
        versions[name] = importlib.metadata.version(name).split("+")[0]
    assert versions == {name: pins()[name] for name in versions}


def test_conda_has_python_and_pip_and_installs_the_lock_and_the_package():
    dependencies = environment()["dependencies"]
    assert {re.split(r"[=<>]", entry)[0] for entry in dependencies if isinstance(entry, str)} == {"python", "pip"}
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert {"-r requirements.lock", "-e ."} <= set(pip)
    assert all(entry.startswith("-") for entry in pip), "versions belong into requirements.lock"


def tracked():
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_nothing_that_is_made_here_is_committed():
    # A committed .venv (a link is enough) stops `python -m venv .venv` in every fresh clone.
    made = re.compile(r"(^|/)(\.venv|runs|__pycache__|\.snakemake|[^/]*\.egg-info|\.ready)(/|$)")
    assert [path for path in tracked() if made.search(path)] == []


def test_only_reports_that_readme_shows_are_committed():
    readme = (ROOT / "README.md").read_text()
    kept = {path.split("/")[1] for path in tracked() if path.startswith("reports/")} - {"exploration"}
    assert kept == {name for name in kept if f"reports/{name}/report.html" in readme}
    studies = {f"{name}-{profile}" for name in config.studies() for profile in config.load(name).profiles}
    assert kept <= studies | set(config.studies()) - {f"{name}-smoke" for name in config.studies()}
    assert "(reports/exploration/README.md)" in readme
    assert [p for p in tracked() if p.startswith("reports/") and p.endswith(".ipynb")] == []


# The package


def test_importing_the_package_and_its_figures_is_silent_and_leaves_pyplot_alone():
    # Figures outside pyplot cannot pile up, and need no display.
    code = "import sys, haste_core, haste_core.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_public_names_of_the_package_exist():
    for name in haste_core.__all__:
        assert getattr(haste_core, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = haste_core.nothing_like_this


def imported(path):
    """Top-level names of everything a module imports, also inside functions."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_imports_are_the_packages_own_or_declared_dependencies_and_only_figures_plots():
    modules = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
    # These come with a declared dependency: papermill and ipykernel run on them.
    implied = {"haste_core", "IPython", "jupyter_client", "nbclient", "traitlets"}
    declared = {canonicalize_name(Requirement(r).name) for r in PYPROJECT["project"]["dependencies"]}
    for path in MODULES:
        found = imported(path)
        foreign = found - set(sys.stdlib_module_names) - implied
        assert {m for m in foreign if canonicalize_name(modules.get(m, m)) not in declared} == set(), path
        allowed = {"matplotlib"} if path.parent.name == "figures" else set()
        assert found & {"matplotlib", "seaborn", "plotly", "snakemake"} <= allowed, path


def dotted(node):
    """The dotted name of a call's function, such as "torch.load", or ""."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def test_what_is_read_is_never_executed():
    # Ruff's rules S refuse calls that unpickle, evaluate or start a shell; these are those that it does not know.
    pickling = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in MODULES:
        assert imported(path) & pickling == set(), path
        for node in (n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)):
            options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            assert options.get("allow_pickle", False) is False, path
            assert dotted(node.func) not in ("yaml.unsafe_load", "yaml.full_load"), path
            assert dotted(node.func) != "torch.load" or options.get("weights_only") is True, path


# Notebooks


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def parameter_cells(path):
    return [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_has_one_parameters_cell_of_literals_and_it_comes_first(path):
    assert parameter_cells(path) == cells(path)[:1]
    names = []
    for statement in ast.parse(source(parameter_cells(path)[0])).body:
        assert isinstance(statement, ast.Assign)
        assert len(statement.targets) == 1
        names.append(statement.targets[0].id)
        ast.literal_eval(statement.value)
    assert len(set(names)) == len(names)
    assert names[:3] == ["study", "profile", "overrides"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_short_without_outputs_and_begins_with_its_question(path):
    content, code = json.loads(path.read_text()), [source(cell) for cell in cells(path)]
    assert content["cells"][0]["cell_type"] == "markdown"
    assert source(content["cells"][0]).startswith("# ")
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path))
    lines = "\n".join(code).splitlines()
    assert len([line for line in lines if line.strip() and not line.strip().startswith("#")]) < 60
    for node in ast.walk(ast.parse("\n".join(code))):
        assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/", "./", "../", "~", "runs/", "reports/")), node.value


# README


README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
}
BARE = {"haste latents", "haste score", "haste study"}  # named in a sentence, not to be typed


def commands(text):
    """The commands of haste in a page: in sentences, and on lines of their own."""
    return {*re.findall(r"`(haste [a-z][^`]*)`", text), *re.findall(r"^(haste [a-z-]+ .*)$", text, re.M)} - BARE


def block_below(page, heading, language="python"):
    """The first block of code in a language below a heading of a page."""
    return re.search(rf"^## {heading}\n.*?^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)[1]


def test_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 200
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in README] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page):
    places = re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page])
    assert [place for place in places if not ((ROOT / page).parent / place).exists()] == []


def test_readmes_block_for_ones_own_trainer_trains(tmp_path):
    block = block_below("README.md", "In your own trainer")
    tiny = 'Teacher("vit_tiny_patch16_224", weights="random", img_size=8, patch_size=2, embed_dim=24, num_heads=3)'
    block = block.replace('Teacher("vit_base_patch14_dinov2.lvd142m", img_size=224)', tiny).replace(
        "width=1152", "width=24"
    )
    model = SiT(image_size=8, channels=4, classes=10, depth=9, width=24, heads=3, patch=2)
    before = [p.clone() for p in model.parameters()]
    loader = [(torch.rand(2, 3, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([1, 2]))] * 2
    names = {"model": model, "loader": loader}
    exec(block, names)  # noqa: S102
    assert names["loss"].isfinite()
    assert names["haste"].phase == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_block_on_released_checkpoints_does_what_it_says(tmp_path, monkeypatch, randomise):
    # Norms of q and k tell how many heads a narrow model has; a published size tells it by its width.
    sizes = {"image_size": 32, "channels": 4, "classes": 1000, "depth": 9, "width": 32, "heads": 2, "patch": 2}
    model = randomise(SiT(**sizes, qk_norm=True)).eval()
    projectors = {f"projectors.0.{n}": v for n, v in projector(32, 16, 8, seed=0).state_dict().items()}
    weights = model.state_dict() | projectors
    torch.save({"model": weights, "ema": weights, "opt": {}, "steps": 400_000}, tmp_path / "0400000.pt")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block_below("docs/models-and-teachers.md", "Load a released checkpoint and look inside it"), names)  # noqa: S102
    seen, expected = names["seen"], model(names["x"], names["t"], names["y"])
    assert len(names["projectors"]) == 1
    assert torch.equal(seen.output, expected)
    assert {depth: tokens.shape for depth, tokens in seen.tokens.items()} == {8: (1, 256, 32)}
    assert {block: (q.shape, k.shape) for block, (q, k) in seen.qk.items()} == {
        block: ((1, 2, 256, 16),) * 2 for block in (4, 5, 6, 7)
    }


def test_readmes_block_for_notebooks_names_what_exists():
    block = ast.parse(block_below("README.md", "From a notebook"))
    names = {}
    exec("\n".join(ast.unparse(node) for node in block.body if isinstance(node, ast.ImportFrom)), names)  # noqa: S102
    (load,) = (n for n in ast.walk(block) if isinstance(n, ast.Call) and dotted(n.func) == "config.load")
    study = config.load(*map(ast.literal_eval, load.args), **{k.arg: ast.literal_eval(k.value) for k in load.keywords})
    calls = {dotted(n.func): n for n in ast.walk(block) if isinstance(n, ast.Call)}
    for name in ("Run", "fit", "generator_at"):
        call = calls[name]
        inspect.signature(names[name]).bind(*call.args, **{k.arg: k.value for k in call.keywords})
    # The step whose generator is asked for is one that stays.
    assert ast.literal_eval(calls["generator_at"].args[1]) in study.run("haste").train.kept_steps


def test_the_page_on_clusters_names_the_settings_of_profiles():
    page = PAGES["docs/paper-scale-and-clusters.md"]
    for name in ("slurm", "kubernetes"):
        settings = yaml.safe_load((ROOT / "workflow" / name / "config.yaml").read_text())
        named = {"executor", "jobs", "retries", "latency-wait", "default-resources"}
        assert named <= set(settings)
        assert [key for key in named if f"`{key}`" not in page] == []


@pytest.mark.parametrize("command", sorted(set().union(*map(commands, PAGES.values()))))
def test_a_command_of_a_page_is_understood(command):
    arguments, _ = parser().parse_known_args(shlex.split(command, comments=True)[1:])
    if getattr(arguments, "study", None) in config.studies():
        study = study_of(arguments)
        assert getattr(arguments, "arm", None) in (None, *study.arms)


@pytest.mark.parametrize(
    "options", sorted({o for page in PAGES.values() for o in re.findall(r"`(--set [^`]+)`", page)})
)
def test_settings_of_pages_are_known(options):
    words = shlex.split(options)
    assert words[::2] == ["--set"] * (len(words) // 2)
    config.load("digits", overrides=words[1::2])


def test_folders_in_readmes_map_exist():
    block = re.findall(r"^```\n(.*?)^```", README[README.index("## Further") :], re.M | re.S)[-1]
    named = [name for line in block.splitlines() for name in re.split(r"\s{2,}", line)[0].split(", ")]
    assert len(named) > 10
    assert [name for name in named if name != "runs/" and not (ROOT / name).exists()] == []
