from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from haste_core import ddpm, sampling
from haste_core.errors import HasteError
from haste_core.models import DiT, MMDiT, SiT
from haste_core.sampling import SeededNoise
from haste_core.study import config
from haste_core.study import latents as decoding
from haste_core.study.data import contexts
from haste_core.study.presets import SAMPLERS

MEAN, STD = 0.7, 0.4


def gaussian(x, t):
    """The exact velocity E[eps - x_0 | x_t] where the data are N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x - (1 - t) * MEAN
    return t / variance * centred - (MEAN + (1 - t) * STD**2 / variance * centred)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(sampler, steps):
    """Largest distance to the exact solution: the flow takes z at t=1 to MEAN + STD z at t=0."""
    z = noise(200).double()
    return float((sampler(gaussian, z, steps) - (MEAN + STD * z)).abs().max())


@pytest.mark.parametrize(("sampler", "order"), [(sampling.euler, 1), (sampling.heun, 2)])
def test_ode_samplers_converge_to_the_exact_solution_at_their_order(sampler, order):
    errors = [error(sampler, steps) for steps in (100, 200, 400)]
    assert errors[-1] < 0.02
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_euler_and_heun_are_exact_where_the_path_is_straight():
    z = noise(5).double()
    for sampler in (sampling.euler, sampling.heun):
        assert_close(sampler(lambda x, _: torch.full_like(x, 3.0), z, 4), z - 3)


def test_times_run_from_one_to_zero_and_heun_does_not_correct_its_last_step():
    times = []

    def recording(x, t):
        times.append(t)
        return x

    sampling.euler(recording, torch.ones(1), 4)
    assert times == [1.0, 0.75, 0.5, 0.25]
    times.clear()
    sampling.heun(recording, torch.ones(1), 4)
    assert times == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    times.clear()
    sampling.sde(recording, torch.ones(1), 5, lambda _, like: torch.zeros_like(like))
    assert times == pytest.approx([1.0, 0.76, 0.52, 0.28, 0.04])


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


def test_sde_asks_for_the_noise_of_each_step_once_and_for_none_on_the_last():
    asked = []
    sampling.sde(gaussian, noise(3), 6, lambda step, like: asked.append(step) or torch.zeros_like(like))
    assert asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_integration_is_in_float64_whatever_the_input(sampler):
    dtypes = set()

    def recording(x, t):
        dtypes.add(x.dtype)
        return gaussian(x, t)

    sample = config.Sample(sampler=sampler, solver_steps=3)
    drawn = sampling.integrate(recording, noise(4), sample, lambda _, like: torch.zeros_like(like))
    assert drawn.dtype == torch.float64
    assert dtypes == {torch.float64}


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_integrate_uses_the_named_sampler(sampler):
    def replay(step, like):
        return noise(*like.shape, seed=step + 5).to(like)

    by_hand = getattr(sampling, sampler)(gaussian, noise(4), 3, *([replay] if sampler == "sde" else []))
    sample = config.Sample(sampler=sampler, solver_steps=3)
    assert torch.equal(sampling.integrate(gaussian, noise(4), sample, replay), by_hand)


class LabelVelocity(nn.Module):
    """A model whose velocity is its label plus t; it records the rows, times and dtype of each call."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t.unique().tolist(), x.dtype))
        return (torch.zeros_like(x) + y[:, None] + t[:, None]) * self.scale


