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
    # Not "--no-augment", since `no-augment = false` would be a double negation; `augment = false` says it.
    negated = {
        flag for a in flags.values() for flag in a.option_strings if len(a.option_strings) > 1 and flag[:5] == "--no-"
    }
    options = [flag.removeprefix("--") for flag in flags if flag not in ("--help", "--config", *negated)]
    for action in fresh._actions:
        action.required = False
        action.default = argparse.SUPPRESS
    seen: dict[str, str] = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            raise InputError(
                f"config {path} has the table {quoted(key)}; expected keys outside of tables: move them out."
            )
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
            found = _converted(fresh, f"--{name}", action, value)
        except InputError as error:
            reason = str(error).partition("; see ")[0].removeprefix(f"argument --{name}: ")
            raise InputError(f"config {path}: key {quoted(key)}: {reason.rstrip('.')}; correct the value.") from error
        parser.set_defaults(**{action.dest: found})
        action.required = False


def _converted(parser: argparse.ArgumentParser, flag: str, action: argparse.Action, value: Any) -> Any:
    """A key's value as the parser makes it of the flag. Raises InputError for a value that the flag does not take."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"found {quoted(value)}; expected true or false.")
        return value
    several = isinstance(value, list) and action.nargs == "+"
    items = value if several else [value]
    kind: Any = action.type
    for item in items:
        if isinstance(item, bool) or not isinstance(item, _KINDS[kind]):
            expected = {int: "a whole number", float: "a number"}.get(kind, "a text in quotation marks")
            raise InputError(f"found {quoted(item)}; expected {expected}{' or a list of them' if several else ''}.")
    texts = [item if isinstance(item, str) else repr(item) for item in items]
    # One at a time and joined by "=", since a text may begin with dashes.
    found = [getattr(parser.parse_known_args([f"{flag}={text}"])[0], action.dest) for text in texts]
    if action.nargs == "+":
        return [item for one in found for item in one]
    return found[0]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(
            f"config {path} {why_missing(path)}; expected a TOML file or a run's run.json; correct --config."
        ) from None
    except OSError as error:
        raise InputError(
            f"config {path} cannot be read ({error.strerror}); expected a TOML file or a run's run.json; correct "
            "--config."
        ) from error
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
