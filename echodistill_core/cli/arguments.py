"""Flags, made from the settings dataclasses, so that a default and its reason stand in one place."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from .. import __version__
from ..demo.settings import DemoSettings
from ..errors import InputError
from ..models.sources import ModelSources
from ..settings import PRECISIONS, EchoSettings, TrainSettings, nearest

# How a run computes and reports, which may change between its stages: it does not determine the result.
COMPUTING = tuple(f.name for f in dataclasses.fields(TrainSettings) if not f.metadata["affects_result"])

WHAT_WINS = (
    "A flag wins over --preset, that over what the family recommends for its networks, and that over the default shown."
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are this project's one-sentence errors."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of exiting."""
        raise InputError(f"{message}; see {self.prog} --help.")


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="echodistill", description="Personalise a one-step image model from a few photographs.")
    parser.add_argument("--version", action="version", version=f"echodistill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for add in (_add_demo, _add_train, _add_echo, _add_sample, _add_info, _add_export, _add_bench, _add_download):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = _command(commands, "demo", "see it work: learn one thing with the small models that come along, in minutes")
    demo.add_argument(
        "--photos", nargs="+", default=[], metavar="PATH", help="learn these instead: a folder, or image files"
    )
    demo.add_argument(
        "--out", default="", metavar="DIR", help="run folder, which the page lies in (default: runs/demo)"
    )
    add_settings(demo, DemoSettings)


def _add_train(commands: Any) -> None:
    train = _command(commands, "train", "learn a concept from photographs: the distillation stage", WHAT_WINS)
    train.add_argument("--photos", required=True, nargs="+", metavar="PATH", help="a folder, or image files")
    train.add_argument("--out", default="", metavar="DIR", help="run folder; the default is named after the concept")
    train.add_argument(
        "--start-from",
        nargs="+",
        default=[],
        metavar="PATH",
        help="run folder or adapter files that the models of their roles begin from; with --teacher-weight 0 that "
        "teacher and its token stay as they are (teacher-first)",
    )
    add_settings(train, TrainSettings)
    add_settings(train, ModelSources)


def _add_echo(commands: Any) -> None:
    echo = _command(commands, "echo", "let the student's own samples teach both models: the echoing stage", WHAT_WINS)
    echo.add_argument("run", metavar="RUN", help="run folder of a finished train")
    add_settings(echo, EchoSettings)
    add_settings(echo, TrainSettings, only=COMPUTING)


def _add_sample(commands: Any) -> None:
    sample = _command(commands, "sample", "make pictures with a run or with adapter files")
    sample.add_argument("run", nargs="?", default="", metavar="RUN", help="run folder, or leave out and give --adapter")
    sample.add_argument("--adapter", nargs="+", default=[], metavar="FILE", help="adapter files, worn together")
    sample.add_argument("--prompt", nargs="+", required=True, help="one or more prompts with the placeholder in them")
    sample.add_argument("--out", default="sample.png", metavar="FILE", help="picture to write; several get numbers")
    _add_choice_of_adapter(sample, role="which model draws")
    sample.add_argument("--steps", type=int, default=0, help="1, 2 or 4; 0 is 1 for the student, 25 for the teacher")
    sample.add_argument("--batch", type=int, default=1, help="pictures for each prompt")
    sample.add_argument("--seed", type=int, default=0, help="of the first picture; each next one adds 1")
    sample.add_argument("--width", type=int, default=0, help="pixels, a multiple of 8; 0 is the family's own")
    sample.add_argument("--height", type=int, default=0, help="pixels, a multiple of 8; 0 is the family's own")
    sample.add_argument(
        "--guidance", type=float, default=0.0, help="0: none for the student, the family's for the teacher"
    )
    sample.add_argument("--strength", type=float, nargs="+", default=[], help="of each adapter; 0 is the base model")
    sample.add_argument("--image", default="", metavar="FILE", help="picture to begin from")
    sample.add_argument("--denoise", type=float, default=0.5, help="how much of --image is redrawn, 0 to 1")
    sample.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    sample.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="what the models compute in")
    add_settings(sample, ModelSources)


def _add_info(commands: Any) -> None:
    info = _command(commands, "info", "say what is in an adapter file or a run folder")
    info.add_argument("path", metavar="PATH", help="adapter file or run folder")
    info.add_argument("--json", action="store_true", help="as JSON, for programs")


