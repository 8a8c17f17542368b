"""Samplers against closed forms, guidance, samples that depend on label and seed alone, and what a study asks for."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from haste_core import sampling
from haste_core.errors import HasteError
from haste_core.models import build
from haste_core.sampling import Sampler, SeededNoise
from haste_core.study import config, latents
from haste_core.study.presets import SAMPLERS

MEAN, STD = 0.7, 0.4
SMALL = {"image_size": 8, "channels": 1, "classes": 10, "depth": 2, "width": 16, "heads": 2, "patch": 2}


def gaussian(x, t):
    """The exact velocity E[eps - x_0 | x_t] where the data are N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x - (1 - t) * MEAN
    return t / variance * centred - (MEAN + (1 - t) * STD**2 / variance * centred)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- integration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "order"), [(sampling.euler, 1), (sampling.heun, 2)])
def test_ode_samplers_converge_to_the_exact_solution_at_their_order(sampler, order):
    z = noise(200).double()  # the flow takes z at t=1 to MEAN + STD z at t=0
    errors = [float((sampler(gaussian, z, n) - (MEAN + STD * z)).abs().max()) for n in (100, 200, 400)]
    assert errors[-1] < 0.02
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert_close(sampler(lambda x, _: torch.full_like(x, 3.0), z, 4), z - 3)  # exact where the path is straight


def test_sde_takes_noise_to_the_data_distribution():
    z = noise(40_000, 1)
    increments = torch.Generator().manual_seed(1)
    drawn = sampling.sde(gaussian, z, 250, lambda _, like: torch.randn(like.shape, generator=increments))
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(drawn.std()) == pytest.approx(STD, rel=0.03)
    # With diffusion 2 sigma_t dt, the standardised process forgets its start at the rate sigma_t / variance.
    t = np.linspace(0.04, 1, 2000)
    forgotten = np.trapezoid(t / ((1 - t) ** 2 * STD**2 + t**2), t)
    correlation = np.corrcoef(z.flatten(), drawn.flatten())[0, 1]
    assert correlation == pytest.approx(np.exp(-forgotten), abs=0.03)


TIMES = {
    "euler": (4, "uniform", [1.0, 0.75, 0.5, 0.25]),
    "euler on a quadratic grid": (4, "quadratic", [1.0, 0.5625, 0.25, 0.0625]),
    "heun": (4, "uniform", [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),  # its last step is not corrected
    "sde": (5, "uniform", [1.0, 0.76, 0.52, 0.28, 0.04]),
}


@pytest.mark.parametrize("name", TIMES)
def test_integration_is_in_float64_from_one_to_zero_by_the_named_sampler(name):
    steps, grid, expected = TIMES[name]
    sampler, times, dtypes, asked = name.split()[0], [], set(), []

    def recording(x, t):
        times.append(t)
        dtypes.add(x.dtype)
        return gaussian(x, t)

    def replay(step, like):
        asked.append(step)
        return noise(*like.shape, seed=step + 5).to(like)

    found = sampling.integrate(recording, noise(4), Sampler(sampler, steps, grid), replay)
    assert times == pytest.approx(expected)
    assert dtypes == {found.dtype} == {torch.float64}
    # The noise of each step once, and none on the last.
    assert asked == (list(range(steps - 1)) if sampler == "sde" else [])
    more = [replay] if sampler == "sde" else [grid]
    assert torch.equal(found, getattr(sampling, sampler)(gaussian, noise(4), steps, *more))


# -- guidance ---------------------------------------------------------------------------------------------------------


class LabelOutput(nn.Module):
    """A velocity equal to the label plus t, or for "dit" such a noise, and 100 x label as its variance."""

    null_label = 10

    def __init__(self, kind="sit", channels=4):
        super().__init__()
        self.scale, self.kind, self.channels = nn.Parameter(torch.ones(())), kind, channels
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t.unique().tolist(), x.dtype))
        label = y.to(x)[:, None, None, None].expand(-1, self.channels, 2, 2)
        made = [label + t[:, None, None, None]] + [100 * label] * (self.kind == "dit")
        return torch.cat(made, dim=1) * self.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_guidance_extrapolates_from_the_null_label_inside_its_interval(dtype):
    model = LabelOutput().to(dtype)
    velocity = sampling.guided(model, torch.tensor([2, 5]), 10, scale=3.0, low=0.25, high=0.75)
    x = torch.zeros(2, 4, 2, 2, dtype=torch.float64)
    for t, factor in [(0.125, 1), (0.25, 3), (0.5, 3), (0.75, 3), (0.875, 1)]:
        model.calls.clear()
        made = velocity(x, t)
        assert made[:, 0, 0, 0].tolist() == pytest.approx([10 + factor * (y - 10) + t for y in (2, 5)], abs=0.2)
        assert made.dtype == torch.float64
        # Outside the interval the model is called once, with its own labels.
        assert model.calls == [(4 if factor == 3 else 2, [t], dtype)]
    model.calls.clear()
    unguided = sampling.guided(model.float(), torch.tensor([2, 5]), 10)(x, 0.5)
    assert unguided[:, 0, 0, 0].tolist() == [2.5, 5.5]
    assert [rows for rows, _, _ in model.calls] == [2]


