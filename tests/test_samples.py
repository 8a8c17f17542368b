"""Sets of images in shards, locks, presets of samplers, and `haste sample` by one and by several processes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from haste_core import files, sampling
from haste_core.errors import HasteError, Interrupted, InUse
from haste_core.models import SiT
from haste_core.study import cli_files as command
from haste_core.study import config
from haste_core.study.cli import main
from haste_core.study.presets import SAMPLERS
from haste_core.study.samples import SampleSet, drawer

pytestmark = pytest.mark.xdist_group("samples")


def manifest(**more):
    return {"n": 23, "shard_size": 5, "first_seed": 7, "labels": "balanced", "classes": 10, "checkpoint": "abc", **more}


def numbers(labels, seeds):
    """uint8 images (b, 1, 4, 4) that show their label and seed."""
    made = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    made[:, 0, 0, 0], made[:, 0, 0, 1] = labels.to(torch.uint8), torch.tensor(list(seeds), dtype=torch.uint8)
    return made


@pytest.fixture
def samples(tmp_path):
    return SampleSet(tmp_path / "set", manifest())


@pytest.fixture
def filled(samples):
    samples.fill(numbers, batch_size=5)
    return samples


def stored(path):
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


# ---- shards and merging ----


def test_a_set_is_drawn_in_shards_and_merged(tmp_path, filled):
    shards = sorted((tmp_path / "set" / "shards").iterdir())
    assert [np.load(path, allow_pickle=False).shape for path in shards] == [(5, 4, 4, 1)] * 4 + [(3, 4, 4, 1)]
    parts = list(filled.batches(3))
    assert max(len(part) for part in parts) == 3
    assert torch.equal(torch.cat(parts), numbers(filled.labels(), range(7, 30)))
    filled.merge(filled.merged, channels=3)
    content = stored(filled.merged)
    assert (content["arr_0"].shape, content["arr_0"].dtype) == ((23, 4, 4, 3), np.uint8)
    assert content["labels"].tolist() == [i % 10 for i in range(23)]
    for channel in range(3):
        assert content["arr_0"][:, 0, 0, channel].tolist() == [i % 10 for i in range(23)]
        assert content["arr_0"][:, 0, 1, channel].tolist() == list(range(7, 30))
    filled.merge(tmp_path / "grey.npz")
    assert stored(tmp_path / "grey.npz")["arr_0"].shape == (23, 4, 4, 1)
    random = SampleSet(tmp_path / "random", manifest(labels="random"))
    assert torch.equal(random.labels(), sampling.sample_labels(23, 10, "random", 7))


def test_an_interrupted_set_resumes_and_draws_no_shard_twice(samples):
    asked = []

    def stopping(labels, seeds):
        asked.append(seeds[0])
        if len(asked) == 8:  # in the third shard
            os.kill(os.getpid(), signal.SIGTERM)
        return numbers(labels, seeds)

    with pytest.raises(Interrupted, match="10 of 23 images"):
        samples.fill(stopping, batch_size=2)
    assert samples.missing() == [2, 3, 4]
    again = SampleSet(samples.folder, manifest())
    again.fill(stopping, batch_size=2)
    assert asked[8:] == [17, 19, 21, 22, 24, 26, 27, 29]
    assert torch.equal(torch.cat(list(again.batches(9))), numbers(samples.labels(), range(7, 30)))


def test_a_fault_in_drawing_names_what_is_drawn(tmp_path):
    def broken(labels, seeds):
        raise HasteError("2 of 4 drawn images have values that are not finite")

    named = SampleSet(tmp_path / "named", manifest(**{"from": "digits haste seed 0 step 8"}))
    with pytest.raises(HasteError, match=r"^digits haste seed 0 step 8: 2 of 4 drawn images"):
        named.fill(broken, 4)


def test_processes_take_turns_at_the_shards_and_change_no_byte(tmp_path, filled):
    divided, drawn = SampleSet(tmp_path / "divided", manifest()), []
    for rank, first_seeds in ((1, [12, 27]), (0, [7, 22]), (2, [17])):
        divided.fill(lambda labels, seeds: drawn.append(seeds[0]) or numbers(labels, seeds), 5, rank=rank, processes=3)
        assert drawn == first_seeds
        drawn.clear()
    for samples in (filled, divided):
        samples.merge(samples.merged, 3)
    assert filled.merged.read_bytes() == divided.merged.read_bytes()


def test_a_folder_with_another_manifest_or_other_files_is_refused_and_stays(tmp_path, samples):
    assert SampleSet(samples.folder, manifest(**{"from": "another arm with equal weights"})).n == 23
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("[1")
    for place, more, words in (
        (samples.folder, {"checkpoint": "xyz"}, "checkpoint 'abc', now it is 'xyz'"),
        (samples.folder, {"solver_steps": 9}, "solver_steps None, now it is 9"),
        (tmp_path / "mine", {}, "mine.txt is in the way"),
        (tmp_path / "mine" / "mine.txt", {}, "mine.txt is in the way"),
        (tmp_path / "bad", {}, "cannot be read"),
    ):
        with pytest.raises(HasteError, match=words) as caught:
            SampleSet(place, manifest(**more))
        assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("content", ["cut", "pickle", "other"])
def test_a_damaged_shard_is_refused_by_name(filled, content):
    path = filled.paths()[1]
    if content == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif content == "other":
        np.save(path, np.zeros((4, 4, 4, 1), np.uint8))
    else:
        path.write_bytes(path.read_bytes()[:-7])
    for use in (lambda: filled.fill(numbers, 5), lambda: filled.merge(filled.merged)):
        with pytest.raises(HasteError, match=r"00001.npy is truncated or damaged .*; delete it"):
            use()
    path.unlink()
    filled.fill(numbers, batch_size=5)
    assert filled.missing() == []


def test_a_merged_file_is_written_once_and_again_when_it_differs(tmp_path, filled):
    path = tmp_path / "out.npz"
    filled.merge(path)
    written = path.stat().st_mtime_ns
    filled.merge(path)
    assert path.stat().st_mtime_ns == written
    np.savez(path, arr_0=np.zeros((2, 4, 4, 1), np.uint8))
    filled.merge(path)
    assert len(stored(path)["arr_0"]) == 23
    path.write_text("something else")
    filled.merge(path)
    assert len(stored(path)["arr_0"]) == 23


@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_batch_and_shard_size_move_at_most_a_rounding(tmp_path, randomise, tiny, sampler):
    # Sums in another order change the last bits of a float, and now and then a level of a pixel.
    model = randomise(SiT(image_size=8, channels=1, classes=10, depth=2, width=32, heads=2, patch=2), std=0.2).eval()
    results = []
    for batch, shard in ((20, 20), (7, 5)):
        sample = config.SampleSettings(sampler=sampler, solver_steps=3, batch_size=batch)
        samples = SampleSet(tmp_path / f"{batch}-{shard}", manifest(n=40, shard_size=shard))
        samples.fill(drawer(model, tiny.data, sample), batch)
        results.append(torch.cat(list(samples.batches(40))).int())
    assert results[0].float().std() > 10
    difference = (results[1] - results[0]).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.002


# ---- locks ----


def test_a_lock_has_one_holder_whom_the_error_names_and_the_next_waits(tmp_path):
    lock, order, stopping = tmp_path / "x.lock", [], threading.Event()

    def second():
        with pytest.raises(Interrupted, match="stopped while waiting for it"), files.locked(lock, "it", True, stopping):
            pass
        order.append("stopped")
        with files.locked(lock, "it", wait=True):
            order.append("second")

    waiting = threading.Thread(target=second)
    with files.locked(lock, "it"):
        with pytest.raises(InUse, match=rf"it is in use by process {os.getpid()} on .*; wait"):
            files.locked(lock, "it").__enter__()
        waiting.start()
        time.sleep(0.3)
        assert order == []
        stopping.set()
        time.sleep(0.3)
        order.append("first")
    waiting.join(10)
    assert order == ["stopped", "first", "second"]
    with pytest.raises(HasteError, match="mine"), files.locked(lock, "it"):
        raise HasteError("mine")
    with files.locked(lock, "it"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(HasteError, match=r"cannot be locked \(No locks available\); expected a file system with locks"),
        files.locked(tmp_path / "lock", "x"),
    ):
        pass


# ---- the command line ----


def test_a_preset_of_the_command_line_decides_all_of_the_sampler_and_set_wins_over_it():
    file = {"sampler": "heun", "solver_steps": 7, "guidance": 9.0, "guidance_low": 0.3, "batch_size": 11}
    overrides = [f"sample.{key}={value}" for key, value in file.items()]
    chosen = config.load("digits", overrides=[*overrides, *command.preset_overrides("haste-xl-100ep")]).sample
    assert chosen.model_dump() == config.SampleSettings(preset="haste-xl-100ep", batch_size=11).model_dump()
    more = ["sample.solver_steps=10", "sample.guidance=1.0"]
    chosen = config.load("digits", overrides=[*overrides, *command.preset_overrides("sde-250"), *more]).sample
    assert (chosen.solver_steps, chosen.guidance, chosen.guidance_low, chosen.sampler) == (10, 1.0, 0.0, "sde")
    assert command.preset_overrides(None) == []


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


def test_a_folder_and_files_hold_the_same_images(trained, tmp_path, capsys):
    assert main(words(tmp_path / "few.npz", "--n", "25")) == 0
    assert main(words(tmp_path / "many.npz", "--n", "25", "--shard-size", "6")) == 0
    capsys.readouterr()
    assert main(words(tmp_path / "set", "--n", "25", "--shard-size", "6")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'set' / 'samples.npz'}\n"
    few, many, together = (stored(tmp_path / name) for name in ("few.npz", "many.npz", "set/samples.npz"))
    assert few["arr_0"].shape == (25, 8, 8, 1)
    assert np.array_equal(few["arr_0"], many["arr_0"])
    assert np.array_equal(many["arr_0"].repeat(3, axis=3), together["arr_0"])
    assert np.array_equal(few["labels"], together["labels"])
    note = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert note["from"] == "digits vanilla seed 0 step 4"
    assert (note["n"], note["shard_size"], note["vae"]) == (25, 6, None)


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(trained, tmp_path, capsys):
    assert main(words(tmp_path / "set", "--n", "5")) == 0
    moment = (tmp_path / "set" / "samples.npz").stat().st_mtime_ns
    (tmp_path / "set" / "shards" / "00000.npy").unlink()  # not needed any more
    assert main(words(tmp_path / "set", "--n", "5")) == 0
    assert (tmp_path / "set" / "samples.npz").stat().st_mtime_ns == moment
    capsys.readouterr()
    for more, said in (
        (["--n", "6"], "n 5, now it is 6"),
        (["--n", "5", "--sampler", "sde-250"], "sampler"),
    ):
        assert main(words(tmp_path / "set", *more)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--processes", "0"], "--processes 0; expected 1 and above"),
        (["--shard-size", "0"], "--shard-size 0; expected 1 and above"),
        (["--sampler", "sde-25"], "unknown --sampler 'sde-25' (did you mean 'sde-250'?)"),
        (["--out", "x.png", "--processes", "2"], "--processes 2 with --out x.png"),
    ],
)
def test_unusable_arguments_are_refused(trained, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert main(words("set", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_stop_at_a_signal_and_one_resumes_to_the_same_file(trained, tmp_path):
    asked = words(tmp_path / "set", "--n", "60", "--shard-size", "6", "--processes", "2", "--set")
    slow = [*asked, "sample.solver_steps=30", "--set", "sample.batch_size=4"]
    child = subprocess.Popen(
        [sys.executable, "-m", "haste_core.study.cli", *slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    shards = tmp_path / "set" / "shards"
    try:
        deadline = time.monotonic() + 240
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
    assert not list(tmp_path.glob(".launch-*"))
    assert main([word.replace(str(tmp_path / "set"), str(tmp_path / "one")) for word in alone]) == 0
    assert (tmp_path / "one" / "samples.npz").read_bytes() == (tmp_path / "set" / "samples.npz").read_bytes()
