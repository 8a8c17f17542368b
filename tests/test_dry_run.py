"""The dry run of `haste train`: what it reports on data, weights, teacher, runs, disk and GPU, without a network."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections import namedtuple

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from haste_core.errors import HasteError
from haste_core.study import config, dry_run, estimate, runs
from haste_core.study.cli import main
from haste_core.study.dry_run import find_example
from haste_core.study.estimate import Example
from haste_core.study.runs import Run
from haste_core.study.text import write_parts
from haste_core.study.train import fit

Usage = namedtuple("Usage", "total used free")


def looked(study, arm="haste"):
    """The checks of a run by name."""
    checks, _ = dry_run.dry_run(Run(study, arm, 0))
    return {check.name: check for check in checks}


def is_ok(study, name, arm="haste"):
    return looked(study, arm)[name].ok


@pytest.fixture
def prepared(tmp_path):
    """A prepared folder with one real image, 40 latents and 40 names."""
    root = tmp_path / "prepared"
    for side, name in (("images", "img{:08d}.png"), ("vae-sd", "img-mean-std-{:08d}.npy")):
        (root / side / "00000").mkdir(parents=True)
        labels = [[f"00000/{name.format(i)}", i % 5] for i in range(40)]
        (root / side / "dataset.json").write_text(json.dumps({"labels": labels}))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "images" / "00000" / "img00000000.png")
    for i in range(40):
        drawn = np.random.default_rng(i).normal(0, 5, (4, 8, 8))
        latent = np.concatenate([drawn, np.full_like(drawn, 0.1)]).astype(np.float32)
        np.save(root / "vae-sd" / "00000" / f"img-mean-std-{i:08d}.npy", latent)
    return root


@pytest.fixture
def untraced(monkeypatch):
    """Checks alone: no step is traced for the estimate."""
    monkeypatch.setattr(estimate, "step_cost", lambda *_: estimate.StepCost(1, 3, 1))


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
    for words in ("nothing is missing", "not a measurement", "memory in phase I:", "free at"):
        assert words in printed
    assert "time on" not in printed  # of a run of seconds


def test_a_bare_machine_lacks_data_weights_and_reference_and_says_where_they_go(empty_caches, output, capsys, untraced):
    small = ["model.preset=SiT-S/2", "teacher.kwargs={img_size: 224, embed_dim: 48}", "train.precision='no'"]
    words = [word for setting in small for word in ("--set", setting)]
    assert main(["train", "imagenet256", "haste", *words, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "haste: error: not ready to train: data, teacher weights, vae, inception, dinov2, reference" in said.err
    for words in ("haste latents", "vit_base_patch14_dinov2.lvd142m", "teacher.weights the path", "sample.vae=FOLDER",
                  str(empty_caches / "torch"), "evaluate.reference=null", "on each device"):  # fmt: skip
        assert words in said.out


def test_files_in_the_caches_are_found(empty_caches, output, prepared, monkeypatch, untraced):
    # The recipe asks for more disk than a machine that runs the tests need have.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**43, 2**40, 2**42))
    cached(empty_caches, "timm/vit_base_patch14_dinov2.lvd142m", "model.safetensors")
    cached(empty_caches, "timm/vit_large_patch14_dinov2.lvd142m", "pytorch_model.bin")
    cached(empty_caches, "stabilityai/sd-vae-ft-ema", "config.json", "diffusion_pytorch_model.safetensors")
    weights = empty_caches / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir(parents=True)
    torch.save({"w": torch.zeros(1)}, weights)
    np.savez(empty_caches / "reference.npz", mu=np.zeros(2), sigma=np.eye(2))
    study = config.load(
        "imagenet256", overrides=[f"data.path={prepared}", "data.image_size=64", "train.precision=bf16",
                                  "model.preset=SiT-S/2", "teacher.kwargs={img_size: 224, embed_dim: 48}",
                                  "train.batch_size=8", f"evaluate.reference={empty_caches / 'reference.npz'}"],
    )  # fmt: skip
    found = looked(study)
    assert [check for check in found.values() if not check.ok] == []
    assert "38 training images, 5 classes, 4x8x8" in found["data"].found
    # 4x4 tokens of the student against 16x16 of the teacher.
    assert "different, resampled" in found["networks"].found


def test_half_a_vae_is_missing(empty_caches, prepared, untraced):
    cached(empty_caches, "owner/vae", "diffusion_pytorch_model.safetensors")
    folder = empty_caches / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for vae, lacking in (("owner/vae", "config.json"), (folder, "diffusion_pytorch_model.safetensors")):
        found = looked(config.load("imagenet256", "smoke", [f"data.path={prepared}", f"sample.vae={vae}"]), "vanilla")
        assert not found["vae"].ok
        assert f"has no {lacking}" in found["vae"].found


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("settings", ["claims.early=7"], "does not keep"),
        ("data", ["train.batch_size=9"], "exceeds the 6 training images"),
        ("data", ["data.image_size=32"], "expected 64"),
        ("networks", ["model.patch=3"], "does not divide the side 8"),
        ("teacher weights", ["teacher.model=vit_bas_patch14_dinov2", "teacher.weights=hub"], "timm.list_models"),
        ("networks", ["teacher.kwargs.colour=1"], "colour"),
        ("networks", ["alignment.layer_pairs=[[1, 9]]"], "0, 1, 2, 3"),
        ("networks", ["alignment.heads=[0, 3]", "teacher.kwargs.num_heads=2"], "head 3"),
        ("sampler", ["sample.sampler=ddpm"], "euler, heun, sde"),
        (
            "sampler",
            ["sample={guidance: 2, guidance_low: 0.5001, guidance_high: 0.5002}"],
            "guidance 2 for t in [0.5001, 0.5002] meets none of the",
        ),
    ],
)
def test_each_mistake_is_a_problem_of_its_own(prepared, output, untraced, name, settings, words):
    small = [f"data.path={prepared}", "data.test_fraction=0.82", "train.batch_size=6", f"sample.vae={prepared}"]
    found = looked(config.load("imagenet256", "smoke", [*small, *settings]))[name]
    assert not found.ok
    assert words in found.found
    assert "\n" not in found.found


@pytest.mark.parametrize("damage", ["images/dataset.json", "vae-sd/00000/img-mean-std-00000000.npy"])
def test_a_damaged_folder_is_a_problem(prepared, output, damage):
    (prepared / damage).write_bytes(b"{")
    example, check = find_example(config.load("imagenet256", "smoke", [f"data.path={prepared}"]).data)
    assert not check.ok
    assert example == Example(8, 4, 1000, 64, 3)  # assumed from the settings


def test_images_are_counted_and_a_hub_name_is_missing_until_it_is_in_the_cache(tmp_path, monkeypatch, empty_caches):
    for label in ("cat", "dog"):
        (tmp_path / "folder" / "train" / label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "folder" / "train" / label / f"{i}.png")
    settings = config.DataSettings(kind="images", path=str(tmp_path / "folder"), image_size=32, test_fraction=0.2)
    example, check = find_example(settings)
    assert (example, check.ok) == (Example(32, 3, 2, 32, 3), True)
    assert "12 images (8 train, 1 validation, 3 test), 2 classes of 6 to 6 images, 3x32x32" in check.found
    assert not find_example(settings, 13)[1].ok

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    hub = config.load("cifar10").data
    assert (find_example(hub)[0], find_example(hub)[1].ok) == (Example(32, 3, 1000, 32, 3), False)
    (tmp_path / "datasets" / "uoft-cs___cifar10").mkdir(parents=True)
    assert find_example(hub)[1].ok


def test_mnist_has_its_size_without_its_package_too(mnist, monkeypatch):
    settings = config.load("mnist", "two-cores-14").data
    example, check = find_example(settings, 32)
    assert (example, check.ok) == (Example(14, 1, 10, 14, 1), True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_example(settings)[0] == example
    example, check = find_example(config.DataSettings(kind="mnist"))
    assert (example, check.ok, check.kind) == (Example(28, 1, 10, 28, 1), False, dry_run.MISSING)
    assert "pip install -e '.[data]'" in check.found


def test_teacher_weights_are_looked_for_and_pretraining_is_announced(tmp_path, make_study, output, untraced):
    study = make_study(f"teacher.weights={tmp_path / 'teacher.safetensors'}")
    assert not is_ok(study, "teacher weights", "repa")
    (tmp_path / "teacher.safetensors").write_bytes(b"not opened")
    assert is_ok(study, "teacher weights", "repa")
    assert "teacher weights" not in looked(study, "vanilla")
    study = make_study("teacher.weights=pretrain")
    assert "trained first, 20 steps" in looked(study, "repa")["teacher weights"].found
    runs.teacher_path(study, study.teacher).parent.mkdir(parents=True)
    runs.teacher_path(study, study.teacher).write_bytes(b"not opened")
    assert "teacher.safetensors" in looked(study, "repa")["teacher weights"].found


def test_an_existing_run_says_where_it_would_go_on(tiny, make_study, output, untraced):
    assert "begin at step 0" in looked(tiny, "holistic")["run"].found
    fit(Run(tiny, "holistic", 0), progress=False)
    assert "complete" in looked(tiny, "holistic")["run"].found
    assert "begin at step 8, shared with arm holistic" in looked(tiny)["run"].found
    longer = make_study("train.steps=20")
    assert "go on from step 12 of 20" in looked(longer, "holistic")["run"].found
    Run(tiny, "holistic", 0).checkpoint_path(12).write_bytes(b"damaged")
    assert not is_ok(longer, "run", "holistic")


def test_a_switch_that_never_comes_and_a_teacher_that_sees_less_are_said(make_study, output, untraced):
    late = ["arms.haste.termination.at=4", "train.steps=4", "train.keep=[4]", "claims.early=[4]"]
    found = looked(make_study(*late))
    assert "aligned throughout: the switch at 4 lies beyond the last step" in found["settings"].found
    assert "shrunk" not in found["networks"].found
    found = looked(make_study("teacher.kwargs.img_size=4"))
    assert "it sees images of 8 pixels shrunk, see teacher.kwargs.img_size" in found["networks"].found


def test_a_full_disk_is_a_problem_before_training(tiny, output, untraced, monkeypatch):
    found = estimate.estimate(tiny.run("haste"), Example(8, 1, 10, 8, 1))
    needed = int(found["checkpoint_bytes"].sum() + found["writing_bytes"].max())
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(10 * needed, 0, free))
        assert is_ok(tiny, "disk") == (free == needed)


def test_a_place_that_cannot_be_written_is_a_problem_before_training(tiny, output, untraced, monkeypatch):
    monkeypatch.setenv("HASTE_OUTPUT", "/proc/1/x")
    found = looked(tiny, "vanilla")["disk"]
    assert not found.ok
    assert re.match(r"nothing can be written to /proc/1 \([^)]*\); expected HASTE_OUTPUT=", found.found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_a_problem(make_study, output, untraced):
    assert not is_ok(make_study("train.precision=fp16"), "device", "vanilla")
    assert is_ok(make_study("train.precision=bf16"), "device", "vanilla")
    with pytest.raises(HasteError, match=r"arm 'vanilla': train.precision is fp16 and there is no GPU"):
        dry_run.check_study(make_study("train.precision=fp16"))
    assert len(dry_run.check_study(make_study("train.precision=fp16"), allowed=[dry_run.DEVICE])) == 1


def test_a_gpu_that_is_too_small_is_a_problem(tiny, monkeypatch, output, untraced):
    properties = namedtuple("Properties", "total_memory")
    needed = int(estimate.estimate(tiny.run("haste"), Example(8, 1, 10, 8, 1))["memory_bytes"].max())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    for size in (needed, needed - 1):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=size: properties(n))
        assert is_ok(tiny, "memory") == (size == needed)


def test_a_text_model_needs_its_contexts(tmp_path, make_study, output, untraced):
    def ok(width):
        path = f"data.contexts={tmp_path / 'text.safetensors'}"
        return is_ok(make_study("model.kind=mmdit", f"model.context_width={width}", path), "text tokens", "vanilla")

    assert not ok(12)
    write_parts(tmp_path / "text.safetensors", [torch.zeros(11, 3, 12)], 11)
    assert (ok(12), ok(16)) == (True, False)


def test_a_law_that_cannot_be_is_the_problem_it_is_and_no_fault_of_the_teacher(output):
    found = looked(config.load("textured", None, ["data.image_size=4"]), "holistic")
    assert [name for name, check in found.items() if not check.ok] == ["data"]
    assert "templates of 8 pixels in images of data.image_size 4" in found["data"].found
