"""The dry run of `haste train`: what it reports on data, weights, teacher, runs, disk and GPU, without a network."""

from __future__ import annotations

import io
import json
import shutil
import socket
import time
from collections import namedtuple

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from haste_core.study import config, dry_run, runs
from haste_core.study.cli import main
from haste_core.study.dry_run import check_data, check_reference, check_vae
from haste_core.study.estimate import Example, estimate
from haste_core.study.runs import Run
from haste_core.study.train import fit

Usage = namedtuple("Usage", "total used free")


def looked(study, arm="haste"):
    """The checks of a run by name."""
    return {check.name: check for check in dry_run.dry_run(Run(study, arm, 0)).checks}


def states(study, arm="haste"):
    return {name: check.state for name, check in looked(study, arm).items()}


@pytest.fixture
def prepared(tmp_path):
    """A prepared folder with one real pair and 40 names; only lists and the first pair should be looked at."""
    root = tmp_path / "prepared"
    for side, name in (("images", "img{:08d}.png"), ("vae-sd", "img-mean-std-{:08d}.npy")):
        (root / side / "00000").mkdir(parents=True)
        labels = [[f"00000/{name.format(i)}", i % 5] for i in range(40)]
        (root / side / "dataset.json").write_text(json.dumps({"labels": labels}))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "images" / "00000" / "img00000000.png")
    stream = io.BytesIO()
    np.save(stream, np.zeros((8, 8, 8), np.float32))
    (root / "vae-sd" / "00000" / "img-mean-std-00000000.npy").write_bytes(stream.getvalue())
    return root


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    """No weights anywhere, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*_):
        raise AssertionError("a dry run asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def cached(root, repository, *files):
    """Files in the hub's cache as its client lays them out."""
    folder = root / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    for file in files:
        (folder / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / "abc" / file).write_bytes(b"x")


def test_a_study_without_downloads_is_ready_and_nothing_is_written(tiny_overrides, output, capsys):
    settings = [word for override in tiny_overrides for word in ("--set", override)]
    assert main(["train", "digits", "haste", *settings, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert list(output.iterdir()) == []
    for words in ("nothing is missing", "not a measurement", "40% (an assumption)", "FLOP in phase I", "GiB free at"):
        assert words in printed


def test_a_bare_machine_lacks_data_weights_and_reference_and_says_where_they_go(empty_caches, output, capsys):
    begun = time.process_time()
    assert main(["train", "imagenet256", "haste", "--dry-run"]) == 2
    assert time.process_time() - begun < 25
    said = capsys.readouterr()
    assert "6 missing" in said.out
    assert "haste: error: not ready to train: data, teacher weights, vae, inception, dinov2, reference" in said.err
    for words in ("haste latents", "timm/vit_base_patch14_dinov2.lvd142m", "teacher.weights=PATH", "sample.vae=FOLDER",
                  str(empty_caches / "torch"), "evaluate.reference=null", "student 675 M", "on one GPU"):  # fmt: skip
        assert words in said.out


def test_files_in_the_caches_are_found(empty_caches, output, prepared, monkeypatch):
    # The recipe asks for 71 GiB, which a machine that runs the tests need not have.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**43, 2**40, 2**42))
    cached(empty_caches, "timm/vit_base_patch14_dinov2.lvd142m", "model.safetensors")
    cached(empty_caches, "timm/vit_large_patch14_dinov2.lvd142m", "pytorch_model.bin")
    cached(empty_caches, "stabilityai/sd-vae-ft-ema", "config.json", "diffusion_pytorch_model.safetensors")
    weights = empty_caches / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x")
    np.savez(empty_caches / "reference.npz", mu=np.zeros(2), sigma=np.eye(2))
    study = config.load(
        "imagenet256", overrides=[f"data.path={prepared}", "data.image_size=64", "train.precision=bf16",
                                  "train.batch_size=8", f"evaluate.reference={empty_caches / 'reference.npz'}"],
    )  # fmt: skip
    found = looked(study)
    assert [check for check in found.values() if check.state != "ok"] == []
    assert "40 pairs, 38 of them for training, 5 classes, latents 4x8x8 of 64 pixels" in found["data"].found
    # 4x4 tokens of the student against 16x16 of the teacher.
    assert "different, resampled" in found["networks"].found


def test_half_a_vae_is_missing(empty_caches):
    cached(empty_caches, "stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors")
    study = config.load("imagenet256")
    assert check_vae(study.data, study.sample).state == "missing"
    folder = empty_caches / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    found = check_vae(study.data, study.sample.model_copy(update={"vae": str(folder)}))
    assert found.state == "problem"
    assert "diffusion_pytorch_model.safetensors" in found.found


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("settings", ["claims.early=7"], "does not keep"),
        ("data", ["train.batch_size=9"], "more than the 6 training images"),
        ("data", ["data.image_size=32"], "have 64"),
        ("networks", ["model.patch=3"], "does not divide the side 8"),
        ("teacher weights", ["teacher.model=vit_bas_patch14_dinov2", "teacher.weights=hub"], "timm knows no"),
        ("networks", ["teacher.kwargs.colour=1"], "colour"),
        ("networks", ["alignment.layer_pairs=[[1, 9]]"], "0, 1, 2, 3"),
        ("networks", ["alignment.heads=[0, 3]", "teacher.kwargs.num_heads=2"], "head 3"),
        ("sampler", ["sample.sampler=ddpm"], "euler, heun, sde"),
    ],
)
def test_each_mistake_is_a_problem_of_its_own(prepared, output, name, settings, words):
    small = [f"data.path={prepared}", "data.test_fraction=0.82", "train.batch_size=7", f"sample.vae={prepared}"]
    found = looked(config.load("imagenet256", "smoke", [*small, *settings]))[name]
    assert found.state == "problem"
    assert words in found.found
    assert "\n" not in found.found


