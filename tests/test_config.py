from __future__ import annotations

import re

import pytest
import yaml

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.claims import CLAIMS
from haste_core.study.config import STUDIES, RunSettings
from haste_core.study.runs import Run


def refused(*args, **kwargs):
    with pytest.raises(HasteError) as caught:
        config.load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(tmp_path, change):
    """The path of a copy of the digits study, changed by `change` in place."""
    content = yaml.safe_load((STUDIES / "digits.yaml").read_text()) | {"name": "mine"}
    change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# -- loading ----------------------------------------------------------------------------------------------------------


def test_the_default_study_has_the_arms_of_the_paper():
    study = config.load("digits")
    weights = {arm: study.run(arm).alignment for arm in ("vanilla", "repa", "atta", "holistic", "haste")}
    on = {arm: (a.lambda_feature, a.lambda_attention) for arm, a in weights.items()}
    assert on == {"vanilla": (0, 0), "repa": (0.5, 0), "atta": (0, 0.5), "holistic": (0.5, 0.5), "haste": (0.5, 0.5)}
    assert study.run("vanilla").tau == 0
    assert study.run("holistic").tau == float("inf")
    assert 0 < study.run("haste").tau < study.train.steps


def test_arms_change_only_what_they_name(tiny):
    base = tiny.run("vanilla").model_dump()
    haste = tiny.run("haste").model_dump()
    assert {key for key in base if base[key] != haste[key]} == {"alignment", "termination"}
    assert haste["alignment"] == base["alignment"] | {"lambda_feature": 0.5, "lambda_attention": 0.5}


def test_presets_fill_sizes_and_explicit_values_win():
    assert config.ModelSettings(preset="SiT-XL/2").model_dump(include={"depth", "width", "heads", "patch"}) == {
        "depth": 28, "width": 1152, "heads": 16, "patch": 2,
    }  # fmt: skip
    assert config.ModelSettings(preset="SiT-B/4").patch == 4
    assert config.ModelSettings(preset="SiT-B/2", depth=3).depth == 3


def test_kept_steps_are_sorted_unique_and_end_with_the_last(make_study):
    train = make_study("train.keep=[8, 4, 8, 40]", "train.steps=12").train
    assert train.kept_steps == [4, 8, 12]
    assert make_study("train.keep=[4, 12]").train.kept_steps == [4, 12]


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_study_or_file_names_the_known_ones(tmp_path):
    message = refused("digit")
    assert all(word in message for word in ("unknown study 'digit'", "did you mean 'digits'", ".yaml")), message
    path = tmp_path / "mine.yml"
    assert f"no file {path}; expected a study file, or one of the studies: captions, cifar10" in refused(path)


def test_arms_that_are_null_are_left_out_of_the_study_and_its_groups(tmp_path):
    base = config.load("digits", "full")
    group = next(name for name, arms in base.groups.items() if "atta" in arms)
    left = config.load("digits", "full", ["arms.atta=null"])
    assert list(left.arms) == [arm for arm in base.arms if arm != "atta"]
    assert left.groups[group] == [arm for arm in base.groups[group] if arm != "atta"]
    assert all(left.run(arm).hash == base.run(arm).hash for arm in left.arms)
    path = written(tmp_path, lambda content: content["arms"].update({"atta": None, "w0.5": {}, "w0.5.late": {}}))
    assert "atta" not in config.load(path).arms
    dotted = config.load(path, overrides=["arms.w0.5=null", "arms.w0.5.late.train.lr=2e-3"])
    assert "w0.5" not in dotted.arms
    assert dotted.run("w0.5.late").train.lr == 2e-3


def test_an_unknown_profile_names_the_known_ones(tmp_path):
    path = written(tmp_path, lambda content: content.update(profiles={"quick": {"train": {"steps": 5}}}))
    assert config.load(path, "quick").train.steps == 5
    message = refused(path, "quik")
    assert "profile" in message
    assert "expected one of: quick" in message