@torch.no_grad()
def test_of_a_dit_the_noise_is_guided_and_the_variance_is_not_and_of_any_model_the_leading_channels():
    model = LabelOutput("dit")
    sample = Sampler("ddpm", guidance=3.0, guidance_low=0.2, guidance_high=0.5)
    output = sampling.guided_by(model, torch.tensor([2]), sample)
    for timestep, factor in [(199, 1), (200, 3), (500, 3), (501, 1)]:
        model.calls.clear()
        made = output(torch.zeros(1, 4, 2, 2, dtype=torch.float64), float(timestep))
        assert made[0, :, 0, 0].tolist() == pytest.approx([10 + factor * (2 - 10) + timestep] * 4 + [200.0] * 4)
        assert [call[:2] for call in model.calls] == [(2 if factor == 3 else 1, [float(timestep)])]
    output = sampling.guided_by(LabelOutput(), torch.tensor([4]), Sampler(guidance=2.0, guidance_channels=3))
    expected = [10 + 2 * (4 - 10) + 0.5] * 3 + [4.5]
    assert output(torch.zeros(1, 4, 2, 2).double(), 0.5)[0, :, 0, 0].tolist() == pytest.approx(expected)


# -- drawing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(randomise):
    return randomise(build("sit", 0, **SMALL), std=0.2).eval()


@pytest.fixture
def dit(randomise):
    return randomise(build("dit", 0, **SMALL), std=0.05).eval()


@pytest.mark.parametrize("sampler", ["heun", "sde", "ddpm"])
def test_a_sample_depends_on_its_label_and_seed_alone(model, dit, sampler):
    labels, seeds, order = torch.tensor([3, 1, 4, 1, 5]), [10, 11, 12, 13, 14], [4, 0, 3, 1, 2]
    draw = partial(sampling.draw, dit if sampler == "ddpm" else model)

    def sample(batch):
        return Sampler(sampler, solver_steps=4, guidance=1.5, batch_size=batch)

    together = draw(labels, seeds, sample(5))
    assert (together.shape, together.dtype) == ((5, 1, 8, 8), torch.float32)
    for batch in (2, 3):
        assert_close(draw(labels, seeds, sample(batch)), together, atol=1e-5, rtol=1e-4)
    shuffled = draw(labels[order], [seeds[i] for i in order], sample(3))
    assert_close(shuffled, together[order], atol=1e-5, rtol=1e-4)
    assert (together[1] - together[3]).abs().max() > 0.1  # the same label, another seed


def test_draw_takes_a_dit_through_ancestral_sampling_with_one_call_outside_the_interval(dit):
    labels, seeds, calls = torch.tensor([3, 1]), [10, 11], []
    drawn = sampling.draw(dit, labels, seeds, Sampler("ddpm", solver_steps=6))
    source = SeededNoise(seeds)

    def network(x, t):
        return dit(x.float(), torch.full((2,), t), labels).double()

    with torch.no_grad():
        expected = sampling.ancestral(network, source.start((1, 8, 8)), 6, source)
    assert torch.equal(drawn, expected.float())
    dit.register_forward_hook(lambda module, inputs, output: calls.append((len(inputs[0]), float(inputs[1][0]))))
    sampling.draw(dit, labels, seeds, Sampler("ddpm", solver_steps=5, guidance=2.0, guidance_high=0.6))
    assert calls == [(2, 999), (2, 749), (4, 500), (4, 250), (4, 0)]


def test_seeded_noise_is_the_same_to_the_bit_in_any_batch():
    both, alone = SeededNoise([5, 9]), SeededNoise([9])
    assert torch.equal(both.start((1, 4, 4))[1:], alone.start((1, 4, 4)))
    for step in range(3):
        like = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
        increments = both(step, like)
        assert increments.dtype == torch.float64
        assert torch.equal(increments[1:], alone(step, like[:1]))
        assert not torch.equal(increments[0], increments[1])


