"""Captioned scenes and images, text tokens, caption accuracy; what is refused, in one line each."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_images import picture, png
from test_latents import save_vae

from haste_core.errors import HasteError
from haste_core.study import caption_scores, config, evaluation, pretrain, text
from haste_core.study.claims import CLAIMS, TEXT, claims_of
from haste_core.study.cli import main
from haste_core.study.data import Batches, open_dataset
from haste_core.study.data.base import Captions
from haste_core.study.data.scenes import NUMBERS, Reading, Scenes, read, right, things
from haste_core.study.images import save_grid
from haste_core.study.runs import Run
from haste_core.study.text import Contexts, write_parts
from haste_core.study.train import fit

pytestmark = pytest.mark.usefixtures("caches")
FEW = {"images": 400, "digits": [1, 4, 7], "colours": ["red", "blue"]}


def scenes(image_size=None, **changes):
    return open_dataset(config.DataSettings(kind="captions", image_size=image_size, scenes=FEW | changes))


def refused(settings, *words):
    with pytest.raises(HasteError) as error:
        open_dataset(config.DataSettings(kind="captions", **settings))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# Scenes


def told(caption):
    """Across, and digit and colour of the left or upper thing and of the other, read off the words of a caption."""
    found = [(NUMBERS.index(digit), colour) for colour, digit in re.findall(rf"(\w+) ({'|'.join(NUMBERS)})", caption)]
    relation = next(word for word in ("left", "right", "above", "below") if word in caption)
    if caption.startswith(("to the", "above", "below")):  # the other thing is named first
        found.reverse()
    if relation in ("right", "below"):
        found.reverse()
    return relation in ("left", "right"), *found


@pytest.mark.parametrize("size", [32, 16])
def test_captions_are_true_of_the_images_and_unseen_combinations_stay_unseen(size):
    dataset, cell = scenes(size), size // 2
    known, seen = things(dataset.scenes), set()
    assert (dataset.image_size, dataset.channels, len(dataset)) == (size, 3, 400)
    batches = Batches(dataset, 100, seed=0)
    for batch in (batches.next() for _ in range(4)):
        for image, label, index in zip(batch.x, batch.y, batch.indices, strict=True):
            across, first, second = told(dataset.captions.texts[label])
            cells = dataset.labelled("teacher").images("train")[1][index].reshape(2, 2)
            places = cells.nonzero().tolist()
            assert [known[cells[row, column] - 1] for row, column in places] == [first, second]
            assert (places[0][0] == places[1][0]) == across
            for (row, column), (_, colour) in zip(places, (first, second), strict=True):
                quarter = image[:, cell * row : cell * row + cell, cell * column : cell * column + cell].mean((1, 2))
                assert quarter.argmax() == {"red": 0, "blue": 2}[colour]
            seen.add((across, first, second))
    unseen = {told(dataset.captions.texts[label]) for label in range(dataset.sampled, dataset.classes)}
    assert len(unseen) == len(dataset.combinations) - dataset.seen == 9  # 15 % of 2 x 6 x 5, rounded up
    assert not unseen & seen
    everything = dataset.labelled("extractor")
    assert {tuple(row) for row in everything.images("unseen")[1].tolist()} & {
        tuple(row) for row in everything.images("train")[1].tolist()
    }
    # The wording is drawn, the rest of the stream is the same for any part of a batch.
    assert len(dataset.captions.texts) == 6 * len(dataset.combinations)
    half = Batches(dataset, 100, seed=0, part=slice(50, 100)).next()
    whole = Batches(dataset, 100, seed=0).next()
    assert torch.equal(half.y, whole.y[50:])


def test_a_reading_is_right_in_parts():
    dataset = scenes()
    x = torch.tensor([0, dataset.captions.first[3]])
    wanted = torch.tensor([dataset.combinations[0], dataset.combinations[3]])
    exact = Reading(wanted[:, 0].bool(), wanted[:, 1:])
    assert right(dataset, x, exact) == {"digits": 1, "colours": 1, "relation": 1, "all": 1}
    turned = right(dataset, x, exact._replace(things=exact.things.flip(1)))
    assert turned == {"digits": 1, "colours": 1, "relation": 0, "all": 0}
    wrong = exact._replace(across=~exact.across)
    assert right(dataset, x, wrong)["relation"] == 0
    colours = len(dataset.scenes.colours)
    other = exact.things // colours * colours + (exact.things % colours + 1) % colours
    assert right(dataset, x, exact._replace(things=other))["colours"] == 0


def test_a_scene_is_read_off_its_cells():
    dataset = scenes()
    cells = dataset.labelled("extractor")
    labels = cells.images("unseen")[1]
    reading = read(9.0 * torch.nn.functional.one_hot(labels, cells.classes), dataset.scenes)
    for row, across, pair in zip(labels, reading.across, reading.things, strict=True):
        places = row.reshape(2, 2).nonzero().tolist()
        assert (places[0][0] == places[1][0]) == bool(across)
        assert row[row > 0].tolist() == (pair + 1).tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 24}, ["image_size 24", "expected 32 or 16"]),
        ({"scenes.relations": ["left", "beside"]}, ["'beside'", "relations.1", "'left', 'right', 'above' or 'below'"]),
        ({"scenes.colours": ["red", "mauve"]}, ["'mauve'", "colours.1", "'red', 'green', 'blue' or 'yellow'"]),
        ({"scenes.digits": [1, 1, 4]}, ["names one twice"]),
        ({"scenes.digits": [1], "scenes.colours": ["red"]}, ["fewer than 3 things"]),
    ],
)
def test_scenes_that_cannot_be_read_are_refused(changes, words):
    content = {f"data.{name}": value for name, value in changes.items()}
    with pytest.raises(HasteError) as error:
        config.load("captions", "smoke", [f"{key}={value}" for key, value in content.items()])
    assert all(word in str(error.value) for word in words)


# Images of one's own


@pytest.fixture
def folder(tmp_path):
    """Twelve images with captions.jsonl; the first one has two captions."""
    place = tmp_path / "images"
    place.mkdir()
    lines = []
    for i in range(12):
        (place / f"{i:02d}.png").write_bytes(png(picture(i)))
        lines.append(
            {"file": f"{i:02d}.png", **({"captions": ["one", "other"]} if i == 0 else {"caption": f"cat {i}"})}
        )
    (place / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def opened(path, **more):
    return open_dataset(config.DataSettings(kind="captions", path=str(path), image_size=16, **more))


def test_all_captions_of_an_image_are_used_one_a_draw(folder):
    dataset = opened(folder, test_fraction=0.1)
    assert dataset.classes == len(dataset.captions.texts) == 13
    assert "12 images" in dataset.summary
    assert "13 captions" in dataset.summary
    batches = Batches(dataset, len(dataset), seed=0)
    drawn = [dataset.captions.texts[i] for _ in range(20) for i in batches.next().y.tolist()]
    held = {dataset.captions.texts[i] for split in ("validation", "test") for i in dataset.images(split)[1].tolist()}
    assert {"one", "other"} <= set(drawn) or "one" in held
    assert set(drawn) | held | {"other"} == set(dataset.captions.texts)
    # One of several, each about equally often.
    captions = Captions([["a"], ["b", "c", "d"]])
    y = captions.drawn(torch.tensor([0] + [1] * 3000), torch.Generator().manual_seed(0), 3001, slice(None))
    assert y[0] == 0
    assert (torch.bincount(y[1:], minlength=4)[1:] - 1000).abs().max() < 120


def test_cocos_files_and_columns_of_captions_are_read(folder, tmp_path):
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split, numbers in (("train2014", range(8)), ("val2014", range(8, 12))):
        (coco / split).mkdir()
        for i in numbers:
            (coco / split / f"{i:02d}.png").write_bytes(png(picture(i)))
        content = {
            "images": [{"id": i, "file_name": f"{i:02d}.png"} for i in numbers],
            "annotations": [
                {"id": 9 * i + j, "image_id": i, "caption": f"cat {i} {j}"} for i in numbers for j in (0, 1)
            ],
        }
        (coco / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    dataset = opened(coco)
    assert dataset.classes == 24
    x, y = dataset.images("test")
    assert [dataset.captions.texts[i] for i in y.tolist()] == [f"cat {i} 0" for i in range(8, 12)]
    assert torch.equal(((x[0] + 1) * 127.5).round().byte(), torch.from_numpy(picture(8)).permute(2, 0, 1))

    images = [{"bytes": png(picture(i)), "path": f"{i}.png"} for i in range(12)]
    columns = {
        "jpg": images,
        "label": [1] * 12,
        "caption": [[f"cat {i}", "a cat"] for i in range(12)],
        "url": ["u"] * 12,
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    dataset = opened(tmp_path / "rows.parquet")
    assert dataset.classes == 24
    pq.write_table(pa.table(columns | {"mask": images[::-1]}), tmp_path / "two.parquet")
    both = opened(tmp_path / "two.parquet", image_column="jpg")
    assert torch.equal(both.images("train")[0], dataset.images("train")[0])
    refused(
        {"path": str(tmp_path / "rows.parquet"), "image_size": 16, "caption_column": "label"}, "caption_column=label"
    )
    assert dataset.identity()["captions"] != opened(folder).identity()["captions"]


def test_files_that_are_not_read_are_told_of_every_split(folder, tmp_path):
    root = tmp_path / "both"
    for split, other in (("train", "notes.md"), ("test", "rows.csv")):
        shutil.copytree(folder, root / split)
        (root / split / other).write_text("")
    assert opened(root).summary.endswith("; not read: 1 .csv, 1 .md")


LINE = '{"file": "00.png", "caption": "a cat"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"file": "00.png", "caption": "  "}', ["line 13", "empty caption", "stands for no caption"]),
        (b'{"file": "00.png"}', ["line 13", "no caption"]),
        (b'{"file": "00.png", "caption": "caf\xe9"}', ["line 13", "not text in UTF-8", "save the file"]),
        (b'{"file": "99.png", "caption": "a cat"}', ["1 image that are not there", "99.png"]),
        (b'{"file": "../00.png", "caption": "a cat"}', ["line 13", "within the folder"]),
        (b"a cat", ["line 13", "no JSON"]),
        (b"[1]", ["line 13", "no object"]),
    ],
)
def test_a_wrong_line_of_captions_is_named(folder, line, words):
    with (folder / "captions.jsonl").open("ab") as stream:
        stream.write(line + b"\n")
    refused({"path": str(folder), "image_size": 16}, *words)


def test_an_image_without_a_caption_is_named(folder, tmp_path):
    (folder / "more.png").write_bytes(png(picture(99)))
    refused({"path": str(folder), "image_size": 16}, "1 image without a caption (more.png)", "caption")
    (folder / "captions.jsonl").unlink()
    refused({"path": str(folder), "image_size": 16}, "no file of captions", "captions.jsonl")
    content = {"images": [{"id": 1, "file_name": "more.png"}], "annotations": []}
    (folder / "captions_train.json").write_text(json.dumps(content))
    refused({"path": str(folder), "image_size": 16}, "1 image without a caption (more.png)")
    (folder / "captions_train.json").write_text("[]")
    refused({"path": str(folder), "image_size": 16}, "no file of COCO's captions")


def test_captions_are_no_classes(folder):
    dataset = opened(folder)
    with pytest.raises(HasteError, match=r"no classes for a teacher to learn; expected teacher\.weights"):
        dataset.labelled("teacher")
    with pytest.raises(HasteError, match=r"extractor to learn; expected evaluate\.suite: adm"):
        dataset.labelled("extractor")
    assert dataset.labelled("autoencoder") is dataset


# Text tokens


def by_letters(length):
    """An encoder without weights: a token for each word, its values the code of the word's first letter."""

    def encode(texts):
        found = torch.zeros(len(texts), length, 6)
        for row, words in zip(found, map(str.split, texts), strict=True):
            for i, word in enumerate(words[:length]):
                row[i] = ord(word[0])
        return found.half()

    return text.Encoder(length, lambda texts: [len(t.split()) for t in texts], encode)


