"""Studies: one YAML file resolved to runs, with overrides, profiles and the hashes that name directories.

A study file describes a base (data, teacher, model, train, sample, evaluate) and arms, each a set of overrides on
that base. `StudySettings.run(arm)` resolves one arm to a `RunSettings`, the complete description of one training run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, field_validator, model_validator

from haste_core.errors import HasteError, unknown
from haste_core.files import output_root
from haste_core.seeding import STREAMS
from haste_core.study.sections import (
    TRAIN_BOOKKEEPING,
    AlignmentSettings,
    AnalysisSettings,
    AugmentSettings,
    ClaimsSettings,
    DataSettings,
    EvaluateSettings,
    FittingSettings,
    ModelSettings,
    NonNegative,
    SampleSettings,
    Section,
    TeacherSettings,
    TerminationSettings,
    TextureSettings,
    TrainSettings,
    validate,
)

__all__ = [
    "AlignmentSettings", "AnalysisSettings", "AugmentSettings", "ClaimsSettings", "DataSettings", "EvaluateSettings",
    "FittingSettings", "ModelSettings", "RunSettings", "SampleSettings", "StudySettings", "TeacherSettings",
    "TerminationSettings", "TextureSettings", "TrainSettings", "digest", "load", "studies",
]  # fmt: skip

STUDIES = Path(__file__).parent / "studies"


def digest(content: Any) -> str:
    """The first 10 hexadecimal digits of the SHA-256 of `content` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section; neither argument changes."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merge(result[key], value) if both else value
    return result


class RunSettings(Section):
    """Everything that decides one training run, bar its seed."""

    data: DataSettings
    teacher: TeacherSettings
    model: ModelSettings
    alignment: AlignmentSettings = AlignmentSettings()
    termination: TerminationSettings = TerminationSettings()
    train: TrainSettings

    @model_validator(mode="after")
    def _check_student_side(self) -> RunSettings:
        alignment, termination = self.alignment, self.termination
        if self.teacher.knows != "labels" and (self.data.kind, self.teacher.weights) != ("textured", "pretrain"):
            raise ValueError(
                f"teacher.knows {self.teacher.knows!r} with data of kind {self.data.kind!r} and teacher.weights "
                f"{self.teacher.weights!r}; expected labels, or kind 'textured' and weights 'pretrain'"
            )
        if not alignment.active:
            return self
        if alignment.lambda_feature > 0 and alignment.depth > self.model.depth:
            raise ValueError(
                f"alignment.depth {alignment.depth}, but the student has {self.model.depth} blocks, counted from 1"
            )
        if termination.kind == "gradient_angle" and termination.every % self.train.log_every:
            raise ValueError(
                f"termination.every {termination.every} is no multiple of train.log_every {self.train.log_every}"
            )
        student_blocks = [student for student, _ in alignment.layer_pairs]
        for name, given, count in (
            ("termination.block names block", [termination.block or 0], self.model.depth),
            ("alignment.layer_pairs names student block", student_blocks, self.model.depth),
            ("alignment.heads names student head", alignment.heads or [], self.model.heads),
        ):
            if max(given, default=0) >= count:
                raise ValueError(f"{name} {max(given)}; expected 0 to {count - 1}")
        return self

    @property
    def tau(self) -> float:
        """The step from which the run is no longer fully aligned, as far as its settings say.

        0 for a vanilla run, infinity where alignment never ends or a trigger decides.
        """
        if not self.alignment.active:
            return 0
        return float("inf") if self.termination.at is None else self.termination.at

    def _content(self, *more: str) -> dict[str, Any]:
        """Settings of data, model, optimisation and the sections `more`, without bookkeeping, as plain values."""
        return self.model_dump(mode="json", include={"data", "model", *more}) | {
            "train": self.train.model_dump(mode="json", exclude=TRAIN_BOOKKEEPING)
        }

    @property
    def unaligned(self) -> str:
        """Hash of what decides the run apart from its alignment."""
        content = self._content()
        train = content.pop("train")
        return digest([STREAMS, content, train])

    @property
    def lineage(self) -> str:
        """Hash of what decides the run up to the switch: equal for runs that share their first part."""
        return digest([STREAMS, self._content(*(("teacher", "alignment") if self.alignment.active else ()))])

    @property
    def hash(self) -> str:
        """Hash of everything that changes a number of the run; names its directory."""
        ending = self.termination.model_dump(mode="json") if self.alignment.active else None
        return digest([self.lineage, ending])


