from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from haste_core.study.sample_set import SampleSet, drawer
from haste_core.study.turns import claimed, turn

from haste_core import files, sampling
from haste_core.errors import HasteError, Interrupted
from haste_core.models import SiT
from haste_core.study import cli_files as command
from haste_core.study import config
from haste_core.study.cli import main
from haste_core.study.presets import SAMPLERS

pytestmark = pytest.mark.xdist_group("sample_set")

ROOT = Path(__file__).parents[1]


def manifest(**more):
    return {"n": 23, "shard_size": 5, "first_seed": 7, "labels": "balanced", "classes": 10, "checkpoint": "abc", **more}


def numbers(labels, seeds):
    """uint8 images (b, 1, 4, 4) that say which label and seed they were drawn with."""
    made = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    made[:, 0, 0, 0], made[:, 0, 0, 1] = labels.to(torch.uint8), torch.tensor(list(seeds), dtype=torch.uint8)
    return made


def stored(path):
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def test_a_set_is_drawn_in_shards_and_merged(tmp_path):
    samples = SampleSet(tmp_path / "set", manifest())
    samples.fill(numbers, batch_size=2)
    shards = sorted((tmp_path / "set" / "shards").iterdir())
    assert [np.load(path, allow_pickle=False).shape for path in shards] == [(5, 4, 4, 1)] * 4 + [(3, 4, 4, 1)]
    samples.merge(samples.merged, channels=3)
    content = stored(samples.merged)
    assert content["arr_0"].shape == (23, 4, 4, 3)
    assert content["arr_0"].dtype == np.uint8
    assert content["labels"].tolist() == [i % 10 for i in range(23)]
    for channel in range(3):
        assert content["arr_0"][:, 0, 0, channel].tolist() == [i % 10 for i in range(23)]
        assert content["arr_0"][:, 0, 1, channel].tolist() == list(range(7, 30))
    samples.merge(tmp_path / "grey.npz")
    assert stored(tmp_path / "grey.npz")["arr_0"].shape == (23, 4, 4, 1)


def test_batches_come_from_the_shards_in_order(tmp_path):
    samples = SampleSet(tmp_path / "set", manifest())
    samples.fill(numbers, batch_size=5)
    parts = list(samples.batches(3))
    assert len(samples) == 23
    assert max(len(part) for part in parts) == 3
    assert torch.equal(torch.cat(parts), numbers(samples.labels(), range(7, 30)))


def test_random_labels_are_drawn_from_the_first_seed(tmp_path):
    samples = SampleSet(tmp_path / "set", manifest(labels="random"))
    assert torch.equal(samples.labels(), sampling.sample_labels(23, 10, "random", 7))


def test_a_set_goes_on_after_a_stop_and_draws_no_shard_twice(tmp_path):
    asked = []

    def stopping(labels, seeds):
        asked.append(list(seeds))
        if len(asked) == 8:  # in the third shard
            os.kill(os.getpid(), signal.SIGTERM)
        return numbers(labels, seeds)

    samples = SampleSet(tmp_path / "set", manifest())
    with pytest.raises(Interrupted, match="10 of 23 images"):
        samples.fill(stopping, batch_size=2)
    assert samples.missing() == [2, 3, 4]
    kept = [path.stat().st_mtime_ns for path in samples.paths()[:2]]
    again = SampleSet(tmp_path / "set", manifest())
    asked.clear()
    again.fill(lambda labels, seeds: asked.append(list(seeds)) or numbers(labels, seeds), batch_size=2)
    assert asked[0] == [17, 18]
    assert [path.stat().st_mtime_ns for path in samples.paths()[:2]] == kept
    assert torch.equal(torch.cat(list(again.batches(9))), numbers(samples.labels(), range(7, 30)))