def test_text_tokens_are_made_once_for_each_caption_and_long_captions_are_cut(folder, monkeypatch, capsys):
    with (folder / "captions.jsonl").open("a") as stream:
        stream.write(json.dumps({"file": "00.png", "caption": "dog " * 10_000}) + "\n")
    monkeypatch.setattr(text, "words", by_letters)
    data = config.DataSettings(kind="captions", path=str(folder), image_size=16, text_encoder="wordllama")
    made = text.prepare(data)
    assert "1 caption cut to 16 tokens, the longest has 10,000" in capsys.readouterr().err
    assert (made.captions, made.length, made.width) == (14, 16, 6)
    texts = open_dataset(data).captions.texts
    rows = made(torch.arange(15))
    for row, caption in zip(rows, texts, strict=False):
        assert row[: len(caption.split()), 0].tolist() == [ord(word[0]) for word in caption.split()[:16]]
    assert not rows[14].any()
    monkeypatch.setattr(text, "words", None)  # not called again
    assert text.prepare(data).path == made.path
    # Other captions are other text tokens: a file that is named for good is refused.
    named = data.model_copy(update={"contexts": str(made.path)})
    assert text.find(named).captions == 14
    lines = (folder / "captions.jsonl").read_text().replace("cat 11", "bird 11")
    (folder / "captions.jsonl").write_text(lines)
    with pytest.raises(HasteError, match=r"was made with captions .* remove the file and run haste contexts"):
        text.find(named)
    with pytest.raises(HasteError, match="haste contexts STUDY"):
        text.find(data.model_copy(update={"contexts": "nowhere.safetensors"}))