class StudySettings(Section):
    """A base, its arms and its seeds, as read from a study file.

    arms: overrides of the base by arm: sections of `RunSettings` except `data`, `sample`, and `seeds`, some of the
    study's. title: the question, in a line. note: what a reader of the report must know before the numbers.
    groups: lists of arms that belong to one question, by name; `main` are those of the report's own figures, by
    default all. triggers: rules that notebook 07 replays over the logs of always-on runs, by name.
    analyses: notebooks that the study runs before its report, with their parameters. None of these changes a run.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    title: str = ""
    note: str = ""
    data: DataSettings
    teacher: TeacherSettings
    model: ModelSettings
    alignment: AlignmentSettings = AlignmentSettings()
    train: TrainSettings
    sample: SampleSettings = SampleSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    claims: ClaimsSettings = ClaimsSettings()
    analysis: AnalysisSettings = AnalysisSettings()
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*$", max_length=100)], dict[str, Any]]
    seeds: Annotated[list[NonNegative], Field(min_length=1)]
    groups: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    triggers: dict[str, TerminationSettings] = {}
    analyses: dict[str, dict[str, Any]] = {}
    profiles: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _check_groups(self) -> StudySettings:
        for name, members in self.groups.items():
            for arm in members:
                if arm not in self.arms:
                    raise ValueError(f"groups.{name} names arm {arm!r}; expected one of: {', '.join(self.arms)}")
        return self

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("names a seed twice; expected each once")
        return seeds

    @cached_property
    def _runs(self) -> dict[str, RunSettings]:
        return {}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> StudySettings:
        """As of pydantic; the copy resolves its arms anew."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("_runs", None)
        return copied

    @property
    def main(self) -> list[str]:
        """The arms of the report's own figures and of the claims that are read early."""
        return self.groups.get("main", list(self.arms))

    def run(self, arm: str) -> RunSettings:
        """The complete configuration of one arm.

        Raises:
            HasteError: the arm does not exist, or its overrides do not fit.
        """
        if arm not in self._runs:
            self._runs[arm] = self._resolved(arm)
        return self._runs[arm]

    def _resolved(self, arm: str) -> RunSettings:
        if arm not in self.arms:
            raise unknown("arm", arm, self.arms)
        base = self.model_dump(mode="json", include=set(RunSettings.model_fields))
        # All arms learn from the same images, so that their scores can be compared.
        known = sorted({*RunSettings.model_fields, "sample", "seeds"} - {"data"})
        for key in self.arms[arm]:
            if key not in known:
                raise unknown(f"section in arm {arm!r}", key, known)
        own = {key: value for key, value in self.arms[arm].items() if key not in ("sample", "seeds")}
        return validate(RunSettings, _merge(base, own), f"arm {arm!r}")

    def seeds_of(self, arm: str) -> list[int]:
        """The seeds of an arm: the study's, or those of them that the arm names itself.

        Raises:
            HasteError: it names one that the study does not have, or one twice.
        """
        own = self.arms[arm].get("seeds", self.seeds)
        listed = isinstance(own, list) and own and all(type(seed) is int and seed in self.seeds for seed in own)
        if not listed or len(set(own)) < len(own):
            raise HasteError(
                f"arms.{arm}.seeds is {own}; expected a list of some of the study's seeds {self.seeds}, each once"
            )
        return own

    def sample_of(self, arm: str) -> SampleSettings:
        """Sampler settings of an arm: the study's with the arm's own overrides (a DiT needs `ddpm`)."""
        own = self.arms[arm].get("sample", {})
        return validate(SampleSettings, _merge(self.sample.model_dump(mode="json"), own), f"arm {arm!r}")

    def donor(self, arm: str) -> str | None:
        """The arm from whose checkpoint at the switch this arm can start, or None.

        A donor shares everything up to the switch, stays in phase I until then and keeps its checkpoint there.
        """
        own = self.run(arm)
        for other in self.arms:
            candidate = self.run(other)
            shares = candidate.lineage == own.lineage and set(self.seeds_of(arm)) <= set(self.seeds_of(other))
            if shares and candidate.tau > own.tau and own.tau in candidate.train.kept_steps:
                return other
        return None

    def baseline(self, arm: str) -> str | None:
        """The arm without alignment that differs from this one in nothing else, or None."""
        own = self.run(arm)
        for other in self.arms:
            candidate = self.run(other)
            same = candidate.unaligned == own.unaligned and self.sample_of(other) == self.sample_of(arm)
            if same and not candidate.alignment.active:
                return other
        return None

    def teacher_hash(self, teacher: TeacherSettings) -> str:
        """Hash of what decides a teacher's weights in this study, not what it is shown."""
        weights = teacher.model_dump(mode="json", exclude={"low_pass", "precision"})
        return digest([STREAMS, self.data.model_dump(mode="json"), weights])

    def teachers(self) -> list[TeacherSettings]:
        """The study's own teacher, then those that aligned arms bring."""
        found = [self.teacher]
        for run in map(self.run, self.arms):
            if run.alignment.active and run.teacher not in found:
                found.append(run.teacher)
        return found

    def check_baseline(self) -> None:
        """Raise HasteError where no main arm is plain training, against which gains and step times are read."""
        if "vanilla" not in self.main or self.run("vanilla").alignment.active:
            raise HasteError(
                f"gains and step times are read against an arm without alignment named vanilla, main arms are "
                f"{', '.join(self.main)}; expected arms.vanilla={{}}, and groups.main with it"
            )

    def check_claims(self) -> None:
        """Raise HasteError where a step that early gains are read at is not a kept one of every main arm."""
        for arm in self.main:
            kept = self.run(arm).train.kept_steps
            missing = [step for step in self.claims.early if step not in kept]
            if missing:
                raise HasteError(
                    f"claims.early names step {missing[0]}, which arm {arm!r} does not keep; expected some of {kept}, "
                    f"or another train.keep"
                )

    @property
    def extractor_hash(self) -> str:
        """Hash of what decides the weights of the feature extractor behind FID."""
        return self._fitted_hash("extractor", self.evaluate.extractor)

    @property
    def autoencoder_hash(self) -> str:
        """Hash of what decides the weights of the feature extractor that is trained without labels."""
        return self._fitted_hash("autoencoder", self.evaluate.autoencoder)

    def _fitted_hash(self, role: str, fitting: FittingSettings) -> str:
        data = self.data.model_dump(mode="json")
        return digest([STREAMS, role, data, fitting.model_dump(), self.evaluate.extractor_width])

    @property
    def evaluation_hash(self) -> str:
        """Hash of everything that moves a score except the weights that are scored."""
        return self.evaluation_hash_of(self.sample)

    def evaluation_hash_of(self, sample: SampleSettings) -> str:
        """`evaluation_hash` where images are drawn by `sample`."""
        return digest([sample.model_dump(), self.evaluate.model_dump(), self.extractor_hash, self.autoencoder_hash])


def studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(p.stem for p in STUDIES.glob("*.yaml"))


def _shipped(name: str) -> str:
    """The study of the package that writes reports under this name, with one of its profiles or without; else ""."""
    name = name.casefold()  # some file systems do not tell case
    for study in studies():
        profiles = _read(STUDIES / f"{study}.yaml").get("profiles", {}) if name.startswith(f"{study}-") else {}
        if name in (study, *(f"{study}-{profile}" for profile in profiles)):
            return study
    return ""


def load(study: str | Path, profile: str | None = None, overrides: Iterable[str] = ()) -> StudySettings:
    """A study by name or by the path of a YAML file, after its profile and then the overrides.

    Args:
        study: a name from `studies()` or a path ending in .yaml.
        profile: a named set of overrides in the file itself, for instance "smoke".
        overrides: texts such as "train.steps=200"; the value is read as YAML. Keys address the study's base, or an
            arm with "arms.haste.termination.at=100"; "arms.atta=null" leaves one out.

    Raises:
        HasteError: the study, profile, key or type does not exist or does not fit.
    """
    path = Path(study) if str(study).endswith((".yaml", ".yml")) else STUDIES / f"{study}.yaml"
    if path.parent != STUDIES and not path.is_file():
        raise HasteError(f"no file {path}; expected a study file, or one of the studies: {', '.join(studies())}")
    if not path.is_file() or (path.stem not in studies() and path.parent == STUDIES):
        raise unknown("study", study, [*studies(), "or the path of a .yaml file"])
    content = _read(path)
    # A launch writes the settings of its run beside it and gives them to its processes.
    own = output_root() / "runs" in path.resolve().parents
    if path.parent != STUDIES and not own and (shipped := _shipped(str(content.get("name")))):
        raise HasteError(
            f"{path}: name {content['name']!r} is that of the reports of {shipped}, which comes with the package, and "
            f"they would be overwritten; expected another name"
        )
    if profile:
        profiles = content.get("profiles", {})
        if profile not in profiles:
            raise unknown(f"profile of study {content.get('name')!r}", profile, profiles)
        content = _merge(content, profiles[profile])
    for override in overrides:
        content = _apply(content, override)
    loaded = validate(StudySettings, _with_arms(content), f"study {path.stem!r}")
    for arm in loaded.arms:
        run, sample = loaded.run(arm), loaded.sample_of(arm)
        loaded.seeds_of(arm)
        if sample.guidance != 1 and run.train.label_dropout == 0:
            raise HasteError(
                f"arm {arm!r}: sample.guidance {sample.guidance:g} with train.label_dropout 0, so that the label which "
                f"guidance leads away from is never trained; expected guidance 1 or a dropout above 0"
            )
    return loaded


