"""Fitting small networks: they learn, resume to the bit, save on a signal, and size themselves to the images."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from haste_core.errors import HasteError, Interrupted
from haste_core.study import classifier, config
from haste_core.study.data import open_dataset

FITTING = config.Fitting(steps=12, batch_size=32, min_accuracy=0, seed=3)


@pytest.fixture(scope="module")
def digits():
    return open_dataset(config.Data())


def network(seed=0):
    torch.manual_seed(seed)
    return classifier.SmallCNN(10, 8)


def autoencoder(seed=0):
    torch.manual_seed(seed)
    return classifier.Autoencoder(16)


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


@pytest.mark.parametrize("kind", ["classifier", "autoencoder"])
def test_stopping_at_a_signal_and_going_on_equals_never_having_stopped(digits, tmp_path, kind):
    make, fit = {
        "classifier": (network, classifier.fit_classifier),
        "autoencoder": (autoencoder, classifier.fit_autoencoder),
    }[kind]
    whole, stopped, partial = make(), make(), tmp_path / "partial.safetensors"
    expected = fit(whole, digits, FITTING, "network")
    with pytest.raises(Interrupted, match="step 5 of 12"):
        fit(stopped, StopsAfter(digits, 5), FITTING, "network", partial)
    assert partial.is_file()
    again = make(seed=1)  # other weights: everything has to come from the file
    assert fit(again, digits, FITTING, "network", partial) == expected
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
    found = classifier.fit_classifier(network(), digits, fitting, "digits")
    assert list(found) == ["train_accuracy", "validation_accuracy", "test_accuracy"]
    assert all(value > 0.8 for value in found.values())
    with pytest.raises(HasteError, match=r"digits: validation accuracy 0\.\d+ is below the required 1\.0"):
        classifier.fit_classifier(network(), digits, config.Fitting(steps=1, min_accuracy=1.0), "digits")


class NoTest:
    """The data set without a readable test split."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def images(self, split, count=None):
        assert split != "test", "the test split was read"
        return self.dataset.images(split, count)


@pytest.mark.parametrize(
    ("make", "fit"),
    [(network, classifier.fit_classifier), (autoencoder, classifier.fit_autoencoder)],
    ids=["classifier", "autoencoder"],
)
def test_acceptance_is_decided_without_test_images(digits, make, fit):
    with pytest.raises(HasteError, match="below the required"):
        fit(make(), NoTest(digits), config.Fitting(steps=1, min_accuracy=1.0), "network")
    with pytest.raises(AssertionError, match="the test split was read"):
        fit(make(), NoTest(digits), FITTING, "network")  # accepted, so test images are measured


def test_the_autoencoder_explains_held_out_images_by_features_of_unit_variance(digits):
    made, fitting = autoencoder(), config.Fitting(steps=200, batch_size=64, min_accuracy=0.3, seed=5)
    found = classifier.fit_autoencoder(made, digits, fitting, "autoencoder")
    assert list(found) == ["train_explained", "validation_explained", "test_explained"]
    assert all(0.3 < value < 1 for value in found.values())
    with torch.no_grad():
        features = made.features(digits.images("train")[0])
    assert features.shape == (len(digits), 16)
    assert 0.7 < float(features.std(0).min()) <= float(features.std(0).max()) < 1.3
    assert float(features.mean(0).abs().max()) < 0.3


def test_an_autoencoder_that_explains_too_little_is_refused(digits):
    with pytest.raises(HasteError, match=r"explained validation variance -?\d+\.\d+ is below the required 0\.9"):
        classifier.fit_autoencoder(autoencoder(), digits, config.Fitting(steps=1, min_accuracy=0.9), "autoencoder")


def test_the_explained_share_against_closed_forms(digits):
    x = digits.images("test")[0]
    mean = classifier.explained(lambda noised: x.mean(0).expand_as(noised), digits, "test", 0)
    assert mean == pytest.approx(0, abs=1e-6)
    assert classifier.explained(torch.ones_like, digits, "test", 0) == 0
    spread = float(x.var(0, unbiased=False).mean())
    share = classifier.explained(lambda noised: noised, digits, "test", 0)
    assert share == pytest.approx(1 - classifier.NOISE**2 / spread, abs=0.03)
    assert share == classifier.explained(lambda noised: noised, digits, "test", 0)


def test_the_autoencoder_sees_no_labels(digits):
    class Unlabelled(StopsAfter):
        def batch(self, *given):
            batch = self.dataset.batch(*given)
            return batch._replace(y=torch.zeros_like(batch.y))

    one, other = autoencoder(), autoencoder()
    classifier.fit_autoencoder(one, digits, FITTING, "autoencoder")
    classifier.fit_autoencoder(other, Unlabelled(digits, 0), FITTING, "autoencoder")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, 32), (3, 64)])
def test_the_network_fits_the_images(channels, size):
    made = classifier.SmallCNN(7, 5, channels, size).eval()
    x = torch.zeros(2, channels, size, size)
    assert made.features(x).shape == (2, 5)
    assert made(x).shape == (2, 7)
    assert classifier.Autoencoder(5, channels, size).eval()(x).shape == x.shape


def test_an_odd_size_is_an_error():
    with pytest.raises(HasteError, match="multiple of 4"):
        classifier.SmallCNN(7, 5, 3, 30)