def test_an_unknown_arm_names_the_known_ones(tiny):
    with pytest.raises(HasteError, match=r"\(did you mean 'haste'\?\); expected one of: vanilla, repa"):
        tiny.run("hast")
    assert "expected one of: vanilla, repa" in refused("digits", overrides=["arms.hast.termination.at=4"])


@pytest.mark.parametrize(
    ("override", "patterns"),
    [
        ("train.stpes=4", ["stpes", "did you mean 'steps'", "batch_size"]),
        ("trian.steps=4", ["trian", "did you mean 'train'", "evaluate"]),
        ("arms.haste.termination.att=4", ["att", "kind"]),
        ("train.steps.more=4", ["train.steps", "integer"]),
        ("triggers.mine={kind: plateau, windw: 3}", ["triggers.mine", "windw", "did you mean 'window'"]),
        ("train.steps", ["key=value"]),
        ("train.keep=[4", ["YAML"]),
        ("train.steps=many", ["train.steps", "integer", "'many'"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.precision=fp8", ["train.precision", "'no', 'fp16' or 'bf16'"]),
        ("train=4", ["train"]),
        ("model.preset=SiT-XXL/2", ["SiT-XXL/2", "did you mean 'SiT-XL/2'", "SiT-B/2"]),
        ("model.heads=5", ["width 64", "heads 5"]),
        ("alignment.depth=7", ["alignment.depth 7", "6 blocks"]),
        ("alignment.layer_pairs=[[6, 1]]", ["student block 6", "0 to 5"]),
        ("alignment.heads=[4]", ["student head 4", "0 to 3"]),
        ("arms.haste.termination.kind=never", ["at=", "iteration"]),
        ("arms.haste.evaluate.n=5", ["'evaluate'", "termination"]),
        ("data.augment.shfit=1", ["data.augment: unknown key 'shfit'", "rotation"]),
        ("teacher.fitting.augment.x=1", ["teacher.fitting.augment: unknown key 'x'", "shift"]),
        # What YAML and pydantic would let through.
        ("train.steps=yes", [r"train.steps: steps is True, a truth value .*; expected a number|steps is True"]),
        ("train.lr=.inf", [r"train.lr: .*finite number"]),
        ("train.lr=.nan", [r"train.lr"]),
        ("train.keep=[true]", [r"keep is \[True\], a truth value"]),
        ("train.ema_decay=1", [r"train.ema_decay: .*less than 1"]),
        ("train.betas=[1, 1]", [r"train.betas.0: .*less than 1"]),
        ("seeds=[0, 0]", [r"seeds: names a seed twice; expected each once, given \[0, 0\]$"]),
        ("arms.haste.seeds=[0, 0]", [r"arms.haste.seeds is \[0, 0\]; expected .*, each once"]),
        ("arms.haste.seeds=[false]", [r"arms.haste.seeds is \[False\]; expected"]),
        ("train.steps='12'", [r"train: steps is '12', a number in quotes, so text; expected a number without quotes"]),
        ("train.betas=[0.9, '0.99']", [r"betas is \[0.9, '0.99'\], a number in quotes"]),
        ("model.qk_norm=1", [r"qk_norm is 1; expected true or false"]),
        ("teacher.std=[0]", [r"teacher.std.0: .*greater than 0"]),
        ("teacher.std=[-1]", [r"teacher.std.0: .*greater than 0"]),
        ("model.depth=100000", [r"model.depth: .*less than or equal to 1000, given 100000"]),
        ("model.width=4000000", [r"model.width: .*less than or equal to 100000"]),
        ("sample.solver_steps=1000000000", [r"sample.solver_steps: .*less than or equal to 100000"]),
        ("train.lr=" + "[" * 3000, [r"the value is not valid YAML"]),
        ("alignment.heads=[0, 0]", [r"heads \[0, 0\]; expected at least one head, each once"]),
        ("arms={a/b: {}}", [r"arms.a/b: expected letters, digits, \. and _, the first a letter or digit, given 'a/b'"]),
        ("alignment.layer_pairs=[1, 2]", [r"\[\[student block, teacher block\], \.\.\.\]"]),
        ("alignment.layer_pairs=[[1, 2], [1, 2]]", [r"layer_pairs \[\[1, 2\], \[1, 2\]\] name a pair twice"]),
        (
            "sample={guidance: 2, guidance_low: 0.8, guidance_high: 0.2}",
            [r"guide at no noise level; expected low < high"],
        ),
        ("evaluate.n=3", [r"n 3; expected more images than neighborhood 3"]),
        ("arms={vanilla: {}, %s: {}}" % ("a" * 300), [r"at most 100 characters"]),
    ],
)
def test_a_bad_override_is_refused_naming_what_is_expected(override, patterns):
    message = refused("digits", overrides=[override])
    assert [pattern for pattern in patterns if not re.search(pattern, message)] == [], message


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text", ""], ids=repr)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert "odd.yaml" in refused(path)


# -- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-3", 0.001),
        ("train.keep=[3, 1]", [1, 3]),
        ("train.betas=[0.8, 0.95]", (0.8, 0.95)),
        ("model.qk_norm=true", True),
        ("train.precision=no", "no"),
        ("teacher.weights=some/path.pth", "some/path.pth"),
        ("teacher.kwargs.embed_dim=48", 48),
        ("teacher.mean=null", None),
        ("teacher.fitting.augment.rotation=30", 30.0),
        ("title=a = b", "a = b"),
        ("claims.roles.repa_midway=repa", "repa"),
        ("groups.late=[repa]", ["repa"]),
    ],
)
def test_overrides_are_read_as_yaml_and_numbers_without_a_dot_too(override, value):
    found = config.load("digits", overrides=[override])
    for part in override.split("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_an_override_leaves_everything_else_alone():
    before = config.load("digits").model_dump()
    after = config.load("digits", overrides=["teacher.kwargs.depth=3", "arms.repa.train.lr=0.1"]).model_dump()
    before["teacher"]["kwargs"]["depth"] = 3
    before["arms"]["repa"]["train"] = {"lr": 0.1}
    assert after == before


def test_an_override_of_an_arm_changes_that_arm_alone_and_later_ones_win(tiny, make_study):
    changed = make_study("arms.haste.termination.at=5", "arms.haste.termination.at=4")
    assert changed.run("haste").tau == 4
    assert changed.run("haste").hash != tiny.run("haste").hash
    assert changed.run("holistic").hash == tiny.run("holistic").hash


def test_sections_cannot_be_changed_after_loading(tiny):
    with pytest.raises(ValueError, match="frozen"):
        tiny.train.steps = 5


# -- hashes -----------------------------------------------------------------------------------------------------------


BOOKKEEPING = (
    "train.steps=24", "train.keep=[4]", "train.log_every=7", "train.checkpoint_every=5", "train.sample_every=9",
    "sample.solver_steps=99", "evaluate.n=10", "claims.early=4", "title=other", "seeds=[3]",
)  # fmt: skip
EVERY_ARM = (
    "train.lr=0.5", "train.batch_size=8", "train.betas=[0.5, 0.9]", "train.weight_decay=0.1", "train.clip_norm=2",
    "train.ema_decay=0.5", "train.label_dropout=0.5", "train.precision=bf16", "model.depth=4", "model.qk_norm=true",
    "data.split_seed=1", "data.augment.shift=0.3",
)  # fmt: skip
ALIGNED_ARMS = (
    "alignment.depth=1", "alignment.heads=[0]", "alignment.projector_width=8", "alignment.layer_pairs=[[0, 0]]",
    "teacher.kwargs.depth=5", "teacher.weights=hub", "teacher.resize=reference", "teacher.fitting.seed=1",
    "arms.haste.alignment.lambda_feature=0.7", "arms.haste.alignment.lambda_attention=0.7",
)  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [(BOOKKEEPING, set()), (EVERY_ARM, {"vanilla", "haste"}), (ALIGNED_ARMS, {"haste"})],
    ids=["bookkeeping", "every arm", "aligned arms"],
)
def test_hash_and_lineage_change_with_settings_that_change_numbers(tiny, make_study, overrides, changed):
    for override in overrides:
        study = make_study(override)
        for name in ("hash", "lineage"):
            found = {
                arm for arm in ("vanilla", "haste") if getattr(study.run(arm), name) != getattr(tiny.run(arm), name)
            }
            assert found == changed, (override, name)


