"""The dry run: what it says of data, weights, teacher, runs and disk, and its arithmetic against published numbers."""

from __future__ import annotations

import io
import json
import shutil
import socket
import time
from collections import namedtuple
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from haste_core.study.preflight import checks, estimates, readiness, tracing
from haste_core.study.preflight.tracing import Example
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from haste_core import training
from haste_core.state import create
from haste_core.study import config, preflight
from haste_core.study.runs import Run

IMAGENET = Example(32, 4, 1000, 256, 3)
Usage = namedtuple("Usage", "total used free")


def estimated(study, arm, example=IMAGENET):
    run = study.run(arm)
    teacher = tracing.teacher_of(run) if run.alignment.active else None
    nets = tracing.networks(run, tracing.student_of(run, example), teacher)
    return estimates.estimate(run, example, nets)


def states(found):
    return {check.name: check.state for check in found.checks}


def text_of(found, name):
    return next(check.found for check in found.checks if check.name == name)


# -- arithmetic -------------------------------------------------------------------------------------------------------


# Peebles and Xie, arXiv 2212.09748: millions of parameters and G of multiply-adds at 256 and at 512 pixels.
@pytest.mark.parametrize(
    ("profile", "example", "millions", "multiply_adds"),
    [
        ("sit-b", IMAGENET, 130, 23.01),
        ("sit-l", IMAGENET, 458, 80.71),
        (None, IMAGENET, 675, 118.64),
        ("dit-xl", IMAGENET, 675, 118.64),
        (None, Example(64, 4, 1000, 512, 3), 675, 524.60),
    ],
)
def test_parameters_and_operations_are_the_published_ones(profile, example, millions, multiply_adds):
    found = estimated(config.load("imagenet256", profile), "vanilla", example)
    assert round(found.student / 1e6) == millions
    assert found.forward / 2e9 == pytest.approx(multiply_adds, rel=5e-4)


def test_phase_two_costs_what_vanilla_costs():
    study = config.load("imagenet256", "sit-b")
    haste, vanilla = estimated(study, "haste"), estimated(study, "vanilla")
    assert haste.step_flops[2] == vanilla.step_flops[2]
    assert haste.memory[2] == vanilla.memory[2]
    assert haste.checkpoint[2] == vanilla.checkpoint[2]
    assert set(vanilla.steps) == {2}
    assert haste.steps == {1: 100_000, 2: 300_000}


def test_phase_one_adds_teacher_projector_and_attention_logits():
    study = config.load("imagenet256", "sit-b")
    found, tokens, batch = estimated(study, "haste"), 256, 256
    projector = 2 * tokens * (768 * 2048 + 2048 * 2048 + 2048 * 768)
    logits = 2 * 12 * tokens * tokens * 64  # 12 heads of width 64 on both sides
    # The teacher goes forward alone, and so do its logits; the rest goes back through inputs and weights too.
    added = found.teacher_forward + 3 * projector + len(study.alignment.layer_pairs) * (1 + 3) * logits
    assert found.step_flops[1] - found.step_flops[2] == batch * added


def test_operations_of_one_attention_and_mlp_by_hand():
    """A block of width D on N tokens: 12 N D^2 + 2 N^2 D multiply-adds, and 6 D^2 for the modulation."""
    sizes = ["model.preset=null", "model.width=768", "model.heads=12"]
    six, seven = (
        estimated(config.load("imagenet256", "sit-b", [*sizes, f"model.depth={depth}"]), "vanilla") for depth in (6, 7)
    )
    n, d = 256, 768
    assert (seven.forward - six.forward) // 2 == 12 * n * d**2 + 2 * n**2 * d + 6 * d**2


@pytest.mark.parametrize(("kind", "precision"), [("sit", "no"), ("dit", "fp16"), ("mmdit", "bf16")])
def test_few_traced_blocks_stand_for_all(make_study, kind, precision):
    study = make_study("model.depth=5", f"model.kind={kind}", f"train.precision='{precision}'")
    run = study.run("haste")
    example = checks.DIGITS
    nets = tracing.networks(run, tracing.student_of(run, example), tracing.teacher_of(run))
    with tracing.without_contents(nets) as shapes:
        for phase in (1, 2):
            few, all_of_them = (f(shapes, example, phase, precision) for f in (tracing.cost, tracing.trace))
            assert few == all_of_them
    assert len(nets.student.blocks) == 5


