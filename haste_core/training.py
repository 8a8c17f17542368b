"""Two-phase training: the loss of a step, the step, and measurements.

Phase I minimises L_diff + lambda_R L_REPA + lambda_A L_ATTA, phase II L_diff alone (Eqs. 3, 4, arXiv 2505.16792). A
phase II step does exactly the work of plain training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from haste_core.alignment import AlignmentLosses, whole_maps
from haste_core.devices import compile_blocks
from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer
from haste_core.paths import Objective, objective_of, shifted
from haste_core.processes import Processes, micro_batches, own_settings
from haste_core.taps import Seen
from haste_core.termination import Switch

if TYPE_CHECKING:
    from haste_core.haste import HASTE


class Batch(NamedTuple):
    """Examples of one training step.

    x: pixels in [-1, 1] or scaled latents, (B, C, S, S) float32. y: labels (B,) int64. images: the teacher's input,
    (B, C', S', S') float32 in [-1, 1], or (0, C', S', S') for latents without their images. indices: of the training
    images, (B,) int64, or (0,) for other images.
    """

    x: Tensor
    y: Tensor
    images: Tensor
    indices: Tensor = torch.empty(0, dtype=torch.int64)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return Batch(*map(_pinned, self))


def _pinned(part: Tensor) -> Tensor:
    return part.pin_memory() if part.device.type == "cpu" else part


# Steps in a row without a finite gradient norm that end training; in fp16 the loss scaler skips some until it fits.
OVERFLOWS = {"no": 5, "fp16": 100}


class BatchStream(Protocol):
    """Endless stream of batches whose state can be saved. `with_images` False: images are not needed any more."""

    with_images: bool

    def next(self) -> Batch:
        """The next batch, or this process's share of it."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to continue with exactly the next batch."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""


class Draws(NamedTuple):
    """The random part of a step: t (B,) uniform in [0, 1), eps like x, and y with labels dropped to the null label."""

    t: Tensor
    eps: Tensor
    y: Tensor


def draw_noise(
    batch: Batch,
    null_label: int,
    dropout: float,
    generator: Generator,
    drawn: int | None = None,
    part: slice = slice(None),
) -> Draws:
    """Draws for one step, taken on the CPU so that they are the same on every device.

    drawn: number of images in the global batch, by default those of `batch`. part: this process's share of them.
    """
    drawn = drawn or len(batch.x)
    t = torch.rand(drawn, generator=generator)[part]
    eps = torch.randn(drawn, *batch.x.shape[1:], generator=generator)[part]
    dropped = torch.rand(drawn, generator=generator)[part] < dropout
    return Draws(t, eps, batch.y.masked_fill(dropped, null_label))


class StepLosses(NamedTuple):
    """Denoising loss of a step, a scalar, and in phase I its alignment losses."""

    denoising: Tensor
    alignment: AlignmentLosses | None

    def total(self, weight: float = 1.0) -> Tensor:
        """The minimised sum, with the alignment losses times `weight` (`Switch.weight`)."""
        return self.denoising if self.alignment is None else self.denoising + weight * self.alignment.total


def step_losses(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    u: Tensor,
    eps: Tensor,
    y: Tensor,
    haste: HASTE | None = None,
    watch: bool = True,
) -> StepLosses:
    """Losses of one forward pass (Eqs. 3, 4, arXiv 2505.16792): of a training step, of an exact angle, of a FLOP count.

    model: called as model(x_t, t, y). batch: clean examples on its device. u: noise levels (B,) in [0, 1]. eps: noise
    like x. y: labels (B,). haste: of phase I, or None. watch: let its online angle see the pass.
    """
    t = objective.timesteps(u)
    x_t = objective.noised(batch.x, eps, t)
    blocks: Any = getattr(model, "module", model).blocks
    with nullcontext(Seen()) if haste is None else haste.tap(blocks) as seen:
        predicted = model(x_t, t, y)
    alignment = None if haste is None else haste.losses(seen, batch.images, u, watch)
    return StepLosses(objective.loss(predicted, batch.x, eps, t).mean(), alignment)


def add_up(window: dict[str, Tensor], measured: Mapping[str, Tensor | None]) -> None:
    """Add measurements, and how many there were, to the sums in `window`, all of them on the device."""
    for name, value in measured.items():
        if value is not None:
            for key, amount in ((name, value.detach()), (f"count_{name}", torch.ones_like(value))):
                window[key] = window[key] + amount if key in window else amount


