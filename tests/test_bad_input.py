"""User errors end in one line that says what was given and what was expected, and lose nothing."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from haste_core.study import config
from haste_core.study.cli import main
from haste_core.study.runs import Run

# Of /proc, where nobody can write.
NO_PLACE = "No such file or directory" if os.geteuid() == 0 else "Permission denied"

ROOT = Path(__file__).parents[1]
HASTE = str(Path(sys.executable).with_name("haste"))

STEPS = ["--set", "train.steps=8"]
STUDIES = "expected one of: captions, cifar10, coco256, digits, imagenet256, imagenet512, mnist, textured"


def lines(text):
    """The output, without blank lines and progress bars."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and not re.search(r"\d+%\|.*\|", line)]


def refused(capture, *argv):
    """The one line on stderr that a command ends with; its status is 2."""
    capture.readouterr()
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    said = capture.readouterr()
    assert status == 2, said
    assert said.out == ""
    (line,) = lines(said.err)
    assert re.match(r"haste( \w+)?: error: ", line)
    return line


def check(line, *words):
    missing = [word for word in words if word not in line]
    assert not missing, line


def files(folder):
    """Every file below `folder` with its bytes, apart from locks."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def assert_kept(before, folder):
    """Everything that was there is there still, with the same bytes."""
    after = files(folder)
    changed = [str(name) for name in before if after.get(name) != before[name]]
    assert not changed


@pytest.fixture(scope="module")
def settings(tiny_overrides):
    return [word for override in tiny_overrides for word in ("--set", override)]


@pytest.fixture(scope="module")
def finished(new_output, settings):
    """An output folder with a run of haste, trained to step 8 and scored."""
    with new_output() as place:
        for command in ("train", "evaluate"):
            assert main([command, "digits", "haste", *settings, *STEPS]) == 0
    return place


@pytest.fixture
def place(finished, output, monkeypatch):
    """The test's own copy of that folder, where HASTE_OUTPUT points to."""
    copy = output / "out"
    shutil.copytree(finished, copy)
    monkeypatch.setenv("HASTE_OUTPUT", str(copy))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return copy