def measured_peak(state):
    """Bytes that a step of a warmed-up run takes at most beyond what lies there between steps."""
    for _ in range(2):
        training.train_step(state)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        training.train_step(state)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(taken.max())


@pytest.mark.parametrize(("arm", "phase"), [("vanilla", 2), ("holistic", 1)])
@pytest.mark.parametrize("batch", [2, 128])
def test_memory_is_what_a_step_takes_on_the_cpu(make_study, output, arm, phase, batch):
    """batch 2: gradients decide; batch 128: activations. One block's working memory comes on top."""
    wide = ["model.depth=6", "model.width=128", f"train.batch_size={batch}"]
    study = make_study(*wide)
    run = study.run(arm)
    found = estimated(study, arm, checks.DIGITS).memory[phase]
    state = create(run, 0, training.find_teacher(study) if phase == 1 else None)
    assert 1 <= measured_peak(state) / max(found.activations, found.gradients) < 1.15
    assert (found.activations > found.gradients) == (batch == 128)
    trained = [p for p in state.parameters()]
    assert found.weights == sum(p.nbytes for p in trained)
    assert found.average == sum(p.nbytes for p in state.ema.parameters())
    moments = [s[key] for o in state.optimizers for s in o.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert found.optimizer == sum(m.nbytes for m in moments)


@pytest.mark.parametrize("batch", [4, 256])
def test_gradients_of_one_micro_batch_lie_there_during_the_next(make_study, output, batch):
    wide = ["model.depth=6", "model.width=128", f"train.batch_size={batch}", "train.accumulate=2"]
    study = make_study(*wide)
    found = estimated(study, "vanilla", checks.DIGITS).memory[2]
    assert {"activations", "gradients"} <= set(found.at_the_peak)
    state = create(study.run("vanilla"), 0, None)
    assert 1 <= measured_peak(state) / (found.activations + found.gradients) < 1.15


def test_checkpoints_have_the_size_that_was_foretold(tiny, output):
    run = Run(tiny, "haste", 0)
    training.fit(run, progress=False)
    found = estimated(tiny, "haste", checks.DIGITS)
    for step, phase in ((8, 1), (12, 2)):
        size = run.checkpoint_path(step).stat().st_size
        # Headers, positions, the data order and random states come on top of a tiny network's weights.
        assert 0 < size - found.checkpoint[phase] < 150_000
    assert found.kept == {1: 2, 2: 1}


def test_hours_are_operations_over_the_rate():
    found = estimated(config.load("imagenet256", "sit-b"), "haste")
    hours = found.hours(1e12, 0.5)
    assert sum(hours.values()) == pytest.approx(found.flops / 0.5e12 / 3600)
    assert hours[2] / hours[1] == pytest.approx(3 * found.step_flops[2] / found.step_flops[1])


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"sampler": "sde", "solver_steps": 250}, 250),
        ({"sampler": "heun", "solver_steps": 50}, 99),
        ({"sampler": "sde", "solver_steps": 250, "guidance": 2, "guidance_high": 0.6}, 400),
    ],
)
def test_drawing_counts_solver_calls_and_guided_steps_twice(settings, calls):
    study = config.load("imagenet256").model_copy(update={"sample": config.Sample(**settings)})
    assert estimates.scoring_flops(Run(study, next(iter(study.arms)), 0), 10) == 50_000 * calls * 10


# -- checks -----------------------------------------------------------------------------------------------------------


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


def test_a_study_without_downloads_is_ready_and_nothing_is_written(tiny, output, capsys):
    found = preflight.check(tiny, "haste", 0)
    assert set(states(found).values()) == {"ok"}
    assert (found.ready, found.status) == (True, 0)
    assert list(output.iterdir()) == []
    preflight.show(found)
    printed = capsys.readouterr().out
    assert "nothing is missing" in printed
    assert "not a measurement" in printed
    assert "40% (an assumption)" in printed


