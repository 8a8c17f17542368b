"""HASTE in training loops and models that are not ours."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from haste_core import HASTE, DiT, HasteError, Optimization, SiT, Taps, Teacher, Trainer, make_trigger, tap
from haste_core.training import Batch, draw_noise

ROOT = Path(__file__).parents[1]
SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def own_model():
    spec = importlib.util.spec_from_file_location("own_model", ROOT / "notebooks" / "own_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_teacher():
    """A function that makes the same teacher again: one that HASTE drops is gone."""
    return lambda **more: Teacher("vit_tiny_patch16_224", weights="random", mean=[0.5], std=[0.5], **SIZES | more)


def haste_for(teacher, **changes):
    chosen = {"width": 32, "depth": 2, "layer_pairs": [(0, 1), (2, 2)], "projector_width": 16, "stop_at": 20}
    return HASTE(teacher, **chosen | changes)


class Stream:
    """An endless seeded stream of batches."""

    with_images = True

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def next(self):
        x = torch.rand(8, 1, 8, 8, generator=self.generator) * 2 - 1
        return Batch(x, torch.randint(10, (8,), generator=self.generator), x)

    def state_dict(self):
        return {"generator": self.generator.get_state()}


def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def inputs(size=8, channels=1, classes=10):
    x = torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.arange(4) % classes


def test_a_loop_of_ones_own_trains_as_ours_does_step_by_step(own_model, make_teacher, output):
    ours = fill(SiT(image_size=8, channels=1, classes=10, depth=3, width=32, heads=4, patch=2))
    foreign = own_model.OwnSiT(depth=3, width=32)
    weights = {n.replace("y_embedder.embedding_table", "y_embedder"): w for n, w in ours.state_dict().items()}
    foreign.load_state_dict(weights)
    foreign.pos_embed.requires_grad_(False)  # a constant in ours
    trainer = Trainer(ours, Stream(), Optimization(batch_size=8, lr=1e-3, clip_norm=1e9), 5, haste_for(make_teacher()))

    haste, stream, noise = haste_for(make_teacher()), Stream(), torch.Generator().manual_seed(5)
    trained = [p for p in foreign.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *haste.parameters()], lr=1e-3, weight_decay=0.0)
    for step in range(30):
        batch = stream.next()
        t, eps, y = draw_noise(batch, 10, 0.1, noise)
        x_t = (1 - t)[:, None, None, None] * batch.x + t[:, None, None, None] * eps
        with haste.tap(foreign.blocks) as seen:
            v = foreign(x_t, t, y)
        loss = nn.functional.mse_loss(v, eps - batch.x) + haste(seen, batch.images, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(loss.detach()) == pytest.approx(float(trainer.train_step()["loss"]), abs=1e-6)
    assert haste.phase == trainer.switch.phase == 2
    assert_close(foreign(*inputs()), trainer.generator(*inputs()), atol=1e-5, rtol=1e-4)


def test_after_the_switch_there_is_no_loss_no_teacher_and_no_hook(own_model, make_teacher):
    model, haste = own_model.OwnSiT(depth=3, width=32), haste_for(make_teacher(), stop_at=1)
    optimizer = torch.optim.AdamW([*model.parameters(), *haste.parameters()])
    images = inputs()[0]
    losses, hooked = [], []
    for step in range(3):
        with haste.tap(model.blocks) as seen:
            model(*inputs())
            hooked.append(sum(len(m._forward_hooks) for m in model.modules()))
        losses.append(haste(seen, images, step))
    assert [float(loss) for loss in losses[1:]] == [0.0, 0.0]
    assert losses[0].requires_grad
    assert not losses[2].requires_grad
    assert hooked == [5, 5, 0]  # the switch is found when the loss of its step is asked for
    assert list(haste.parameters()) == []
    with pytest.raises(HasteError, match="no teacher in phase II"):
        haste.teacher  # noqa: B018
    before = sum(len(group["params"]) for group in optimizer.param_groups)
    haste.release(optimizer)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == before - 6
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


@pytest.mark.parametrize("stop", [3, 7])
def test_saving_and_resuming_goes_on_as_if_there_was_no_stop(own_model, make_teacher, tmp_path, stop):
    def make():
        torch.manual_seed(0)
        model = fill(own_model.OwnSiT(depth=3, width=32))
        haste = haste_for(
            make_teacher(), stop_at=None, watch_angle=True, trigger=make_trigger("plateau", window=1, gain=1.0)
        )
        return model, haste, torch.optim.SGD([*model.parameters(), *haste.parameters()], lr=0.05)

    def run(model, haste, optimizer, steps):
        lines = []
        for step in steps:
            with haste.tap(model.blocks) as seen:
                v = model(*inputs())
            loss = v.square().mean() + haste(seen, inputs()[0], step, inputs()[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lines.append((float(loss.detach()), haste.phase, haste.measure() if step % 2 else None))
        return lines

    whole = run(*make(), range(10))
    assert {phase for _, phase, _ in whole} == {1, 2}
    model, haste, optimizer = make()
    first = run(model, haste, optimizer, range(stop))
    torch.save({"model": model.state_dict(), "haste": haste.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert not any("teacher" in name or "encoder" in name for name in saved["haste"])
    model, haste, optimizer = make()
    model.load_state_dict(saved["model"])
    haste.load_state_dict(saved["haste"])
    assert [*first, *run(model, haste, optimizer, range(stop, 10))] == whole


def test_measurements_are_means_since_the_last_ones(own_model, make_teacher):
    model, haste = fill(own_model.OwnSiT(depth=3, width=32)), haste_for(make_teacher(), watch_angle=True)
    parts = []
    for step in range(2):
        with haste.tap(model.blocks) as seen:
            v = model(*inputs())
        losses = haste.losses(seen, inputs()[0], watch=False)
        parts.append(losses)
        (v.square().mean() + haste(seen, inputs()[0], step, inputs()[1])).backward()
    line = haste.measure()
    assert (line["step"], line["phase"]) == (2, 1)
    assert line["attention"] == pytest.approx(sum(float(p.attention.detach()) for p in parts) / 2)
    assert line["feature"] == pytest.approx(sum(float(p.feature.detach()) for p in parts) / 2)
    assert set(line["online"]) == {"feature", "attention"}
    assert -1 <= line["online_angle"] <= 1
    assert set(haste.measure()) == {"step", "phase"}


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(own_model, make_teacher):
    def gradients(parts):
        model, haste = fill(own_model.OwnSiT(depth=3, width=32)), haste_for(make_teacher())
        for part in torch.arange(4).chunk(parts):
            x, t, y = (value[part] for value in inputs())
            with haste.tap(model.blocks) as seen:
                v = model(x, t, y)
            ((v.square().mean() + haste(seen, x, 0)) / parts).backward()
        return [p.grad for p in [*model.parameters(), *haste.parameters()]]

    for one, other in zip(gradients(1), gradients(2), strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_losses_are_float32_and_the_step_works_under_autocast(own_model, make_teacher):
    model, haste = fill(own_model.OwnSiT(depth=3, width=32)), haste_for(make_teacher())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with haste.tap(model.blocks) as seen:
            model(*inputs())
        loss = haste(seen, inputs()[0], 0)
    assert seen.qk[0][0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in haste.parameters())


def test_to_moves_the_teacher_and_leaves_it_frozen_and_out_of_the_parameters(make_teacher):
    haste = haste_for(make_teacher()).to(torch.float64)
    assert haste.teacher.mean.dtype == haste.projector[0].weight.dtype == torch.float64
    assert len(list(haste.parameters())) == 6
    assert not any(p.requires_grad for p in haste.teacher.parameters())


def loss_of(model, haste, *args, **kwargs):
    with haste.tap(model.transformer_blocks) as seen:
        output = model(*args, **kwargs).sample
    return output.square().mean() + haste(seen, torch.rand(4, 1, 8, 8), next(haste.steps)), seen


def test_diffusers_dit_trains_through_the_switch(make_teacher):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=11,
    )  # fmt: skip
    haste = haste_for(make_teacher(), width=16, stop_at=2)
    haste.steps = count()
    x, _, y = inputs()
    optimizer = torch.optim.AdamW([*model.parameters(), *haste.parameters()], lr=1e-3)
    kept = []
    for _ in range(4):
        loss, seen = loss_of(model, haste, x, timestep=torch.arange(4), class_labels=y)
        kept.append(seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert haste.phase == 2
    assert kept[0].qk[0][0].shape == (4, 2, 16, 8)
    assert kept[0].tokens[2].shape == (4, 16, 16)
    assert kept[3].qk == {}
    # What was read is what the kernel got.
    attention, caught = model.transformer_blocks[0].attn1, []
    hook = attention.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    with tap(model.transformer_blocks, Taps(blocks=(0,))) as seen:
        model(x, timestep=torch.arange(4), class_labels=y)
    hook.remove()
    assert_close(seen.qk[0][0], attention.to_q(caught[0]).unflatten(-1, (2, 8)).transpose(1, 2))


class Fused(nn.Module):
    """A block with one projection for q, k and v, as in early timm."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)})
        self.attn.num_heads = 2

    def forward(self, x):
        q, k, v = self.attn["qkv"](x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_online_angle_is_that_of_whole_gradients_where_q_and_k_are_read_off_projections(make_teacher):
    from diffusers.models.attention import BasicTransformerBlock

    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2))
    for make in (Fused, lambda: BasicTransformerBlock(16, 2, 8)):
        blocks, haste = (
            fill(nn.ModuleList([make(), make(), make()])),
            haste_for(make_teacher(), width=16, watch_angle=True),
        )
        plain = x
        for block in blocks:
            plain = block(plain)
        with haste.tap(blocks) as seen:
            output = x
            for block in blocks:
                output = block(output)
        assert_close(output, plain)
        (output.square().mean() + haste(seen, inputs()[0], 0, inputs()[1])).backward()
        cosines = [c for c in haste.measure()["online"]["attention"] if c is not None]
        assert len(cosines) == 4
        assert all(-1 <= c <= 1 for c in cosines)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_the_image_tokens_of_diffusers_joint_blocks_are_read(make_teacher, qk_norm):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=1,
        pos_embed_max_size=8, qk_norm=qk_norm,
    )  # fmt: skip
    haste = haste_for(make_teacher(), width=16)
    haste.steps = count()
    words = {"encoder_hidden_states": torch.randn(4, 5, 16), "pooled_projections": torch.randn(4, 16)}
    loss, seen = loss_of(model, haste, inputs()[0], timestep=torch.arange(4), **words)
    assert seen.qk[0][0].shape == seen.qk[0][1].shape == (4, 2, 16, 8)
    assert seen.tokens[2].shape == (4, 16, 16)
    loss.backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad.abs().sum() > 0