def test_the_same_settings_give_the_same_hash_however_they_are_written(tiny, make_study):
    assert make_study("train.lr=0.001").run("haste").hash == make_study("train.lr=1e-3").run("haste").hash
    run = tiny.run("haste")
    assert RunSettings.model_validate(run.model_dump(mode="json")).hash == run.hash


def test_haste_shares_its_lineage_with_holistic_and_starts_from_it(tiny, make_study):
    arms = ("vanilla", "repa", "atta", "holistic", "haste")
    lineages = {arm: tiny.run(arm).lineage for arm in arms}
    assert lineages["holistic"] == lineages["haste"]
    assert len(set(lineages.values())) == 4
    assert len({tiny.run(arm).hash for arm in arms}) == 5
    assert {arm: tiny.donor(arm) for arm in arms} == dict.fromkeys(arms) | {"haste": "holistic"}
    # No donor without a checkpoint at the switch, or with another first part.
    assert make_study("train.keep=[4]").donor("haste") is None
    assert make_study("train.keep=[4]", "train.steps=8").donor("haste") == "holistic"
    assert make_study("arms.holistic.train.lr=0.5").donor("haste") is None
    assert make_study("arms.holistic.alignment.lambda_feature=1").donor("haste") is None


def test_an_arm_that_switches_later_is_a_donor_and_one_that_switches_earlier_is_not(tmp_path):
    def arms(early, late):
        weights = {"alignment": {"lambda_feature": 0.5}}
        made = {
            "early": weights | {"termination": {"kind": "iteration", "at": early}},
            "late": weights | {"termination": {"kind": "iteration", "at": late}},
        }

        def change(content):
            content["train"] |= {"steps": 2000, "keep": [500, 1000]}
            content |= {"arms": made, "profiles": {}}

        return config.load(written(tmp_path, change))

    study = arms(500, 1000)
    assert (study.donor("early"), study.donor("late")) == ("late", None)
    assert arms(500, 500).donor("early") is None


