"""Which files of a folder are photographs, by their names and, under odd names, by their first bytes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import why_missing
from ..messages import shortened
from .contents import HEAD, RAW, Content, recognise
from .decoding import FORMATS, RAW_SUFFIXES, readable_suffixes

# Photographs to a user, whether or not Pillow knows them: they are named when they cannot be read, not skipped.
UNDECODED_SUFFIXES = frozenset({".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2"})
# Pictures that cameras write beside a video or a raw file, of 160 x 120 pixels.
_THUMBNAIL_SUFFIXES = frozenset({".thm"})

UNUSUAL_NAME = "read for its content, because its name has no picture's ending"


@dataclass(frozen=True)
class Candidate:
    """A file that was named or found. reason: why it cannot be opened, if so. note: for the user, if there is one."""

    path: Path
    reason: str = ""
    note: str = ""


def resolve_source(source: str | Path | Sequence[str | Path]) -> list[Candidate]:
    """What `source` names, in the order of `find_photographs`, with those that cannot be opened among them.

    Raises InputError as `find_photographs` does, but not where a folder holds only such as cannot be opened.
    """
    one = isinstance(source, (str, Path))
    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    if not paths or (one and not str(source).strip()):  # Path("") would be the current folder
        raise InputError("no photographs were named; give a folder of images, an image file, or a list of files.")
    try:
        if one and paths[0].is_dir():
            return _photographs_in(paths[0])
        for path in paths:
            _check_file(path)
    except OSError as error:  # a folder that may not be read, a name longer than the system allows
        raise InputError(
            f"the photographs at {shortened(error.filename)} cannot be reached: {error.strerror}."
        ) from error
    return [Candidate(path) for path in paths]


def unreadable_reason(path: Path) -> str:
    """Why nothing can be read from `path`, as the end of a sentence; empty for a regular file, links followed."""
    try:
        if path.is_file():
            return ""
        if path.is_dir():
            return "it is a folder"
        if path.exists():
            return "it is not a regular file"
    except OSError as error:  # a folder on the way that may not be entered, a name longer than the system allows
        return error.strerror or type(error).__name__
    return f"it {why_missing(path)}" if path.is_symlink() else "there is no such file"


def _photographs_in(folder: Path) -> list[Candidate]:
    """The photographs of a folder in natural order. Raises InputError if there is no picture among its files."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    suffixes = readable_suffixes() | UNDECODED_SUFFIXES | RAW_SUFFIXES
    found = []
    for path in entries:
        if path.suffix.lower() in suffixes:
            found.append(Candidate(path, unreadable_reason(path)))
        elif (
            not unreadable_reason(path)
            and path.suffix.lower() not in _THUMBNAIL_SUFFIXES
            and _is_picture(content_of(path))
        ):
            found.append(Candidate(path, note=UNUSUAL_NAME))
    if not found:
        files = sum(not path.is_dir() for path in entries)
        holds = f"holds {files} files, none of them an image" if files else "is empty"
        raise InputError(
            f"folder {shortened(folder)} {holds}; put JPEG or PNG photographs into it (subfolders are not searched)."
        )
    return sorted(found, key=lambda entry: _natural_key(entry.path))


def content_of(path: Path) -> Content | None:
    """What a regular file holds, by its first bytes. None for a file that cannot be read or is not known."""
    try:
        with path.open("rb") as file:
            return recognise(file.read(HEAD))
    except OSError:
        return None


def _is_picture(content: Content | None) -> bool:
    """Whether a file under any name counts as a photograph: of a format that is read, or a camera's raw file."""
    return content is not None and (content.readable in FORMATS or content is RAW)


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    """Sort key in which 2.jpg precedes 10.jpg, a.jpg B.jpg, and dog.jpg dog2.jpg; ties go by the whole name."""
    # macOS hands out names decomposed, others as written: without a normal form, accents would sort differently.
    stem, name = (unicodedata.normalize("NFC", text) for text in (path.stem, path.name))
    # The split alternates text and digits, beginning with text, so that equal places always hold equal types.
    parts = re.split(r"([0-9]+)", stem.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _check_file(path: Path) -> None:
    """Raise InputError unless `path` is a file."""
    reason = unreadable_reason(path)
    if not reason:
        return
    name = shortened(path)
    if path.is_dir():
        raise InputError(f"{name} in the list of photographs is a folder; list its files, or give the folder alone.")
    if path.exists():
        raise InputError(f"{name} is neither a file nor a folder; give a folder of photographs, or an image file.")
    if path.is_symlink():
        raise InputError(f"{name} cannot be read: {reason}; mend the link, or give the picture itself.")
    raise InputError(f"there is no file or folder {name}; check its name, or give another folder of photographs.")
