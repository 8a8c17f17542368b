"""Networks trained in a study: they learn, resume to the bit, save on a signal, and are made once for all runs."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked
from haste_core.study import config, pretrain, runs
from haste_core.study.data import open_dataset

FITTING = config.FittingSettings(steps=12, batch_size=32, min_accuracy=0, seed=3)


@pytest.fixture(scope="module")
def digits():
    return open_dataset(config.DataSettings())


def network(seed=0):
    torch.manual_seed(seed)
    return pretrain.SmallCNN(10, 8)


def autoencoder(seed=0):
    torch.manual_seed(seed)
    return pretrain.Autoencoder(16)


both_kinds = pytest.mark.parametrize("make", [network, autoencoder])


class Wrapped:
    """The data set, with an action before batches and split images are given out."""

    def __init__(self, dataset, before_batch=lambda: None, before_images=lambda split: None):
        self.dataset, self.before_batch, self.before_images = dataset, before_batch, before_images

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def batch(self, *given, **more):
        self.before_batch()
        return self.dataset.batch(*given, **more)

    def images(self, split, count=None):
        self.before_images(split)
        return self.dataset.images(split, count)


def stops_at(dataset, number):
    """The data set, sending this process a signal when batch `number` is asked for."""
    batches = iter(range(1, number + 1))
    return Wrapped(dataset, lambda: next(batches) == number and os.kill(os.getpid(), signal.SIGTERM))


@both_kinds
def test_stopping_at_a_signal_and_resuming_equals_an_uninterrupted_fit(digits, tmp_path, make):
    whole, stopped, partial = make(), make(), tmp_path / "partial.safetensors"
    expected = pretrain.fit(whole, digits, FITTING, "extractor")
    with pytest.raises(Interrupted, match="step 5 of 12"):
        pretrain.fit(stopped, stops_at(digits, 5), FITTING, "extractor", partial)
    again = make(seed=1)  # other weights: everything has to come from the file
    assert pretrain.fit(again, digits, FITTING, "extractor", partial) == expected
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    assert not partial.exists()


@both_kinds
def test_acceptance_is_decided_without_test_images(digits, make):
    read = []
    dataset = Wrapped(digits, before_images=read.append)
    with pytest.raises(
        HasteError, match=r"extractor: validation_\w+ \d\.\d+ is below .* 1\.0; raise evaluate\.extractor\.steps"
    ):
        pretrain.fit(make(), dataset, config.FittingSettings(steps=1, min_accuracy=1.0), "extractor")
    assert "test" not in read
    pretrain.fit(make(), dataset, FITTING, "extractor")
    assert "test" in read


def test_a_classifier_learns(digits):
    fitting = config.FittingSettings(steps=60, batch_size=64, lr=1e-2, min_accuracy=0.5)
    found = pretrain.fit(network(), digits, fitting, "extractor")
    assert list(found) == ["train_accuracy", "validation_accuracy", "test_accuracy"]
    assert all(value > 0.8 for value in found.values())


def test_the_autoencoder_explains_held_out_images_by_features_of_unit_variance(digits):
    made, fitting = autoencoder(), config.FittingSettings(steps=60, batch_size=32, lr=1e-2, min_accuracy=0.2, seed=5)
    found = pretrain.fit(made, digits, fitting, "autoencoder")
    assert list(found) == ["train_explained", "validation_explained", "test_explained"]
    assert all(0.2 < value < 1 for value in found.values())
    with torch.no_grad():
        features = made.features(digits.images("train")[0])
    assert features.shape == (len(digits), 16)
    assert 0.7 < float(features.std(0).min()) <= float(features.std(0).max()) < 1.3
    assert float(features.mean(0).abs().max()) < 0.3


def test_the_autoencoder_sees_no_labels(digits):
    class Unlabelled(Wrapped):
        def batch(self, *given):
            batch = self.dataset.batch(*given)
            return batch._replace(y=torch.zeros_like(batch.y))

    one, other = autoencoder(), autoencoder()
    pretrain.fit(one, digits, FITTING, "autoencoder")
    pretrain.fit(other, Unlabelled(digits), FITTING, "autoencoder")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_explained_share_against_closed_forms(digits):
    x = digits.images("test")[0]
    mean = pretrain.explained(lambda noised: x.mean(0).expand_as(noised), digits, "test", 0)
    assert mean == pytest.approx(0, abs=1e-6)
    assert pretrain.explained(torch.ones_like, digits, "test", 0) == 0
    spread = float(x.var(0, unbiased=False).mean())
    share = pretrain.explained(lambda noised: noised, digits, "test", 0)
    assert share == pytest.approx(1 - pretrain.NOISE**2 / spread, abs=0.03)


def test_a_single_image_has_no_variance_to_explain(make_study):
    alone = open_dataset(make_study("data.test_fraction=0.0001").data)
    with pytest.raises(HasteError, match=r"the test split has 1 image, all equal; .* data\.test_fraction"):
        pretrain.explained(lambda noised: noised, alone, "test", 0)


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 8), (3, 32), (1, 6), (3, 12), (1, 14), (3, 16), (3, 20), (1, 28), (3, 30)]
)
def test_the_networks_fit_the_images(channels, size):
    made = pretrain.SmallCNN(7, 5, channels, size).eval()
    x = torch.zeros(2, channels, size, size)
    assert (made.features(x).shape, made(x).shape) == ((2, 5), (2, 7))
    assert pretrain.Autoencoder(5, channels, size).eval()(x).shape == x.shape


# The networks of a study


def test_processes_that_start_together_wait_for_one_network_and_read_it(make_study, output):
    study = make_study("teacher.weights=pretrain", "teacher.fitting.steps=5")
    path, held, released = runs.teacher_path(study, study.teacher), threading.Event(), []

    def another():
        with locked(path.parent / "run.lock", "another process"):
            held.set()
            time.sleep(0.7)
            released.append(path.is_file())

    thread = threading.Thread(target=another)
    thread.start()
    assert held.wait(10)
    made = pretrain.prepare_teacher(study)
    thread.join()
    assert released == [False]  # nothing was written while another had the lock
    written = path.stat().st_mtime_ns
    with locked(path.parent / "run.lock", "another process"):
        assert pretrain.prepare_teacher(study) == made
    assert path.stat().st_mtime_ns == written


def test_extractors_are_loaded_as_they_were_trained_and_their_facts_are_written(make_study, output):
    study = make_study("evaluate.autoencoder.seed=7")
    facts = pretrain.write_facts(study, output / "facts.json")
    network, name = pretrain.load_extractor(study, "autoencoder")
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    found, extractor = facts["autoencoder"], facts["extractor"]
    assert (found["kind"], f"autoencoder-{found['fingerprint']}", found["attempts"]) == ("Autoencoder", name, 1)
    assert (extractor["kind"], extractor["attempts"]) == ("SmallCNN", 1)
    data = pretrain.fitting_data(study, study.evaluate.autoencoder)
    assert pretrain.explained(network, data, "test", seed=7) == found["test_explained"]
    assert pretrain.prepare_extractors(make_study("evaluate.suite=adm")) == {"extractor": None, "autoencoder": None}


def test_a_refused_network_is_trained_again_from_the_next_seed(make_study, output, monkeypatch):
    seeds = []

    def second_is_good(network, dataset, fitting, what, partial):
        seeds.append(fitting.seed)
        if len(seeds) == 1:
            raise HasteError("not good enough")
        return {"test_accuracy": 1.0}

    monkeypatch.setattr(pretrain, "fit", second_is_good)
    study = make_study("evaluate.extractor.attempts=2", "evaluate.extractor.seed=5")
    assert pretrain.prepare_extractor(study, "extractor")["attempts"] == 2
    assert seeds == [5, 6]
    seeds.clear()
    once = make_study("evaluate.extractor.attempts=1", "evaluate.extractor.seed=8")
    with pytest.raises(HasteError, match="not good enough"):
        pretrain.prepare_extractor(once, "extractor")


def test_the_extractor_is_drawn_from_its_own_seed(tiny, make_study):
    data = open_dataset(tiny.data)

    def weights(study, global_seed):
        torch.manual_seed(global_seed)
        return torch.cat([p.flatten() for p in pretrain.build_extractor(study, "extractor", data).parameters()])

    assert torch.equal(weights(tiny, 0), weights(tiny, 1))
    assert not torch.equal(weights(tiny, 0), weights(make_study("evaluate.extractor.seed=5"), 0))