@torch.no_grad()
def test_guidance_extrapolates_from_the_null_label_inside_its_interval():
    velocity = sampling.guided(LabelVelocity(), torch.tensor([2, 5]), 10, scale=3.0, low=0.25, high=0.75)
    x = torch.zeros(2, 1, dtype=torch.float64)
    for t, factor in [(0.2, 1), (0.25, 3), (0.5, 3), (0.75, 3), (0.8, 1)]:
        expected = torch.tensor([[10 + factor * (2 - 10) + t], [10 + factor * (5 - 10) + t]], dtype=torch.float64)
        assert_close(velocity(x, t), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_outside_the_interval_the_model_is_called_once_and_unguided():
    model = LabelVelocity()
    velocity = sampling.guided(model, torch.tensor([2, 5]), 10, scale=3.0, low=0.3, high=0.8)
    sampling.euler(velocity, torch.zeros(2, 1), 4)
    assert [rows for rows, _, _ in model.calls] == [2, 4, 4, 2]
    assert [t for _, t, _ in model.calls] == [[1.0], [0.75], [0.5], [0.25]]


@torch.no_grad()
def test_without_guidance_the_model_never_sees_the_null_label():
    model = LabelVelocity()
    velocity = sampling.guided(model, torch.tensor([2, 5]), 10)
    assert_close(velocity(torch.zeros(2, 1, dtype=torch.float64), 0.5), torch.tensor([[2.5], [5.5]]).double())
    assert [rows for rows, _, _ in model.calls] == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_model_is_called_in_its_own_dtype(dtype):
    model = LabelVelocity().to(dtype)
    velocity = sampling.guided(model, torch.tensor([1]), 10, scale=2.0)
    assert velocity(torch.zeros(1, 1, dtype=torch.float64), 0.5).dtype == torch.float64
    assert model.calls[0][2] == dtype


@pytest.fixture
def model(randomise):
    return randomise(SiT(image_size=8, channels=1, classes=10, depth=2, width=16, heads=2, patch=2), std=0.2).eval()


@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_a_sample_depends_on_its_label_and_seed_alone(model, sampler):
    labels, seeds = torch.tensor([3, 1, 4, 1, 5]), [10, 11, 12, 13, 14]
    settings = config.Sample(sampler=sampler, solver_steps=4, guidance=1.5, batch_size=5)
    together = sampling.draw(model, labels, seeds, settings)
    assert together.shape == (5, 1, 8, 8)
    assert together.dtype == torch.float32
    for batch_size in (1, 2, 3):
        changed = settings.model_copy(update={"batch_size": batch_size})
        assert_close(sampling.draw(model, labels, seeds, changed), together, atol=1e-5, rtol=1e-4)
    order = [4, 0, 3, 1, 2]
    shuffled = sampling.draw(model, labels[order], [seeds[i] for i in order], settings)
    assert_close(shuffled, together[order], atol=1e-5, rtol=1e-4)
    assert (together[1] - together[3]).abs().max() > 0.1  # the same label, another seed


def test_seeded_noise_is_the_same_to_the_bit_in_any_batch():
    both, alone = SeededNoise([5, 9]), SeededNoise([9])
    assert torch.equal(both.start((1, 4, 4))[1:], alone.start((1, 4, 4)))
    for step in range(3):
        like = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
        increments = both(step, like)
        assert increments.dtype == torch.float64
        assert torch.equal(increments[1:], alone(step, like[:1]))


def test_seeded_noise_is_standard_normal_and_new_at_every_step():
    source = SeededNoise(range(50))
    first, second = source.start((1, 20, 20)), source(0, torch.zeros(50, 1, 20, 20))
    for drawn in (first, second):
        assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
        assert float(drawn.std()) == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.03


def test_labels_and_seeds_must_match_in_number(model):
    with pytest.raises(HasteError, match="3 labels for 2 seeds"):
        sampling.draw(model, torch.zeros(3, dtype=torch.int64), [0, 1], config.Sample())


def test_labels_are_balanced_or_drawn_from_a_seed():
    assert sampling.sample_labels(25, 10, "balanced", 0).tolist() == [*range(10), *range(10), *range(5)]
    drawn = [sampling.sample_labels(1000, 10, "random", seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].unique().tolist() == list(range(10))


def test_uint8_rule_gives_every_level_back_and_clips():
    levels = torch.arange(256)
    assert torch.equal(sampling.to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert sampling.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


# What each kind of model makes of the sampler


class NoiseAndVariance(nn.Module):
    """A DiT-like model: `channels` values of noise equal to the label plus t, then as many of variance, 100 x label."""

    kind, null_label = "dit", 10

    def __init__(self, channels=4):
        super().__init__()
        self.scale, self.channels, self.calls = nn.Parameter(torch.ones(())), channels, []

    def forward(self, x, t, y):
        self.calls.append((len(x), t.unique().tolist()))
        label = y.to(x)[:, None, None, None].expand(-1, self.channels, 2, 2)
        return torch.cat([label + t[:, None, None, None], 100 * label], dim=1) * self.scale


class Velocity(NoiseAndVariance):
    """The same with the first half of it, a velocity."""

    kind = "sit"

    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, : self.channels]


@torch.no_grad()
def test_of_a_dit_the_noise_is_guided_and_the_variance_is_not():
    model = NoiseAndVariance()
    sample = config.Sample(sampler="ddpm", guidance=3.0, guidance_low=0.2, guidance_high=0.5)
    output = sampling.guided_by(model, torch.tensor([2]), sample)
    x = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    for timestep, factor in [(199, 1), (200, 3), (500, 3), (501, 1)]:
        model.calls.clear()
        made = output(x, float(timestep))
        assert_close(made[:, :4], torch.full_like(made[:, :4], 10 + factor * (2 - 10) + timestep))
        assert_close(made[:, 4:], torch.full_like(made[:, 4:], 200.0))
        assert model.calls == [(2 if factor == 3 else 1, [float(timestep)])]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "guided", "whole"), [(NoiseAndVariance, 3, 8), (Velocity, 3, 4), (Velocity, None, 4)])
