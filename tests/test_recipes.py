"""The recipes of the paper's own scale, held against its tables, and their code path at toy size."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import machine
from haste_core.study import config
from haste_core.study.estimate import Example, networks_of
from haste_core.study.runs import Run
from haste_core.study.train import fit

ARMS = {"vanilla": (0, 0), "repa": (0.5, 0), "atta": (0, 0.5), "holistic": (0.5, 0.5), "haste": (0.5, 0.5)}
XL = [(4, 8), (5, 9), (6, 10), (7, 11)]
# Table 16, arXiv 2505.16792, column by column: blocks, width, heads, aligned depth, pairs, tau, sampler.
TABLE_16 = {
    "sit-b": ("sit", 12, 768, 12, 5, [(2, 7), (3, 9), (4, 11)], 100_000, "sde"),
    "sit-l": ("sit", 24, 1024, 16, 8, XL, 250_000, "sde"),
    None: ("sit", 28, 1152, 16, 8, XL, 250_000, "sde"),
    "dit-xl": ("dit", 28, 1152, 16, 8, XL, 250_000, "ddpm"),
}
# Iterations at which the paper gives FID (Sec. 3, Tables 1, 3, 4).
ROWS = {
    "sit-b": {100_000, 200_000, 400_000},
    "sit-l": {100_000, 200_000, 400_000},
    None: {100_000, 200_000, 250_000, 400_000, 500_000},
    "dit-xl": {400_000},
}
# Table 15: guidance scale and upper end of the interval, and the steps of 400, 500 and 600 epochs.
TABLE_15 = {
    "guided": (1.825, 0.6, 500_000),
    "guided-400ep": (1.675, 0.7, 2_000_000),
    "guided-500ep": (1.65, 0.72, 2_500_000),
    "guided-600ep": (1.67, 0.7, 3_000_000),
}
BOTH = ("imagenet256", "imagenet512")
EVERY = [(name, profile) for name in BOTH for profile in (None, *config.load(name).profiles)]


@pytest.mark.parametrize("profile", TABLE_16)
def test_sizes_layers_tau_and_sampler_are_those_of_table_16(profile):
    study = config.load("imagenet256", profile)
    run = study.run("haste")
    model, alignment = run.model, run.alignment
    found = (model.kind, model.depth, model.width, model.heads, alignment.depth, alignment.layer_pairs, run.tau)
    assert (*found, study.sample.sampler) == TABLE_16[profile]
    assert (model.patch, model.mlp_ratio, model.qk_norm, alignment.projector_width) == (2, 4.0, False, 2048)
    assert study.sample.solver_steps == 250
    assert set(run.train.kept_steps) >= ROWS[profile]


@pytest.mark.parametrize("name", BOTH)
def test_optimisation_is_that_of_table_16(name):
    study = config.load(name)
    train, evaluate = study.train, study.evaluate
    assert (train.batch_size, train.lr, train.betas, train.weight_decay) == (256, 1e-4, (0.9, 0.999), 0)
    assert (train.clip_norm, train.ema_decay, train.precision, train.label_dropout) == (1.0, 0.9999, "fp16", 0.1)
    assert (evaluate.suite, evaluate.n, evaluate.labels) == ("adm", 50_000, "random")
    assert (study.teacher.model, study.teacher.resize) == ("vit_base_patch14_dinov2.lvd142m", "reference")
    assert study.sample.vae == "stabilityai/sd-vae-ft-ema"


@pytest.mark.parametrize(("name", "profile"), EVERY)
def test_every_profile_has_the_papers_arms_and_a_kept_step_for_early_gains(name, profile):
    study = config.load(name, profile)
    study.check_claims()
    weights = {arm: study.run(arm).alignment for arm in study.arms}
    assert {arm: (a.lambda_feature, a.lambda_attention) for arm, a in weights.items()} == ARMS
    assert study.run("holistic").tau == math.inf
    assert 0 < min(study.claims.early) <= study.run("haste").tau < study.train.steps
    # What haste shares with holistic is trained once.
    assert study.donor("haste") == "holistic"


@pytest.mark.parametrize(("name", "image", "grid"), [("imagenet256", 256, 16), ("imagenet512", 512, 32)])
def test_the_teachers_token_grid_is_the_students(name, image, grid):
    study = config.load(name)
    student, haste = networks_of(study.run("haste"), Example(image // 8, 4, 1000, image, 3))
    teacher = haste.teacher
    assert student.grid == teacher.grid == (grid, grid)
    assert teacher.image_size == (image * 7 // 8, image * 7 // 8)
    assert not teacher.antialias


@pytest.mark.parametrize("profile", TABLE_15)
def test_guided_profiles_draw_otherwise_and_train_the_same_run(profile):
    base, guided = config.load("imagenet256"), config.load("imagenet256", profile)
    assert guided.run("haste").hash == base.run("haste").hash
    assert guided.evaluation_hash != base.evaluation_hash
    sample = guided.sample
    assert (sample.guidance, sample.guidance_high, guided.train.steps) == TABLE_15[profile]
    assert (sample.sampler, sample.solver_steps, sample.guidance_low) == ("sde", 250, 0)


def test_512_switches_at_60_epochs_and_is_scored_at_80_and_100_with_table_13s_guidance():
    study = config.load("imagenet512")
    assert study.run("haste").tau == 60 * 5000
    assert {400_000, 500_000} <= set(study.train.kept_steps)
    assert (study.sample.guidance, study.sample.guidance_low, study.sample.guidance_high) == (1.25, 0, 1)
    assert config.load("imagenet512", "unguided").sample.guidance == 1


def test_nearly_all_images_train_the_paper_scale():
    # 1,281,167 images less three in a thousand: an epoch of 256 keeps within twenty steps of the paper's.
    data = config.load("imagenet256").data
    rest = 1_281_167 - math.ceil(1_281_167 * data.test_fraction)
    training = rest - math.ceil(rest * data.validation_fraction)
    assert abs(training // 256 - 5004) < 20
    assert rest - training >= config.load("imagenet256").run("haste").termination.n  # what a trigger looks at


@pytest.fixture
def prepared(tmp_path):
    """A folder in REPA's layout: 24 images of 64 pixels in 2 classes, with latents of 4x8x8."""
    machine.write_pairs(tmp_path / "prepared", Example(8, 4, 2, 64, 3), 24)
    return tmp_path / "prepared"


@pytest.fixture
def decoder(tmp_path):
    """The folder of a tiny VAE of 4 channels and 8 pixels to a latent, with drawn weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("name", ["imagenet256", pytest.param("imagenet512", marks=pytest.mark.slow)])
def test_the_smoke_profile_trains_through_both_phases_on_a_prepared_folder(name, prepared, decoder, output):
    study = config.load(name, "smoke", [f"data.path={prepared}", f"sample.vae={decoder}"])
    run = Run(study, "haste", 0)
    fit(run, progress=False)
    assert run.missing_steps() == []
    phases = {line["step"]: line["phase"] for line in run.metrics()}
    assert phases == {2: 1, 4: 1, 6: 2}
    first, last = run.metrics()[0], run.metrics()[-1]
    assert {"feature", "attention"} <= set(first)
    assert not {"feature", "attention"} & set(last)
    # Four channels and 2 classes: latents came in, not images.
    weights = run.load(6, prefixes=("ema.x_embedder", "ema.y_embedder"))[0]
    assert weights["ema.x_embedder.proj.weight"].shape == (32, 4, 2, 2)
    assert len(weights["ema.y_embedder.embedding_table.weight"]) == 3
