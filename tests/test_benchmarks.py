"""Tables and figures of the benchmarks; no test depends on a duration."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import attention, growth, machine, pictures, sampling, step
from benchmarks.__main__ import ALL
from haste_core.study.data import open_dataset


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    return tmp_path


def test_attention_is_timed_with_whole_maps_and_in_chunks(monkeypatch):
    monkeypatch.setattr(attention, "TOKENS", (64, 200))
    monkeypatch.setattr(machine, "peak_gib", lambda *_, **environment: 1.0)
    table = attention.measure(2)
    assert list(zip(table["tokens"], table["queries"], strict=True)) == [(64, 64), (200, 128), (200, 200)]
    assert list(table["chosen"]) == [True, False, True]
    whole = table[table["tokens"] == table["queries"]]
    assert (whole["ratio"] == 1).all()
    assert (table["seconds"] > 0).all()


def test_pairs_of_noise_are_a_data_set_like_prepared_ones(tmp_path):
    machine.write_pairs(tmp_path, step.EXAMPLE, 8)
    chosen = step.study(tmp_path)
    batch = open_dataset(chosen.data).examples("train")
    assert batch.x.shape[1:] == (4, 32, 32)
    assert batch.images.shape[1:] == (3, 256, 256)
    assert chosen.main == step.ARMS
    assert chosen.run("repa").alignment.active


@pytest.mark.slow
def test_a_step_is_timed_in_every_phase_beside_its_teacher_and_compiled(monkeypatch):
    whole = step.study

    def small(folder, model="SiT-S/8", arms=step.ARMS, compiled=False, batch=None):
        loaded = whole(folder, "SiT-S/8", arms, compiled, batch)
        encoder = {"model": "vit_tiny_patch16_224", "kwargs": {"depth": 2, "img_size": 64}}
        teacher = loaded.teacher.model_copy(update=encoder)
        alignment = loaded.alignment.model_copy(update={"layer_pairs": [(4, 1)], "depth": 4})
        arms = {name: {k: v for k, v in arm.items() if k != "teacher"} for name, arm in loaded.arms.items()}
        return loaded.model_copy(update={"teacher": teacher, "alignment": alignment, "arms": arms})

    monkeypatch.setattr(step, "study", small)
    monkeypatch.setattr(machine, "peak_gib", lambda *_: 1.0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = step.measure(9).set_index("what"), step.compiled(3).set_index("what")
    assert list(plain.index) == [*step.PHASES, "teacher forward"]
    assert list(compiled.index) == ["vanilla, compiled", "haste phase 1, compiled"]
    table = pd.concat([plain, compiled])
    assert table["ratio"]["vanilla"] == 1
    assert table["over_least"]["vanilla"] < 1 < table["ratio"]["haste phase 1"]
    assert table["tflop"]["haste phase 1, compiled"] == table["tflop"]["haste phase 1"] > table["tflop"]["vanilla"]
    assert table["peak_gib"].notna().sum() == 4
    assert table["share"].drop("teacher forward").gt(0).all()  # of a rate that was timed at another moment


@pytest.mark.slow
def test_memory_is_that_of_a_process_by_itself_with_its_own_environment(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert 0 < machine.peak_gib(_check_environment, "4194304", environment=attention.GIVES_BACK) < 4
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


def _check_environment(expected):
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == expected


def test_jobs_of_a_study_are_those_of_its_graph():
    assert growth._jobs(3) == 34


def test_samplers_are_timed_in_every_way(monkeypatch):
    euler = {"sampler": "euler", "solver_steps": 4}
    guided = {**euler, "guidance": 2.0, "guidance_high": 0.6}
    monkeypatch.setattr(sampling, "SETTINGS", {"Euler": euler, "guided": guided})
    monkeypatch.setattr(sampling, "WAYS", {way: more for way, more in sampling.WAYS.items() if way != "compiled"})
    table = sampling.measure(2)
    assert list(table["way"]) == ["plain", "bf16", "plain", "bf16", "guided everywhere"]
    assert list(table["passes"]) == [4, 4, 6, 6, 8]
    assert (table["images_per_s"] == table["images"] / table["seconds"]).all()
    assert (table.loc[table["way"] == "plain", "ratio"] == 1).all()


def test_tables_keep_their_origin_and_the_report_shows_both(results):
    timed = {"seconds": 1.0, "ratio": 1.0, "low": 0.9, "high": 1.1, "peak_gib": 2.0, "rounds": 3}
    grown = [{"grows": grows, "amount": n, **timed} for grows in pictures.UNITS for n in (1, 2)]
    held = [
        {"tokens": n, "batch": 1, "queries": q, "chosen": True, "returning_gib": 1.5, **timed}
        for n, q in ((64, 64), (256, 128), (256, 256))
    ]
    alone = machine.keep(pd.DataFrame(grown), "growth", matrix_rate=5e10).parent
    assert "## attention" not in pictures.write(alone).read_text()
    folder = machine.keep(pd.DataFrame(held), "attention").parent
    assert folder.parent == results
    table, origin = machine.kept(folder, "growth")
    assert list(table["amount"]) == [row["amount"] for row in grown]
    text = pictures.write(folder).read_text()
    assert f"Commit {origin['commit']}" in text
    assert "50 GFLOP/s" in text
    assert (folder / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("folder", sorted(machine.RESULTS.glob("*/")), ids=lambda folder: folder.name)
def test_readme_and_the_report_show_the_committed_tables(folder, tmp_path):
    assert pictures.readme_block(folder) in (Path(__file__).parents[1] / "docs" / "development.md").read_text()
    again = tmp_path / folder.name
    shutil.copytree(folder, again)
    assert pictures.write(again).read_text() == (folder / "report.md").read_text()
    assert {path.stem for path in folder.glob("*.csv")} <= set(ALL)
