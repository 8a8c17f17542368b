"""Seeds by role: fixed, in range, and no two of a study alike."""

from __future__ import annotations

from haste_core.seeding import stream
from haste_core.study import config
from haste_core.study.train import Seeds, seeds_of

NETWORKS = ("teacher", "extractor", "autoencoder")
PARTS = ("weights", "heads", "order", "noise", "train noise", "validation noise", "test noise")


def test_a_stream_is_a_fixed_number_that_torch_takes():
    assert stream("weights", 0) == int.from_bytes(bytes.fromhex("9c130089a7c4245d"), "big") % 2**63
    assert stream("weights", 1) == stream("weights", 1)
    assert all(0 <= stream("order", seed) < 2**63 for seed in range(1000))


def test_no_two_streams_of_a_study_coincide():
    study = config.load("digits")
    used = {(part, seed): number for seed in range(20) for part, number in seeds_of(seed)._asdict().items()}
    fittings = (study.teacher.fitting, study.evaluate.extractor, study.evaluate.autoencoder)
    for network, fitting in zip(NETWORKS, fittings, strict=True):
        for seed in range(fitting.seed, fitting.seed + fitting.attempts):
            used |= {(f"{network} {part}", seed): stream(f"{network} {part}", seed) for part in PARTS}
    used["validation split", study.data.split_seed] = stream("validation split", study.data.split_seed)
    assert len(set(used.values())) == len(used)


def test_a_run_has_a_seed_of_its_own_for_every_part():
    assert seeds_of(1) == Seeds(*(stream(role, 1) for role in ("weights", "projector", "order", "noise", "rest")))
    numbers = {number for seed in range(2000) for number in seeds_of(seed)}
    assert len(numbers) == 2000 * len(Seeds._fields)