@pytest.fixture
def run(place, tiny):
    return Run(tiny, "haste", 0)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "arm", "more", "words"),
    [
        ("digitz", "haste", [], ["unknown study 'digitz'", "did you mean 'digits'", STUDIES, ".yaml"]),
        ("digits", "hast", [], ["unknown arm 'hast'", "did you mean 'haste'", "vanilla, repa, atta, holistic, haste"]),
        ("digits", "haste", ["--profile", "smoky"], ["unknown profile", "'smoky'", "did you mean 'smoke'"]),
        ("digits", "haste", ["--seed", "-1"], ["seed -1", "0 and above"]),
        ("digits", "haste", ["--set", "arms.hast.train.steps=3"], ["unknown arm 'hast'", "haste"]),
        ("digits", "haste", ["--set", "train.steps=0"], ["train.steps", "greater than 0", "given 0"]),
        ("digits", "haste", ["--set", "train.precision=fp8"], ["train.precision", "'no', 'fp16' or 'bf16'", "'fp8'"]),
        ("digits", "haste", ["--set", "seeds=[0, -3]"], ["seeds.1", "greater than or equal to 0", "-3"]),
        ("digits", "haste", ["--set", "train.steps"], ["'train.steps'", "key=value", "train.steps=200"]),
        ("digits", "haste", ["--set", "train.keep=[4"], ["'train.keep=[4'", "not valid YAML"]),
    ],
)
def test_an_unknown_name_or_value_is_refused_naming_the_known_ones(output, capsys, study, arm, more, words):
    check(refused(capsys, "train", study, arm, *more), *words)
    assert files(output) == {}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["alignment.depth=9"], ["alignment.depth 9", "3 blocks", "counted from 1"]),
        (["alignment.layer_pairs=[[1, 9]]"], ["teacher block", "'9'", "0, 1, 2, 3"]),
        (["alignment.layer_pairs=[[1, -1]]"], ["alignment.layer_pairs", "-1"]),
        (["alignment.heads=[]"], ["heads []; expected at least one head"]),
        (["teacher.kwargs.num_heads=2", "alignment.heads=[0, 3]"], ["head 3", "expected 0 to 1", "teacher 2"]),
        (["model.patch=3"], ["model.patch is 3", "side 8"]),
        (["teacher.model=vit_tinny"], ["'vit_tinny'", "timm.list_models()"]),
        (["teacher.weights=/no/such.safetensors"], ["'/no/such.safetensors'", "hub, pretrain, random"]),
        (["teacher.kwargs.depht=3"], ["depht", "teacher", "expected teacher.kwargs that timm"]),
        (["teacher.kwargs.num_heads=5"], ["divisible", "expected teacher.kwargs that timm"]),
        (["teacher.kwargs.depth=100000"], ["teacher.kwargs.depth is 100000", "from 1 to 1,000"]),
        (["teacher.mean=[0.5, 0.5, 0.5]"], ["channel"]),
        (["train.batch_size=5000"], ["train.batch_size 5000", "training images"]),
        (["train.lr=1e12"], ["the loss is", "step", "train.lr", "no checkpoint before it"]),
    ],
)
def test_what_does_not_fit_together_is_refused_and_leaves_no_checkpoint(place, capsys, settings, overrides, words):
    before = files(place)
    more = [word for override in overrides for word in ("--set", override)]
    check(refused(capsys, "train", "digits", "haste", *settings, *more), *words)
    assert_kept(before, place)
    assert len(list(place.rglob("*.safetensors"))) == sum(name.suffix == ".safetensors" for name in before)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["COMMAND", "required", "haste --help"]),
        (["trian"], ["'trian'", "train", "evaluate", "notebook"]),
        (["train", "digits"], ["arm", "required", "haste train --help"]),
        (["train", "digits", "haste", "--seed", "one"], ["--seed", "int", "'one'"]),
        (["train", "digits", "haste", "--nonsense"], ["--nonsense"]),
        (["cost", "digits", "--rounds", "0"], ["--rounds 0; expected 1 and above"]),
    ],
)
def test_a_bad_command_line_is_one_line(output, capsys, argv, words):
    check(refused(capsys, *argv), *words)
    assert files(output) == {}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--out", "images.jpg"], ["images.jpg", ".png or .npz"]),
        (["--n", "0"], ["--n 0", "1 and above"]),
        (["--step", "5"], ["step_00000005", "expected one of: step_00000004.safetensors, step_00000008.safetensors"]),
        (["--first-seed", "-1"], ["-1", "0 and above"]),
    ],
)
def test_a_bad_wish_for_samples_is_refused(place, tmp_path, monkeypatch, capsys, settings, more, words):
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    check(refused(capsys, "sample", "digits", "haste", *settings, *more), *words)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("below", "said"),
    [
        ("file", "which is no folder"),
        ("file/sub", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("/proc/1/x", NO_PLACE),
    ],
)
def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch, capsys, settings, below, said):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("HASTE_OUTPUT", str(tmp_path / below))
    check(refused(capsys, "train", "digits", "vanilla", *settings), said, "expected", "HASTE_OUTPUT")
    check(refused(capsys, "study", "digits", *settings, "--dry-run"), said, "expected", "HASTE_OUTPUT")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_named_as_it_was_given(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place, said in (
        ("/proc/x.safetensors", NO_PLACE),
        (f"/proc/{'x' * 240}.safetensors", NO_PLACE),
        (f"{tmp_path}/{'x' * 240}.safetensors", "File name too long"),
        (f"{tmp_path}/file/x.safetensors", "File exists"),
    ):
        line = refused(capsys, "convert", str(run.checkpoint_path(8)), place)
        assert line.endswith(f"{said}; expected a place that can be written"), line
        assert ".tmp" not in line


def study_text(**changes):
    content = yaml.safe_load((config.STUDIES / "digits.yaml").read_text())
    return yaml.safe_dump(content | {"name": "mine"} | changes).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: [digits", ["mine.yaml", "not valid YAML"]),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", ["mine.yaml", "not valid YAML"]),
        (b"- digits\n", ["mine.yaml", "list", "mapping"]),
        (b"", ["mine.yaml", "mapping"]),
        (b"name: mine\narms: {haste: {}}\n", ["'mine'", "data", "required"]),
        (study_text(arms={"haste": {"alignmet": {}}}), ["'haste'", "'alignmet'", "did you mean 'alignment'"]),
        (study_text(arms={"haste": {"alignment": {"dept": 2}}}), ["'haste'", "dept", "depth"]),
        (study_text(arms={"haste": 3}), ["arms.haste", "dictionary", "3"]),
        (study_text(arms=None), ["arms"]),
        (study_text(profiles={"smoke": 3}), ["profiles"]),
        (study_text(trian={}), ["'trian'", "did you mean 'train'"]),
        (study_text(name="../elsewhere"), ["name", "../elsewhere"]),
        (study_text(seeds=[]), ["seeds", "at least 1"]),
    ],
)
def test_a_bad_study_file_is_refused(output, capsys, content, words):
    (output / "mine.yaml").write_bytes(content)
    check(refused(capsys, "train", str(output / "mine.yaml"), "haste", "--set", "arms.haste.termination.at=3"), *words)
    assert list(files(output)) == [Path("mine.yaml")]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_an_untrained_run_is_refused_with_the_command_that_trains_it(place, capsys):
    before = files(place)
    more = ["--profile", "smoke", "--set", "train.steps=2"]
    line = refused(capsys, "evaluate", "digits", "vanilla", *more)
    check(line.split("; run haste ")[1], "train digits vanilla --seed 0", *more)
    check(refused(capsys, "sample", "digits", "vanilla", *more), "no checkpoint", "vanilla", "train")
    assert_kept(before, place)
    assert not list(place.glob("runs/digits/vanilla-*"))