def test_images_that_are_not_finite_are_never_given_out(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(float("nan"))
    quick = Sampler(sampler="euler", solver_steps=2, batch_size=4)
    with pytest.raises(HasteError, match="haste seed 1 step 8: 4 of 4 drawn images have values that are not finite"):
        sampling.draw(broken, torch.arange(6), range(6), quick, "haste seed 1 step 8")


def test_labels_are_balanced_or_drawn_from_a_seed_and_as_many_as_seeds(model):
    assert sampling.sample_labels(25, 10, "balanced", 0).tolist() == [*range(10), *range(10), *range(5)]
    with pytest.warns(UserWarning, match="3 images with balanced labels show the first 3 of 10 classes alone"):
        assert sampling.sample_labels(3, 10, "balanced", 0).tolist() == [0, 1, 2]
    drawn = [sampling.sample_labels(1000, 10, "random", seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].unique().tolist() == list(range(10))
    with pytest.raises(HasteError, match="3 labels for 2 seeds"):
        sampling.draw(model, torch.zeros(3, dtype=torch.int64), [0, 1], Sampler())


def test_uint8_rule_gives_every_level_back_and_clips():
    levels = torch.arange(256)
    assert torch.equal(sampling.to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert sampling.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("kind", "sampler", "steps", "words"),
    [("dit", "euler", 5, r"'euler' does not go with a model of kind 'dit'.*expected one of: ddpm"),
     ("sit", "ddpm", 5, r"'ddpm' does not go with a model of kind 'sit'.*expected one of: euler, heun, sde"),
     ("dit", "ddpm", 1001, "1001; expected for ddpm: 1 to 1000")],
)  # fmt: skip
def test_a_sampler_that_does_not_fit_the_model_is_refused(kind, sampler, steps, words):
    with pytest.raises(HasteError, match=words):
        sampling.draw(build(kind, 0, **SMALL), torch.tensor([0]), [0], Sampler(sampler, steps))


def drawn(model, **settings):
    sample = Sampler("heun", solver_steps=3, batch_size=4, guidance=2, guidance_high=0.5, **settings)
    return sampling.draw(model, torch.arange(6) % 3, range(6), sample)


def test_in_half_precision_the_network_is_cast_and_the_integrator_is_not(model):
    cast = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda module, given, out: cast.append(out.dtype))
    half = drawn(model, precision="bf16")
    handle.remove()
    assert set(cast) == {torch.bfloat16}
    exact = drawn(model)
    assert not torch.equal(half, exact)
    assert_close(half, exact, rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_images_in_batches_of_any_size(model, monkeypatch):
    exact = drawn(model)
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert_close(drawn(model, compile=True), exact, rtol=1e-4, atol=1e-5)
    made = counters["stats"]["unique_graphs"]
    # Batches of 4 and 2, guided and not: one graph for a size, then one for all.
    assert 1 <= made <= 3
    drawn(model, compile=True)
    assert counters["stats"]["unique_graphs"] == made
    torch.compiler.reset()


# -- a study's samplers: Tables 1, 13, 15 and 16, arXiv 2505.16792 ----------------------------------------------------

PAPER = {
    "sde-250": ("sde", 250, 1.0, 0.0, 1.0),
    "ode-heun-50": ("heun", 50, 1.0, 0.0, 1.0),
    "ddpm-250": ("ddpm", 250, 1.0, 0.0, 1.0),
    "haste-xl-100ep": ("sde", 250, 1.825, 0.0, 0.6),
    "haste-xl-400ep": ("sde", 250, 1.675, 0.0, 0.7),
    "haste-xl-500ep": ("sde", 250, 1.65, 0.0, 0.72),
    "haste-xl-600ep": ("sde", 250, 1.67, 0.0, 0.7),
    "haste-xl-512": ("sde", 250, 1.25, 0.0, 1.0),
}


def fields(sample):
    return (sample.sampler, sample.solver_steps, sample.guidance, sample.guidance_low, sample.guidance_high)


def test_presets_are_what_the_paper_reports_and_fields_that_are_given_win():
    assert {name: fields(config.SampleSettings(preset=name)) for name in SAMPLERS} == PAPER
    chosen = config.SampleSettings(preset="haste-xl-100ep", guidance=1.0, solver_steps=9)
    assert fields(chosen) == ("sde", 9, 1.0, 0.0, 0.6)
    assert fields(config.load("digits", overrides=["sample={preset: haste-xl-512, guidance: 1.5}"]).sample)[2] == 1.5
    with pytest.raises(HasteError, match=r"'sde-25'.*did you mean 'sde-250'"):
        config.load("digits", overrides=["sample.preset=sde-25"])


def test_facts_of_the_drawing_hold_every_field_that_moves_a_pixel(tiny):
    facts = latents.drawing_facts(tiny.data, config.SampleSettings(preset="haste-xl-100ep", guidance_channels=3))
    assert facts == {
        "sampler": "sde", "solver_steps": 250, "guidance": 1.825, "guidance_interval": [0.0, 0.6],
        "guidance_channels": 3, "integrator_dtype": "float64", "vae": None,
        "uint8_rule": "clip(127.5 x + 128), truncated",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [({"sampler": "euler", "solver_steps": 7}, "sit", 7),
     ({"preset": "ode-heun-50"}, "sit", 99),  # twice on every step but the last
     ({"preset": "haste-xl-500ep"}, "sit", 250 + 177),  # guided where 1 - k 0.96 / 249 and 0.04 lie below 0.72
     ({"preset": "ddpm-250", "guidance": 2.0, "guidance_high": 0.5}, "dit", 250 + 125)],
)  # fmt: skip
def test_passes_are_those_that_drawing_makes(settings, kind, expected, model):
    sample = config.SampleSettings(batch_size=2, **settings).options
    assert sampling.passes(kind, sample) == expected
    if kind == "sit" and expected < 100:  # drawing counts the same way
        seen = []
        model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
        sampling.draw(model, torch.zeros(2, dtype=torch.int64), range(2), sample)
        assert sum(seen) == 2 * expected