def test_teacher_extractor_and_evaluation_hashes_follow_what_they_depend_on(tiny, make_study):
    def hashes(*overrides):
        study = make_study(*overrides)
        return study.teacher_hash(study.teacher), study.extractor_hash, study.autoencoder_hash, study.evaluation_hash

    base = hashes()
    for override, changed in [
        ("teacher.fitting.steps=21", (True, False, False, False)),
        ("evaluate.extractor.steps=21", (False, True, False, True)),
        ("evaluate.autoencoder.steps=21", (False, False, True, True)),
        ("evaluate.extractor_width=32", (False, True, True, True)),
        ("evaluate.n=41", (False, False, False, True)),
        ("sample.solver_steps=3", (False, False, False, True)),
        ("data.split_seed=1", (True, True, True, True)),
        ("data.validation_fraction=0.2", (True, True, True, True)),
        ("train.lr=0.5", (False, False, False, False)),
    ]:
        assert tuple(a != b for a, b in zip(hashes(override), base, strict=True)) == changed, override


def test_hashes_name_the_version_of_the_random_streams(make_study, monkeypatch):
    def hashes():
        study = make_study()
        run = study.run("haste")
        return (
            run.hash, run.lineage, run.unaligned, study.teacher_hash(study.teacher), study.extractor_hash,
            study.autoencoder_hash, study.evaluation_hash,
        )  # fmt: skip

    now = hashes()
    monkeypatch.setattr(config, "STREAMS", 1)
    assert all(a != b for a, b in zip(now, hashes(), strict=True))