@pytest.mark.parametrize(
    ("command", "kind", "keep"),
    [("train", "haste-*/seed0/checkpoints/step_00000008", 0.5),
     ("evaluate", "haste-*/seed0/checkpoints/step_00000008", 0.999), ("evaluate", "extractor-*/extractor", 0.5)],
)  # fmt: skip
def test_a_truncated_file_of_weights_is_refused_by_name(place, capsys, settings, command, kind, keep):
    (path,) = place.glob(f"runs/digits/{kind}.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    before = files(place)
    more = STEPS if command == "evaluate" else []
    check(refused(capsys, command, "digits", "haste", *settings, *more), str(path), "truncated or damaged", "delete it")
    notes = ("provenance.json", "config.yaml")  # they follow what was asked for last
    assert_kept({name: content for name, content in before.items() if name.name not in notes}, place)


# -- two processes ----------------------------------------------------------------------------------------------------

HOLDER = (
    "import fcntl, os, sys\n"
    "stream = open(sys.argv[1], 'a+')\n"
    "fcntl.flock(stream, fcntl.LOCK_EX)\n"
    "stream.truncate(0)\n"
    "stream.write(str(os.getpid()))\n"
    "stream.flush()\n"
    "print('held', flush=True)\n"
    "sys.stdin.read()\n"
)


@pytest.mark.parametrize(
    ("lock", "what", "command"),
    [
        ("run.lock", "run haste seed 0", ["train", "digits", "haste"]),
        ("evaluation.lock", "the evaluation of haste seed 0", ["evaluate", "digits", "haste", *STEPS]),
        ("study.lock", "study digits", ["study", "digits"]),
    ],
)
def test_a_second_process_is_refused_naming_the_first(run, place, capfd, settings, lock, what, command):
    path = (place / "runs" / "digits" if lock == "study.lock" else run.dir) / lock
    before = files(place)
    argv = [*command[:3], *settings, *command[3:]]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout.readline() == "held\n"
            line = refused(capfd, *argv)
            check(line, what, f"in use by process {child.pid}", str(path), "wait for it, or stop it")
        finally:
            child.stdin.close()
            child.wait(timeout=20)
    assert files(place) == before


def test_the_lock_of_a_process_that_died_does_not_count(run, place, settings):
    (run.dir / "run.lock").write_text("1")
    assert main(["train", "digits", "haste", *settings]) == 0
    assert run.missing_steps() == []


# -- no room ----------------------------------------------------------------------------------------------------------


def haste(*argv, **options):
    return subprocess.run([HASTE, *argv], capture_output=True, text=True, cwd=ROOT, timeout=200, **options)


def assert_no_room(done):
    assert done.returncode == 2, done.stderr
    (line,) = lines(done.stderr)
    check(line, "haste: error: no room", "free some space")


def finishes(run, settings):
    assert main(["train", "digits", "haste", *settings]) == 0
    return run.steps() == [4, 8, 12] and [line["step"] for line in run.metrics()] == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_a_checkpoint_over_the_file_size_limit_is_refused_and_a_later_call_finishes(run, place, settings):
    limit = run.checkpoint_path(8).stat().st_size // 2
    before = files(run.dir / "checkpoints")
    done = haste(
        "train", "digits", "haste", *settings,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert_no_room(done)
    assert files(run.dir / "checkpoints") == before
    assert finishes(run, settings)
    assert_kept(before, run.dir / "checkpoints")


@pytest.fixture
def small_disk(finished, output, monkeypatch):
    """A function that leaves so many bytes of room on the disk of the finished folder, to which HASTE_OUTPUT points."""
    disk = output / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")

    def resize(room):
        usage = os.statvfs(disk)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        size = used + room
        subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True, capture_output=True)

    try:
        shutil.copytree(finished, disk / "out")
        monkeypatch.setenv("HASTE_OUTPUT", str(disk / "out"))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_with_less_room_than_a_checkpoint_is_refused_and_a_later_call_finishes(small_disk, tiny, settings):
    run = Run(tiny, "haste", 0)
    before = files(run.dir / "checkpoints")
    assert run.checkpoint_path(8).stat().st_size > 100_000
    small_disk(40_960)
    assert_no_room(haste("train", "digits", "haste", *settings))
    assert files(run.dir / "checkpoints") == before
    small_disk(2**25)
    assert finishes(run, settings)
    assert_kept(before, run.dir / "checkpoints")


@pytest.mark.slow
def test_a_full_disk_for_samples_is_refused(small_disk, output, capsys, settings):
    small_disk(0)
    path = output / "disk" / "images.npz"
    line = refused(capsys, "sample", "digits", "haste", *settings, *STEPS, "--out", str(path))
    check(line, "no room", str(path))
    assert not path.exists()
    assert not list(path.parent.glob(".images*"))


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_a_full_disk_for_a_converted_checkpoint_is_refused(small_disk, tiny, output, capsys, name):
    small_disk(40_960)
    path = output / "disk" / name
    check(refused(capsys, "convert", str(Run(tiny, "haste", 0).checkpoint_path(8)), str(path)), "no room", str(path))
    assert not path.exists()
    assert not list(path.parent.glob(".out*"))


# -- notebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["01_trian"], ["unknown notebook '01_trian'", "did you mean '01_train'", "00_data_and_teacher", "10_report"]),
        (
            ["01_train", "-p", "amr=haste"],
            [
                "notebook 01_train: unknown parameter 'amr'",
                "did you mean 'arm'",
                "study, profile, overrides, arm, seeds",
            ],
        ),
        (["01_train", "-p", "arm"], ["'arm'", "name=value"]),
        (["01_train", "-p", "overrides=[a"], ["overrides=[a", "YAML"]),
    ],
)
def test_a_bad_notebook_or_parameter_is_refused_before_it_runs(output, capfd, argv, words):
    name, *rest = argv
    check(refused(capfd, "notebook", name, str(output / "out.ipynb"), *rest), *words)
    assert files(output) == {}


