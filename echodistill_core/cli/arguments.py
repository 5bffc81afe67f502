"""Flags, made from the settings dataclasses, so that each default and its reason is defined once."""

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
from .config import apply_config, config_path

# Settings that may change between the stages of a run, since they do not affect its result.
COMPUTING = tuple(f.name for f in dataclasses.fields(TrainSettings) if not f.metadata["affects_result"])

WHAT_WINS = (
    "Precedence: a flag, a key of the --config file, --preset, the family's recommended values, the default shown."
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports mistakes as InputError, in one sentence."""

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
    demo = _command(commands, "demo", "try it: learn one subject with the small models of the package, in minutes")
    demo.add_argument(
        "--photos",
        nargs="+",
        default=[],
        metavar="PATH",
        help="your own photographs to learn from: a folder, or image files",
    )
    demo.add_argument(
        "--out", default="", metavar="DIR", help="run folder, which also holds the page (default: runs/demo)"
    )
    add_settings(demo, DemoSettings)


def _add_train(commands: Any) -> None:
    train = _command(commands, "train", "learn a concept from photographs: the distillation stage", WHAT_WINS)
    train.add_argument("--photos", required=True, nargs="+", metavar="PATH", help="a folder, or image files")
    train.add_argument("--out", default="", metavar="DIR", help="run folder (default: runs/<class noun>-<fingerprint>)")
    train.add_argument(
        "--start-from",
        nargs="+",
        default=[],
        metavar="PATH",
        help="run folder or adapter files to initialise student and teacher from; with --teacher-weight 0 the "
        "teacher and its token stay fixed (teacher-first)",
    )
    _add_tensorboard(train)
    add_settings(train, TrainSettings)
    add_settings(train, ModelSources)


def _add_echo(commands: Any) -> None:
    echo = _command(commands, "echo", "the echoing stage: train both models on samples of the student", WHAT_WINS)
    echo.add_argument("run", metavar="RUN", help="run folder of a finished train command")
    _add_tensorboard(echo)
    add_settings(echo, EchoSettings)
    add_settings(echo, TrainSettings, only=COMPUTING)


def _add_sample(commands: Any) -> None:
    sample = _command(commands, "sample", "generate images with a run or with adapter files")
    sample.add_argument(
        "run", nargs="?", default="", metavar="RUN", help="run folder; omit it where --adapter is given"
    )
    sample.add_argument("--adapter", nargs="+", default=[], metavar="FILE", help="adapter files, applied together")
    sample.add_argument("--prompt", nargs="+", required=True, help="one or more prompts with the placeholder in them")
    sample.add_argument(
        "--out", default="sample.png", metavar="FILE", help="image file to write; several images are numbered"
    )
    _add_choice_of_adapter(sample, role="model that generates the images")
    sample.add_argument("--steps", type=int, default=0, help="1, 2 or 4; 0 is 1 for the student, 25 for the teacher")
    sample.add_argument("--batch", type=int, default=1, help="images per prompt")
    sample.add_argument("--seed", type=int, default=0, help="seed of the first image; each further image adds 1")
    sample.add_argument("--width", type=int, default=0, help="pixels, a multiple of 8; 0 is the family's resolution")
    sample.add_argument("--height", type=int, default=0, help="pixels, a multiple of 8; 0 is the family's resolution")
    sample.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        help="classifier-free guidance; 0: none for the student, the family's for the teacher",
    )
    sample.add_argument(
        "--strength", type=float, nargs="+", default=[], help="strength of each adapter; 0 is the base model"
    )
    sample.add_argument("--image", default="", metavar="FILE", help="image to start from (img2img)")
    sample.add_argument(
        "--denoise", type=float, default=0.5, help="share of the noise schedule applied to --image, over 0, up to 1"
    )
    sample.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    sample.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="data type for computation")
    add_settings(sample, ModelSources)


def _add_info(commands: Any) -> None:
    info = _command(commands, "info", "describe an adapter file or a run folder; without PATH, the environment")
    info.add_argument(
        "path",
        nargs="?",
        default="",
        metavar="PATH",
        help="adapter file or run folder; omit it for versions and devices",
    )
    info.add_argument("--json", action="store_true", help="as JSON, for programs")


def _add_export(commands: Any) -> None:
    export = _command(commands, "export", "convert a run or adapter for tools that do not read weight differences")
    export.add_argument("path", metavar="PATH", help="run folder or adapter file")
    export.add_argument(
        "--to", choices=("lora", "merged"), required=True, help="a low-rank LoRA, or a diffusers folder"
    )
    export.add_argument("--out", required=True, metavar="PATH", help="file (lora) or new folder (merged)")
    export.add_argument("--rank", type=int, default=32, help="rank of the LoRA; the error of each matrix is printed")
    _add_choice_of_adapter(export, role="which model's adapter")
    add_settings(export, ModelSources)


def _add_bench(commands: Any) -> None:
    bench = _command(
        commands, "bench", "train and evaluate the method, its baselines and ablations, and write a report"
    )
    bench.add_argument(
        "--suite",
        default="miniature",
        metavar="NAME",
        help="a registered suite: miniature (the paper's tables) or sweep (trials of settings on development concepts)",
    )
    bench.add_argument("--quick", action="store_true", help="a few iterations of a few methods, as a test")
    bench.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="folder of results and report (default: runs/bench-SUITE or bench-quick)",
    )
    bench.add_argument("--trainings", nargs="+", default=[], metavar="NAME", help="only these trainings")
    bench.add_argument(
        "--seeds", type=int, default=0, metavar="N", help="number of training seeds; 0 is the suite's default"
    )
    bench.add_argument("--development", action="store_true", help="use the concepts on which settings are chosen")
    bench.add_argument("--report", action="store_true", help="train nothing; write the report of the results so far")
    bench.add_argument("--workers", type=int, default=0, metavar="N", help="number of processes; 0 is one per core")


def _add_download(commands: Any) -> None:
    download = _command(
        commands, "download", "download checkpoints and backbones from the hub; shows files, sizes and licences first"
    )
    download.add_argument(
        "names", nargs="+", metavar="NAME", help="a bundle (sd-turbo-family) or single models (dinov2)"
    )
    download.add_argument("--endpoint", default=None, metavar="URL", help="URL of a mirror of the hub")
    download.add_argument("--cache-dir", default=None, metavar="DIR", help="cache folder in place of the hub's default")
    download.add_argument("--yes", action="store_true", help="start without asking")


def _add_tensorboard(parser: Parser) -> None:
    parser.add_argument(
        "--tensorboard", default="", metavar="DIR", help="write losses and previews as TensorBoard event files"
    )


def _add_choice_of_adapter(parser: Parser, role: str) -> None:
    """Flags that select one of a run's adapters, read by `commands._adapters_and_sources`. role: help on --role."""
    parser.add_argument(
        "--stage",
        choices=("auto", "distil", "echo"),
        default="auto",
        help="stage of the adapter; auto is the latest finished one",
    )
    parser.add_argument("--role", choices=("student", "teacher"), default="student", help=role)
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="allow an adapter that was trained on another checkpoint with equal shapes",
    )


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags over those of a --config file. Raises InputError; for unknown names it suggests the nearest."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        command, commands = words[0], _subparsers(parser)
        _check_names(command, words[1:], commands)
        config = config_path(words[1:])
        if config is not None:
            if config.suffix.lower() == ".json" and any(w.partition("=")[0] == "--preset" for w in words[1:]):
                raise InputError(
                    f"--preset does not change the settings that {config} records; give these settings as flags, or "
                    "leave --config out."
                )
            apply_config(config, command, commands[command], _subparsers(build_parser())[command])
    return parser.parse_args(words)


