"""Released checkpoints: what is read from which layout, what is refused, and that writing loses nothing."""

from __future__ import annotations

import argparse
import collections
import re
import resource
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from haste_core.alignment import projector
from haste_core.errors import HasteError
from haste_core.models import KINDS, SiT
from haste_core.models.layers import sincos_positions
from haste_core.released import begin_from, infer, load_reference, save_reference
from haste_core.study import config, runs
from haste_core.study.dry_run import check_study
from haste_core.study.runs import Run
from haste_core.study.train import fit, open_trainer

SMALL = {"image_size": 8, "channels": 4, "classes": 5, "depth": 2, "width": 24, "heads": 3, "patch": 2}
JOINT = SMALL | {"classes": 1, "width": 64, "heads": 2, "context_width": 6}


@pytest.fixture
def made(randomise):
    """A function to a random generator of a family, small unless told otherwise."""

    def make(family="sit", seed=0, **sizes):
        return randomise(KINDS[family](**{**(JOINT if family == "mmdit" else SMALL), **sizes}), seed).eval()

    return make


@pytest.fixture
def projected(randomise):
    """A function to the projectors' part of a released state dict, and the modules."""

    def make(count=1, width=24):
        modules = [randomise(projector(width, 20, 10 + i, seed=0), seed=i) for i in range(count)]
        return {f"projectors.{i}.{n}": v for i, m in enumerate(modules) for n, v in m.state_dict().items()}, modules

    return make


def assert_same(found, expected):
    """Equal to the bit, parameter by parameter and buffer by buffer."""
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (found, expected))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def load(source, family="sit", num_heads=3, **more):
    return load_reference(source, family, num_heads, **more).generator


def inputs(model, batch=3, length=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.channels, model.image_size, model.image_size, generator=generator)
    t = torch.tensor([0.25, 0.5, 0.875])[:batch]
    if model.kind == "mmdit":
        return x, t, torch.randn(batch, length, model.context_embedder.in_features, generator=generator)
    return x, t, torch.arange(batch) % model.classes


