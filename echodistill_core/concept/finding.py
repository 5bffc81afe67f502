"""Finds the photographs in a folder, by extension or, for other extensions, by the first bytes."""

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

# Photographs even where Pillow lacks the format: they are reported as unreadable, not skipped.
UNDECODED_SUFFIXES = frozenset({".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2"})
# Thumbnails of 160 x 120 pixels that cameras write for videos and raw files.
_THUMBNAIL_SUFFIXES = frozenset({".thm"})

UNUSUAL_NAME = "read for its content, because its name has no picture's ending"


@dataclass(frozen=True)
class Candidate:
    """A file that may be a photograph. reason: why it cannot be opened, or "". note: for the user, or ""."""

    path: Path
    reason: str = ""
    note: str = ""


def resolve_source(source: str | Path | Sequence[str | Path]) -> list[Candidate]:
    """The files of `source` in the order of `find_photographs`, including those that cannot be opened.

    Raises InputError as `find_photographs` does, except for a folder whose files cannot be opened.
    """
    one = isinstance(source, (str, Path))
    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    if not paths or (one and not str(source).strip()):  # Path("") is the current folder
        raise InputError("no photographs were named; give a folder of images, an image file, or a list of files.")
    try:
        if one and paths[0].is_dir():
            return _photographs_in(paths[0])
        for path in paths:
            _check_file(path)
    except OSError as error:  # for example no permission, or a name that is too long
        raise InputError(
            f"the photographs at {shortened(error.filename)} cannot be reached: {error.strerror}."
        ) from error
    return [Candidate(path) for path in paths]


def unreadable_reason(path: Path) -> str:
    """Why `path` cannot be read, as the end of a sentence; "" for a regular file, following links."""
    try:
        if path.is_file():
            return ""
        if path.is_dir():
            return "it is a folder"
        if path.exists():
            return "it is not a regular file"
    except OSError as error:  # for example no permission on a parent folder, or a name that is too long
        return error.strerror or type(error).__name__
    return f"it {why_missing(path)}" if path.is_symlink() else "there is no such file"


def _photographs_in(folder: Path) -> list[Candidate]:
    """The photographs of a folder in natural order. Raises InputError for a folder without images."""
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
    """The content of a regular file, by its first bytes. None for an unreadable file or an unknown format."""
    try:
        with path.open("rb") as file:
            return recognise(file.read(HEAD))
    except OSError:
        return None


def _is_picture(content: Content | None) -> bool:
    """Whether a content counts as a photograph: a readable format, or a camera raw file."""
    return content is not None and (content.readable in FORMATS or content is RAW)


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    """Sort key: 2.jpg before 10.jpg, a.jpg before B.jpg, dog.jpg before dog2.jpg; ties by the whole name."""
    # macOS returns decomposed names, other systems names as written: normalise for the same order everywhere.
    stem, name = (unicodedata.normalize("NFC", text) for text in (path.stem, path.name))
    # The split alternates text and digits, starting with text, so equal positions have equal types.
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
