"""HASTE in training loops and models that are not ours."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import haste_core
from haste_core import HASTE, HasteError, Optimization, SiT, Taps, Teacher, Trainer, make_trigger, tap
from haste_core.training import Batch, draw_noise

ROOT = Path(__file__).parents[1]
SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 4}


@pytest.fixture
def own_model(randomise):
    """A function to a filled transformer of notebook 09, which is not ours."""
    spec = importlib.util.spec_from_file_location("own_model", ROOT / "notebooks" / "own_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda depth=3: randomise(module.OwnSiT(depth=depth, width=32))


@pytest.fixture(scope="module")
def make_haste():
    """A function to HASTE with a teacher of its own: one that HASTE drops is gone."""

    def make(**changes):
        teacher = Teacher("vit_tiny_patch16_224", weights="random", mean=[0.5], std=[0.5], **SIZES)
        chosen = {"width": 32, "depth": 2, "layer_pairs": [(0, 1), (2, 2)], "projector_width": 16, "stop_at": 20}
        return HASTE(teacher, **chosen | changes)

    return make


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


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T, Y = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.arange(4)


def loss_of(model, haste, step=0, part=slice(None), called=None):
    with haste.tap(model.blocks) as seen:
        v = (model if called is None else called)(X[part], T[part], Y[part])
    return v.square().mean() + haste(seen, X[part], step, T[part])


def take(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_a_loop_of_ones_own_trains_as_ours_does_step_by_step(own_model, make_haste, randomise, output):
    ours = randomise(SiT(image_size=8, channels=1, classes=10, depth=3, width=32, heads=4, patch=2))
    foreign = own_model()
    weights = {n.replace("y_embedder.embedding_table", "y_embedder"): w for n, w in ours.state_dict().items()}
    foreign.load_state_dict(weights)
    foreign.pos_embed.requires_grad_(False)  # a constant in ours
    options = Optimization(batch_size=8, lr=1e-3, clip_norm=1e9)
    trainer = Trainer(ours, Stream(), options, 5, make_haste(stop_at=4))
    haste, stream, noise = make_haste(stop_at=4), Stream(), torch.Generator().manual_seed(5)
    trained = [p for p in foreign.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *haste.parameters()], lr=1e-3, weight_decay=0.0)
    for step in range(7):
        batch = stream.next()
        t, eps, y = draw_noise(batch, 10, 0.1, noise)
        x_t = (1 - t)[:, None, None, None] * batch.x + t[:, None, None, None] * eps
        with haste.tap(foreign.blocks) as seen:
            v = foreign(x_t, t, y)
        loss = take(optimizer, nn.functional.mse_loss(v, eps - batch.x) + haste(seen, batch.images, step))
        assert loss == pytest.approx(float(trainer.train_step()["loss"]), abs=1e-6)
    assert haste.phase == trainer.switch.phase == 2
    assert_close(foreign(X, T, Y), trainer.generator(X, T, Y), atol=1e-5, rtol=1e-4)


def test_after_the_switch_there_is_no_loss_no_teacher_and_no_hook(own_model, make_haste):
    model, haste = own_model(), make_haste(stop_at=1)
    optimizer = torch.optim.AdamW([*model.parameters(), *haste.parameters()])
    losses, hooked = [], []
    for step in range(3):
        with haste.tap(model.blocks) as seen:
            model(X, T, Y)
            hooked.append(sum(len(m._forward_hooks) for m in model.modules()))
        losses.append(haste(seen, X, step))
    assert [float(loss) for loss in losses[1:]] == [0.0, 0.0]
    assert [loss.requires_grad for loss in losses] == [True, False, False]
    assert hooked == [5, 5, 0]  # the switch is found when the loss of its step is asked for
    assert list(haste.parameters()) == []
    with pytest.raises(HasteError, match="no teacher in phase II"):
        haste.teacher  # noqa: B018
    before = sum(len(group["params"]) for group in optimizer.param_groups)
    haste.release(optimizer)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == before - 6
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


@pytest.mark.parametrize("stop", [3, 7])
def test_saving_and_resuming_goes_on_as_if_there_was_no_stop(own_model, make_haste, tmp_path, stop):
    def make():
        model, trigger = own_model(), make_trigger("plateau", window=1, gain=1.0)
        haste = make_haste(stop_at=None, watch_angle=True, trigger=trigger)
        return model, haste, torch.optim.SGD([*model.parameters(), *haste.parameters()], lr=0.05)

    def run(model, haste, optimizer, steps):
        lines = []
        for step in steps:
            loss = take(optimizer, loss_of(model, haste, step))
            lines.append((loss, haste.phase, haste.measure() if step % 2 else None))
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


def test_measurements_are_means_since_the_last_ones(own_model, make_haste):
    model, haste = own_model(), make_haste(watch_angle=True)
    with haste.tap(model.blocks) as seen:
        model(X, T, Y)
    losses = haste.losses(seen, X, watch=False)
    for step in range(2):
        loss_of(model, haste, step).backward()
    line = haste.measure()
    assert (line["step"], line["phase"]) == (2, 1)
    assert line["attention"] == pytest.approx(float(losses.attention.detach()))
    assert line["feature"] == pytest.approx(float(losses.feature.detach()))
    assert set(line["online"]) == {"feature", "attention"}
    assert -1 <= line["online_angle"] <= 1
    assert set(haste.measure()) == {"step", "phase"}


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(own_model, make_haste):
    def gradients(parts):
        model, haste = own_model(), make_haste()
        for part in torch.arange(4).chunk(parts):
            (loss_of(model, haste, 0, part) / parts).backward()
        return [p.grad for p in [*model.parameters(), *haste.parameters()]]

    for one, other in zip(gradients(1), gradients(2), strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_to_moves_the_teacher_and_leaves_it_frozen_and_out_of_the_parameters(make_haste):
    haste = make_haste().to(torch.float64)
    assert haste.teacher.mean.dtype == haste.projector[0].weight.dtype == torch.float64
    assert len(list(haste.parameters())) == 6
    assert not any(p.requires_grad for p in haste.teacher.parameters())


# -- models of other libraries ----------------------------------------------------------------------------------------


def loss_of_diffusers(model, haste, step, **kwargs):
    with haste.tap(model.transformer_blocks) as seen:
        output = model(X, timestep=torch.arange(4), **kwargs).sample
    return output.square().mean() + haste(seen, X, step), seen


def test_diffusers_dit_trains_through_the_switch(make_haste):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=11,
    )  # fmt: skip
    haste, kept = make_haste(width=16, stop_at=2), []
    optimizer = torch.optim.AdamW([*model.parameters(), *haste.parameters()], lr=1e-3)
    for step in range(4):
        loss, seen = loss_of_diffusers(model, haste, step, class_labels=Y)
        take(optimizer, loss)
        kept.append(seen)
    assert haste.phase == 2
    assert kept[0].qk[0][0].shape == (4, 2, 16, 8)
    assert kept[0].tokens[2].shape == (4, 16, 16)
    assert kept[3].qk == {}
    # What was read is what the kernel got.
    attention, caught = model.transformer_blocks[0].attn1, []
    attention.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    with tap(model.transformer_blocks, Taps(blocks=(0,))) as seen:
        model(X, timestep=torch.arange(4), class_labels=Y)
    assert_close(seen.qk[0][0], attention.to_q(caught[0]).unflatten(-1, (2, 8)).transpose(1, 2))


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_the_image_tokens_of_diffusers_joint_blocks_are_read(make_haste, qk_norm):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=1,
        pos_embed_max_size=8, qk_norm=qk_norm,
    )  # fmt: skip
    words = {"encoder_hidden_states": torch.randn(4, 5, 16), "pooled_projections": torch.randn(4, 16)}
    loss, seen = loss_of_diffusers(model, make_haste(width=16), 0, **words)
    assert seen.qk[0][0].shape == seen.qk[0][1].shape == (4, 2, 16, 8)
    assert seen.tokens[2].shape == (4, 16, 16)
    loss.backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad.abs().sum() > 0


class Fused(nn.Module):
    """A block with one projection for q, k and v, as in early timm."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)})
        self.attn.num_heads = 2

    def forward(self, x):
        q, k, v = self.attn["qkv"](x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_online_angle_is_that_of_whole_gradients_where_q_and_k_are_read_off_projections(make_haste, randomise):
    from diffusers.models.attention import BasicTransformerBlock

    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2))
    for make in (Fused, lambda: BasicTransformerBlock(16, 2, 8)):
        blocks, haste = randomise(nn.Sequential(make(), make(), make())), make_haste(width=16, watch_angle=True)
        plain = blocks(x)
        with haste.tap(blocks) as seen:
            output = blocks(x)
        assert_close(output, plain)
        (output.square().mean() + haste(seen, X, 0, T)).backward()
        cosines = [c for c in haste.measure()["online"]["attention"] if c is not None]
        assert len(cosines) == 4
        assert all(-1 <= c <= 1 for c in cosines)


