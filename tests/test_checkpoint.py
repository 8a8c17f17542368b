"""Checkpoint files: whole or not at all, safe to load."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from haste_core import checkpoint
from haste_core.errors import HasteError

BASE = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "model.a": torch.arange(6.0).reshape(2, 3),
    "model.half": torch.ones(3, dtype=torch.bfloat16),
    "noise.generator": torch.Generator().manual_seed(3).get_state(),
    "data.order": torch.arange(5),
    # Tensors that share memory, and views of it.
    "shared.a": BASE,
    "shared.b": BASE,
    "shared.c": BASE.T,
    "shared.d": BASE[:, 1],
}
STATE = {"step": 12, "lineage": "abc", "termination": {"phase": 1, "switched_at": None}}


@pytest.fixture
def path(tmp_path):
    where = tmp_path / "checkpoints" / "step_00000012.safetensors"
    checkpoint.save(where, TENSORS, STATE)
    return where


def assert_alone(path, content):
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_tensors_and_state_come_back_to_the_bit_whole_or_by_prefix(path):
    tensors, state = checkpoint.load(path)
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert {key: state[key] for key in STATE} == STATE
    assert_alone(path, path.read_bytes())
    assert checkpoint.load(path, ("model.", "noise."))[0].keys() == {"model.a", "model.half", "noise.generator"}
    assert checkpoint.load(path, ("none",)) == ({}, state)
    assert checkpoint.under(tensors, "model.").keys() == {"a", "half"}


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_truncated_file_is_refused(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(HasteError, match="truncated or damaged") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_naming_the_others(path):
    with pytest.raises(HasteError, match=r"no checkpoint .*step_00000013.*expected one of: step_00000012\.safetensors"):
        checkpoint.load(path.with_name("step_00000013.safetensors"))
    with pytest.raises(HasteError, match="train first"):
        checkpoint.load(path.parents[1] / "elsewhere" / "step_00000001.safetensors")


@pytest.mark.parametrize("metadata", [None, {"state": "no json"}, {"state": '{"format": 99}'}], ids=str)
def test_a_foreign_safetensors_file_is_refused(path, metadata):
    save_file({"model.a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(HasteError):
        checkpoint.load(path)


@pytest.mark.parametrize("write", [lambda what, path: path.write_bytes(pickle.dumps(what)), torch.save])
def test_a_pickle_in_disguise_is_refused_unexecuted(path, bomb, write):
    write({"model.a": bomb}, path)
    with pytest.raises(HasteError):
        checkpoint.load(path)


def test_fingerprint_changes_with_any_weight_or_name_and_not_with_order():
    print_of = checkpoint.fingerprint({"a": torch.zeros(6), "b": torch.ones(4)})
    assert checkpoint.fingerprint({"b": torch.ones(4), "a": torch.zeros(6)}) == print_of
    assert checkpoint.fingerprint({"a": torch.zeros(6), "c": torch.ones(4)}) != print_of
    assert checkpoint.fingerprint({"a": torch.zeros(2, 3), "b": torch.ones(4)}) != print_of
    for i in range(6):
        changed = torch.zeros(6)
        changed[i] = 1e-45  # the smallest float32
        assert checkpoint.fingerprint({"a": changed, "b": torch.ones(4)}) != print_of