def mine(
    folder,
    first="overrides = ['train.steps=2']  # text with an equals sign\nx = 1\n",
    tags=("parameters",),
    language="python",
    kind=nbformat.v4.new_code_cell,
):
    cells = [kind(first, metadata={"tags": list(tags)}), nbformat.v4.new_code_cell("x, overrides")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "some", "language": language}} if language else {}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "mine.ipynb")
    return str(folder / "mine.ipynb")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tags": ()}, "has no cell tagged `parameters`; expected that tag on the code cell"),
        ({"kind": nbformat.v4.new_markdown_cell}, "has the tag `parameters` on a markdown cell; expected"),
        ({"language": "julia"}, "has a kernel of language 'julia'; expected Python"),
        ({"first": "x = ("}, "the cell tagged `parameters` is not valid Python"),
    ],
)
def test_a_notebook_that_cannot_take_parameters_is_refused(output, capfd, changes, said):
    check(refused(capfd, "notebook", mine(output, **changes), str(output / "out.ipynb")), said)


def test_an_old_or_foreign_notebook_is_refused(output, capfd):
    for text, said in (
        ('{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}', "a notebook of format 3"),
        ("hello", "cannot be read as a notebook"), ("{}", "cannot be read as a notebook"),
    ):  # fmt: skip
        (output / "mine.ipynb").write_text(text)
        check(refused(capfd, "notebook", str(output / "mine.ipynb"), str(output / "out.ipynb")), said)


