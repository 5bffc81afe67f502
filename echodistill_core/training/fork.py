"""Several echoes of one run: each in a copy of it, since a run folder has one echoing stage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import DamagedRunError, InputError
from ..files import replacing_folder, write_json
from ..settings import EchoSettings
from .run import Run, open_run


def fork_for_echo(run: Run, echo: EchoSettings) -> Run:
    """The run's copy for these settings of the echo, beside it: made, or found by a fingerprint of both.

    Its files are links to the run's as far as the disk allows; nothing that a stage has finished is changed in place.
    Raises InputError where the run is not trained to its end, or is an echoed one itself.
    """
    if not run.is_finished("distil"):
        raise InputError(f"the run {run.folder} is gone or not trained to its end; train it again first.")
    if run.is_finished("echo"):
        raise InputError(f"the run {run.folder} has been echoed already; echo the one that it was copied from.")
    folder = run.folder.with_name(f"{run.folder.name}-echo-{run.echo_fingerprint(echo)}")
    if not (folder / "run.json").is_file():
        with replacing_folder(folder) as temporary:
            shutil.copytree(
                run.folder,
                temporary,
                copy_function=_link_or_copy,
                dirs_exist_ok=True,
                ignore=lambda place, names: {"echo"} if Path(place) == run.folder else set(),
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
