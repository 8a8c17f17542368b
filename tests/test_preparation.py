"""Teacher and extractor are made once, however many runs ask for them."""

from __future__ import annotations

import threading
import time

import pytest

from haste_core.errors import HasteError
from haste_core.files import locked
from haste_core.study import classifier, preparation, runs


@pytest.mark.parametrize(
    ("prepare", "where"),
    [
        (preparation.prepare_teacher, lambda study: runs.teacher_path(study, study.teacher)),
        (preparation.prepare_extractor, runs.extractor_path),
        (preparation.prepare_autoencoder, runs.autoencoder_path),
    ],
    ids=["teacher", "extractor", "autoencoder"],
)
def test_runs_that_begin_together_wait_for_what_one_makes_and_read_it(make_study, output, prepare, where):
    study = make_study("teacher.weights=pretrain", "teacher.fitting.steps=5", "teacher.fitting.min_accuracy=0")
    path, held, released = where(study), threading.Event(), []

    def another():
        with locked(path.parent / "run.lock", "what another makes"):
            held.set()
            time.sleep(0.7)
            released.append(path.is_file())

    thread = threading.Thread(target=another)
    thread.start()
    assert held.wait(10)
    made = prepare(study)
    thread.join()
    assert released == [False]  # nothing was written while another had the lock
    written = path.stat().st_mtime_ns
    with locked(path.parent / "run.lock", "what another reads"):
        assert prepare(study) == made
    assert path.stat().st_mtime_ns == written


def test_the_autoencoder_is_loaded_as_it_was_trained_and_its_facts_are_written(make_study, output):
    study = make_study("evaluate.autoencoder.seed=7")
    facts = preparation.write_facts(study, output / "facts.json")
    network, fingerprint = preparation.load_autoencoder(study)
    assert isinstance(network, classifier.Autoencoder)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    found = facts["autoencoder"]
    assert (found["kind"], found["fingerprint"], found["attempts"]) == ("Autoencoder", fingerprint, 1)
    assert {"train_explained", "validation_explained", "test_explained"} <= set(found)
    assert {"train_accuracy", "validation_accuracy", "test_accuracy"} <= set(facts["extractor"])
    data = preparation.fitting_data(study, study.evaluate.autoencoder)
    assert classifier.explained(network, data, "test", seed=7) == found["test_explained"]


def test_another_suite_needs_no_extractor(make_study, output):
    facts = preparation.write_facts(make_study("evaluate.suite=adm"), output / "facts.json")
    assert facts["extractor"] is facts["autoencoder"] is None


def test_a_refused_network_is_trained_again_from_the_next_seed(make_study, output, monkeypatch):
    fit, seeds = classifier.fit_classifier, []

    def second_is_good(network, dataset, fitting, what, partial):
        seeds.append(fitting.seed)
        if len(seeds) == 1:
            raise HasteError("not good enough")
        return fit(network, dataset, fitting, what, partial)

    monkeypatch.setattr(classifier, "fit_classifier", second_is_good)
    facts = preparation.prepare_extractor(make_study("evaluate.extractor.attempts=2", "evaluate.extractor.seed=5"))
    assert seeds == [5, 6]
    assert facts["attempts"] == 2
    seeds.clear()
    once = make_study("evaluate.extractor.attempts=1", "evaluate.extractor.seed=8")
    with pytest.raises(HasteError, match="not good enough"):
        preparation.prepare_extractor(once)