def test_stops_threads_and_order_change_no_byte_of_the_result(tmp_path):
    one = SampleSet(tmp_path / "one", manifest())
    one.fill(numbers, batch_size=5)
    sets = [SampleSet(tmp_path / "many", manifest()) for _ in range(4)]
    drawn, guard = [], threading.Lock()

    def slow(labels, seeds):
        with guard:
            drawn.append(seeds[0])
        time.sleep(0.05)
        return numbers(labels, seeds)

    # Locks belong to open files, so threads contend for them as processes do.
    threads = [threading.Thread(target=samples.fill, args=(slow, 5)) for samples in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == [7, 12, 17, 22, 27]
    for samples in (one, sets[0]):
        samples.merge(samples.merged, 3)
    assert one.merged.read_bytes() == sets[0].merged.read_bytes()
    assert not list((tmp_path / "many" / "shards").glob("*.lock"))


def test_a_shard_whose_holder_dies_is_taken_over(tmp_path):
    samples = SampleSet(tmp_path / "set", manifest())
    lock = samples.paths()[0].with_suffix(".lock")
    hold = f"""
import fcntl, os, time
os.makedirs({str(lock.parent)!r})
stream = open({str(lock)!r}, "a")
fcntl.flock(stream, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        worker = threading.Thread(target=samples.fill, args=(numbers, 5))
        worker.start()
        deadline = time.monotonic() + 20
        while samples.missing() != [0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert worker.is_alive()  # waits for the shard that is held
    finally:
        holder.kill()
        holder.wait()
    worker.join(20)
    assert samples.missing() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint": "xyz"}, "checkpoint 'abc', asked is 'xyz'"),
        ({"n": 24}, "n 23, asked is 24"),
        ({"solver_steps": 9}, "solver_steps None, asked is 9"),
        ({"labels": "random"}, "labels 'balanced', asked is 'random'"),
    ],
)
def test_a_folder_with_another_manifest_is_refused_in_one_line(tmp_path, change, words):
    SampleSet(tmp_path / "set", manifest())
    with pytest.raises(HasteError) as stop:
        SampleSet(tmp_path / "set", manifest(**change))
    assert words in str(stop.value)
    assert "\n" not in str(stop.value)


def test_where_equal_weights_come_from_is_noted_and_not_compared(tmp_path):
    SampleSet(tmp_path / "set", manifest(**{"from": "a"}))
    assert SampleSet(tmp_path / "set", manifest(**{"from": "b"})).n == 23


def test_a_folder_of_other_files_is_refused_and_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for place, words in ((tmp_path, "mine.txt"), (tmp_path / "mine.txt", "is a file")):
        with pytest.raises(HasteError, match=words):
            SampleSet(place, manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("[1")
    with pytest.raises(HasteError, match="cannot be read"):
        SampleSet(tmp_path / "bad", manifest())


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", "cut", "pickle", "other"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, content):
    samples = SampleSet(tmp_path / "set", manifest())
    samples.fill(numbers, batch_size=5)
    path = samples.paths()[1]
    if content == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif content == "other":
        np.save(path, np.zeros((4, 4, 4, 1), np.uint8))
    else:
        path.write_bytes(path.read_bytes()[:-7] if content == "cut" else content)
    for use in (lambda: samples.fill(numbers, 5), lambda: samples.merge(samples.merged)):
        with pytest.raises(HasteError, match=r"00001.npy is truncated or damaged; possible: delete it"):
            use()
    path.unlink()
    samples.fill(numbers, batch_size=5)
    assert samples.missing() == []


def test_a_merged_file_is_written_once_and_again_when_it_is_another(tmp_path):
    samples = SampleSet(tmp_path / "set", manifest())
    samples.fill(numbers, batch_size=5)
    path = tmp_path / "out.npz"
    samples.merge(path)
    written = path.stat().st_mtime_ns
    samples.merge(path)
    assert path.stat().st_mtime_ns == written
    np.savez(path, arr_0=np.zeros((2, 4, 4, 1), np.uint8))
    samples.merge(path)
    assert len(stored(path)["arr_0"]) == 23
    path.write_text("something else")
    samples.merge(path)
    assert len(stored(path)["arr_0"]) == 23


def test_merging_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    samples = SampleSet(tmp_path / "set", manifest())
    samples.fill(numbers, batch_size=5)
    ways, load = set(), np.load
    monkeypatch.setattr(np, "load", lambda path, **more: ways.add(more.get("mmap_mode")) or load(path, **more))
    samples.merge(samples.merged)
    assert ways == {"r"}


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    samples = SampleSet(tmp_path / "set", manifest())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(HasteError, match="no room"):
        samples.fill(numbers, batch_size=5)
    monkeypatch.undo()
    assert samples.missing() == [0, 1, 2, 3, 4]
    assert not list((tmp_path / "set" / "shards").glob("*.tmp"))


def test_a_claim_is_held_by_one_and_a_turn_waits(tmp_path):
    lock, order = tmp_path / "x.lock", []
    with claimed(lock, "it") as one, claimed(lock, "it") as other:
        assert (one, other) == (True, False)

    def second():
        with turn(lock, "it"):
            order.append("second")

    waiting = threading.Thread(target=second)
    with turn(lock, "it"):
        waiting.start()
        time.sleep(0.1)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
    stopping = threading.Event()
    stopping.set()
    with turn(lock, "it"), pytest.raises(Interrupted, match="waiting for it"), turn(lock, "it", stopping):
        pass


def test_an_error_in_a_turn_is_not_taken_for_a_held_lock(tmp_path):
    with pytest.raises(HasteError, match="mine"), turn(tmp_path / "x.lock", "it"):
        raise HasteError("mine")
    with pytest.raises(HasteError, match="mine"), claimed(tmp_path / "x.lock", "it"):
        raise HasteError("mine")


# A real generator


@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_batch_and_shard_size_move_at_most_a_rounding(tmp_path, randomise, tiny, sampler):
    # Sums in another order change the last bits of a float, and now and then a level of a pixel.
    model = randomise(SiT(image_size=8, channels=1, classes=10, depth=2, width=32, heads=2, patch=2), std=0.2).eval()
    results = []
    for batch, shard in ((20, 20), (7, 20), (1, 5)):
        sample = config.Sample(sampler=sampler, solver_steps=4, batch_size=batch)
        samples = SampleSet(tmp_path / f"{batch}-{shard}", manifest(n=60, shard_size=shard))
        samples.fill(drawer(model, tiny.data, sample), batch)
        results.append(torch.cat(list(samples.batches(60))).int())
    assert results[0].float().std() > 10
    for other in results[1:]:
        difference = (other - results[0]).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() < 0.002


# Presets


def test_a_preset_of_the_command_line_decides_all_of_the_sampler_and_set_wins_over_it():
    file = {"sampler": "heun", "solver_steps": 7, "guidance": 9.0, "guidance_low": 0.3, "batch_size": 11}
    overrides = [f"sample.{key}={value}" for key, value in file.items()]
    chosen = config.load("digits", overrides=[*overrides, *command.preset_overrides("haste-xl-100ep")]).sample
    assert chosen.model_dump() == config.Sample(preset="haste-xl-100ep", batch_size=11).model_dump()
    more = ["sample.solver_steps=10", "sample.guidance=1.0"]
    chosen = config.load("digits", overrides=[*overrides, *command.preset_overrides("sde-250"), *more]).sample
    assert (chosen.solver_steps, chosen.guidance, chosen.guidance_low, chosen.sampler) == (10, 1.0, 0.0, "sde")
    assert command.preset_overrides(None) == []


# The command line


SHORT = ["--profile", "smoke", "--set", "train.steps=4", "--set", "train.keep=[]"]


@pytest.fixture(scope="module")
def folder(new_output):
    with new_output() as place:
        assert main(["train", "digits", "vanilla", *SHORT]) == 0
    return place


@pytest.fixture
def trained(folder, output, monkeypatch):
    monkeypatch.setenv("HASTE_OUTPUT", str(folder))


def words(out, *more):
    return ["sample", "digits", "vanilla", *SHORT, "--out", str(out), *more]


def test_help_lists_every_preset(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    text = capsys.readouterr().out
    for name, fields in SAMPLERS.items():
        (line,) = (line for line in text.splitlines() if line.strip().startswith(name))
        assert all(f"{key} {value}" in line for key, value in fields.items())


def test_a_folder_a_file_and_two_processes_give_the_same_images(trained, tmp_path, capsys):
    assert main(words(tmp_path / "few.npz", "--n", "25")) == 0
    assert main(words(tmp_path / "many.npz", "--n", "25", "--shard-size", "6")) == 0
    capsys.readouterr()
    assert main(words(tmp_path / "set", "--n", "25", "--shard-size", "6", "--processes", "2")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'set' / 'samples.npz'}\n"
    few, many, together = (stored(tmp_path / name) for name in ("few.npz", "many.npz", "set/samples.npz"))
    assert few["arr_0"].shape == (25, 8, 8, 1)
    assert np.array_equal(few["arr_0"], many["arr_0"])
    assert np.array_equal(many["arr_0"].repeat(3, axis=3), together["arr_0"])
    assert np.array_equal(few["labels"], together["labels"])
    note = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert note["from"] == "digits vanilla seed 0 step 4"
    assert (note["n"], note["shard_size"], note["vae"]) == (25, 6, None)


def test_a_finished_folder_is_left_alone_and_another_wish_refused(trained, tmp_path, capsys):
    assert main(words(tmp_path / "set", "--n", "5")) == 0
    moment = (tmp_path / "set" / "samples.npz").stat().st_mtime_ns
    (tmp_path / "set" / "shards" / "00000.npy").unlink()  # not needed any more
    assert main(words(tmp_path / "set", "--n", "5")) == 0
    assert (tmp_path / "set" / "samples.npz").stat().st_mtime_ns == moment
    capsys.readouterr()
    for more, said in (
        (["--n", "6"], "n 5, asked is 6"),
        (["--n", "5", "--first-seed", "1"], "first_seed 0, asked is 1"),
        (["--n", "5", "--sampler", "sde-250"], "sampler"),
    ):
        assert main(words(tmp_path / "set", *more)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_an_error_of_a_worker_is_the_error_of_the_command(trained, tmp_path, capsys):
    assert main(words(tmp_path / "set", "--n", "5", "--processes", "2", "--step", "3")) == 2
    assert "step_00000003" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--processes", "0"], "--processes 0; possible: 1 and above"),
        (["--shard-size", "0"], "--shard-size 0; possible: 1 and above"),
        (["--sampler", "sde-25"], "unknown --sampler 'sde-25' (did you mean 'sde-250'?)"),
        (["--out", "x.png", "--processes", "2"], "--processes 2 with --out x.png"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(trained, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert main(words("set", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_sigterm_stops_all_processes_between_batches_and_the_same_command_goes_on(trained, tmp_path):
    asked = words(tmp_path / "set", "--n", "120", "--shard-size", "12", "--processes", "2", "--set")
    slow = [*asked, "sample.solver_steps=30", "--set", "sample.batch_size=4"]
    child = subprocess.Popen(
        [sys.executable, "-m", "haste_core.study.cli", *slow],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd(),
    )  # fmt: skip
    shards = tmp_path / "set" / "shards"
    try:
        deadline = time.monotonic() + 120
        while not list(shards.glob("[0-9]*.npy")):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 143
    assert "run again to go on" in said.splitlines()[-1]
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("[0-9]*.npy")}
    assert 0 < len(kept) < 10
    alone = [word for word in slow if word not in ("--processes", "2")]
    assert main(alone) == 0
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items())
    assert stored(tmp_path / "set" / "samples.npz")["arr_0"].shape == (120, 8, 8, 3)