class Strange(nn.Module):
    """Attention by other names."""

    def __init__(self):
        super().__init__()
        self.queries_and_keys = nn.Linear(8, 16)

    def forward(self, x):
        return x + self.queries_and_keys(x)[..., :8]


def test_other_attention_is_read_by_a_pair_of_functions_and_named_where_it_is_not():
    blocks = nn.ModuleList([Strange()])
    named = r"Strange with the modules queries_and_keys; expected .*read="
    with pytest.raises(HasteError, match=named), tap(blocks, Taps(blocks=(0,))):
        pass
    assert not blocks[0]._forward_hooks

    def split(output):
        q, k = output.unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        return q, k

    with tap(blocks, Taps(blocks=(0,)), read=(lambda block: block.queries_and_keys, split)) as seen:
        blocks[0](torch.randn(3, 5, 8))
    assert seen.qk[0][0].shape == (3, 2, 5, 4)
    with (
        pytest.raises(HasteError, match=r"depth \(from 1\) to read tokens at '5'; expected one of: 1"),
        tap(blocks, Taps(depths=(5,))),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stop_at": 3, "trigger": make_trigger("never")}, "stop_at=3 and a trigger"),
        ({"layer_pairs": [(0, 7)]}, "teacher block"),
        ({"layer_pairs": []}, "without layer_pairs"),
        ({"heads": 2, "aligned_heads": [3]}, r"names head 3; expected 0 to 1 \(student 2 heads, teacher 4\)"),
    ],
)
def test_settings_that_do_not_fit_say_so(make_teacher, changes, words):
    with pytest.raises(HasteError, match=words):
        haste_for(make_teacher(), **changes)


