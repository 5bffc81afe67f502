"""`--config FILE`: options from a TOML file, or from the run.json of a run that is to be repeated.

A TOML file holds the command's flags by their long names, with "-" or "_":

    photos = "my_dog/"
    class-noun = "dog"
    preset = "tuned"
    iterations = 500

Flags on the command line win over the file. Relative paths start at the current folder, as on the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import why_missing
from ..messages import quoted
from ..settings import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KINDS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), None: (str,), str: (str,)}


def config_path(words: Sequence[str]) -> Path | None:
    """The file that these command line words name with --config, or None. The last one counts."""
    found = None
    for i, word in enumerate(words):
        if word == "--":
            break
        if word == "--config" and i + 1 < len(words):
            found = words[i + 1]
        elif word.startswith("--config="):
            found = word.partition("=")[2]
    return Path(found) if found else None


def apply_config(path: Path, command: str, parser: argparse.ArgumentParser, fresh: argparse.ArgumentParser) -> None:
    """Make the options in a file the defaults of a command's parser, so that flags on the command line win.

    fresh: another parser of the same command, which converts and checks the values and is spoiled by it.
    Raises InputError naming the file and the key for an unknown key, a value of the wrong type or outside its choices.
    """
    is_record = path.suffix.lower() == ".json"
    if is_record and command != "train":
        raise InputError(f"config {path} is a run's record, which only train repeats; give {command} a TOML file.")
    values = _from_record(path) if is_record else _read_toml(path)
    flags = {flag: action for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    options = [flag.removeprefix("--") for flag in flags if flag not in ("--help", "--config")]
    for action in fresh._actions:
        action.required = False
        action.default = argparse.SUPPRESS
    seen: dict[str, str] = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in options:
            raise InputError(
                f"config {path} has the unknown key {quoted(key)}{nearest(name, options)}; see echodistill {command} "
                "--help for the names."
            )
        action = flags[f"--{name}"]
        if action.dest in seen:
            raise InputError(f"config {path} gives {quoted(seen[action.dest])} and {quoted(key)}; keep one of them.")
        seen[action.dest] = key
        try:
            found = fresh.parse_known_args(_words(f"--{name}", action, value))[0]
        except InputError as error:
            reason = str(error).partition("; see ")[0].removeprefix(f"argument --{name}: ")
            raise InputError(f"config {path}: key {quoted(key)}: {reason.rstrip('.')}; correct the value.") from error
        for dest, converted in vars(found).items():
            parser.set_defaults(**{dest: converted})
        action.required = False


def _words(flag: str, action: argparse.Action, value: Any) -> list[str]:
    """A key and its value as the words of a command line. Raises InputError for a value of another type."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"found {quoted(value)}; expected true or false.")
        if value:
            return [flag]
        negative = f"--no-{flag.removeprefix('--')}"
        return [negative] if negative in action.option_strings else []
    several = isinstance(value, list) and action.nargs == "+"
    items = value if several else [value]
    kind: Any = action.type
    for item in items:
        if isinstance(item, bool) or not isinstance(item, _KINDS[kind]):
            expected = {int: "a whole number", float: "a number"}.get(kind, "a text in quotation marks")
            raise InputError(f"found {quoted(item)}; expected {expected}{' or a list of them' if several else ''}.")
    texts = [item if isinstance(item, str) else repr(item) for item in items]
    # Joined by "=", a text may begin with dashes.
    return [f"{flag}={texts[0]}"] if len(texts) == 1 else [flag, *texts]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config {path} {why_missing(path)}; expected a TOML file or a run's run.json.") from None
    except OSError as error:
        raise InputError(f"config {path} cannot be read ({error.strerror}); expected a TOML file.") from error
    except ValueError as error:  # TOML's and UTF-8's errors are ValueErrors
        raise InputError(f"config {path} is not TOML ({error}); correct the file.") from error


def _from_record(path: Path) -> Mapping[str, Any]:
    """The options of `train` that repeat a run: its settings, models, photographs and start adapters."""
    if path.name != "run.json":
        raise InputError(f"config {path} is not a run.json; expected a TOML file or the run.json of a run folder.")
    from ..training.run import open_run  # imports torch, which takes seconds

    run = open_run(path.parent)
    values = {**dataclasses.asdict(run.settings), **dataclasses.asdict(run.sources)}
    # The run folder keeps the photographs as squares of the training size, which `train` does not resize again.
    run.photographs()  # raises where they were changed
    values["photos"] = str(run.folder / "photographs")
    if run.start_paths:
        values["start_from"] = [str(file) for file in run.start_files().values()]
    return values
