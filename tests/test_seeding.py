"""Seeds by role: fixed, in range, and no two of a study alike."""

from __future__ import annotations

from haste_core.seeding import stream
from haste_core.study import config
from haste_core.study.train import Seeds, seeds_of

PARTS = ("weights", "heads", "order", "noise", "train noise", "validation noise", "test noise")


def test_streams_are_fixed_numbers_that_torch_takes_one_for_every_part_of_a_run():
    assert stream("weights", 0) == int.from_bytes(bytes.fromhex("9c130089a7c4245d"), "big") % 2**63
    assert seeds_of(1) == Seeds(*(stream(role, 1) for role in ("weights", "projector", "order", "noise", "rest")))
    numbers = {number for seed in range(2000) for number in seeds_of(seed)}
    assert len(numbers) == 2000 * len(Seeds._fields)
    assert all(0 <= number < 2**63 for number in numbers)


def test_no_two_streams_of_a_study_coincide():
    study = config.load("digits")
    used = {(part, seed): number for seed in range(20) for part, number in seeds_of(seed)._asdict().items()}
    fittings = {"teacher": study.teacher.fitting, "extractor": study.evaluate.extractor}
    for network, fitting in (fittings | {"autoencoder": study.evaluate.autoencoder}).items():
        for seed in range(fitting.seed, fitting.seed + fitting.attempts):
            used |= {(f"{network} {part}", seed): stream(f"{network} {part}", seed) for part in PARTS}
    used["validation split", study.data.split_seed] = stream("validation split", study.data.split_seed)
    assert len(set(used.values())) == len(used)