# Groups, roles, baselines


def test_groups_name_arms_that_there_are(make_study):
    study = make_study("groups={main: [vanilla, haste], late: [repa]}")
    assert study.main == ["vanilla", "haste"]
    assert make_study().main == list(make_study().arms)
    with pytest.raises(HasteError, match=r"groups.late names arm 'rapa'.*repa"):
        make_study("groups={late: [rapa]}")
    with pytest.raises(HasteError, match="at least 1"):
        make_study("groups={late: []}")


def test_only_main_arms_must_keep_the_early_step(make_study):
    short = ["arms.atta.train={steps: 4, keep: []}", "claims.early=8"]
    make_study(*short, "groups={main: [vanilla, repa]}").check_claims()
    with pytest.raises(HasteError, match=r"claims.early names step 8, which arm 'atta' does not keep"):
        make_study(*short).check_claims()


def test_a_study_without_plain_training_cannot_be_reported_on(make_study):
    study = make_study()
    without = study.model_copy(update={"arms": {"repa": study.arms["repa"]}, "groups": {}})
    with pytest.raises(HasteError, match="without alignment named vanilla, main arms are repa"):
        without.check_baseline()


def test_the_baseline_differs_in_alignment_alone(make_study):
    study = make_study("arms.atta.model={width: 16}", "arms.repa.teacher={low_pass: 0.5}")
    assert study.baseline("haste") == study.baseline("repa") == study.baseline("vanilla") == "vanilla"
    assert study.baseline("atta") is None  # no plain run of that width
    assert make_study("arms.atta.train={lr: 0.1}").baseline("atta") is None
    assert make_study("arms.atta.train={steps: 4, keep: []}").baseline("atta") == "vanilla"
    assert make_study("arms.atta.sample={solver_steps: 9}").baseline("atta") is None


def test_an_arm_may_draw_its_images_in_its_own_way(make_study):
    study = make_study("arms.haste.sample={sampler: euler}")
    assert study.sample_of("haste").sampler == "euler"
    assert study.sample_of("haste").solver_steps == study.sample.solver_steps
    assert study.sample_of("repa") == study.sample
    assert study.run("haste").hash == make_study().run("haste").hash
    run, other = (Run(study, arm, 0) for arm in ("haste", "repa"))
    assert run.evaluation_hash != other.evaluation_hash == study.evaluation_hash
    with pytest.raises(HasteError, match=r"sampler.*'huen'"):
        make_study("arms.haste.sample.sampler=huen")


def test_the_full_profile_of_digits_can_read_every_claim_that_digits_can_answer():
    study = config.load("digits", "full")
    study.check_claims()
    named = set(study.arms) | set(study.triggers)
    assert set(study.claims.roles.values()) <= named
    missing = {claim.id for claim in CLAIMS for arm in claim.arms if study.claims.roles.get(arm, arm) not in study.arms}
    assert missing == {"C16", "C20", "C20g", "C20gx", "C20gd"}
    assert {arm for members in study.groups.values() for arm in members} == set(study.arms)
    # Every switched arm of the sweep costs its tail alone.
    for always_on, tails in {
        "holistic": ("haste_400", "haste", "haste_1600"),
        "strong_holistic": ("strong_400", "strong_800", "strong_1600"),
        "double_holistic": ("double_400", "double_800", "double_1600"),
        "repa": ("repa_400", "repa_800"),
        "strong_repa": ("strong_repa_800",),
    }.items():
        assert [study.donor(arm) for arm in tails] == [always_on] * len(tails)


def test_an_arm_may_have_some_of_the_studys_seeds(make_study):
    study = make_study("seeds=[0, 1, 2]", "arms.repa.seeds=[2, 0]")
    assert (study.seeds_of("repa"), study.seeds_of("vanilla")) == ([2, 0], [0, 1, 2])
    assert study.run("repa").hash == make_study().run("repa").hash
    for wrong in ("[3]", "[]", "2"):
        with pytest.raises(HasteError, match=r"arms\.repa\.seeds"):
            make_study("seeds=[0, 1, 2]", f"arms.repa.seeds={wrong}")
    # An arm branches from one that has all its seeds.
    more = ("seeds=[0, 1]", "train.keep=[4, 8]")
    assert make_study(*more, "arms.haste.seeds=[1]").donor("haste") == "holistic"
    assert make_study(*more, "arms.holistic.seeds=[1]").donor("haste") is None