def refused(match, source, *args, **kwargs):
    with pytest.raises(HasteError, match=match) as caught:
        load_reference(source, *args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CONFIGURATIONS = [
    ("sit", ".pt", {"qk_norm": True}),
    # A hidden width of 61, whose ratio to 28 is rounded down.
    ("sit", ".safetensors", {"width": 28, "heads": 7, "mlp_ratio": 61.5 / 28, "patch": 4, "image_size": 12}),
    ("dit", ".safetensors", {}),
    ("mmdit", ".pt", {"depth": 1, "width": 32, "heads": 1, "context_width": 768, "patch": 4, "image_size": 16}),
]


@pytest.mark.parametrize(("family", "suffix", "sizes"), CONFIGURATIONS)
def test_a_round_trip_is_exact_to_the_bit(tmp_path, made, projected, family, suffix, sizes):
    model = made(family, **sizes)
    extra, modules = projected(2, model.x_embedder.proj.out_channels)
    path = tmp_path / f"deep/er/model{suffix}"
    save_reference(path, model, nn.ModuleList(modules))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found, several = load_reference(path, family, None if sizes.get("qk_norm") else model.heads)
    assert type(found) is KINDS[family]
    assert not found.training
    assert_same(found, model)
    assert torch.equal(found(*inputs(model)), model(*inputs(model)))
    assert_same({f"projectors.{n}": v for n, v in several.state_dict().items()}, extra)
    facts = "heads", "grid", "patch", "image_size", "channels", "classes", "null_label"
    assert all(getattr(found, fact) == getattr(model, fact) for fact in facts)


@pytest.mark.parametrize("saved", ["zip", "legacy"])
def test_layouts_with_model_and_ema(tmp_path, made, projected, saved):
    model, ema, (extra, _) = made(seed=0), made(seed=1), projected()
    whole = {
        "model": {f"module.{n}": v for n, v in (model.state_dict() | extra).items()},
        "ema": collections.OrderedDict(ema.state_dict() | extra),
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(model="SiT-XL/2", lr=1e-4, resolution=256, proj_coeff=0.5, exp=None),
        "steps": 400000,
    }
    path = tmp_path / "0400000.pt"
    torch.save(whole, path, _use_new_zipfile_serialization=saved == "zip")
    for source in (path, str(path), whole):
        assert_same(load(source), ema)
        assert_same(load(source, weights="model"), model)
        assert len(load_reference(source, "sit", 3).projectors) == 1
    for source in ({"model": whole["model"], "ema": None}, model.state_dict()):
        assert_same(load(source), model)
    refused("no 'ema' weights; expected one of: model", {"model": whole["model"]}, "sit", 3, weights="ema")


def test_prefixes_of_wrappers_are_stripped_and_other_float_types_become_float32(tmp_path, made):
    weights = made().state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        assert_same(load({prefix + n: v for n, v in weights.items()}), made())
    refused("'pos_embed' twice", weights | {"module.pos_embed": weights["pos_embed"]}, "sit", 3)
    for dtype in (torch.bfloat16, torch.float64):
        other = {name: value.to(dtype) for name, value in weights.items()}
        torch.save(other, tmp_path / "a.pth")
        save_file(other, tmp_path / "a.safetensors")
        for name in ("a.pth", "a.safetensors"):
            assert_same(load(tmp_path / name), {n: value.float() for n, value in other.items()})


def test_positions_and_heads_that_are_not_stored_are_made_or_given(made):
    weights, normed = made().state_dict(), made(qk_norm=True).state_dict()
    other = weights | {"pos_embed": torch.arange(16 * 24.0).reshape(1, 16, 24)}
    assert torch.equal(load(other).pos_embed, other["pos_embed"])
    bare = {name: value for name, value in weights.items() if name != "pos_embed"}
    assert_same(load(bare, image_size=8), made())
    assert torch.equal(load(bare, image_size=12).pos_embed, sincos_positions(24, 6)[None])
    for size in (None, -2, 0, 7):
        refused(rf"image_size {size}; expected a multiple of 2", bare, "sit", 3, image_size=size)
    assert load(weights, num_heads=6).heads == 6
    for heads in (None, 5, 0, -3, 48):
        refused(rf"num_heads {heads}, .*expected num_heads \(--heads\), a divisor of 24", weights, "sit", heads)
    assert load(normed, num_heads=None).heads == load(normed).heads == 3
    assert load(made("mmdit").state_dict(), None, None).heads == 2
    for depth, width, heads in ((12, 384, 6), (28, 1152, 16)):
        sizes = SMALL | {"image_size": 32, "depth": depth, "width": width, "heads": heads, "classes": 1000}
        with torch.device("meta"):
            tensors = SiT(**sizes).state_dict()
        assert infer(tensors).sizes == sizes | {"mlp_ratio": 4.0, "qk_norm": False}
        assert infer(tensors, "sit", heads // 2).sizes["heads"] == heads // 2


@pytest.mark.parametrize(
    ("kind", "asked", "words"),
    [
        ("dit", "mmdit", "'mmdit' was asked for, the weights look like family 'dit'"),
        ("sit", "dit", "'dit' was asked for, the weights look like family 'sit'"),
        ("mmdit", "sit", "'sit' was asked for, the weights look like family 'mmdit'"),
        ("dit", None, "two outputs per channel.*expected family 'dit' or 'sit'"),
        ("sit", "sid", "unknown family 'sid' .did you mean 'sit'"),
    ],
)
def test_a_family_that_does_not_fit_is_refused_naming_the_right_one(made, kind, asked, words):
    refused(words, made(kind).state_dict(), asked, 2 if kind == "mmdit" else 3)


@pytest.mark.parametrize(("family", "block"), [("sit", "blocks.1"), ("mmdit", "joint_blocks.1.x_block")])
def test_missing_unknown_misshapen_and_other_weights_are_named(made, projected, family, block):
    weights, width = made(family).state_dict(), 64 if family == "mmdit" else 24
    extra = projected(2, width)[0]

    def without(name):
        return {n: value for n, value in (weights | extra).items() if not n.startswith(name)}

    wrong = {
        rf"do not fit: Missing.*{block}\.mlp\.fc2\.bias.*; expected": without(f"{block}.mlp.fc2.bias"),
        rf"Unexpected.*{block}\.attn\.a": weights | {f"{block}.attn.a": torch.zeros(2)},
        rf"mismatch for {block}\.attn\.qkv\.bias": weights | {f"{block}.attn.qkv.bias": torch.zeros(5)},
        "mismatch for final_layer.linear.bias": weights | {"final_layer.linear.bias": torch.zeros(())},
        "mismatch for pos_embed": weights | {"pos_embed": torch.zeros(1, 15, width)},
        "Missing": {re.sub(r"blocks\.1\.", "blocks.7.", n): v for n, v in weights.items()},
        "have no projectors.0.0.weight": without("projectors.0"),
        "Missing.*1.2.weight": without("projectors.1.2.weight"),
        "mismatch for 0.0.weight": weights | projected(1, width + 6)[0],
        "'n_averaged', a torch.int64; expected": weights | {"n_averaged": torch.tensor(3)},
        "'steps', a int; expected": weights | {"steps": 3},
        "they have nothing": {},
    }
    for words, tensors in wrong.items():
        refused(words, tensors, family, 2 if family == "mmdit" else 3)
    for shape in ((), (3,), (0, 4), (7, 24), (24, 4, 2, 3)):
        for name in ("x_embedder.proj.weight", "final_layer.linear.weight"):
            refused(".", weights | {name: torch.zeros(shape)}, family, 1)


# -- SiT's own convention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"qk_norm": True}, {"patch": 4, "channels": 3}])
@torch.no_grad()
def test_sits_own_release_becomes_a_plain_sit_exactly(made, projected, sizes):
    released = made("dit", **sizes)  # the same network with twice the outputs, called with t=1 at data
    extra, (module,) = projected()
    found, (only,) = load_reference(released.state_dict() | extra, "sit", 3)
    assert type(found) is SiT
    x, t, y = inputs(released)
    expected = -released(x, 1 - t, y)[:, : released.channels]
    assert expected.std() > 0.1
    assert_close(found(x, t, y), expected, atol=1e-5, rtol=1e-5)
    assert (found(x, t, y) - found(x, 1 - t, y)).abs().max() > 1e-3  # time does matter here
    assert_close(only(torch.ones(1, 24)), module(torch.ones(1, 24)))


@torch.no_grad()
def test_convention_can_be_said(made):
    single, double = made("sit"), made("dit")
    x, t, y = inputs(single)

    def velocity(model, how):
        return load(model.state_dict(), convention=how)(x, t, y)

    assert torch.equal(velocity(single, "auto"), single(x, t, y))
    assert torch.equal(velocity(single, "haste"), single(x, t, y))
    assert_close(velocity(single, "sit"), -single(x, 1 - t, y), atol=1e-5, rtol=1e-5)
    assert_close(velocity(double, "haste"), double(x, t, y)[:, :4])
    assert torch.equal(velocity(double, "auto"), velocity(double, "sit"))
    refused("convention 'sit' with family 'dit'", double.state_dict(), "dit", 3, convention="sit")
    refused("convention 'repa'; expected one of: auto, haste, sit", single.state_dict(), "sit", convention="repa")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_never_run(tmp_path, made, bomb, legacy):
    path = tmp_path / "a.pt"
    torch.save({"model": made().state_dict(), "args": bomb}, path, _use_new_zipfile_serialization=not legacy)
    line = refused("could run code and is not loaded; expected tensors", path, "sit", 3)
    assert str(path) in line
    torch.save({"ema": made(), "args": argparse.Namespace()}, path, _use_new_zipfile_serialization=not legacy)
    refused("wants haste_core.models.sit.SiT, which could run code", path, "sit", 3)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_harmless_things_beside_weights_are_read(tmp_path, made):
    model = made()
    beside = {
        "args": argparse.Namespace(out=Path("runs/a")),
        "fid": np.float64(2.5),
        "step": np.int64(3),
        "where": PureWindowsPath("a"),
    }
    for wrapped in (
        lambda state: {"ema": state},
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": {"ema": state}},
        lambda state: {"model_state_dict": state},
        lambda state: {"ema_state_dict": state, "model_state_dict": {}},
        lambda state: {"module": state},
    ):
        torch.save(wrapped(model.state_dict()) | beside, tmp_path / "a.pt")
        found = load_reference(tmp_path / "a.pt", "sit", 3).generator.state_dict()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.pt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS pointer, .*: git lfs pull",
        ),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("a.pt", b"\n<!DOCTYPE html><html>sign in</html>", "is a web page or text, not the file itself"),
        ("a.safetensors", b"<html>", "is a web page"),
        ("a.pt", b"<!-- gate --><html>", "is a web page"),
        ("a.pt", b'{"error": "Access denied"}', "is a web page or text"),
        ("a.pt", b"Access to model is restricted", "is a web page or text"),
        ("a.pt", b"", "is empty; download it again"),
        ("a.pt", b"\x1f\x8b\x08\x00", "is compressed by gzip"),
    ],
)
def test_what_a_download_left_instead_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    refused(said, tmp_path / name, "sit", 3)