def test_a_bare_machine_misses_data_weights_and_reference_and_says_where_they_go(empty_caches, output, capsys):
    study = config.load("imagenet256")
    begun = time.process_time()
    found = preflight.check(study, "haste", 0)
    assert time.process_time() - begun < 15
    missing = {name for name, state in states(found).items() if state == "missing"}
    assert missing == {"data", "teacher weights", "vae", "inception", "dinov2", "reference"}
    assert found.status == 2
    assert "timm/vit_base_patch14_dinov2.lvd142m" in text_of(found, "teacher weights")
    assert "teacher.weights=PATH" in text_of(found, "teacher weights")
    assert str(empty_caches / "torch") in text_of(found, "inception")
    assert found.estimate is not None
    preflight.show(found)
    assert "6 missing" in capsys.readouterr().out


def test_what_is_in_the_caches_is_found(empty_caches, output, prepared, monkeypatch):
    # The recipe asks for 71 GiB, which a machine that runs the tests need not have.
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2**43, used=2**40, free=2**42))
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
    found = preflight.check(study, "haste", 0)
    assert [c for c in found.checks if c.state != "ok"] == []
    assert "40 pairs, 38 of them for training, 5 classes, latents 4x8x8 of 64 pixels" in text_of(found, "data")
    # 4x4 tokens of the student against 16x16 of the teacher.
    assert "different, resampled" in text_of(found, "alignment")


def test_half_a_vae_is_missing(empty_caches):
    cached(empty_caches, "stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors")
    study = config.load("imagenet256")
    assert checks.vae(study.data, study.sample).state == "missing"
    folder = empty_caches / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    found = checks.vae(study.data, study.sample.model_copy(update={"vae": str(folder)}))
    assert found.state == "problem"
    assert "diffusion_pytorch_model.safetensors" in found.found


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("settings", ["claims.early=7"], "does not keep"),
        ("data", ["train.batch_size=9"], "exceeds the 6 training images"),
        ("data", ["data.image_size=32"], "have 64"),
        ("model", ["model.patch=3"], "does not divide the size 8"),
        ("teacher weights", ["teacher.model=vit_bas_patch14_dinov2", "teacher.weights=hub"], "timm knows no"),
        ("teacher", ["teacher.kwargs.colour=1"], "colour"),
        ("alignment", ["alignment.layer_pairs=[[1, 9]]"], "possible: 0, 1, 2, 3"),
        ("alignment", ["alignment.heads=[0, 3]", "teacher.kwargs.num_heads=2"], "head 3"),
        ("sampler", ["sample.sampler=ddpm"], "euler, heun, sde"),
    ],
)
def test_each_mistake_is_a_problem_of_its_own(prepared, output, name, settings, words):
    small = [f"data.path={prepared}", "data.test_fraction=0.82", "train.batch_size=7", f"sample.vae={prepared}"]
    found = preflight.check(config.load("imagenet256", "smoke", [*small, *settings]), "haste", 0)
    assert states(found)[name] == "problem"
    assert words in text_of(found, name)
    assert "\n" not in text_of(found, name)
    assert found.status == 2


@pytest.mark.parametrize("damage", ["dataset.json", "latent"])
def test_a_damaged_folder_is_a_problem(prepared, output, damage):
    if damage == "dataset.json":
        (prepared / "images" / "dataset.json").write_text("{")
    else:
        (prepared / "vae-sd" / "00000" / "img-mean-std-00000000.npy").write_bytes(b"no array")
    check, example = checks.data(config.load("imagenet256", "smoke", [f"data.path={prepared}"]).data, 4)
    assert check.state == "problem"
    assert example == Example(8, 4, 1000, 64, 3)  # what the settings suggest


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
        settings = config.Data(kind="images", path=str(tmp_path / folder), image_size=32)
        check, example = checks.data(settings, 4)
        assert check.state == "ok"
        assert f"{count} training images, {classes} classes" in check.found
        assert example == Example(32, 3, classes, 32, 3)
        assert checks.data(settings, count + 1)[0].state == "problem"


def test_a_hub_name_is_missing_until_it_is_in_the_cache(tmp_path, monkeypatch, empty_caches):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    settings = config.load("cifar10").data
    check, example = checks.data(settings, 10**6)
    assert check.state == "missing"
    assert example == Example(32, 3, 1000, 32, 3)
    (tmp_path / "datasets" / "uoft-cs___cifar10").mkdir(parents=True)
    assert checks.data(settings, 128)[0].state == "ok"
    wrong = settings.model_copy(update={"path": "no/such/folder"})
    assert checks.data(wrong, 128)[0].state == "problem"