def test_guidance_away_from_a_label_that_was_never_trained_is_refused():
    with pytest.raises(HasteError, match=r"sample.guidance 2 with train.label_dropout 0"):
        config.load("digits", overrides=["sample.guidance=2", "train.label_dropout=0"])
    config.load("digits", overrides=["sample.guidance=2"])
    config.load("digits", overrides=["train.label_dropout=0"])


def test_a_key_stands_once(tmp_path):
    path, text = tmp_path / "own.yaml", (config.STUDIES / "digits.yaml").read_text()
    path.write_text(text + "\nseeds: [0]\n")
    with pytest.raises(
        HasteError, match=r"own.yaml is not valid YAML: the key 'seeds' is given twice, in lines \d+ and \d+"
    ):
        config.load(path)
    path.write_text("arms: {vanilla: {}, vanilla: {train: {lr: 5}}}\n")
    with pytest.raises(HasteError, match=r"the key 'vanilla' is given twice, in line 1$"):
        config.load(path)
    with pytest.raises(HasteError, match="not valid YAML"):
        config.load("digits", overrides=["sample={guidance: 2, guidance: 3}"])
    path.write_text("base: &base {steps: 3}\nother: {<<: *base, lr: 1}\n")  # merging stays possible
    assert config._read(path)["other"] == {"steps": 3, "lr": 1}


def test_a_copy_of_a_shipped_study_needs_a_name_of_its_own(tmp_path):
    path, text = tmp_path / "own.yaml", (config.STUDIES / "digits.yaml").read_text()
    path.write_text(text)
    with pytest.raises(HasteError, match=r"own.yaml: name 'digits' is that of the reports of digits, which comes with"):
        config.load(path)
    for name in ("Digits", "digits-full", "DIGITS-smoke", "cifar10-two-cores"):
        path.write_text(text.replace("name: digits", f"name: {name}", 1))
        with pytest.raises(HasteError, match=f"name '{name}' is that of the reports of "):
            config.load(path)
    path.write_text(text.replace("name: digits", "name: digits-of-mine", 1))
    assert config.load(path).name == "digits-of-mine"
    path.write_text(text.replace("name: digits", "name: mine", 1))
    assert config.load(path).name == "mine"


def test_numbers_in_a_study_file_are_those_of_yaml_1_2(tmp_path):
    path, text = (
        tmp_path / "own.yaml",
        (config.STUDIES / "digits.yaml").read_text().replace("name: digits", "name: a", 1),
    )
    for number in ("1e-3", "1.5e-3", "+1E-3", ".1e-2"):
        path.write_text(re.sub(r"(\n  lr: )[\d.e-]+", rf"\g<1>{number}", text))
        assert config.load(path).train.lr == float(number)
    path.write_text("a: " + "[" * 3000)
    with pytest.raises(HasteError, match=r"own.yaml is not valid YAML: nested too deeply$"):
        config.load(path)
    path.write_text("a: [1\nb: 2")
    with pytest.raises(HasteError, match=r"is not valid YAML: while parsing a flow sequence in line 1, column 4"):
        config.load(path)


def test_a_section_that_is_given_in_part_keeps_its_other_defaults():
    own, default = config.EvaluateSettings(autoencoder={"steps": 7}).autoencoder, config.EvaluateSettings().autoencoder
    assert own == default.model_copy(update={"steps": 7})
    assert own.seed != config.EvaluateSettings().extractor.seed
    study = config.load("cifar10", "two-cores")
    assert study.evaluate.autoencoder.min_accuracy == 0.5
