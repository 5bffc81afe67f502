"""Copies of a run for several echoing stages with different settings: a run folder has one echoing stage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import DamagedRunError, InputError
from ..files import replacing_folder, write_json
from ..settings import EchoSettings
from .run import Run, open_run


def fork_for_echo(run: Run, echo: EchoSettings) -> Run:
    """A copy of the run for an echoing stage with these settings, in the folder NAME-echo-FINGERPRINT beside it.

    An existing copy is reused. Files are hard links where the file system supports them; the files of a finished stage
    are never changed in place.
    Raises InputError if the run's distillation stage is not finished, or if its echoing stage is.
    """
    if not run.is_finished("distil"):
        raise InputError(f"the run {run.folder} is gone or not trained to its end; train it again first.")
    if run.is_finished("echo"):
        raise InputError(f"the run {run.folder} has been echoed already; echo the run from which it was copied.")
    folder = run.folder.with_name(f"{run.folder.name}-echo-{run.echo_fingerprint(echo)}")
    if not (folder / "run.json").is_file():
        with replacing_folder(folder) as temporary:
            shutil.copytree(
                run.folder,
                temporary,
                copy_function=_link_or_copy,
                dirs_exist_ok=True,
                ignore=lambda folder, names: {"echo"} if Path(folder) == run.folder else set(),
            )
    try:
        return open_run(folder)
    except DamagedRunError:
        write_json(folder / "run.json", run.record)
        return open_run(folder)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
