"""The sections of a study file: what can be set, of which type, with which default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from haste_core.errors import unknown

# depth, width, heads of the published sizes (Table 16, arXiv 2505.16792; S from the DiT paper).
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a study; unknown keys and wrong types are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Augment(Section):
    """Random affine map per training image: shift in pixels, rotation in degrees, scale as a fraction."""

    shift: float = Field(0.0, ge=0)
    rotation: float = Field(0.0, ge=0, le=180)
    scale: float = Field(0.0, ge=0, lt=1)


class Data(Section):
    """Where images come from. `digits`: scikit-learn's 1,797 handwritten digits, 8x8, one channel."""

    kind: Literal["digits"] = "digits"
    test_fraction: float = Field(0.25, gt=0, lt=1)
    split_seed: NonNegative = 0
    augment: Augment = Augment()


class Fitting(Section):
    """How a small classifier (teacher or extractor) is trained inside the study.

    augment: its own augmentation; the data's when not given. attempts: how many seeds (seed, seed + 1, ...) are tried
    before a held-out accuracy below min_accuracy is an error.
    """

    steps: Positive = 1500
    batch_size: Positive = 128
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    label_smoothing: Unit = 0.1
    seed: NonNegative = 1000
    attempts: Positive = 1
    min_accuracy: Unit = 0.98
    augment: Augment | None = None


class Teacher(Section):
    """A frozen encoder: any timm vision transformer by name.

    weights: `hub` (timm's published weights), `pretrain` (trained in the study's first stage by `fitting`),
    `random` (timing and tests only), or the path of a local checkpoint. mean, std: of inputs in [0, 1]; taken from
    timm's `pretrained_cfg` when not given.
    """

    model: str
    kwargs: dict[str, Any] = {}
    weights: str = "hub"
    mean: list[float] | None = None
    std: list[float] | None = None
    resize: Literal["antialias", "reference"] = "antialias"
    fitting: Fitting = Fitting()


class Model(Section):
    """The diffusion transformer. `preset` such as "SiT-XL/2" fills depth, width, heads and patch."""

    kind: Literal["sit"] = "sit"
    preset: str | None = None
    depth: Positive = 12
    width: Positive = 384
    heads: Positive = 6
    patch: Positive = 2
    mlp_ratio: float = Field(4.0, gt=0)
    qk_norm: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not values.get("preset"):
            return values
        names = [f"SiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]
        if values["preset"] not in names:
            raise ValueError(str(unknown("preset", values["preset"], names)))
        size, patch = values["preset"].removeprefix("SiT-").split("/")
        depth, width, heads = SIZES[size]
        return {"depth": depth, "width": width, "heads": heads, "patch": int(patch)} | dict(values)

    @model_validator(mode="after")
    def _check_heads(self) -> Model:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which the sin-cos positions need")
        return self


class Alignment(Section):
    """Phase I (Eq. 4, arXiv 2505.16792). Both weights zero means a vanilla run.

    depth: the block, counted from 1, whose output tokens are aligned. layer_pairs: (student block, teacher block),
    both counted from 0. heads: indices aligned, student head m with teacher head m; by default the first
    min(student heads, teacher heads), the rest stay free.
    """

    lambda_feature: float = Field(0.0, ge=0)
    lambda_attention: float = Field(0.0, ge=0)
    depth: Positive = 8
    layer_pairs: list[tuple[NonNegative, NonNegative]] = []
    heads: list[NonNegative] | None = None
    projector_width: Positive = 2048

    @property
    def active(self) -> bool:
        """True when either loss has a weight, so that the run has a phase I."""
        return self.lambda_feature > 0 or self.lambda_attention > 0

    @model_validator(mode="after")
    def _check(self) -> Alignment:
        if self.lambda_attention > 0 and not self.layer_pairs:
            raise ValueError("lambda_attention > 0 needs layer_pairs, a list of [student block, teacher block]")
        if self.heads is not None and (not self.heads or len(set(self.heads)) < len(self.heads)):
            raise ValueError(f"heads {self.heads} must name at least one head, each once")
        return self


class Termination(Section):
    """When phase I ends (Eq. 3). `iteration`: phase II from step `at` on; `never`: always on."""

    kind: Literal["never", "iteration"] = "never"
    at: NonNegative | None = None

    @model_validator(mode="after")
    def _check(self) -> Termination:
        if (self.kind == "iteration") != (self.at is not None):
            raise ValueError(f"kind {self.kind!r} with at={self.at}: `at` (a step) belongs to kind 'iteration' alone")
        return self


class Train(Section):
    """Optimisation (Table 16). Steps are optimizer steps; `keep` lists the steps whose checkpoints stay for good."""

    steps: Positive
    batch_size: Positive = 256
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: Unit = 0.9999
    label_dropout: Unit = 0.1
    precision: Literal["no", "fp16", "bf16"] = "no"
    threads: Positive = 1
    keep: list[Positive] = []
    log_every: Positive = 50
    checkpoint_every: Positive = 500
    sample_every: Positive = 1000

    @field_validator("precision", mode="before")
    @classmethod
    def _undo_yaml(cls, precision: Any) -> Any:
        return "no" if precision is False else precision  # YAML reads a bare no as false

    @field_validator("keep")
    @classmethod
    def _sorted(cls, keep: list[int]) -> list[int]:
        return sorted(set(keep))

    @property
    def kept_steps(self) -> list[int]:
        """Steps whose checkpoints stay, ending with the last step of the run."""
        return [s for s in self.keep if s < self.steps] + [self.steps]


# What of `Train` changes no number of a run: how far it goes, and what is written on the way.
TRAIN_BOOKKEEPING = {"steps", "keep", "log_every", "checkpoint_every", "sample_every"}


class Sample(Section):
    """How images are drawn. Guidance scale 1 means none; the interval is in t, 0 data, 1 noise."""

    sampler: Literal["euler", "heun", "sde"] = "sde"
    solver_steps: Positive = 250
    guidance: float = Field(1.0, ge=0)
    guidance_low: Unit = 0.0
    guidance_high: Unit = 1.0
    batch_size: Positive = 256


class Evaluate(Section):
    """How images are scored. n images; the i-th is drawn from seed `seed + i` for every arm alike."""

    n: Positive = 1000
    seed: NonNegative = 0
    labels: Literal["balanced", "random"] = "balanced"
    kid_subsets: Positive = 50
    kid_subset_size: Positive = 400
    neighborhood: Positive = 3
    extractor_width: Positive = 64
    extractor: Fitting = Fitting(seed=2000)


class Claims(Section):
    """Which arms and steps stand for the paper's settings. early: the step at which early gains are read."""

    early: Positive = 1
    confidence: float = Field(0.95, gt=0, lt=1)