def test_a_missing_package_and_weights_whose_names_do_not_fit_are_named(tmp_path, monkeypatch):
    weights = tmp_path / "w.safetensors"
    save_file({"words": torch.zeros(3, 4)}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(text, "optional", lambda name, command: None)
        patch.setattr(text, "word_files", lambda: (weights, weights))
        with pytest.raises(HasteError, match=r"has no tensor embedding.weight \('embedding.weight'\); expected the"):
            text.words(16)
        weights.write_bytes(b"no weights")
        with pytest.raises(HasteError, match=r"w\.safetensors cannot be read"):
            text.words(16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HasteError, match=r"package 'wordllama' is not installed; .* pip install -e '\.\[data\]'"):
        text.word_files()
    with pytest.raises(HasteError, match=r"needs the package no_such_package, which is not installed; pip"):
        text.optional("no_such_package", "pip install it")


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@installed("wordllama")
@installed("tokenizers")
def test_word_embeddings_come_from_the_packages_files_in_the_order_of_words():
    encoder = text.words(16)
    one, other = encoder.encode(["a green four above a red seven", "a red four above a green seven"]).float()
    assert encoder.sizes(["a green four above a red seven", ""]) == [7, 0]
    assert one.shape == (16, 256)
    assert not one[7:].any()
    assert not encoder.encode([""]).any()
    # The same words, at other places: tokens differ, their embeddings do not.
    places = text.positions(16, 256)
    assert torch.allclose(one[1] - places[1], other[5] - places[5], atol=0.01)
    assert not torch.allclose(one[1], other[5], atol=0.5)
    assert (one[:7] - places[:7]).square().mean(1).sqrt() == pytest.approx([1.0] * 7, abs=0.01)


@pytest.fixture
def clip(tmp_path):
    """The folder of a tiny CLIP with drawn weights and a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path / "clip"
    place.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"))
    tokenizer.save_pretrained(place)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    settings = transformers.CLIPTextConfig(**sizes, **ends, vocab_size=len(vocabulary), max_position_embeddings=77)
    transformers.CLIPTextModel(settings).save_pretrained(place)
    return place


def test_a_clip_whose_weights_do_not_fit_is_refused(clip):
    encoder = text.clip(str(clip), 77)
    assert encoder.encode(["a cat", "a dog", ""]).shape == (3, 77, 32)
    assert encoder.sizes(["a cat"]) == [6]
    with pytest.raises(HasteError, match="text_length 100; expected at most 77"):
        text.clip(str(clip), 100)
    save_file({"other.weight": torch.zeros(2)}, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HasteError, match=r"lacks .* tensors of a CLIP's text side"):
        text.clip(str(clip), 77)
    with pytest.raises(HasteError, match=r"cannot be loaded: .*expected wordllama, or a CLIP by hub name"):
        text.clip(str(clip / "nothing"), 77)


def test_files_larger_than_memory_are_written_in_parts_and_read_by_rows(tmp_path, monkeypatch):
    whole = torch.randn(7, 3, 4).half()
    write_parts(tmp_path / "t.safetensors", iter(whole.split(3)), 7, {"encoder": "x"})
    kept = Contexts(tmp_path / "t.safetensors")
    monkeypatch.setattr("haste_core.study.text.KEPT", 0)
    rows = Contexts(tmp_path / "t.safetensors")
    for table in (kept, rows):
        assert (table.captions, table.length, table.width, table.facts["encoder"]) == (6, 3, 4, "x")
        assert torch.equal(table(torch.tensor([6, 0, 2])), whole[[6, 0, 2]])


# Studies


@pytest.fixture
def study(output):
    """The study `captions` at toy size under text tokens of random numbers."""
    table = output / "text.safetensors"
    dataset = open_dataset(config.load("captions", "smoke").data)
    write_parts(table, [torch.randn(dataset.classes + 1, 16, 256)], dataset.classes + 1)
    return config.load("captions", "smoke", [f"data.contexts={table}", "data.text_encoder=null"])


def test_the_study_trains_through_both_phases_and_scores_captions(study):
    run = Run(study, "haste", 0)
    fit(run, progress=False)
    assert {line["step"]: line["phase"] for line in run.metrics()} == {2: 1, 4: 1, 6: 2}
    assert {"feature", "attention"} <= set(run.metrics()[0])
    facts = pretrain.prepare_extractors(study)["extractor"]
    assert {"test_accuracy", "unseen_accuracy"} <= set(facts)
    row = evaluation.evaluate_run(run, progress=False)[-1]
    assert set(row) == set(evaluation.columns(study))
    assert all(0 <= row[name] <= 1 for name in caption_scores.COLUMNS)
    kept = np.load(evaluation.find_samples(run, 6, "captions"), allow_pickle=False)
    assert kept.shape == (4, caption_scores.SHOWN, 3, 32, 32)
    shown = caption_scores.shown(study)
    assert len(shown) == 4 * caption_scores.SHOWN
    dataset = open_dataset(study.data)
    assert isinstance(dataset, Scenes)
    seen = set(dataset.captions.texts[: dataset.sampled])
    assert {entry["set"] for entry in shown if entry["caption"] not in seen} == {
        "caption_unseen",
        "caption_unseen_guided",
    }


def test_further_readings_of_c16_are_those_of_studies_of_scenes():
    assert claims_of(config.load("captions"))[len(CLAIMS) :] == TEXT
    assert claims_of(config.load("digits")) == claims_of(config.load("coco256")) == CLAIMS
    arms = config.load("captions").claims.roles
    assert {arms[arm] for claim in TEXT for arm in claim.arms} == {"vanilla", "haste"}
    assert {claim.id for claim in TEXT} == {"C16x", "C16d", "C16s", "C16c", "C16u"}


def test_a_sheet_has_room_for_its_captions(tmp_path):
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    save_grid(images, tmp_path / "plain.png", 2)
    save_grid(images, tmp_path / "told.png", 2, captions=["a green four above a red seven"] * 3)
    plain, told_sheet = (np.array(Image.open(tmp_path / name)) for name in ("plain.png", "told.png"))
    assert told_sheet.shape[1] == plain.shape[1]
    assert told_sheet.shape[0] > plain.shape[0] + 2 * 20
    below = told_sheet[132:150]
    assert (below[:, :132] < 128).any()


def test_table_2s_settings_and_the_paper_scales_dry_run(capsys):
    study = config.load("coco256")
    model, run = study.model, study.run("haste")
    assert (model.kind, model.depth, model.width, model.heads) == ("mmdit", 24, 768, 24)
    assert (run.tau, study.train.steps, study.train.batch_size) == (200_000, 250_000, 256)
    assert {150_000, 250_000} <= set(study.train.kept_steps)
    assert study.donor("haste") == "holistic"
    study.check_claims()
    assert main(["train", "coco256", "haste", "--dry-run"]) == 2
    said = capsys.readouterr().out
    assert re.search(r"ok +networks +MMDiT-24/2, 24 blocks of width 768, 16x16 tokens; teacher", said)
    assert re.search(
        r"problem +text tokens +data.contexts data/coco256-text.safetensors is missing; .*haste contexts", said
    )


def test_coco256_goes_from_a_folder_of_captions_to_a_trained_run(folder, tmp_path, request, output, capsys):
    save_vae(tmp_path / "vae", (4, 4, 4, 4))
    prepared, tokens = tmp_path / "prepared", tmp_path / "text.safetensors"
    words = ["latents", str(folder), str(prepared), "--vae", str(tmp_path / "vae"), "--size", "64", "--device", "cpu"]
    assert main(words) == 0
    assert "12 images of 64 pixels with captions" in capsys.readouterr().out
    given = [f"data.path={prepared}", f"sample.vae={tmp_path / 'vae'}", f"data.contexts={tokens}"]
    if importlib.util.find_spec("transformers"):
        given.append(f"data.text_encoder={request.getfixturevalue('clip')}")
        options = [word for setting in given for word in ("--set", setting)]
        assert main(["contexts", "coco256", "--profile", "smoke", *options]) == 0
        assert "13 captions of 77 tokens, 32 wide" in capsys.readouterr().out
    else:
        given.append("data.text_encoder=null")
        write_parts(tokens, [torch.randn(14, 77, 32)], 14)
        options = [word for setting in given for word in ("--set", setting)]
    study = config.load("coco256", "smoke", given)
    dataset = open_dataset(study.data)
    assert dataset.captions.texts[:2] == ["one", "other"]
    assert dataset.classes == 13
    run = Run(study, "haste", 0)
    fit(run, progress=False)
    assert {line["step"]: line["phase"] for line in run.metrics()} == {2: 1, 4: 1, 6: 2}
    assert {"feature", "attention"} <= set(run.metrics()[0])
    main(["train", "coco256", "haste", "--profile", "smoke", "--dry-run", *options])
    assert f"ok       text tokens      {tokens}: 13 captions of 77 tokens" in capsys.readouterr().out