def test_tokens_that_fill_no_square_need_a_grid(make_teacher):
    haste = haste_for(make_teacher(), lambda_attention=0.0)
    seen = type("Seen", (), {"tokens": {2: torch.randn(4, 15, 32)}, "qk": {}})()
    with pytest.raises(HasteError, match="15 tokens, no square; expected grid="):
        haste(seen, inputs()[0], 0)


def test_a_compiled_model_is_read_and_trains_as_an_uncompiled_one(own_model, make_teacher):
    def losses(compiled):
        torch.compiler.reset()
        model, haste = fill(own_model.OwnSiT(depth=3, width=32)), haste_for(make_teacher(), stop_at=2)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer, found = torch.optim.SGD([*model.parameters(), *haste.parameters()], lr=0.05), []
        for step in range(4):
            with haste.tap(model.blocks) as seen:
                v = called(*inputs())
            loss = v.square().mean() + haste(seen, inputs()[0], step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)
    torch.compiler.reset()


def test_a_copy_of_the_model_that_is_averaged_has_no_hooks(own_model, make_teacher):
    model, haste = own_model.OwnSiT(depth=3, width=32), haste_for(make_teacher())
    with haste.tap(model.blocks):
        model(*inputs())
    copied = copy.deepcopy(model)
    assert not any(m._forward_hooks for m in copied.modules())


