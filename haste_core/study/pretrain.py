"""Small networks trained inside a study: the pretrained teacher, and the feature extractors behind its scores.

Each is trained once, under a lock, and kept by the hash of its settings (`haste_core.study.runs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from haste_core import checkpoint
from haste_core.devices import default_device
from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked, write_json
from haste_core.seeding import stream
from haste_core.study import config, runs, signals
from haste_core.study.data import Batches, Dataset, check_same, check_unchanged, open_dataset
from haste_core.teacher import Teacher
from haste_core.training import Batch

# Steps between two saved states of a network in training.
SAVE_EVERY = 500
# Standard deviation of the Gaussian noise that the autoencoder removes from images in [-1, 1].
NOISE = 0.5
# Minimum cosine similarity between half-precision and float32 teacher outputs, and the images it is checked on.
LEAST_COSINE, CHECKED_ON = 0.999, 8
# Where the settings of each role's training are written.
KEYS = {"teacher": "teacher.fitting", "extractor": "evaluate.extractor", "autoencoder": "evaluate.autoencoder"}
# Feature extractors by role, each with its name on cards.
EXTRACTORS = {"extractor": "small-cnn", "autoencoder": "autoencoder"}
# Weights, and measures by split, of a training under one seed with the study's data and the path of a checkpoint file.
Trained = tuple[dict[str, Tensor], dict[str, float]]
Train = Callable[[config.FittingSettings, Dataset, Path], Trained]


class FeatureNetwork(nn.Module):
    """A convolutional encoder of images (B, channels, S, S) in [-1, 1], for Frechet distances."""

    def __init__(self, width: int, channels: int, image_size: int) -> None:
        super().__init__()
        # Images of at most 8x8 are downsampled one time less.
        self.early = 2 if image_size > 8 else 1
        # The last row and column are repeated up to a side that can be halved so many times.
        self.margin = -image_size % (4 * self.early)
        self.side = (image_size + self.margin) // (4 * self.early)  # of the trunk's 96 output channels
        self.trunk = nn.Sequential(
            _stage(channels, 32, 1), _stage(32, 64, self.early), _stage(64, 64, 2), _stage(64, 96, 2)
        )
        # Standardised features put distances in units of the standard deviation over the training data.
        self.embed = nn.Sequential(nn.Linear(96 * self.side**2, width), nn.BatchNorm1d(width, affine=False))

    def features(self, x: Tensor) -> Tensor:
        """Features (B, width), about zero mean and unit variance, before any non-linearity."""
        if self.margin:
            x = F.pad(x, (0, self.margin, 0, self.margin), mode="replicate")
        return self.embed(self.trunk(x).flatten(1))


class SmallCNN(FeatureNetwork):
    """A convolutional classifier: images (B, channels, S, S) to logits; `features` are penultimate.

    cells: rows and columns of the grid of labels of an image (`Dataset.cells`).
    """

    def __init__(self, classes: int, width: int, channels: int = 1, image_size: int = 8, cells: int = 1) -> None:
        super().__init__(width, channels, image_size)
        self.head, self.cells = nn.Linear(width, classes * cells**2), cells

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes), of several cells (B, cells * cells, classes)."""
        logits = self.head(F.relu(self.features(x)))
        return logits if self.cells == 1 else logits.unflatten(1, (self.cells**2, -1))


