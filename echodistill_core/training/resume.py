"""How a run folder is begun anew, opened to go on, or given back a record that was lost."""

from __future__ import annotations

import dataclasses
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
from ..tensorfile import read_header
from .identity import as_known_to, fingerprint_of, run_identity
from .pngs import write_png
from .run import CHECKPOINT, FORMAT_VERSION, Run, another_run, open_run


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
    """Rename a run.json that cannot be read, so that it can be written anew; whether there was one.

    Raises DamagedRunError where a checkpoint in the folder shows that the run had another fingerprint.
    """
    if not (folder / "run.json").is_file():
        return False
    try:
        open_run(folder)
    except DamagedRunError as error:
        checkpoint = folder / "distil" / CHECKPOINT
        if checkpoint.is_file():
            there = read_header(checkpoint).metadata.get("fingerprint")
            if there != fingerprint:
                raise DamagedRunError(
                    f"{str(error).rstrip('.')}; but these settings, photographs or models are not the run's own "
                    f"(fingerprint {fingerprint}, its checkpoint has {quoted(there)})."
                ) from error
        (folder / "run.json").replace(folder / "run.json.damaged")
        warnings.warn(
            f"{folder / 'run.json'} could not be read and is written anew; the old file is run.json.damaged",
            category=Notice,
            stacklevel=4,
        )
        return True
    return False


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
