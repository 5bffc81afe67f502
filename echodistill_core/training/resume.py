"""Creates a run folder, reopens it to resume the run, and restores a damaged run.json."""

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
from ..logs import logger
from ..messages import quoted, shortened
from ..models.family import Family
from ..models.sources import ModelSources
from ..settings import TrainSettings
from .identity import comparable_identity, fingerprint_of, run_identity
from .pngs import write_png
from .run import CHECKPOINT, FORMAT_VERSION, Run, checkpoint_fingerprint, different_run_error, open_run

log = logger(__name__)


def create_or_resume(
    folder: str | Path,
    settings: TrainSettings,
    sources: ModelSources,
    images: ImageSet,
    family: Family,
    start: Mapping[str, Path] | None = None,
) -> Run:
    """Create a run in this folder, or reopen it if the folder holds a run of the same identity.

    start: role -> adapter file that the role starts from; the run stores a copy.
    A damaged run.json is written again if the folder's checkpoint belongs to this run.
    Raises InputError, with the differences, if the folder holds another run, and if it holds other files.
    """
    folder = Path(folder)
    identity = run_identity(settings, images, family, start)
    damaged = _set_aside_damaged(folder, fingerprint_of(identity))
    if (folder / "run.json").is_file():
        run = open_run(folder)
        recorded = run.record["identity"]
        current = comparable_identity(recorded, identity)
        if run.record["fingerprint"] != fingerprint_of(current):
            raise different_run_error(folder, recorded, current)
        run.remove_leftovers()
        _save_photographs(run, images)
        _save_start(run, start or {})
        # The identities are equal, so only settings that do not affect the result can differ. The new ones apply.
        newest = {"settings": dataclasses.asdict(settings), "sources": dataclasses.asdict(sources)}
        if any(run.record[name] != value for name, value in newest.items()):
            run.record.update(newest)
            run.save()
        log.info("run folder %s: reopened, fingerprint %s", shortened(folder), run.record["fingerprint"])
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
    log.info("run folder %s: created, fingerprint %s", shortened(folder), record["fingerprint"])
    log.debug("identity of %s: %s", shortened(folder), identity)
    return run


def _set_aside_damaged(folder: Path, fingerprint: str) -> bool:
    """Rename a damaged run.json, so that a new one can be written into the folder. Returns whether it did.

    The checkpoint of the first stage identifies the run. Without this checkpoint the whole folder is renamed, and an
    echo folder without a checkpoint of its own is renamed too: their pictures may come from other inputs.
    fingerprint: of the run that is about to be trained.
    Raises DamagedRunError if the checkpoint has another fingerprint.
    """
    if not (folder / "run.json").is_file():
        return False
    try:
        open_run(folder)
    except DamagedRunError as error:
        recorded = checkpoint_fingerprint(folder / "distil" / CHECKPOINT)
        if not recorded:
            aside = _set_aside(folder)
            _warn(
                f"{folder / 'run.json'} could not be read, and the folder has no checkpoint to resume: the run starts "
                f"at step 0, and {aside} keeps the previous files"
            )
            return False
        if recorded != fingerprint:
            raise DamagedRunError(
                f"{str(error).rstrip('.')}; but these settings, photographs or models are not those of the run "
                f"(fingerprint {fingerprint}, its checkpoint has {quoted(recorded)})."
            ) from error
        if (folder / "echo").is_dir() and not checkpoint_fingerprint(folder / "echo" / CHECKPOINT):
            _warn(f"the echo in {folder} had no checkpoint; {_set_aside(folder / 'echo')} keeps its pictures")
        (folder / "run.json").replace(folder / "run.json.damaged")
        echo = "; the same echo command resumes its echo" if (folder / "echo").is_dir() else ""
        _warn(f"{folder / 'run.json'} could not be read and is written anew; the old file is run.json.damaged{echo}")
        log.info("damaged %s: renamed run.json.damaged", shortened(folder / "run.json"))
        return True
    return False


def _set_aside(folder: Path) -> Path:
    """Rename a folder to NAME-damaged-1, or the next free number. Returns the new path."""
    for number in itertools.count(1):
        aside = folder.with_name(f"{folder.name}-damaged-{number}")
        if not aside.exists():
            folder.replace(aside)
            log.info("damaged folder %s: renamed %s", shortened(folder), shortened(aside.name))
            return aside
    raise AssertionError


def _warn(text: str) -> None:
    warnings.warn(text, category=Notice, stacklevel=5)


def check_new_folder(folder: Path) -> None:
    """Raise InputError unless a new run can be created in this folder: it must be missing or empty."""
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
        copy = run.folder / "start" / f"{role}.safetensors"
        if not copy.is_file():
            write_bytes(copy, path.read_bytes())