def _with_arms(content: dict[str, Any]) -> dict[str, Any]:
    """A study's content without the arms that are null, which its groups do not name any more."""
    arms, groups = content.get("arms"), content.get("groups")
    if not isinstance(arms, Mapping) or None not in arms.values():
        return content
    kept = {arm: own for arm, own in arms.items() if own is not None}
    found = content | {"arms": kept}
    if isinstance(groups, Mapping):
        found["groups"] = {
            name: [arm for arm in named if arms.get(arm, 0) is not None] if isinstance(named, list) else named
            for name, named in groups.items()
        }
    return found


class _Loader(yaml.SafeLoader):
    """YAML in which a key is given once; elsewhere the last one wins in silence. 1e-3 is a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, Any], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                where = f"lines {lines[name]} and {line}" if line != lines[name] else f"line {line}"
                raise yaml.YAMLError(f"the key {key.value!r} is given twice, in {where}")
            lines[name] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parsed(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        ValueError: it is not valid; in one line.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split()).replace('"<unicode string>", ', "")) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class _Overridden(BaseModel):
    """The parts of a study file that profiles and overrides read before the whole is validated."""

    arms: dict[str, dict[str, Any] | None] = {}
    profiles: dict[str, dict[str, Any]] = {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _parsed(path.read_text())
    except UnicodeDecodeError as error:
        raise HasteError(f"{path} is not valid YAML: not text in UTF-8") from error
    except ValueError as error:
        raise HasteError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise HasteError(f"{path} holds {type(content).__name__}; a study is a mapping of sections")
    validate(_Overridden, content, f"study {path.stem!r}")
    return content


def read_pair(text: str, what: str, example: str) -> tuple[str, Any]:
    """Name and value of "name=value", the value read as YAML.

    what: it is called in errors. example: of the form.

    Raises:
        HasteError: it has no such form, or the value is no YAML.
    """
    key, equals, given = text.partition("=")
    if not equals or not key:
        raise HasteError(f"{what} {text!r} is not of the form {example}")
    try:
        return key, _parsed(given)
    except ValueError as error:
        raise HasteError(f"{what} {text[:100]!r}: the value is not valid YAML") from error


def _apply(content: Mapping[str, Any], override: str) -> dict[str, Any]:
    key, value = read_pair(override, "override", "key=value, for instance train.steps=200")
    parts = key.split(".")
    if parts[0] == "arms" and len(parts) > 1:
        arms = content.get("arms", {})
        # An arm's name may have dots of its own.
        meant = [arm for arm in arms if f"{key}.".startswith(f"arms.{arm}.")]
        if not meant:
            raise unknown("arm", parts[1], arms)
        arm = max(meant, key=len)
        parts = ["arms", arm, *key.removeprefix(f"arms.{arm}").split(".")[1:]]
    for part in reversed(parts):
        value = {part: value}
    return _merge(content, value)