class Autoencoder(FeatureNetwork):
    """A convolutional denoising autoencoder; its features come from images alone, without labels."""

    def __init__(self, width: int, channels: int = 1, image_size: int = 8) -> None:
        super().__init__(width, channels, image_size)

        def larger(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Upsample(scale_factor=2), *_stage(inputs, outputs, 1))

        self.decoder = nn.Sequential(
            nn.Linear(width, 96 * self.side**2),
            nn.ReLU(),
            nn.Unflatten(1, (96, self.side, self.side)),
            larger(96, 48),
            larger(48, 16),
            larger(16, 16) if self.early == 2 else nn.Identity(),
            nn.Conv2d(16, channels, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions (B, channels, S, S) of clean images from noisy ones."""
        return self.decoder(self.features(x))[..., : x.shape[-2], : x.shape[-1]]


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class PatchClassifier(nn.Module):
    """An encoder under two linear heads, on its class token (if any) and on the mean of its patch tokens.

    The second head makes the patch tokens, which the student is aligned with, predict the class. Of a grid of labels
    each is predicted from the mean of its own tokens, without a class token.
    """

    def __init__(self, teacher: Teacher, classes: int, cells: int = 1) -> None:
        super().__init__()
        self.cells = cells
        self.teacher, self.encoder = [teacher], teacher.encoder  # the list keeps the frozen wrapper unregistered
        self.class_head = nn.Linear(teacher.width, classes)
        self.patch_head = nn.Linear(teacher.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes), the mean of both heads, or of tokens alone; of cells (B, cells * cells, classes)."""
        if self.teacher[0].maps:
            (maps,) = self.teacher[0].feature_maps(images, [self.teacher[0].stage])
            return self._of_cells(maps) if self.cells > 1 else self.patch_head(maps.mean((2, 3)))
        tokens = self.encoder.forward_features(self.teacher[0].prepare(images))  # type: ignore[operator]
        prefix = int(self.encoder.num_prefix_tokens)  # type: ignore[arg-type]
        if self.cells > 1:
            return self._of_cells(tokens[:, prefix:].transpose(1, 2).unflatten(2, self.teacher[0].grid))
        logits = self.patch_head(tokens[:, prefix:].mean(1))
        return (logits + self.class_head(tokens[:, 0])) / 2 if prefix else logits

    def _of_cells(self, maps: Tensor) -> Tensor:
        return self.patch_head(F.adaptive_avg_pool2d(maps, self.cells).flatten(2).transpose(1, 2))


# Training


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor], dataset: Dataset, split: str, of: Callable[[Tensor], Tensor] = Tensor.long
) -> float:
    """The share of a split's images whose labels, or parts `of` them, are right in all their cells, in [0, 1]."""
    x, y = dataset.images(split)
    found = torch.cat([model(part.to(default_device())).argmax(-1).cpu() for part in x.split(512)])
    return float((of(found) == of(y)).reshape(len(y), -1).all(1).float().mean())


@torch.no_grad()
def explained(model: Callable[[Tensor], Tensor], dataset: Dataset, split: str, seed: int) -> float:
    """The share of a split's pixel variance that reconstructions from noised images explain, in [0, 1].

    One minus the mean square error over the variance around the mean image, 0 where the error is larger. Noise comes
    from `seed` and `split`. Raises HasteError where all images are equal, as a single one is.
    """
    x, _ = dataset.images(split)
    device, generator = default_device(), Generator().manual_seed(stream(f"autoencoder {split} noise", seed))
    parts = ((part, model(_noised(part, generator).to(device)).cpu()) for part in x.split(512))
    error = sum(float((made - part).double().square().sum()) for part, made in parts)
    variance = float((x - x.mean(0)).double().square().sum())
    if not variance:
        raise HasteError(
            f"the {split} split has {len(x)} image{'s' * (len(x) != 1)}, all equal; expected at least two that differ, "
            f"see data.test_fraction and data.validation_fraction"
        )
    return max(1 - error / variance, 0.0)


def _noised(x: Tensor, generator: Generator) -> Tensor:
    """x (B, C, S, S) on the CPU with Gaussian noise."""
    return x + NOISE * torch.randn(x.shape, generator=generator)


def _loss(model: nn.Module, batch: Batch, noise: Generator, label_smoothing: float) -> Tensor:
    """Mean square error of an autoencoder on noised images, or cross-entropy of a classifier."""
    device = default_device()
    if isinstance(model, Autoencoder):
        return F.mse_loss(model(_noised(batch.images, noise).to(device)), batch.images.to(device))
    batch = batch.to(device)
    logits = model(batch.images).flatten(0, -2)  # of all images and cells
    return F.cross_entropy(logits, batch.y.flatten(), label_smoothing=label_smoothing)