def test_a_notebook_does_not_go_where_it_cannot(output, capfd):
    source = mine(output)
    before = Path(source).read_bytes()
    check(refused(capfd, "notebook", source, source), "mine.ipynb is the notebook itself; expected another name")
    check(refused(capfd, "notebook", source, str(output)), "Is a directory; expected a place that can be written")
    for place in ("/proc/x.ipynb", "/proc/no/x.ipynb"):
        check(refused(capfd, "notebook", source, place), f"{NO_PLACE}; expected a place")
    assert Path(source).read_bytes() == before


def test_a_notebook_without_parameters_says_so(output, capfd):
    source = mine(output, first="# nothing\n")
    said = "notebook mine: unknown parameter 'x'; expected none, since none are defined"
    check(refused(capfd, "notebook", source, str(output / "out.ipynb"), "-p", "x=1"), said)


@pytest.mark.parametrize(
    ("changes", "given", "shown"),
    [
        # Equals signs, magic and no kernel are taken without a word.
        ({"first": "%matplotlib inline\noverrides = ['train.steps=2']\nx = 1\n", "language": None},
         ["overrides=[a=b]"], "(1, ['a=b'])"),
        ({}, ["x=1e3", "overrides=[a=b]"], "(1000.0, ['a=b'])"),
        ({}, ["x=2024-01-31"], "('2024-01-31', ['train.steps=2'])"),
    ],
)  # fmt: skip
def test_parameters_are_read_as_settings_are(output, capfd, changes, given, shown):
    options = [word for pair in given for word in ("-p", pair)]
    assert main(["notebook", mine(output, **changes), str(output / "out.ipynb"), *options]) == 0
    (found,) = nbformat.read(output / "out.ipynb", as_version=4).cells[-1].outputs
    assert found["data"]["text/plain"] == shown
    said = capfd.readouterr().err
    assert "Unable to parse" not in said
    assert "unknown parameter" not in said


def test_a_parameter_that_json_cannot_hold_is_refused(output, capfd):
    check(refused(capfd, "notebook", mine(output), str(output / "out.ipynb"), "-p", "x=.nan"), "parameter x=nan")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from haste_core.study import config\nconfig.load('digitz')", "mine: unknown study 'digitz'"),
        ("raise ValueError('one\\ntwo')", "mine: ValueError: one two"),
    ],
)
def test_an_error_in_a_cell_is_passed_on_in_one_line(output, capfd, source, said):
    cells = [nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(source)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), output / "mine.ipynb")
    check(refused(capfd, "notebook", str(output / "mine.ipynb"), str(output / "out.ipynb")), said)
    executed = nbformat.read(output / "out.ipynb", as_version=4).cells
    assert [o["output_type"] for cell in executed for o in cell.get("outputs", [])] == ["error"]