def test_weights_that_are_not_finite_are_refused(tmp_path, made):
    state = made().state_dict()
    state["x_embedder.proj.bias"][0] = torch.nan
    torch.save(state, tmp_path / "a.pt")
    refused("x_embedder.proj.bias and 0 more hold values that are not finite", tmp_path / "a.pt", "sit", 3)


def test_a_file_under_the_suffix_of_another_format_is_named(tmp_path, made):
    for name, other, said in (("a.pt", "b.safetensors", "rename it to end in .pt"),
                              ("a.safetensors", "b.pt", "rename it to end in .safetensors")):  # fmt: skip
        save_reference(tmp_path / name, made())
        (tmp_path / name).rename(tmp_path / other)
        refused(said, tmp_path / other, "sit", 3)


def test_truncated_and_other_files_are_refused(tmp_path, made):
    for name in ("a.pt", "a.safetensors"):
        path = tmp_path / name
        save_reference(path, made())
        content = path.read_bytes()
        for keep in (10, len(content) // 2, -1):
            path.write_bytes(content[:keep])
            assert str(path) in refused("truncated or damaged", path, "sit", 3)
    refused("no checkpoint .*nothing.pt; expected", tmp_path / "nothing.pt", "sit")
    refused(r"unknown suffix '.bin'; expected one of: .pt, .pth, .safetensors", tmp_path / "a.bin", "sit")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    refused("holds a list; expected a dict", tmp_path / "list.pt", "sit")
    with pytest.raises(HasteError, match=r"unknown suffix '.ckpt'; expected one of: .pt, .safetensors"):
        save_reference(tmp_path / "a.ckpt", made())
    assert not (tmp_path / "a.ckpt").exists()


def test_what_was_loaded_trains_outlives_its_source_and_leaves_it_alone(tmp_path, made):
    weights, random = made().state_dict(), torch.get_rng_state()
    for name in ("a.pt", "a.safetensors", None):
        source = weights if name is None else tmp_path / name
        if name is not None:
            save_reference(source, made())
        found = load(source)
        if name is not None:
            with source.open("r+b") as stream:
                stream.truncate(100)  # in place, as cp does
        assert_same(found, made())
        found(*inputs(found)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in found.parameters())
        with torch.no_grad():
            found.x_embedder.proj.weight += 1
    assert_same(weights, made())
    torch.set_rng_state(random)
    load(weights)
    assert torch.equal(torch.get_rng_state(), random)


def test_written_files_are_plain_small_and_hold_model_and_average(tmp_path, made, projected):
    model, ema, (extra, modules) = made(seed=0), made(seed=1), projected()
    save_reference(tmp_path / "a.pt", model, modules[0], ema)
    whole = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(whole) == ["model", "ema"]
    for name, module in (("model", model), ("ema", ema)):
        assert {type(v) for v in whole[name].values()} == {torch.Tensor}
        assert whole[name].keys() == module.state_dict().keys() | extra.keys()
        assert_same(load(tmp_path / "a.pt", weights=name), module)
    save_reference(tmp_path / "b.pt", model, modules)
    assert (tmp_path / "b.pt").stat().st_size < 0.7 * (tmp_path / "a.pt").stat().st_size  # one copy under both names
    save_reference(tmp_path / "a.safetensors", model, modules, ema)
    assert_same(load(tmp_path / "a.safetensors"), ema)
    big = torch.zeros(1000, *model.x_embedder.proj.weight.shape)  # a view of much more than it shows
    model.x_embedder.proj.weight = nn.Parameter(big[3].copy_(model.x_embedder.proj.weight.detach()))
    for name in ("c.pt", "c.safetensors"):
        save_reference(tmp_path / name, model)
        assert_same(load(tmp_path / name), made())
        assert (tmp_path / name).stat().st_size < 200_000


def test_no_room_is_one_line_and_the_old_files_stay(tmp_path, made):
    model, paths = made(), [tmp_path / "a.pt", tmp_path / "a.safetensors"]
    for path in paths:
        save_reference(path, model)
    before, limits = [path.read_bytes() for path in paths], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        for path in paths:
            with pytest.raises(HasteError, match=f"no room to write {path}"):
                save_reference(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "a.safetensors"]


# -- haste convert ----------------------------------------------------------------------------------------------------


@pytest.fixture
def haste(capsys):
    """A function that runs `haste convert` and returns what it printed."""
    from haste_core.study.cli import parser

    def command(*words):
        arguments = parser().parse_args(["convert", *map(str, words)])
        capsys.readouterr()
        arguments.action(arguments)
        (line,) = capsys.readouterr().out.splitlines()
        return line

    return command


def test_a_run_is_converted_in_both_phases_with_heads_and_kind_of_its_configuration(tmp_path, tiny, output, haste):
    run = Run(tiny, "haste", 0)
    fit(run, progress=False)
    for step in (4, 12):
        source, tensors = run.checkpoint_path(step), load_file(run.checkpoint_path(step))
        assert haste(source, tmp_path / "a.pt").endswith("weights ema and model")
        for weights in ("ema", "model"):
            found, projectors = load_reference(tmp_path / "a.pt", "sit", 4, weights=weights)
            prefix = f"{weights}."
            assert_same(found, {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
            assert len(projectors) == (1 if step == 4 else 0)  # phase II has none
        assert_same(load(source, None, 4), load(tmp_path / "a.pt", None, 4))
    line = haste(source, tmp_path / "a.safetensors")
    for words in ("sit, depth 3, width 32, heads 4, patch 2, 1x8x8, 10 classes", "projectors none", "weights ema"):
        assert words in line
    assert haste(source, tmp_path / "m.pt", "--weights", "model").endswith("weights model")
    for option, words in (("--heads 8", "expected 4"), ("--family dit", "expected sit")):
        with pytest.raises(HasteError, match=rf"{option} contradicts .*config.yaml; {words}"):
            haste(source, tmp_path / "b.pt", *option.split())
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(source.read_bytes())
    with pytest.raises(HasteError, match=r"num_heads \(--heads\)"):
        haste(alone, tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()
    assert "heads 8" in haste(alone, tmp_path / "b.pt", "--heads", "8")
    (run.dir / "config.yaml").write_text("model: [")
    with pytest.raises(HasteError, match=r"is no run's configuration"):
        haste(source, tmp_path / "b.pt")


def test_convert_reads_every_family_and_says_what_it_found(tmp_path, made, projected, haste):
    out = tmp_path / "out.safetensors"
    save_reference(tmp_path / "d.pt", made("dit", qk_norm=True))
    line = haste(tmp_path / "d.pt", out, "--family", "dit")
    assert line.startswith(f"{out}: dit, depth 2, width 24, heads 3, patch 2, q/k norm, 4x8x8, 5 classes, 0.0")
    assert_same(load(out, "dit", None), made("dit", qk_norm=True))
    assert "convention sit" in haste(tmp_path / "d.pt", out, "--family", "sit")
    assert load(out, None, None).kind == "sit"
    save_reference(tmp_path / "m.pt", made("mmdit"), projected(1, 64)[1])
    line = haste(tmp_path / "m.pt", tmp_path / "m.safetensors")
    for words in ("mmdit, ", "text width 6", "projectors 64-20-20-10,", "convention haste"):
        assert words in line


def test_convert_never_harms_its_source(tmp_path, made, haste):
    source = tmp_path / "a.pt"
    save_reference(source, made())
    before = source.read_bytes()
    (tmp_path / "link.pt").symlink_to(source)
    (tmp_path / "hard.pt").hardlink_to(source)
    (tmp_path / "folder.pt").mkdir()
    cases = {out: "is the source itself" for out in ("a.pt", "./a.pt", "link.pt", "hard.pt")}
    cases |= {"folder.pt": "is a folder", "a.npz": r"unknown suffix '.npz'; expected one of: .pt, .safetensors"}
    for out, words in cases.items():
        with pytest.raises(HasteError, match=words):
            haste(source, tmp_path / out, "--heads", "3")
    assert source.read_bytes() == before


# -- training that begins with a checkpoint ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sit", "dit", "mmdit"])
def test_a_generator_of_other_classes_and_image_size_begins_with_released_weights(made, family):
    source, student = made(family, seed=1), made(family, seed=2, classes=8, image_size=12)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    said = begin_from(student, {"ema": source.state_dict(), "model": made(family, seed=3).state_dict()})
    labels, expected = "y_embedder.embedding_table.weight", source.state_dict()
    for name, value in student.state_dict().items():
        if name == labels:
            assert torch.equal(value[:-1], before[name][:-1])
            assert torch.equal(value[-1], expected[name][-1])
        else:
            assert torch.equal(value, before[name] if name == "pos_embed" else expected[name]), name
    assert said.startswith("ema weights ")
    assert ("they know 5 classes, the data have 8" in said) is (family != "mmdit")


def test_labels_are_taken_over_where_classes_agree(made):
    source, student = made(seed=1), made(seed=2)
    assert "labels" not in begin_from(student, source.state_dict())
    assert_same(student, source)


def test_a_generator_begins_with_no_weights_of_other_sizes(made):
    with pytest.raises(HasteError, match="the weights have depth 2, width 24; expected depth 3, width 48, as the gen"):
        begin_from(made(depth=3, width=48), made().state_dict())


def test_a_run_begins_with_a_checkpoint_says_so_and_resumes_without_it(tmp_path, make_study, output, made, capsys):
    source = made(seed=4, channels=1, classes=7, depth=3, width=32, heads=4)
    save_reference(tmp_path / "old.pt", source)
    study = make_study(f"train.init_from={tmp_path / 'old.pt'}", "train.checkpoint_every=1")
    run = Run(study, "vanilla", 0)
    begun = open_trainer(run)
    name = "blocks.2.attn.qkv.weight"
    for model in (begun.generator, begun.ema):
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert "begins with" in capsys.readouterr().err
    fit(run, progress=False)
    assert runs.provenance(run.dir)["begun_from"]["weights"].startswith("ema weights ")
    (tmp_path / "old.pt").unlink()
    run.checkpoint_path(12).unlink()
    fit(run, progress=False)
    # Nothing else moved: without the setting the run has its old name and its old weights.
    assert Run(make_study(), "vanilla", 0).config.hash != run.config.hash
    assert "init_from" not in config.load("digits").run("vanilla").model_dump_json()


def test_other_weights_under_the_same_path_are_no_second_beginning(tmp_path, make_study, output, made):
    sizes = {"channels": 1, "classes": 10, "depth": 3, "width": 32, "heads": 4}
    study = make_study(f"train.init_from={tmp_path / 'old.pt'}")
    save_reference(tmp_path / "old.pt", made(seed=4, **sizes))
    open_trainer(Run(study, "vanilla", 0))
    save_reference(tmp_path / "old.pt", made(seed=5, **sizes))
    with pytest.raises(HasteError, match=r"began with ema weights \w+; expected the same file for all runs"):
        open_trainer(Run(study, "vanilla", 1))


def test_a_study_whose_beginning_is_missing_or_does_not_fit_trains_nothing(tmp_path, make_study, output, made):
    study = make_study(f"train.init_from={tmp_path / 'old.pt'}")
    with pytest.raises(HasteError, match="arm 'vanilla': no checkpoint"):
        check_study(study)
    save_reference(tmp_path / "old.pt", made(channels=1))
    with pytest.raises(HasteError, match="arm 'vanilla': the weights have depth 2, width 24"):
        check_study(study)