def fit(
    model: nn.Module, dataset: Dataset, fitting: config.FittingSettings, what: str, partial: Path | None = None
) -> dict[str, float]:
    """Train `model` on the augmented training split, leaving it in eval mode on the CPU.

    An `Autoencoder` learns to remove noise, any other network (images to logits) to classify. AdamW under a one-cycle
    schedule. Batches and noise come from the streams "<what> order" and "<what> noise" of `fitting.seed`. Acceptance
    is decided on validation images; test images are measured after it.

    Args:
        what: the network's role, of `KEYS`, used for streams, progress bar and errors.
        partial: checkpoint file, written every `SAVE_EVERY` steps and on SIGTERM or SIGINT, from which the next call
            resumes, on the CPU to the bit; removed at the end.

    Returns:
        `train_`, `validation_` and `test_accuracy`, or for an autoencoder `train_`, `validation_` and `test_explained`.

    Raises:
        HasteError: the measure on validation images stays below `fitting.min_accuracy`.
        Interrupted: a signal arrived; the state is saved if `partial` is given.
    """
    batches = Batches(dataset, min(fitting.batch_size, len(dataset)), stream(f"{what} order", fitting.seed))
    noise = Generator().manual_seed(stream(f"{what} noise", fitting.seed))
    model.to(default_device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=fitting.lr, weight_decay=fitting.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fitting.lr, fitting.steps + 1)
    model.train()
    state = _FitState(model, optimizer, schedule, batches, noise)
    first = state.load(partial) if partial and partial.is_file() else 0
    bar = tqdm(range(first, fitting.steps), desc=what, unit="step", mininterval=1.0, initial=first, total=fitting.steps)
    with signals.catch() as stopping:
        for step in bar:
            loss = _loss(model, batches.next(), noise, fitting.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if partial and ((step + 1) % SAVE_EVERY == 0 or stopping.is_set()):
                state.save(partial, step + 1)
            if stopping.is_set():
                raise Interrupted(f"{what} stopped at step {step + 1} of {fitting.steps}; run again to resume")
    model.eval()
    name = "explained" if isinstance(model, Autoencoder) else "accuracy"

    def measure(split: str) -> float:
        if isinstance(model, Autoencoder):
            return explained(model, dataset, split, fitting.seed)
        return accuracy(model, dataset, split)

    result = {f"{split}_{name}": measure(split) for split in ("train", "validation")}
    if partial:
        partial.unlink(missing_ok=True)
    reached = result[f"validation_{name}"]
    if not reached >= fitting.min_accuracy:
        raise HasteError(
            f"{what}: validation_{name} {reached:.4f} is below the required {fitting.min_accuracy}; raise "
            f"{KEYS[what]}.steps ({fitting.steps}), use a larger network, or lower {KEYS[what]}.min_accuracy"
        )
    result[f"test_{name}"] = measure("test")
    model.cpu()
    return result


class _FitState(NamedTuple):
    """Everything that resuming a fit to the bit needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.OneCycleLR
    batches: Batches
    noise: Generator

    def save(self, path: Path, step: int) -> None:
        parts = {
            "model": self.model.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, self.model),
            "data": self.batches.state_dict(),
        }
        tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        checkpoint.save(path, tensors | {"noise": self.noise.get_state()}, {"step": step})

    def load(self, path: Path) -> int:
        """Restore the state in `path`; returns its step."""
        tensors, state = checkpoint.load(path)
        step = int(state["step"])
        self.model.load_state_dict(checkpoint.under(tensors, "model."))
        checkpoint.load_optimizer(self.optimizer, self.model, checkpoint.under(tensors, "optimizer."))
        self.batches.load_state_dict(checkpoint.under(tensors, "data."))
        self.noise.set_state(tensors["noise"])
        # The schedule depends on the step alone; a call of `step` gives learning rate and betas to the optimizer.
        self.schedule.load_state_dict({"last_epoch": step - 1, "_step_count": step + 1})
        self.schedule.step()
        return step


# The networks of a study


def _trained_once(
    study: config.StudySettings, path: Path, fitting: config.FittingSettings, train: Train, knows: str = "labels"
) -> dict[str, Any]:
    """The state kept beside the weights in `path`, which one process at a time trains unless the file exists."""
    role = path.stem
    if path.is_file():
        check_unchanged(path.parent, study.data, begun=True)
    else:
        with locked(path.parent / "run.lock", f"the {role}", wait=True):
            if not path.is_file():
                torch.set_num_threads(study.train.threads)  # the same bits on every machine with this many threads
                check_unchanged(path.parent, study.data, begun=False)
                with runs.session(path.parent, what=role):
                    weights, facts = _accepted(fitting, fitting_data(study, fitting, role, knows), path.parent, train)
                    state = {"measured": facts, "fingerprint": checkpoint.fingerprint(weights)}
                    checkpoint.save(path, weights, {"accuracies": facts} if role == "teacher" else state)
    return checkpoint.load(path, prefixes=())[1]


def _accepted(
    fitting: config.FittingSettings, dataset: Dataset, folder: Path, train: Train
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of the first accepted network, and its measures with the number of attempts.

    Seeds are tried from that of `fitting` upwards. Raises the error of the last attempt if none was accepted.
    """
    for seed in range(fitting.seed, fitting.seed + fitting.attempts):
        try:
            chosen = fitting.model_copy(update={"seed": seed})
            weights, measured = train(chosen, dataset, folder / f"partial-{seed}.safetensors")
            return weights, measured | {"attempts": seed - fitting.seed + 1}
        except HasteError as error:
            failure = error
    raise failure


def fitting_data(
    study: config.StudySettings, fitting: config.FittingSettings, role: str = "extractor", knows: str = "labels"
) -> Dataset:
    """The study's data with the labels and augmentation of a role's training; knows: of `TeacherSettings`."""
    data = study.data.model_copy(update={"augment": fitting.augment or study.data.augment})
    return open_dataset(data).labelled(role, knows)


def prepare_teacher(study: config.StudySettings, wanted: config.TeacherSettings | None = None) -> dict[str, Any]:
    """Pretrain a teacher of the study (by default its own) if it is to be pretrained and does not exist yet.

    Returns:
        Facts about the teacher: model, weights, width, heads, blocks, grid, parameters, and for a pretrained one the
        measures of `fit` and `attempts`.
    """
    wanted = wanted or study.teacher

    def train(fitting: config.FittingSettings, dataset: Dataset, partial: Path) -> Trained:
        frozen = build_teacher(wanted.model_copy(update={"fitting": fitting}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream("teacher heads", fitting.seed))
            classifier = PatchClassifier(frozen, dataset.classes, dataset.cells)
        measured = fit(classifier.requires_grad_(True), dataset, fitting, "teacher", partial)
        for name, of in dataset.parts.items():
            measured[f"test_{name}_accuracy"] = accuracy(classifier, dataset, "test", of)
        return frozen.encoder.state_dict(), measured

    accuracies: dict[str, float] = {}
    if wanted.weights == "pretrain":
        path = runs.teacher_path(study, wanted)
        accuracies = _trained_once(study, path, wanted.fitting, train, wanted.knows)["accuracies"]
    teacher = find_teacher(study, wanted)
    return {
        "model": wanted.model,
        "weights": wanted.weights,
        "width": teacher.width,
        "heads": teacher.heads,
        "blocks": teacher.blocks,
        "grid": list(teacher.grid),
        "parameters": sum(p.numel() for p in teacher.parameters()),
        **accuracies,
    }


def build_teacher(teacher: config.TeacherSettings, state: Mapping[str, Tensor] | None = None) -> Teacher:
    """Frozen teacher with the given settings; `state` holds weights trained in the study (`weights: pretrain`)."""
    settings = teacher.model_dump(include={"weights", "mean", "std", "resize", "low_pass", "precision", "stage"})
    return Teacher(teacher.model, state=state, seed=teacher.fitting.seed, **settings, **teacher.kwargs)


def find_teacher(study: config.StudySettings, teacher: config.TeacherSettings | None = None) -> Teacher:
    """Frozen teacher of a study, by default its own: pretrained in it, or timm's with hub or local weights."""
    teacher = teacher or study.teacher
    if teacher.weights != "pretrain":
        return build_teacher(teacher)
    path = runs.teacher_path(study, teacher)
    if not path.is_file():
        raise HasteError(f"no teacher weights at {path}; train them by: haste teacher {study.name}, with its profile")
    return build_teacher(teacher, load_file(path))


def check_precision(teacher: Teacher, dataset: Dataset, blocks: tuple[int, ...], precision: str) -> None:
    """Refuse a teacher whose outputs in a precision have a mean cosine similarity to those in float32 below 0.999.

    blocks: blocks whose q and k are used. precision: of the run, used where the teacher has none of its own.
    """
    precision = teacher.precision or precision
    if precision == "no":
        return
    images = dataset.examples("train", CHECKED_ON).images.to(teacher.mean.device)
    cosine = teacher.cosine_to_float32(images, blocks, precision)
    if not cosine >= LEAST_COSINE:
        raise HasteError(
            f"the teacher in {precision} has a cosine of {cosine:.5f} to itself in float32, expected at least "
            f"{LEAST_COSINE}; set teacher.precision=no, which leaves the run's own precision as it is"
        )


def build_extractor(
    study: config.StudySettings, role: str, dataset: Dataset, seed: int | None = None
) -> FeatureNetwork:
    """The network of a role ("extractor" or "autoencoder") for the images of `dataset`.

    Weights are drawn from `seed`, by default that of the role's settings.
    """
    channels, side = dataset.images("train", 1)[0].shape[1:3]
    width = study.evaluate.extractor_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(f"{role} weights", getattr(study.evaluate, role).seed if seed is None else seed))
        if role == "extractor":
            return SmallCNN(dataset.classes, width, channels, side, dataset.cells)
        return Autoencoder(width, channels, side)


def _extractor_path(study: config.StudySettings, role: str) -> Path:
    return runs.extractor_path(study) if role == "extractor" else runs.autoencoder_path(study)


def check_begun(study: config.StudySettings, chosen: Iterable[runs.Run]) -> None:
    """`check_same` for data on disk and everything that was begun of these runs and of the networks of the study."""
    paths = [_extractor_path(study, role) for role in EXTRACTORS]
    paths += [runs.teacher_path(study, teacher) for teacher in study.teachers()]
    folders = [run.dir for run in chosen if run.steps()] + [path.parent for path in paths if path.is_file()]
    if folders and study.data.path is not None and Path(study.data.path).exists():
        now = open_dataset(study.data).identity()
        for folder in folders:
            check_same(folder, study.data, now)


def prepare_extractors(study: config.StudySettings) -> dict[str, dict[str, Any] | None]:
    """Facts of "extractor" and "autoencoder" (`prepare_extractor`), None in another suite than `study`."""
    return {role: prepare_extractor(study, role) if study.evaluate.suite == "study" else None for role in EXTRACTORS}


def prepare_extractor(study: config.StudySettings, role: str) -> dict[str, Any]:
    """Train the feature extractor of a role if it does not exist yet.

    Returns its kind, width, seed, fingerprint of the weights, attempts, and the measures of `fit`.
    """
    wanted: config.FittingSettings = getattr(study.evaluate, role)

    def train(fitting: config.FittingSettings, dataset: Dataset, partial: Path) -> Trained:
        network = build_extractor(study, role, dataset, fitting.seed)
        measured = fit(network, dataset, fitting, role, partial)
        if study.data.has_scenes and role == "extractor":
            measured["unseen_accuracy"] = accuracy(network.to(default_device()), dataset, "unseen")
        return network.cpu().state_dict(), measured

    state = _trained_once(study, _extractor_path(study, role), wanted, train)
    common = {"width": study.evaluate.extractor_width, "seed": wanted.seed, "fingerprint": state["fingerprint"]}
    return {"kind": "SmallCNN" if role == "extractor" else "Autoencoder", **common, **state["measured"]}


def load_extractor(study: config.StudySettings, role: str) -> tuple[FeatureNetwork, str]:
    """The trained network of a role, frozen in eval mode, and its name with the fingerprint of its weights."""
    network = build_extractor(study, role, open_dataset(study.data).labelled(role))
    weights, state = checkpoint.load(_extractor_path(study, role))
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval(), f"{EXTRACTORS[role]}-{state['fingerprint']}"


def write_facts(study: config.StudySettings, path: Path) -> dict[str, Any]:
    """Prepare teachers and extractors, and write their facts to the JSON file `path`; returns them."""
    own, *further = [prepare_teacher(study, teacher) for teacher in study.teachers()]
    facts = {"teacher": own, "further_teachers": further, **prepare_extractors(study)}
    write_json(path, facts)
    return facts
