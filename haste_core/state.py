"""A training run between two steps: what it consists of, and how it is made (`haste_core.snapshot` saves it)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast
from torch import Generator, Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from haste_core import sharding
from haste_core.alignment import Alignment
from haste_core.analysis.online import OnlineAngle
from haste_core.compiling import compile_blocks
from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer, build
from haste_core.objectives import Objective, objective_of
from haste_core.processes import Processes, micro_batches
from haste_core.seeding import stream
from haste_core.study.config import RunConfig
from haste_core.study.data import Batches, Dataset, open_dataset
from haste_core.study.data.contexts import Contexts
from haste_core.study.pretrain import check_precision
from haste_core.teacher import Teacher
from haste_core.teacher_cache import TeacherCache
from haste_core.termination import Termination


@dataclass
class TrainState:
    """A run between two steps. `alignment`, its optimizer and `angle` exist in phase I only.

    processes: those that train the run together, each with a state of its own; weights, average, optimizers and
    generators are equal in all of them. batches: hands out this process's share. micro_batches: the parts of that share
    that one forward and backward pass each takes. window: of this process alone until `gather`.
    angle: the online estimate of the gradient angle, where the run watches it. cache: what the teacher makes of every
    training image, where it was written down.
    """

    config: RunConfig
    seed: int
    accelerator: Accelerator
    model: nn.Module
    ema: DiffusionTransformer
    optimizer: torch.optim.Optimizer
    alignment: Alignment | None
    alignment_optimizer: torch.optim.Optimizer | None
    termination: Termination
    batches: Batches
    noise: Generator
    objective: Objective
    processes: Processes
    micro_batches: list[slice]
    step: int = 0
    angle: OnlineAngle | None = None
    cache: TeacherCache | None = None
    window: dict[str, Tensor] = field(default_factory=dict)  # sums since the last logged step

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The student's optimizer and, in phase I, the projector's."""
        return [o for o in (self.optimizer, self.alignment_optimizer) if o is not None]

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained now: the student, and in phase I the projector."""
        projector = self.alignment.projector if self.alignment else None
        return [*self.model.parameters(), *(projector.parameters() if projector else ())]

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """While open, gradients add up in each process by itself, and forward passes expect no average of them."""
        projector = self.alignment.projector if self.alignment else None
        with ExitStack() as held:
            for module in (self.model, projector):
                if module is not None:
                    held.enter_context(self.accelerator.no_sync(module))
                    held.enter_context(sharding.unsynchronised(module))
            yield

    def gather(self) -> None:
        """Make what was summed up since the last logged step the mean over all processes, in each of them."""
        self.window = self.processes.mean(self.window)
        if self.angle is not None:
            self.angle.sums = self.processes.mean({"sums": self.angle.sums})["sums"]

    def enter_phase_two(self) -> None:
        """Drop teacher, projector and their optimizer state for good; nobody looks at clean images any more."""
        self._release(self.alignment.projector if self.alignment is not None else None, self.alignment_optimizer)
        self.alignment = self.alignment_optimizer = self.angle = self.cache = None
        self.batches.with_images = False
        self.compile()

    def _release(self, projector: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Let accelerate forget what it prepared for phase I; it would keep the projector and its moments for good."""
        if projector is None:
            return
        dropped = (projector, self.accelerator.unwrap_model(projector), optimizer)
        for kept in (self.accelerator._models, self.accelerator._optimizers):
            kept[:] = [one for one in kept if not any(one is gone for gone in dropped)]

    def read_teacher_from(self, folder: Path) -> None:
        """From now on take what the teacher sees from the cache in `folder`; images need not be read for it."""
        self.cache = TeacherCache(folder)
        self.batches.with_images = False

    def compile(self) -> None:
        """Where the run is compiled, let its blocks be; those whose q and k are watched stay as they are meanwhile.

        The watch catches gradients on the way from q and k into the block's own attention, which a compiled block has
        nowhere to hang it on.
        """
        if self.config.train.compile:
            watched = self.alignment.taps.blocks if self.alignment is not None and self.angle is not None else ()
            compile_blocks(self.accelerator.unwrap_model(self.model), leave=watched)


class Seeds(NamedTuple):
    """A seed for each random part of a run, so that no part's draws depend on another's."""

    weights: int
    projector: int
    order: int
    noise: int
    rest: int


def seeds_of(seed: int) -> Seeds:
    """The seeds that a run's seed stands for."""
    return Seeds(*(stream(role, seed) for role in Seeds._fields))


