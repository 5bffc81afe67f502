"""The files of the embedded family (`miniature`) in the package, with a SHA-256 check."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from ..errors import InputError

FOLDER = Path(__file__).parents[1] / "miniature" / "weights"
MANIFEST = "manifest.json"
_REMEDY = "install the package again (in a git checkout: git checkout -- echodistill_core/miniature/weights)"


def embedded_folder(part: str) -> Path:
    """The folder of one part of the embedded family ("teacher", "student", "backbones", "judges"), checked.

    Raises InputError naming the first file that is missing or has another checksum than the manifest's.
    """
    _check(FOLDER)
    return FOLDER / part


def manifest(folder: Path = FOLDER) -> dict[str, object]:
    """The manifest: "files" (path -> SHA-256), "quality" and more. Raises InputError where it is unreadable."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the embedded family's {folder / MANIFEST} cannot be read ({error}); {_REMEDY}.") from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise InputError(f"the embedded family's {folder / MANIFEST} lists no files; {_REMEDY}.")
    return found


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=2)
def _check(folder: Path) -> None:
    files = manifest(folder)["files"]
    assert isinstance(files, dict)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"the embedded family's file {path} is missing; {_REMEDY}.")
        found = sha256(path)
        if found != expected:
            raise InputError(
                f"the embedded family's file {path} is damaged: its SHA-256 begins {found[:12]}, expected "
                f"{str(expected)[:12]}; {_REMEDY}."
            )