def means_of(window: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of what was added up; waits for the device."""
    return {k: float(window[k] / window[f"count_{k}"]) for k in window if not k.startswith("count_")}


@dataclass(frozen=True)
class Optimization:
    """Settings of the optimisation of a run (Table 16, arXiv 2505.16792).

    batch_size: images of one optimizer step, over all processes. accumulate: number of gradient-accumulation steps per
    process. label_dropout: share of labels replaced by the null label. timestep_shift: see `paths.shifted`.
    precision: "no" (float32), "bf16" or "fp16". compile: torch.compile the blocks. activation_checkpointing: recompute
    activations of blocks in the backward pass. threads: of a CPU.
    """

    batch_size: int = 256
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    timestep_shift: float = 1.0
    accumulate: int = 1
    precision: str = "no"
    compile: bool = False
    activation_checkpointing: bool = False
    threads: int = 1


class Trainer:
    """A run between two steps, the same in all processes.

    Args:
        model: the generator at its first step, on the CPU.
        batches: this process's share of each batch.
        noise_seed: of noise levels, noise and dropped labels.
        haste: of phase I; None trains plainly. switch: the phase, by default that of `haste`.
        processes: those that train the run together; by default those that a launcher started.

    Attributes:
        model, optimizer: as accelerate prepared them. ema: the averaged generator. haste: None in phase II.
        step: number of steps done. window: sums of measurements since the last `measure`.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        batches: BatchStream,
        options: Optimization,
        noise_seed: int,
        haste: HASTE | None = None,
        switch: Switch | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.batches, self.options = batches, options
        self.share = self.processes.share(options.batch_size)
        self.micro_batches = micro_batches(options.batch_size, options.accumulate, self.processes.count)
        self.accelerator = make_accelerator(options)
        self.objective = objective_of(model.kind)
        self.noise = Generator().manual_seed(noise_seed)
        self.switch = switch or (haste.switch if haste is not None else Switch())
        self.haste = haste if self.switch.phase == 1 else None
        model.activation_checkpointing = options.activation_checkpointing
        model.to(self.accelerator.device)
        if self.haste is not None:
            self.haste.to(self.accelerator.device)
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        # Buffers are constants, equal in all processes; by default they would be sent before every forward pass.
        constants = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
        groups = [{"params": list(model.parameters())}]
        if self.haste is not None and self.haste.projector is not None:
            groups.append({"params": list(self.haste.parameters())})
        adamw = torch.optim.AdamW(
            groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
        )
        self.model: nn.Module
        self.optimizer: Any
        with own_settings():
            self.model, self.optimizer = self.accelerator.prepare(model, adamw)
        self.step = 0
        self.window: dict[str, Tensor] = {}
        # Steps in a row whose gradient norm was not finite, and the most of them since the last `measure`.
        self.overflows = self.most_overflows = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        self._compile()

    @property
    def generator(self) -> DiffusionTransformer:
        """The trained module without its wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the losses of this process's share and the gradient norm, on the device.

        Random numbers are drawn for the global batch, whatever the number of processes and micro-batches.
        """
        if self.haste is not None and self.haste.update(self.step):
            self.enter_phase_two()
        batch = self.batches.next()
        null, dropout = self.ema.null_label, self.options.label_dropout
        draws = draw_noise(batch, null, dropout, self.noise, self.options.batch_size, self.share)
        if self.accelerator.device.type == "cuda":  # a copy from other memory may wait for the steps before it
            batch, draws = batch.pinned(), Draws(*map(_pinned, draws))
        found = []
        for i, part in enumerate(self.micro_batches, 1):
            # Gradients are averaged over processes once a step, in the backward pass of the last micro-batch.
            with nullcontext() if i == len(self.micro_batches) else self.accelerator.no_sync(self.model):
                found.append(self._accumulate(Batch(*(b[part] for b in batch)), Draws(*(d[part] for d in draws))))
        measured = {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}
        trained = [*self.model.parameters(), *(self.haste.parameters() if self.haste is not None else ())]
        grad_norm = self.accelerator.clip_grad_norm_(trained, self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():  # ema <- decay ema + (1 - decay) model
            decay = self.options.ema_decay
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        measured |= {"grad_norm": grad_norm.detach()}
        self.overflows = torch.where(measured["grad_norm"].isfinite(), 0, self.overflows + 1)
        self.most_overflows = torch.maximum(self.most_overflows, self.overflows)
        add_up(self.window, measured)
        return measured

    def _accumulate(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Add one micro-batch's part to the gradients of the step; returns its losses."""
        device = self.accelerator.device
        batch, (u, eps, y) = batch.to(device), (d.to(device, non_blocking=True) for d in draws)
        u = shifted(u, self.options.timestep_shift)
        with self.accelerator.autocast():
            losses = step_losses(self.model, self.objective, batch, u, eps, y, self.haste)
        loss = losses.total(self.switch.weight(self.step))
        # Every loss is a mean over its images and micro-batches are equally large: their mean is the batch's.
        self.accelerator.backward(loss / len(self.micro_batches))
        measured: dict[str, Tensor | None] = {"loss": loss, "denoising": losses.denoising}
        if losses.alignment is not None:
            measured |= {"feature": losses.alignment.feature, "attention": losses.alignment.attention}
        return {name: value.detach() for name, value in measured.items() if value is not None}

    def enter_phase_two(self) -> None:
        """Leave nothing of phase I: teacher, projector and its moments are dropped, images are not read any more."""
        if self.haste is not None:
            self.haste.finish()
            self.haste.release(self.optimizer.optimizer)
        self.haste = None
        self.batches.with_images = False
        self._compile()

    def _compile(self) -> None:
        # Hooks sit on q and k inside the block, so blocks that are read are not compiled.
        if self.options.compile:
            compile_blocks(self.generator, leave=self.haste.taps.blocks if self.haste is not None else ())
        if self.options.compile and self.haste is not None and self.haste.pairs:
            self.haste.whole_maps = torch.compile(whole_maps)

    def gather(self) -> None:
        """Replace sums since the last `measure` by their means over all processes, in each of them."""
        self.window = self.processes.mean(self.window)
        if self.haste is not None and self.haste.angle is not None:
            self.haste.angle.sums = self.processes.mean({"sums": self.haste.angle.sums})["sums"]

    def measure(self, **readings: float) -> dict[str, Any]:
        """Means of measurements since the last call, over all processes, and `readings`; the trigger sees them too.

        Keys: step, images_seen, phase, loss, denoising and grad_norm; in phase I feature, attention, and where
        the angle is watched online and online_angle.

        Raises:
            NotFinite: the loss is not finite, or several gradients in a row were not.
        """
        self.gather()
        means = means_of(self.window)
        check_finite(means["loss"], self.step)
        most, self.most_overflows = int(self.most_overflows), self.overflows.clone()
        if most >= OVERFLOWS.get(self.options.precision, OVERFLOWS["no"]):
            raise NotFinite(
                f"the norm of the gradient was not finite in {most} steps in a row at or before step {self.step}; try "
                f"a lower train.lr, or precision 'no' or 'bf16'"
            )
        line: dict[str, Any] = {"step": self.step, "images_seen": self.step * self.options.batch_size}
        line |= {"phase": self.switch.phase, **means}
        if self.haste is not None and self.haste.angle is not None:
            line |= self.haste.angle.summary()
        line |= readings
        # The trigger reads the main process's line, or rounding could part the processes at the switch.
        line = self.processes.from_main(lambda: line)
        self.switch.observe(line)
        self.window.clear()
        return line


class NotFinite(HasteError):
    """Training cannot go on: a loss, or gradients, are NaN or infinite."""


def check_finite(loss: float, step: int) -> None:
    """Raise NotFinite when a loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise NotFinite(
            f"the loss is {loss} at or before step {step}; try a lower train.lr, or precision 'no' or 'bf16'"
        )


def make_accelerator(options: Optimization) -> Accelerator:
    """accelerate's handle on device, precision and averaging of gradients."""
    averaging = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    with own_settings():
        accelerator = Accelerator(mixed_precision=options.precision, kwargs_handlers=[averaging])
    if accelerator.device.type == "cpu":
        if options.precision == "fp16":
            # accelerate would train in float32 without a word.
            raise HasteError("train.precision fp16 needs a GPU; expected here: bf16, no")
        torch.set_num_threads(options.threads)
    return accelerator