def test_local_teacher_weights_are_looked_for(tmp_path, make_study, output):
    study = make_study(f"teacher.weights={tmp_path / 'teacher.safetensors'}")
    assert states(preflight.check(study, "repa", 0))["teacher weights"] == "missing"
    (tmp_path / "teacher.safetensors").write_bytes(b"not opened")
    assert states(preflight.check(study, "repa", 0))["teacher weights"] == "ok"
    assert "teacher weights" not in states(preflight.check(study, "vanilla", 0))


def test_a_pretrained_teacher_is_foretold_and_then_found(make_study, output):
    from haste_core.study import preparation

    study = make_study("teacher.weights=pretrain")
    assert "trained first, 20 steps" in text_of(preflight.check(study, "repa", 0), "teacher weights")
    preparation.prepare_teacher(study)
    assert "teacher.safetensors" in text_of(preflight.check(study, "repa", 0), "teacher weights")


@pytest.mark.parametrize(
    ("arrays", "state"), [({"mu": 1, "sigma": 1}, "ok"), ({"arr_0": 1}, "ok"), ({"labels": 1}, "problem")]
)
def test_a_reference_must_hold_statistics_or_images(tmp_path, arrays, state):
    np.savez(tmp_path / "reference.npz", **arrays)
    assert checks.reference(str(tmp_path / "reference.npz")).state == state
    (tmp_path / "damaged.npz").write_bytes(b"PK broken")
    assert checks.reference(str(tmp_path / "damaged.npz")).state == "problem"


def test_an_existing_run_says_where_it_would_go_on(tiny, make_study, output):
    assert "begin at step 0" in text_of(preflight.check(tiny, "holistic", 0), "run")
    training.fit(Run(tiny, "holistic", 0), progress=False)
    assert "complete" in text_of(preflight.check(tiny, "holistic", 0), "run")
    assert "begin at step 8, shared with arm holistic" in text_of(preflight.check(tiny, "haste", 0), "run")
    longer = make_study("train.steps=20")
    assert "go on from step 12 of 20" in text_of(preflight.check(longer, "holistic", 0), "run")
    Run(tiny, "holistic", 0).checkpoint_path(12).write_bytes(b"damaged")
    assert states(preflight.check(longer, "holistic", 0))["run"] == "problem"


def test_a_full_disk_is_a_problem_before_training(tiny, output, monkeypatch):
    needed = estimated(tiny, "haste", checks.DIGITS).disk
    for free, state in ((needed + 1, "ok"), (needed - 1, "problem")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(10 * needed, 0, free))
        assert states(preflight.check(tiny, "haste", 0))["disk"] == state


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_a_problem(make_study, output):
    assert states(preflight.check(make_study("train.precision=fp16"), "vanilla", 0))["device"] == "problem"
    assert states(preflight.check(make_study("train.precision=bf16"), "vanilla", 0))["device"] == "ok"


def test_a_gpu_that_is_too_small_is_a_problem(monkeypatch):
    found = estimated(config.load("imagenet256"), "haste")
    properties = namedtuple("Properties", "total_memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for size, state in ((80, "problem"), (141, "ok")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=size: properties(n * 2**30))
        assert readiness._memory(found).state == state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpus_matrix_rate_is_plausible():
    assert 1e12 < estimates.matrix_rate("fp16") < 1e16


def test_a_text_model_needs_its_contexts(tmp_path, make_study, output):
    from haste_core.study.data.contexts import write

    study = make_study("model.kind=mmdit", "model.context_width=12", f"data.contexts={tmp_path / 'text.safetensors'}")
    assert states(preflight.check(study, "haste", 0))["text tokens"] == "missing"
    write(tmp_path / "text.safetensors", torch.zeros(10, 3, 12), torch.zeros(3, 12))
    assert states(preflight.check(study, "haste", 0))["text tokens"] == "ok"
    wider = make_study("model.kind=mmdit", "model.context_width=16", f"data.contexts={tmp_path / 'text.safetensors'}")
    assert states(preflight.check(wider, "haste", 0))["text tokens"] == "problem"
