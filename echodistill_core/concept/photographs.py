"""A user's photographs: find them, decode them to upright 8-bit sRGB, make them square."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError, Notice
from ..messages import shortened
from .decoding import MAX_PIXELS as MAX_PIXELS
from .decoding import MIN_SIDE as MIN_SIDE
from .decoding import UnusableError, decode
from .finding import resolve_source, unreadable_reason

CROPS = ("center", "squash")


@dataclass(frozen=True)
class Photograph:
    """One decoded photograph.

    name: the file's name without its folder. image: mode RGB, 8 bits per channel, sRGB, upright, without metadata.
    """

    name: str
    image: Image.Image


def find_photographs(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The photographs of `source`: a folder's image files, one file, or a list of files.

    A folder's subfolders and hidden files are skipped. Its files are in natural order without case, equal on every
    system; an image is recognised by its extension or its first bytes. Listed files keep their order and may have any
    extension. All paths are regular files.

    Raises InputError for a path that is missing or neither file nor folder, a dangling link, a folder that cannot be
    listed or has no image file, and an empty list.
    """
    found = resolve_source(source)
    paths = [entry.path for entry in found if not entry.reason]
    if not paths:
        raise _none_usable(source, [UnusableError(entry.path, entry.reason) for entry in found])
    return paths


def load_photograph(path: str | Path) -> Photograph:
    """Read one image file as upright 8-bit sRGB (see `decoding`). Size limits are checked before pixels are decoded.

    Warns about a colour profile that was applied or ignored.
    Raises InputError for a file that is missing, cannot be decoded, is damaged or cut off, has a side under MIN_SIDE
    pixels, or has more than MAX_PIXELS pixels (or more than Pillow's own limit, where that is lower).
    """
    photograph, notes = _load(Path(path))
    if notes:
        warnings.warn(f"about photograph {shortened(path)}: {'; '.join(notes)}.", category=Notice, stacklevel=2)
    return photograph


def load_photographs(source: str | Path | Sequence[str | Path], limit: int = 0) -> list[Photograph]:
    """Read the first `limit` usable photographs of `source` (see `find_photographs`); 0 for all.

    Later files are not opened. Files that cannot be read, are too small or too large, and entries with an image's name
    that are not files, are left out; a warning names each with the reason. A second warning names files with a note: an
    unusual extension, a colour profile other than sRGB, or the same bytes as an earlier file.

    Raises InputError as `find_photographs` does, and if no file can be used.
    """
    if limit < 0:
        raise InputError(f"the number of photographs to use is {limit}; expected 0 for all of them, or more.")
    photographs: list[Photograph] = []
    left_out: list[UnusableError] = []
    notes: dict[str, list[str]] = {}
    read: list[Path] = []
    for entry in resolve_source(source):
        try:
            if entry.reason:
                raise UnusableError(entry.path, entry.reason)
            photograph, remarks = _load(entry.path)
        except UnusableError as error:
            left_out.append(error)
            continue
        photographs.append(photograph)
        read.append(entry.path)
        for note in filter(None, [entry.note, *remarks]):
            notes.setdefault(note, []).append(shortened(photograph.name, 100))
        if len(photographs) == limit:
            break
    if not photographs:
        raise _none_usable(source, left_out)
    for first, again in _duplicates(read):
        notes.setdefault(f"the same bytes as {shortened(first.name, 100)}", []).append(shortened(again.name, 100))
    if left_out:
        warnings.warn(
            f"photographs left out because they could not be used: {_named(left_out)}.", category=Notice, stacklevel=2
        )
    if notes:
        said = "; ".join(f"{', '.join(names)} ({note})" for note, names in notes.items())
        warnings.warn(f"about the photographs: {said}.", category=Notice, stacklevel=2)
    return photographs


def to_square(image: Image.Image, size: int, crop: str) -> Tensor:
    """An RGB image as a square, resampled with Pillow's Lanczos filter: uint8 (3, size, size), 0..255.

    crop: "center" scales the shorter side to `size` and crops the middle; "squash" scales both sides to `size` and
    changes the aspect ratio (the protocol of the paper's evaluation).
    Raises InputError for another crop or a size below 1.
    """
    if size < 1:
        raise InputError(f"the side of the training images is {size}; expected 1 pixel or more.")
    if crop == "center":
        square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    elif crop == "squash":
        square = image.resize((size, size), Image.Resampling.LANCZOS)
    else:
        raise InputError(f"setting crop is {crop!r}; expected one of {', '.join(CROPS)}.")
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _load(path: Path) -> tuple[Photograph, list[str]]:
    """`load_photograph` with its notes returned. Raises UnusableError."""
    reason = unreadable_reason(path)  # before opening: reading a named pipe would block
    if reason:
        raise UnusableError(path, reason)
    image, notes = decode(path)
    return Photograph(path.name, image), notes


def _duplicates(paths: list[Path]) -> list[tuple[Path, Path]]:
    """Pairs (earlier file, later file) with the same bytes."""
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        by_size.setdefault(path.stat().st_size, []).append(path)
    found = []
    for group in by_size.values():
        first: dict[bytes, Path] = {}
        for path in group if len(group) > 1 else ():
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            if first.setdefault(digest.digest(), path) is not path:
                found.append((first[digest.digest()], path))
    return found


def _none_usable(source: str | Path | Sequence[str | Path], left_out: list[UnusableError]) -> InputError:
    if len(left_out) == 1:
        return left_out[0]
    where = f"in {shortened(source)}" if isinstance(source, (str, Path)) else "of the list"
    return InputError(f"not one photograph {where} can be used: {_named(left_out)}; save them as JPEG or PNG.")


def _named(left_out: list[UnusableError]) -> str:
    """The files with the reason why each was left out, as part of a sentence."""
    return "; ".join(f"{shortened(error.path.name, 100)} ({error.reason})" for error in left_out)