class Strange(nn.Module):
    """Attention by other names."""

    def __init__(self):
        super().__init__()
        self.queries_and_keys = nn.Linear(8, 16)

    def forward(self, x):
        return x + self.queries_and_keys(x)[..., :8]


def test_other_attention_is_read_by_a_pair_of_functions_and_named_where_it_is_not():
    blocks = nn.ModuleList([Strange()])
    wrong = {
        r"Strange with the modules queries_and_keys; expected .*read=": Taps(blocks=(0,)),
        r"depth \(from 1\) to read tokens at '5'; expected one of: 1": Taps(depths=(5,)),
    }
    for words, taps in wrong.items():
        with pytest.raises(HasteError, match=words), tap(blocks, taps):
            pass
    assert not blocks[0]._forward_hooks

    def split(output):
        q, k = output.unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        return q, k

    with tap(blocks, Taps(blocks=(0,)), read=(lambda block: block.queries_and_keys, split)) as seen:
        blocks[0](torch.randn(3, 5, 8))
    assert seen.qk[0][0].shape == (3, 2, 5, 4)


def test_what_a_loss_lacks_is_named(own_model, make_haste):
    seen = type("Seen", (), {"tokens": {2: torch.randn(4, 15, 32)}, "qk": {}})()
    with pytest.raises(HasteError, match="15 tokens, no square; expected grid="):
        make_haste(lambda_attention=0.0)(seen, X, 0)
    for changes in ({"t_low": 0.5}, {"watch_angle": True}):
        with pytest.raises(HasteError, match=r"no noise levels were given.*step, t"):
            make_haste(**changes)(seen, X, 0)