def test_the_leading_channels_that_are_named_are_guided_and_the_others_conditional(kind, guided, whole):
    sample = config.Sample(
        sampler="ddpm" if kind is NoiseAndVariance else "sde", guidance=2.0, guidance_channels=guided
    )
    made = sampling.guided_by(kind(), torch.tensor([4]), sample)(torch.zeros(1, 4, 2, 2, dtype=torch.float64), 0.5)
    expected = [10 + 2 * (4 - 10) + 0.5] * (guided or 4) + [4.5] * (4 - (guided or 4)) + [400.0] * (whole - 4)
    assert made[0, :, 0, 0].tolist() == pytest.approx(expected)


def test_more_guided_channels_than_a_dit_has_are_all_of_its_noise():
    sample = config.Sample(sampler="ddpm", guidance=2.0, guidance_channels=7)
    with torch.no_grad():
        made = sampling.guided_by(NoiseAndVariance(), torch.tensor([4]), sample)(torch.zeros(1, 4, 2, 2).double(), 0.0)
    assert made[0, :, 0, 0].tolist() == pytest.approx([-2.0] * 4 + [400.0] * 4)


@pytest.fixture
def dit(randomise):
    return randomise(DiT(image_size=8, channels=1, classes=10, depth=2, width=16, heads=2, patch=2), std=0.05).eval()


def test_draw_takes_a_dit_through_ancestral_sampling(dit):
    labels, seeds, steps = torch.tensor([3, 1]), [10, 11], 6
    drawn = sampling.draw(dit, labels, seeds, config.Sample(sampler="ddpm", solver_steps=steps))
    source = SeededNoise(seeds)

    def network(x, t):
        return dit(x.float(), torch.full((2,), t), labels).double()

    with torch.no_grad():
        expected = ddpm.ancestral(network, source.start((1, 8, 8)), steps, source)
    assert torch.equal(drawn, expected.float())
    alone = sampling.draw(dit, labels[1:], seeds[1:], config.Sample(sampler="ddpm", solver_steps=steps))
    assert_close(alone, drawn[1:], atol=1e-4, rtol=1e-4)


def test_a_guided_dit_calls_its_network_once_outside_the_interval(dit):
    sizes = []
    dit.register_forward_hook(lambda module, inputs, output: sizes.append((len(inputs[0]), float(inputs[1][0]))))
    sample = config.Sample(sampler="ddpm", solver_steps=5, guidance=2.0, guidance_high=0.6)
    sampling.draw(dit, torch.tensor([3, 1]), [0, 1], sample)
    # Timesteps 999, 749, 500, 250, 0 of 1000.
    assert [size for size, _ in sizes] == [2, 2, 4, 4, 4]
    assert [t for _, t in sizes] == [999, 749, 500, 250, 0]


