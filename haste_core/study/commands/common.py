"""Arguments that commands share, and what they stand for."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from haste_core.study import config

if TYPE_CHECKING:
    from haste_core.study.runs import Run


def add_study(commands: Any, name: str, text: str, arm: bool = False) -> Any:
    """A sub-parser for a command on a study, or on one run of it (`arm`)."""
    sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    names = ", ".join(config.studies())
    sub.add_argument("study", help=f"a study's name ({names}) or the path of a .yaml file")
    if arm:
        sub.add_argument("arm", help="an arm of the study, for instance vanilla, repa, atta, holistic or haste")
        sub.add_argument("--seed", type=int, default=0, help="seed of the run (default: %(default)s)")
    sub.add_argument("--profile", help="a named set of overrides in the study file, for instance smoke")
    sub.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting, for instance train.steps=200; may be repeated",
    )  # fmt: skip
    return sub


def study_of(arguments: argparse.Namespace) -> config.Study:
    """The study that `add_study`'s arguments name."""
    return config.load(arguments.study, arguments.profile, arguments.overrides)


def run_of(arguments: argparse.Namespace) -> Run:
    """The run that `add_study`'s arguments name."""
    from haste_core.study.runs import Run

    return Run(study_of(arguments), arguments.arm, arguments.seed)


def settings(arguments: argparse.Namespace) -> str:
    """The words that name the same profile and overrides again, for a command a message suggests."""
    profile = ["--profile", arguments.profile] if arguments.profile else []
    chosen = [*profile, *(word for override in arguments.overrides for word in ("--set", override))]
    return f" {shlex.join(chosen)}" if chosen else ""
