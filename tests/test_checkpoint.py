from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from haste_core import checkpoint
from haste_core.errors import HasteError

TENSORS = {
    "model.a": torch.arange(6.0).reshape(2, 3),
    "model.half": torch.ones(3, dtype=torch.bfloat16),
    "optimizer.step": torch.tensor(7.0),
    "noise.generator": torch.Generator().manual_seed(3).get_state(),
    "data.order": torch.arange(5),
}
STATE = {"step": 12, "lineage": "abc", "termination": {"phase": 1, "switched_at": None}}


@pytest.fixture
def path(tmp_path):
    where = tmp_path / "checkpoints" / "step_00000012.safetensors"
    checkpoint.save(where, TENSORS, STATE)
    return where


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_tensors_and_state_come_back_to_the_bit(path):
    tensors, state = checkpoint.load(path)
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert {key: state[key] for key in STATE} == STATE
    assert names(path.parent) == [path.name]


def test_only_the_asked_prefixes_are_read(path):
    assert checkpoint.load(path, ("model.", "noise."))[0].keys() == {"model.a", "model.half", "noise.generator"}
    assert checkpoint.load(path, ("none",)) == ({}, checkpoint.load(path)[1])


def test_tensors_that_share_memory_or_are_views_can_be_saved(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    shared = {"a": base, "b": base, "c": base.T, "d": base[:, 1]}
    checkpoint.save(tmp_path / "x.safetensors", shared, {})
    loaded, _ = checkpoint.load(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in shared.items())


def test_under_strips_the_prefix():
    assert checkpoint.under({"model.a": TENSORS["model.a"], "ema.a": TENSORS["model.a"]}, "ema.").keys() == {"a"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()

    def half(_, filename, **__):
        Path(filename).write_bytes(before[:100])
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(RuntimeError, match="went away"):
        checkpoint.save(path, {"model.a": torch.zeros(1)}, {})
    assert path.read_bytes() == before
    assert names(path.parent) == [path.name]


def test_no_room_is_an_error_of_one_line_and_the_old_file_stays(path):
    before = path.read_bytes()
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from haste_core import checkpoint\n"
        "from haste_core.errors import HasteError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try:\n"
        "    checkpoint.save(Path(sys.argv[1]), {'model.a': torch.zeros(100000)}, {})\n"
        "except HasteError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "no room" in line
    assert path.name in line
    assert path.read_bytes() == before
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(HasteError, match="truncated or damaged") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_naming_the_others(path):
    with pytest.raises(HasteError, match=r"no checkpoint .*step_00000013.*possible: step_00000012\.safetensors"):
        checkpoint.load(path.with_name("step_00000013.safetensors"))
    with pytest.raises(HasteError, match="train first"):
        checkpoint.load(path.parents[1] / "elsewhere" / "step_00000001.safetensors")


@pytest.mark.parametrize("metadata", [None, {"state": "no json"}, {"state": '{"format": 99}'}], ids=str)
def test_a_foreign_safetensors_file_is_refused(path, metadata):
    save_file({"model.a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(HasteError):
        checkpoint.load(path)


class Bomb:
    """Unpickles by creating a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_disguise_is_refused_unexecuted(path, tmp_path):
    trace = tmp_path / "executed"
    path.write_bytes(pickle.dumps({"model.a": Bomb(trace)}))
    with pytest.raises(HasteError):
        checkpoint.load(path)
    torch.save({"model.a": Bomb(trace)}, path)
    with pytest.raises(HasteError):
        checkpoint.load(path)
    assert not trace.exists()


def test_fingerprint_changes_with_any_weight_or_name_and_not_with_order():
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    print_of = checkpoint.fingerprint(weights)
    assert checkpoint.fingerprint({"b": torch.ones(4), "a": torch.zeros(2, 3)}) == print_of
    assert checkpoint.fingerprint({"a": torch.zeros(2, 3), "c": torch.ones(4)}) != print_of
    for name, value in weights.items():
        for i in range(value.numel()):
            changed = {n: v.clone() for n, v in weights.items()}
            flat = changed[name].view(-1)
            flat[i] = torch.nextafter(flat[i], torch.tensor(9.0))
            assert checkpoint.fingerprint(changed) != print_of
