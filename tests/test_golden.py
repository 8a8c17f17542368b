"""Our model, losses and samplers against numbers of the reference implementation (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from haste_core import sampling
from haste_core.alignment import Alignment, attention_logits
from haste_core.models import SiT
from haste_core.paths import interpolate, velocity
from haste_core.study import config
from haste_core.taps import Taps
from haste_core.teacher import TeacherOutput

FILE = Path(__file__).parent / "golden" / "sit_a.safetensors"
EXACT = {"atol": 2e-5, "rtol": 1e-4}
LOOSE = {"atol": 1e-3, "rtol": 1e-3}
PAIRS = [(4, 8), (5, 9), (6, 10), (7, 11)]


def fill(name, shape, std):
    drawn = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(drawn.astype(np.float32) * np.float32(std))


class RecordedTeacher:
    """The interface of a teacher of 12 blocks over what the rule gives for its features, q and k."""

    width, heads, blocks, grid = 24, 12, 12, (16, 16)

    def __call__(self, images, blocks):
        q, k = (fill(f"sit-a.loss.teacher_{part}", (4, 2, 12, 256, 4), 1) for part in "qk")
        tokens = fill("sit-a.loss.teacher_features", (2, 256, 24), 1)
        return TeacherOutput(tokens, {block: (q[block - 8], k[block - 8]) for block in blocks})


@pytest.fixture(scope="module")
def golden():
    with safe_open(FILE, "pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)


@pytest.fixture
def model():
    sit = SiT(image_size=32, channels=4, classes=1000, depth=9, width=48, heads=16, patch=2)
    weights = {name: fill(f"sit-a.{name}", value.shape, 0.06) for name, value in sit.state_dict().items()}
    sit.load_state_dict(weights | {"pos_embed": sit.pos_embed})
    return sit.eval()


@pytest.fixture
def alignment(model):
    settings = config.Alignment(
        lambda_feature=0.5, lambda_attention=0.5, depth=8, layer_pairs=PAIRS, projector_width=64
    )
    made = Alignment(settings, model, RecordedTeacher(), seed=0)
    weights = made.projector.state_dict()
    made.projector.load_state_dict({n: fill(f"sit-a.projectors.0.{n}", v.shape, 0.06) for n, v in weights.items()})
    return made


@torch.no_grad()
def test_forward_velocity_projected_tokens_and_attention_logits(golden, model, alignment):
    x, t, y = (golden[f"forward.{name}"] for name in "xty")
    tapped = model(x, t, y, Taps(depths=(8,), blocks=(4,)))
    assert_close(tapped.output, golden["forward.velocity"], **EXACT)
    assert_close(alignment.projector(tapped.tokens[8]), golden["forward.projected"], **EXACT)
    logits = attention_logits(*tapped.qk[4])[:, :, :4]
    assert_close(logits, golden["forward.attention_logits_block4_first_query_rows"], **EXACT)


def test_losses_and_gradient_norms(golden, model, alignment):
    x, noise, t, y = (golden[f"loss.{name}"] for name in ("x", "noise", "t", "y"))
    tapped = model(interpolate(x, noise, t), t, y, alignment.taps)
    per_sample = (tapped.output - velocity(x, noise)).square().mean((1, 2, 3))
    losses = alignment.losses(tapped, x)
    total = per_sample.mean() + losses.total
    assert_close(per_sample, golden["loss.denoising_per_sample"], **EXACT)
    assert_close(losses.feature[None], golden["loss.projection"], **EXACT)
    assert_close(losses.attention[None], golden["loss.attention"], **EXACT)
    assert_close(total[None], golden["loss.total"], **EXACT)

    total.backward()
    parameters = dict(model.named_parameters())
    parameters |= {f"projectors.0.{n}": p for n, p in alignment.projector.named_parameters()}
    names = [name for name in golden if name.startswith("loss.grad_norm.")]
    assert len(names) == 5
    for name in names:
        norm = parameters[name.removeprefix("loss.grad_norm.")].grad.norm()
        assert_close(norm[None], golden[name], **LOOSE)


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "guidance"),
    [
        ("euler", "euler", 8, {}),
        ("heun", "heun", 5, {}),
        ("euler_cfg", "euler", 8, {"guidance": 2.5, "guidance_low": 0.2, "guidance_high": 0.8}),
        ("sde", "sde", 8, {}),
        ("sde_cfg", "sde", 8, {"guidance": 1.8, "guidance_low": 0.0, "guidance_high": 0.7}),
    ],
)
@torch.no_grad()
def test_samplers(golden, model, name, sampler, steps, guidance):
    sample = config.Sample(sampler=sampler, solver_steps=steps, **guidance)
    drift = sampling.guided(
        model, golden["sample.y"], model.null_label, sample.guidance, sample.guidance_low, sample.guidance_high
    )

    def replayed(step, like):
        return fill(f"sit-a.sample.noise{step}", like.shape, 1)

    drawn = sampling.integrate(drift, golden["sample.latents"], sample, replayed)
    assert_close(drawn.float(), golden[f"sample.{name}"], **LOOSE)
