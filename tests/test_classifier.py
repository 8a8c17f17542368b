"""Fitting a classifier: it learns, resumes to the bit, saves on a signal, and sizes itself to the images."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from haste_core import classifier, config
from haste_core.data import open_dataset
from haste_core.errors import HasteError, Interrupted

FITTING = config.Fitting(steps=12, batch_size=32, min_accuracy=0, seed=3)


@pytest.fixture(scope="module")
def digits():
    return open_dataset(config.Data())


def network():
    torch.manual_seed(0)
    return classifier.SmallCNN(10, 8)


class StopsAfter:
    """The data set, sending this process a signal when batch number `batches` is asked for."""

    def __init__(self, dataset, batches):
        self.dataset, self.left = dataset, batches

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices, generator, with_images=True, part=slice(None)):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.dataset.batch(indices, generator)


def test_stopping_at_a_signal_and_going_on_equals_never_having_stopped(digits, tmp_path):
    whole, stopped, partial = network(), network(), tmp_path / "partial.safetensors"
    expected = classifier.fit_classifier(whole, digits, FITTING, "whole")
    with pytest.raises(Interrupted, match="step 5 of 12"):
        classifier.fit_classifier(stopped, StopsAfter(digits, 5), FITTING, "stopped", partial)
    assert partial.is_file()
    again = classifier.SmallCNN(10, 8)  # other weights: everything has to come from the file
    assert classifier.fit_classifier(again, digits, FITTING, "again", partial) == expected
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    assert not partial.exists()


def test_state_is_kept_on_the_way(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "SAVE_EVERY", 4)
    partial, kept = tmp_path / "partial.safetensors", []
    keep = classifier._keep
    monkeypatch.setattr(classifier, "_keep", lambda path, step, *rest: (kept.append(step), keep(path, step, *rest)))
    classifier.fit_classifier(network(), digits, FITTING, "kept", partial)
    assert kept == [4, 8, 12]


def test_it_learns_and_says_when_it_did_not(digits):
    fitting = config.Fitting(steps=150, batch_size=64, lr=3e-3, min_accuracy=0.5)
    assert classifier.fit_classifier(network(), digits, fitting, "digits")["test_accuracy"] > 0.8
    with pytest.raises(HasteError, match="below the required"):
        classifier.fit_classifier(network(), digits, config.Fitting(steps=1, min_accuracy=1.0), "digits")


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, 32), (3, 64)])
def test_the_network_fits_the_images(channels, size):
    made = classifier.SmallCNN(7, 5, channels, size).eval()
    x = torch.zeros(2, channels, size, size)
    assert made.features(x).shape == (2, 5)
    assert made(x).shape == (2, 7)


def test_an_odd_size_is_an_error():
    with pytest.raises(HasteError, match="multiple of 4"):
        classifier.SmallCNN(7, 5, 3, 30)
