"""How a run folder is begun anew, opened to go on, or given back a record that was lost."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..concept.images import ImageSet
from ..errors import DamagedRunError, InputError, Notice
from ..files import remove_leftovers, write_bytes
from ..messages import quoted
from ..models.family import Family
from ..models.sources import ModelSources
from ..settings import TrainSettings
from .identity import as_known_to, fingerprint_of, run_identity
from .pngs import write_png
from .run import CHECKPOINT, FORMAT_VERSION, Run, another_run, checkpoint_fingerprint, open_run


def create_or_resume(
    folder: str | Path,
    settings: TrainSettings,
    sources: ModelSources,
    images: ImageSet,
    family: Family,
    start: Mapping[str, Path] | None = None,
) -> Run:
    """The run in this folder: begun anew where there is none, or opened where it is the same run.

    start: by role, the adapter files to begin from; the run keeps copies of its own.
    Raises InputError where the folder holds another run, saying what differs, or anything else.
    """
    folder = Path(folder)
    identity = run_identity(settings, images, family, start)
    damaged = _set_aside_damaged(folder, fingerprint_of(identity))
    if (folder / "run.json").is_file():
        run = open_run(folder)
        there = run.record["identity"]
        asked = as_known_to(there, identity)
        if run.record["fingerprint"] != fingerprint_of(asked):
            raise another_run(folder, there, asked)
        run.remove_leftovers()
        _save_photographs(run, images)
        _save_start(run, start or {})
        # Only settings without influence on the result can differ here, and the newest of those hold.
        newest = {"settings": dataclasses.asdict(settings), "sources": dataclasses.asdict(sources)}
        if any(run.record[name] != value for name, value in newest.items()):
            run.record.update(newest)
            run.save()
        return run
    if not damaged:
        check_new_folder(folder)
    record = {
        "format_version": FORMAT_VERSION,
        "echodistill_version": __version__,
        "fingerprint": fingerprint_of(identity),
        "identity": identity,
        "settings": dataclasses.asdict(settings),
        "sources": dataclasses.asdict(sources),
        "photographs": list(images.names),
        "echo": None,
        "finished": {},
    }
    run = Run(folder, record)
    run.save()
    _save_photographs(run, images)
    _save_start(run, start or {})
    return run


def _set_aside_damaged(folder: Path, fingerprint: str) -> bool:
    """Rename a run.json that cannot be read, so that it can be written anew beside the files of its run.

    Returns whether there was one. The first stage's checkpoint tells which run the files belong to; without one, or
    with an echo that has none, the folder is renamed instead: its pictures may be of other inputs.
    Raises DamagedRunError where the checkpoint has another fingerprint.
    """
    if not (folder / "run.json").is_file():
        return False
    try:
        open_run(folder)
    except DamagedRunError as error:
        there = checkpoint_fingerprint(folder / "distil" / CHECKPOINT)
        if not there:
            aside = _set_aside(folder)
            _warn(
                f"{folder / 'run.json'} could not be read, and there is no checkpoint to go on from: the run begins "
                f"anew, and {aside} keeps what was there"
            )
            return False
        if there != fingerprint:
            raise DamagedRunError(
                f"{str(error).rstrip('.')}; but these settings, photographs or models are not the run's own "
                f"(fingerprint {fingerprint}, its checkpoint has {quoted(there)})."
            ) from error
        if (folder / "echo").is_dir() and not checkpoint_fingerprint(folder / "echo" / CHECKPOINT):
            _warn(f"the echo in {folder} had no checkpoint; {_set_aside(folder / 'echo')} keeps its pictures")
        (folder / "run.json").replace(folder / "run.json.damaged")
        echo = "; the same echo command takes up its echo again" if (folder / "echo").is_dir() else ""
        _warn(f"{folder / 'run.json'} could not be read and is written anew; the old file is run.json.damaged{echo}")
        return True
    return False


def _set_aside(folder: Path) -> Path:
    """Give a folder another name beside it, and return that."""
    for number in itertools.count(1):
        aside = folder.with_name(f"{folder.name}-damaged-{number}")
        if not aside.exists():
            folder.replace(aside)
            return aside
    raise AssertionError


def _warn(text: str) -> None:
    warnings.warn(text, category=Notice, stacklevel=5)


def check_new_folder(folder: Path) -> None:
    """Raise InputError where no run can begin in this folder: it is a file, or holds something but no run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out folder {folder} is a file; expected a new or empty folder.")
    remove_leftovers(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"out folder {folder} is not empty and holds no run; choose a new or empty folder.")


def _save_photographs(run: Run, images: ImageSet) -> None:
    for i, image in enumerate(images.pixels):
        if not (run.folder / "photographs" / f"{i:03d}.png").is_file():
            write_png(run.folder / "photographs" / f"{i:03d}.png", image)


def _save_start(run: Run, start: Mapping[str, Path]) -> None:
    for role, path in start.items():
        kept = run.folder / "start" / f"{role}.safetensors"
        if not kept.is_file():
            write_bytes(kept, path.read_bytes())