def test_the_core_alone_imports_nothing_of_the_study():
    code = (
        "import sys, haste_core\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), sep='\\n')\n"
        "print('haste_core.study' in sys.modules, 'haste_core.analysis' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"pydantic", "pandas", "sklearn", "datasets", "diffusers", "matplotlib", "papermill", "snakemake"}
    assert not heavy & set(told)
    assert told[-2:] == ["False", "False"]


@pytest.mark.parametrize("kind", [SiT, DiT])
def test_recomputed_activations_change_no_number(make_teacher, output, kind):
    def run(recompute):
        torch.manual_seed(0)
        model = fill(kind(image_size=8, channels=1, classes=10, depth=3, width=32, heads=4, patch=2))
        options = Optimization(batch_size=8, lr=1e-3, activation_checkpointing=recompute)
        trainer = Trainer(model, Stream(), options, 5, haste_for(make_teacher(), stop_at=2, watch_angle=True))
        losses = [float(trainer.train_step()["loss"]) for _ in range(2)]
        return [*losses, trainer.measure()["online_angle"], *(float(trainer.train_step()["loss"]) for _ in range(2))]

    assert run(True) == pytest.approx(run(False), rel=1e-6)


@pytest.mark.parametrize("changes", [{"t_low": 0.5}, {"watch_angle": True}])
def test_settings_by_noise_level_need_the_noise_levels(own_model, make_teacher, changes):
    model, haste = own_model.OwnSiT(depth=3, width=32), haste_for(make_teacher(), **changes)
    with haste.tap(model.blocks) as seen:
        model(*inputs())
    with pytest.raises(HasteError, match=r"no noise levels were given.*step, t"):
        haste(seen, inputs()[0], 0)