def add_settings(parser: argparse.ArgumentParser, cls: type, only: Collection[str] | None = None) -> None:
    """Add a flag for each field of a settings dataclass, or for the fields in `only`.

    A flag that is not given is absent from the namespace, so that presets can fill it.
    """
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
    """The fields of a settings dataclass that were given as flags or in a --config file."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in vars(options).items() if name in names}


def _command(commands: Any, name: str, text: str, epilog: str = "") -> Parser:
    repeats = ", or the run.json of a run to repeat"
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
    assert isinstance(parser, Parser)
    parser.add_argument(
        "--config", default="", metavar="FILE", help="TOML file of these flags by name" + repeats * (name == "train")
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print what is read, written and begun")
    return parser


def _subparsers(parser: Parser) -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def _check_names(command: str, arguments: Sequence[str], commands: dict[str, argparse.ArgumentParser]) -> None:
    """Raise InputError for an unknown command or flag. argparse would report a missing required flag first."""
    if command not in commands:
        raise InputError(
            f"there is no command {command!r}; expected one of {', '.join(commands)}{nearest(command, commands)}."
        )
    known = [flag for action in commands[command]._actions for flag in action.option_strings]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if argument == "--":
            return
        # A word with a space is a text that begins with dashes, not a flag.
        if flag.startswith("--") and " " not in flag and flag not in known:
            raise InputError(f"there is no setting {flag}{nearest(flag, known)}; see echodistill {command} --help.")