def create(
    config: RunConfig,
    seed: int,
    teacher: Teacher | None,
    termination: Termination | None = None,
    dataset: Dataset | None = None,
    processes: Processes | None = None,
) -> TrainState:
    """A run before its first step; every initial value comes from `seed`.

    Args:
        config: the run.
        seed: of weights, projector, data order and noise, each of which gets a stream of its own.
        teacher: the frozen encoder; needed in phase I and never used otherwise.
        termination: the phase to begin in; by default that of step 0.
        dataset: what to learn from in place of the run's data; for timing.
        processes: those that train the run together; by default those that a launcher started.

    Raises:
        HasteError: there is no teacher, or settings, data and machine do not fit together.
    """
    processes = processes or Processes()
    parts = micro_batches(config.train, processes.count)
    accelerator = accelerator_of(config)
    seeds = seeds_of(seed)
    torch.manual_seed(seeds.rest)  # nothing draws from it; set so that it is the same in every run
    dataset = open_dataset(config.data) if dataset is None else dataset
    student = build_generator(config, dataset, seeds.weights)
    mesh = None
    if config.train.sharded and processes.count > 1:
        mesh = sharding.mesh_of(processes.count, accelerator.device)
    else:
        student.to(accelerator.device)  # a divided one goes there block by block
    if termination is None:
        termination = Termination(config)
        termination.update(0)
    alignment = None
    if termination.phase == 1:
        alignment = _alignment(config, student, teacher, seeds.projector, accelerator.device, processes)
        check_precision(alignment.teacher, dataset, alignment.teacher_blocks, config.train.precision)
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    if mesh is not None:
        sharding.divide(ema, ema.blocks, mesh)
    model, optimizer = _prepared(accelerator, student, config, mesh, student.blocks)
    alignment_optimizer = None
    if alignment is not None and alignment.projector is not None:
        alignment.projector, alignment_optimizer = _prepared(accelerator, alignment.projector, config, mesh)
    angle = None
    if alignment is not None and watches(config):
        angle = OnlineAngle(accelerator.device, processes=processes.count)
    share = processes.share(config.train)
    state = TrainState(
        config, seed, accelerator, model, ema, optimizer, alignment, alignment_optimizer, termination,
        batches=Batches(
            dataset, config.train.batch_size, seeds.order, alignment is not None, share, config.train.prefetch
        ),
        noise=Generator().manual_seed(seeds.noise),
        objective=objective_of(config.model.kind),
        processes=processes,
        micro_batches=parts,
        angle=angle,
    )  # fmt: skip
    state.compile()
    return state


def _alignment(
    config: RunConfig,
    student: DiffusionTransformer,
    teacher: Teacher | None,
    seed: int,
    device: torch.device,
    processes: Processes,
) -> Alignment:
    """Phase I's teacher and projector, the same in all processes."""
    if teacher is None:
        raise HasteError("an aligned run needs its teacher; possible: haste teacher <study> prepares it")
    teacher = teacher.to(device)
    if processes.count > 1:
        broadcast(list(teacher.state_dict().values()))  # one with random weights was drawn by each
    return Alignment(config.alignment, student, teacher, seed)


def _prepared(
    accelerator: Accelerator,
    module: nn.Module,
    config: RunConfig,
    mesh: DeviceMesh | None,
    blocks: Iterable[nn.Module] = (),
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module and its optimizer, ready to be trained here alone or by several processes.

    mesh, blocks: what the module is divided among, if it is, and the units it is divided by.
    """
    if mesh is not None:
        # Of the model accelerate sees to the precision alone, as of one that is not trained.
        module = accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
        sharding.divide(module, blocks, mesh)
        return module, accelerator.prepare_optimizer(adamw(module, config))
    # Buffers are constants, equal in all processes; by default they would be sent round before every forward pass.
    constants = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, constants)
    prepared: tuple[nn.Module, torch.optim.Optimizer] = accelerator.prepare(module, adamw(module, config))
    return prepared


def accelerator_of(config: RunConfig) -> Accelerator:
    """accelerate's handle on device, precision and, among several processes, the averaging of gradients.

    Raises:
        HasteError: the precision does not exist here, or accelerate was set up for more than data-parallel training.
    """
    # No parameter goes unused in either phase, so nobody has to look for such.
    averaging = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision=config.train.precision, kwargs_handlers=[averaging])
    possible = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.num_processes > 1 and accelerator.distributed_type not in possible:
        names = ", ".join(kind.value for kind in possible)
        raise HasteError(f"accelerate is set up for {accelerator.distributed_type.value}; possible: {names}")
    if accelerator.device.type == "cpu":
        if config.train.precision == "fp16":
            # accelerate would train in float32 without a word.
            raise HasteError("train.precision fp16 needs a GPU; possible here: bf16, no")
        torch.set_num_threads(config.train.threads)
    return accelerator


def watches(config: RunConfig) -> bool:
    """True when a run takes the online estimate of its gradient angle in phase I."""
    return config.train.watch_angle or config.termination.kind == "online_angle"


def build_generator(config: RunConfig, dataset: Dataset, seed: int) -> DiffusionTransformer:
    """A run's generator as it is before the first step, sized for what `dataset` holds.

    Raises:
        HasteError: the patch does not divide the image, or an MM-DiT has no text tokens to learn from.
    """
    if dataset.image_size % config.model.patch:
        raise HasteError(f"model.patch {config.model.patch} does not divide the image size {dataset.image_size}")
    contexts, model = Contexts(config.data.contexts) if config.data.contexts else None, config.model
    if model.kind == "mmdit" and (
        contexts is None or (contexts.captions, contexts.width) != (dataset.classes, model.context_width)
    ):
        found = "none" if contexts is None else f"{contexts.captions} captions of width {contexts.width}"
        raise HasteError(
            f"an MM-DiT needs text tokens for {dataset.classes} labels of width {model.context_width}, data.contexts "
            f"has {found}; possible: a file by haste_core.study.data.contexts.write, or another model.context_width"
        )
    return build(
        model, image_size=dataset.image_size, channels=dataset.channels, classes=dataset.classes, seed=seed,
        contexts=contexts,
    )  # fmt: skip


def adamw(module: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over a module with the run's settings (Table 16, arXiv 2505.16792), as one fused kernel."""
    train = config.train
    return torch.optim.AdamW(
        module.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
    )