def test_an_mmdit_is_drawn_from_its_captions_and_guided_from_the_empty_one(randomise, tmp_path):
    texts = noise(4, 3, 8, seed=5)
    contexts.write(tmp_path / "texts.safetensors", texts[:3], texts[3])
    model = MMDiT(
        image_size=8, channels=1, classes=3, depth=2, width=16, heads=2, patch=2, context_width=8,
        contexts=contexts.Contexts(tmp_path / "texts.safetensors"),
    )  # fmt: skip
    randomise(model, std=0.2).eval()
    sample = config.Sample(sampler="euler", solver_steps=3, guidance=1.5, batch_size=2)
    labels = torch.tensor([2, 0, 2])
    drawn = sampling.draw(model, labels, [0, 1, 0], sample)
    assert_close(drawn[0], drawn[2], atol=1e-5, rtol=1e-4)
    assert (drawn[0] - drawn[1]).abs().max() > 0.01

    def velocity(x, t):
        at = torch.full((1,), t)
        chosen, empty = (model(x.float(), at, text[None].float()).double() for text in (texts[2], texts[3]))
        return empty + 1.5 * (chosen - empty)

    with torch.no_grad():
        expected = sampling.euler(velocity, SeededNoise([0]).start((1, 8, 8)), 3)
    assert_close(drawn[:1], expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_a_sampler_of_velocities_is_refused_for_a_dit(dit, sampler):
    with pytest.raises(HasteError, match=rf"{sampler!r} does not go with a model of kind 'dit'.*possible: ddpm"):
        sampling.draw(dit, torch.tensor([0]), [0], config.Sample(sampler=sampler))


def test_ddpm_is_refused_for_a_model_of_velocities_and_beyond_its_steps(model, dit):
    with pytest.raises(HasteError, match=r"'ddpm' does not go with a model of kind 'sit'.*possible: euler, heun, sde"):
        sampling.draw(model, torch.tensor([0]), [0], config.Sample(sampler="ddpm"))
    with pytest.raises(HasteError, match="1001; possible for ddpm: 1 to 1000"):
        sampling.draw(dit, torch.tensor([0]), [0], config.Sample(sampler="ddpm", solver_steps=1001))


# Presets: Tables 1, 13, 15 and 16, arXiv 2505.16792

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


@pytest.mark.parametrize("name", sorted(set(PAPER) | set(SAMPLERS)))
def test_a_preset_is_what_the_paper_reports(name):
    assert fields(config.Sample(preset=name)) == PAPER[name]


def test_fields_that_are_given_win_over_the_preset():
    chosen = config.Sample(preset="haste-xl-100ep", guidance=1.0, solver_steps=9)
    assert fields(chosen) == ("sde", 9, 1.0, 0.0, 0.6)
    assert fields(config.load("digits", overrides=["sample={preset: haste-xl-512, guidance: 1.5}"]).sample)[2] == 1.5


def test_an_unknown_preset_is_refused_naming_the_nearest():
    with pytest.raises(HasteError, match=r"'sde-25'.*did you mean 'sde-250'"):
        config.load("digits", overrides=["sample.preset=sde-25"])


def test_facts_of_the_drawing_hold_every_field_that_moves_a_pixel(tiny):
    facts = sampling.drawing_facts(tiny.data, config.Sample(preset="haste-xl-100ep", guidance_channels=3))
    assert facts == {
        "sampler": "sde", "solver_steps": 250, "guidance": 1.825, "guidance_interval": [0.0, 0.6],
        "guidance_channels": 3, "integrator_dtype": "float64", "vae": None,
        "uint8_rule": "clip(127.5 x + 128), truncated",
    }  # fmt: skip


class FakeVae:
    name, fingerprint = "folder/vae", "0123456789abcdef"

    def decode(self, x):
        return x.repeat(1, 3, 2, 2) / 2


def test_latents_are_decoded_by_the_vae_and_pixels_are_not(tiny, tmp_path, monkeypatch):
    latents = config.Data(kind="latents", path=str(tmp_path))
    asked = []
    monkeypatch.setattr(
        decoding, "_cached_vae", lambda name, fingerprint: asked.append((name, fingerprint)) or FakeVae()
    )
    x, sample = noise(2, 1, 4, 4), config.Sample(vae="folder/vae")
    assert decoding.to_images(x, tiny.data, sample) is x
    assert asked == []
    assert_close(decoding.to_images(x, latents, sample), x.repeat(1, 3, 2, 2) / 2)
    assert asked == [("folder/vae", None)]
    facts = sampling.drawing_facts(latents, sample)
    assert facts["vae"] == {"name": "folder/vae", "weights": "0123456789abcdef"}


# -- precision and compiled blocks ------------------------------------------------------------------------------------


def drawn(model, **settings):
    sample = config.Sample(sampler="heun", solver_steps=3, batch_size=4, guidance=2, guidance_high=0.5, **settings)
    return sampling.draw(model, torch.arange(6) % 3, range(6), sample)


def test_in_half_precision_the_network_is_cast_and_the_integrator_is_not(model, monkeypatch):
    seen = []
    heun = sampling.heun

    def spied(velocity, x, steps, grid):
        def noting(x, t):
            v = velocity(x, t)
            seen.append((x.dtype, v.dtype))
            return v

        return heun(noting, x, steps, grid)

    monkeypatch.setattr(sampling, "heun", spied)
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    half, exact = drawn(model, precision="bf16"), None
    handle.remove()
    assert torch.bfloat16 in seen
    assert {pair for pair in seen if isinstance(pair, tuple)} == {(torch.float64, torch.float64)}
    exact = drawn(model)
    assert not torch.equal(half, exact)
    assert_close(half, exact, rtol=0.1, atol=0.05)


def test_compiled_blocks_draw_the_same_images_in_batches_of_any_size(model, monkeypatch):
    exact = drawn(model)
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = drawn(model, compile=True)
    assert_close(compiled, exact, rtol=1e-4, atol=1e-5)
    made = counters["stats"]["unique_graphs"]
    # Batches of 4 and 2, guided and not: one graph for a size, then one for all.
    assert 1 <= made <= 3
    drawn(model, compile=True)
    assert counters["stats"]["unique_graphs"] == made
    torch.compiler.reset()


def test_what_is_as_ever_changes_no_hash_and_no_card(make_study):
    plain = make_study()
    assert not {"precision", "compile"} & plain.sample.model_dump().keys()
    assert make_study("sample.precision=no", "sample.compile=false").evaluation_hash == plain.evaluation_hash
    for setting, fact in (
        ("sample.precision=bf16", ("precision", "bf16")),
        ("sample.compile=true", ("compiled", True)),
    ):
        other = make_study(setting)
        assert other.evaluation_hash != plain.evaluation_hash
        facts = sampling.drawing_facts(other.data, other.sample)
        assert dict([fact]).items() <= facts.items()
        assert fact[0] not in sampling.drawing_facts(plain.data, plain.sample)


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [({"sampler": "euler", "solver_steps": 7}, "sit", 7),
     ({"preset": "ode-heun-50"}, "sit", 99),  # twice on every step but the last
     ({"preset": "sde-250"}, "sit", 250),
     ({"preset": "haste-xl-512"}, "sit", 500),  # guided everywhere
     ({"preset": "haste-xl-500ep"}, "sit", 250 + 177),  # guided where 1 - k 0.96 / 249 and 0.04 lie below 0.72
     ({"preset": "ddpm-250"}, "dit", 250),
     ({"preset": "ddpm-250", "guidance": 2.0, "guidance_high": 0.5}, "dit", 250 + 125)],
)  # fmt: skip
def test_passes_are_those_that_drawing_makes(settings, kind, expected, model, dit):
    sample = config.Sample(batch_size=2, **settings)
    assert sampling.passes(kind, sample) == expected
    if expected > 100:
        return  # drawing counts the same way
    seen = []
    network = dit if kind == "dit" else model
    network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    sampling.draw(network, torch.zeros(2, dtype=torch.int64), range(2), sample)
    assert sum(seen) == 2 * expected