@pytest.mark.parametrize("damage", ["dataset.json", "latent"])
def test_a_damaged_folder_is_a_problem(prepared, output, damage):
    if damage == "dataset.json":
        (prepared / "images" / "dataset.json").write_text("{")
    else:
        (prepared / "vae-sd" / "00000" / "img-mean-std-00000000.npy").write_bytes(b"no array")
    check, example = check_data(config.load("imagenet256", "smoke", [f"data.path={prepared}"]).data, 4)
    assert check.state == "problem"
    assert example == Example(8, 4, 1000, 64, 3)  # assumed from the settings


def test_image_folders_and_parquet_files_are_counted_without_being_read(tmp_path, empty_caches):
    import datasets

    for label in ("cat", "dog"):
        (tmp_path / "folder" / "train" / label).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "folder" / "train" / label / f"{i}.png").write_bytes(b"never opened")
    rows = datasets.Dataset.from_dict(
        {"img": [np.zeros((4, 4, 3), np.uint8)] * 9, "label": [0, 1, 2] * 3},
        features=datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"])),
    )
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    rows.to_parquet(tmp_path / "parquet" / "test.parquet")
    for folder, count, classes in (("folder", 12, 2), ("parquet", 9, 3)):
        settings = config.DataSettings(kind="images", path=str(tmp_path / folder), image_size=32)
        check, example = check_data(settings, 4)
        assert check.state == "ok"
        assert f"{count} training images, {classes} classes" in check.found
        assert example == Example(32, 3, classes, 32, 3)
        assert check_data(settings, count + 1)[0].state == "problem"


def test_a_hub_name_is_missing_until_it_is_in_the_cache(tmp_path, monkeypatch, empty_caches):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    settings = config.load("cifar10").data
    check, example = check_data(settings, 10**6)
    assert check.state == "missing"
    assert example == Example(32, 3, 1000, 32, 3)
    (tmp_path / "datasets" / "uoft-cs___cifar10").mkdir(parents=True)
    assert check_data(settings, 128)[0].state == "ok"
    wrong = settings.model_copy(update={"path": "no/such/folder"})
    assert check_data(wrong, 128)[0].state == "problem"


def test_teacher_weights_are_looked_for_and_pretraining_is_announced(tmp_path, make_study, output):
    study = make_study(f"teacher.weights={tmp_path / 'teacher.safetensors'}")
    assert states(study, "repa")["teacher weights"] == "missing"
    (tmp_path / "teacher.safetensors").write_bytes(b"not opened")
    assert states(study, "repa")["teacher weights"] == "ok"
    assert "teacher weights" not in states(study, "vanilla")
    study = make_study("teacher.weights=pretrain")
    assert "trained first, 20 steps" in looked(study, "repa")["teacher weights"].found
    runs.teacher_path(study, study.teacher).parent.mkdir(parents=True)
    runs.teacher_path(study, study.teacher).write_bytes(b"not opened")
    assert "teacher.safetensors" in looked(study, "repa")["teacher weights"].found


@pytest.mark.parametrize(
    ("arrays", "state"), [({"mu": 1, "sigma": 1}, "ok"), ({"arr_0": 1}, "ok"), ({"labels": 1}, "problem")]
)
def test_a_reference_must_hold_statistics_or_images(tmp_path, arrays, state):
    np.savez(tmp_path / "reference.npz", **arrays)
    assert check_reference(str(tmp_path / "reference.npz")).state == state
    (tmp_path / "damaged.npz").write_bytes(b"PK broken")
    assert check_reference(str(tmp_path / "damaged.npz")).state == "problem"


def test_an_existing_run_says_where_it_would_go_on(tiny, make_study, output):
    assert "begin at step 0" in looked(tiny, "holistic")["run"].found
    fit(Run(tiny, "holistic", 0), progress=False)
    assert "complete" in looked(tiny, "holistic")["run"].found
    assert "begin at step 8, shared with arm holistic" in looked(tiny)["run"].found
    longer = make_study("train.steps=20")
    assert "go on from step 12 of 20" in looked(longer, "holistic")["run"].found
    Run(tiny, "holistic", 0).checkpoint_path(12).write_bytes(b"damaged")
    assert states(longer, "holistic")["run"] == "problem"


def test_a_full_disk_is_a_problem_before_training(tiny, output, monkeypatch):
    needed = estimate(tiny.run("haste"), Example(8, 1, 10, 8, 1)).disk
    for free, state in ((needed + 1, "ok"), (needed - 1, "problem")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(10 * needed, 0, free))
        assert states(tiny)["disk"] == state


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_a_problem(make_study, output):
    assert states(make_study("train.precision=fp16"), "vanilla")["device"] == "problem"
    assert states(make_study("train.precision=bf16"), "vanilla")["device"] == "ok"


def test_a_gpu_that_is_too_small_is_a_problem(monkeypatch, output):
    properties = namedtuple("Properties", "total_memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    for size, state in ((80, "problem"), (141, "ok")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=size: properties(n * 2**30))
        assert states(config.load("imagenet256"))["memory"] == state


def test_a_text_model_needs_its_contexts(tmp_path, make_study, output):
    from haste_core.study.data.contexts import write

    def state(width):
        path = f"data.contexts={tmp_path / 'text.safetensors'}"
        return states(make_study("model.kind=mmdit", f"model.context_width={width}", path))["text tokens"]

    assert state(12) == "missing"
    write(tmp_path / "text.safetensors", torch.zeros(10, 3, 12), torch.zeros(3, 12))
    assert (state(12), state(16)) == ("ok", "problem")
