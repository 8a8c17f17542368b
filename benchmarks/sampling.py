"""Images per second of the samplers: plain, compiled, in bf16, and guided everywhere instead of inside an interval."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pandas as pd
import torch

from haste_core import sampling
from haste_core.devices import default_device
from haste_core.models import DiffusionTransformer, build
from haste_core.study import config, cost
from haste_core.study.sections import ModelSettings

IMAGES = {"cpu": 16, "cuda": 32}
# What a generator of the machine's size is; class labels, image side and channels as of its data.
STUDENTS = {"cpu": ModelSettings(depth=6, width=64, heads=4), "cuda": ModelSettings(preset="SiT-XL/2")}
INPUTS = {"cpu": (8, 1, 10), "cuda": (32, 4, 1000)}
SETTINGS: dict[str, dict[str, Any]] = {
    "Euler, 50 steps": {"sampler": "euler", "solver_steps": 50},
    "ode-heun-50": {"preset": "ode-heun-50"},
    "sde-250": {"preset": "sde-250"},
    "sde-250, guided 1.65 for t <= 0.72": {"preset": "haste-xl-500ep"},
    "ddpm-250": {"preset": "ddpm-250"},
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "bf16": {"precision": "bf16"},
    "guided everywhere": {"guidance_high": 1.0},
}
# What takes seconds on a GPU, where everything is in bf16.
ON_GPU = {"Euler, 50 steps": ("plain", "compiled"), "ode-heun-50": ("plain",)}


def measure(rounds: int) -> pd.DataFrame:
    """Images per second by sampler and way of computing; weights are random.

    Returns:
        sampler, way (a key of `WAYS`; "guided everywhere" of a sampler that is guided inside an interval), passes (of
        the network for one image), seconds (of all images), images_per_s, ratio, low, high (to plain with the same
        sampler; 95 % interval), images, rounds.
    """
    device = default_device()
    precision = {"cpu": "no", "cuda": "bf16"}[device.type]
    made = cache(partial(generator, device=device))
    rows = []
    for name, fields in SETTINGS.items():
        kind = "dit" if fields.get("preset") == "ddpm-250" else "sit"
        settings = {
            way: config.SampleSettings(batch_size=IMAGES[device.type], **{"precision": precision, **fields, **more})
            for way, more in WAYS.items()
            if device.type == "cpu" or way in ON_GPU.get(name, ())
        }
        if not settings:
            continue
        if settings["plain"].guidance == 1:
            settings.pop("guided everywhere", None)
        actions = {way: partial(draw, made(kind, way), sample) for way, sample in settings.items()}
        timed = cost.interleaved(actions, "plain", rounds, device=device, label=name)
        rows += [
            {"sampler": name, "passes": sampling.passes(kind, settings[way].options), "way": way, "seconds": t.seconds,
             "images_per_s": IMAGES[device.type] / t.seconds, "ratio": t.ratio, "low": t.low, "high": t.high,
             "images": IMAGES[device.type], "rounds": t.rounds}
            for way, t in timed.items()
        ]  # fmt: skip
    return pd.DataFrame(rows)


def generator(kind: str, way: str, device: torch.device) -> DiffusionTransformer:
    """A generator of this machine's size, on `device`; each `way` has one of its own, which it may compile."""
    size, channels, classes = INPUTS[device.type]
    sizes = STUDENTS[device.type].model_dump(include={"depth", "width", "heads", "patch"})
    built = build(kind, seed=0, image_size=size, channels=channels, classes=classes, **sizes)
    return built.requires_grad_(False).eval().to(device)


def draw(model: DiffusionTransformer, sample: config.SampleSettings) -> torch.Tensor:
    """One batch of images."""
    count = sample.batch_size
    return sampling.draw(model, torch.arange(count) % model.classes, range(count), sample.options)