@pytest.mark.slow
def test_a_compiled_model_is_read_and_trains_as_an_uncompiled_one(own_model, make_haste):
    def losses(compiled):
        torch.compiler.reset()
        model, haste = own_model(2), make_haste(stop_at=1, layer_pairs=[(1, 1)])
        called = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD([*model.parameters(), *haste.parameters()], lr=0.05)
        return [take(optimizer, loss_of(model, haste, step, called=called)) for step in range(2)]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)
    torch.compiler.reset()


def test_an_editor_and_a_notebook_know_the_names_of_the_core(tmp_path):
    (tmp_path / "mine.py").write_text("import haste_core\nreveal_type(haste_core.draw)\nhaste_core.drow\n")
    done = subprocess.run([sys.executable, "-m", "mypy", str(tmp_path / "mine.py")], capture_output=True, text=True)
    assert "def (model: haste_core.models.layers.DiffusionTransformer, labels: torch" in done.stdout
    assert 'Module has no attribute "drow"' in done.stdout
    assert set(haste_core.__all__) == set(dir(haste_core))


@pytest.mark.slow
def test_the_core_alone_imports_nothing_of_the_study():
    # Names are imported at their first use; a star import uses all of them.
    code = "import sys; from haste_core import *; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"haste_core.teacher", "haste_core.alignment"} <= set(names)
    heavy = {"pydantic", "pandas", "sklearn", "datasets", "diffusers", "matplotlib", "papermill", "snakemake"}
    assert not heavy & {name.partition(".")[0] for name in names}
    assert not {"haste_core.study", "haste_core.analysis"} & set(names)