def _add_export(commands: Any) -> None:
    export = _command(commands, "export", "write a run or adapter for tools that know no difference keys")
    export.add_argument("path", metavar="PATH", help="run folder or adapter file")
    export.add_argument(
        "--to", choices=("lora", "merged"), required=True, help="a low-rank LoRA, or a diffusers folder"
    )
    export.add_argument("--out", required=True, metavar="PATH", help="file (lora) or new folder (merged)")
    export.add_argument("--rank", type=int, default=32, help="rank of the LoRA; each matrix's error is reported")
    _add_choice_of_adapter(export, role="which model's adapter")
    add_settings(export, ModelSources)


def _add_bench(commands: Any) -> None:
    bench = _command(commands, "bench", "train and evaluate the method, baselines and ablations, and write a report")
    bench.add_argument(
        "--suite",
        default="miniature",
        metavar="NAME",
        help="a registered suite: miniature (the paper's tables) or sweep (trials of settings on development concepts)",
    )
    bench.add_argument("--quick", action="store_true", help="a few iterations of a few methods, to see that it runs")
    bench.add_argument(
        "--out", default="", metavar="DIR", help="folder of results and report; runs/bench-SUITE or bench-quick"
    )
    bench.add_argument("--trainings", nargs="+", default=[], metavar="NAME", help="some trainings only, by name")
    bench.add_argument("--seeds", type=int, default=0, metavar="N", help="training seeds; 0 is the suite's own number")
    bench.add_argument("--development", action="store_true", help="on the concepts that settings are chosen with")
    bench.add_argument("--report", action="store_true", help="run nothing: the report of what has been measured so far")
    bench.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0 is one a core")


def _add_download(commands: Any) -> None:
    download = _command(commands, "download", "get checkpoints and backbones from the hub, after showing what they are")
    download.add_argument(
        "names", nargs="+", metavar="NAME", help="a bundle (sd-turbo-family) or single models (dinov2)"
    )
    download.add_argument("--endpoint", default=None, metavar="URL", help="a mirror of the hub")
    download.add_argument("--cache-dir", default=None, metavar="DIR", help="in place of the hub's own cache folder")
    download.add_argument("--yes", action="store_true", help="do not ask before starting")


def _add_choice_of_adapter(parser: Parser, role: str) -> None:
    """Which of a run's adapters, for `commands._adapters_and_sources`. role: help on --role."""
    parser.add_argument("--stage", choices=("auto", "distil", "echo"), default="auto", help="the run's latest, or one")
    parser.add_argument("--role", choices=("student", "teacher"), default="student", help=role)
    parser.add_argument("--any-base", action="store_true", help="allow an adapter on another checkpoint of its shapes")


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, naming the nearest command or flag for an unknown one. Raises InputError."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        _check_names(words[0], words[1:], _subparsers(parser))
    return parser.parse_args(words)


def add_settings(parser: argparse.ArgumentParser, cls: type, only: Collection[str] | None = None) -> None:
    """A flag for every field of a settings dataclass, or for some. What is not given stays out, for presets to fill."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if only is not None and f.name not in only:
            continue
        flag, kind = "--" + f.name.replace("_", "-"), hints[f.name]
        unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
        text = f"{f.metadata['reason']}{unit} (default: {f.default})".replace("%", "%%")
        options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            choices = f.metadata["choices"] or None
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(flag, type=kind, choices=choices, metavar=metavar, **options)


def given(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of a settings dataclass that were given as flags."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in vars(options).items() if name in names}


def _command(commands: Any, name: str, text: str, epilog: str = "") -> Parser:
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
    assert isinstance(parser, Parser)
    return parser


def _subparsers(parser: Parser) -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def _check_names(command: str, arguments: Sequence[str], commands: dict[str, argparse.ArgumentParser]) -> None:
    """Raise InputError for an unknown command or flag. Before argparse, which would first miss what was misspelt."""
    if command not in commands:
        raise InputError(
            f"there is no command {command!r}; expected one of {', '.join(commands)}{nearest(command, commands)}."
        )
    known = [flag for action in commands[command]._actions for flag in action.option_strings]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if argument == "--":
            return
        # With a space in it, it is a text that begins with dashes.
        if flag.startswith("--") and " " not in flag and flag not in known:
            raise InputError(f"there is no setting {flag}{nearest(flag, known)}; see echodistill {command} --help.")
