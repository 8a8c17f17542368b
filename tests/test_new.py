"""`haste new`: what it writes for which images, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from haste_core.study import config, new
from haste_core.study.cli import main


def folder(root, classes=3, each=10, sizes=((20, 20),), mode="RGB"):
    draw = np.random.default_rng(0)
    for c in range(classes):
        (root / f"kind {c}").mkdir(parents=True)
        for i in range(each):
            width, height = sizes[i % len(sizes)]
            pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / f"kind {c}" / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("sizes", "mode", "side", "patch"),
    [(((20, 20),), "RGB", 20, 2), (((300, 200), (90, 120)), "RGB", 32, 4), (((9, 9),), "L", 8, 2)],
)
def test_the_study_fits_the_images(tmp_path, output, capsys, sizes, mode, side, patch):
    path = tmp_path / "mine.yaml"
    assert main(["new", str(path), "--images", str(folder(tmp_path / "a b", sizes=sizes, mode=mode))]) == 0
    said = capsys.readouterr().out
    assert "30 images" in said
    assert said.splitlines()[-1].strip() == f"haste study {path}"
    study = config.load(path)
    assert (study.name, study.data.image_size, study.model.patch) == ("mine", side, patch)
    assert study.teacher.kwargs["img_size"] == side
    assert 0 < study.run("haste").tau < study.train.steps
    assert main(["study", str(path), "--dry-run"]) == 0
    assert "arm haste" in capsys.readouterr().out


def test_more_minutes_are_more_steps(tmp_path, output, monkeypatch):
    monkeypatch.setattr(new, "timed", lambda *_, **__: {"step": [0.04] * 10})  # whatever else this machine does
    images = str(folder(tmp_path / "images"))
    for minutes in ("1", "20"):
        assert main(["new", str(tmp_path / f"m{minutes}.yaml"), "--images", images, "--minutes", minutes]) == 0
    short, long = (config.load(tmp_path / f"m{minutes}.yaml").train.steps for minutes in (1, 20))
    assert (short, long) == (200, 5000)


@pytest.mark.parametrize(
    ("file", "classes", "more", "said"),
    [
        ("taken.yaml", 2, (), "expected a path that ends in .yaml and is free"),
        ("mine.txt", 2, (), "expected a path that ends in .yaml and is free"),
        ("mine.yaml", 1, (), "has one class, on which no teacher can be trained"),
        ("mine.yaml", 2, ("--minutes", "0"), "--minutes 0; expected more than 0"),
        ("digits.yaml", 2, (), "name 'digits' is that of the reports of digits, which comes with the package"),
    ],
)
def test_what_cannot_become_a_study_is_one_line_and_leaves_nothing(tmp_path, output, capsys, file, classes, more, said):
    (tmp_path / "taken.yaml").write_text("mine")
    before = sorted(tmp_path.iterdir())
    images = folder(tmp_path / "images", classes)
    assert main(["new", str(tmp_path / file), "--images", str(images), *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error
    assert sorted(p for p in tmp_path.iterdir() if p != images and p.suffix in (".yaml", ".txt")) == before
    assert (tmp_path / "taken.yaml").read_text() == "mine"
