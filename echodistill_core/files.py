"""Atomic file writes: a full disk, a crash or a kill leaves the old file or the new one, never a partial one.

Written by hand for safety: temporary file, fsync and os.replace, for files and folders, with errors that name the path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import EchoDistillError, StorageError
from .logs import logger
from .messages import shortened

log = logger(__name__)

# safetensors reports a failed write as text only: "I/O error: File too large (os error 27)".
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_LEFTOVER = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)

_NO_SPACE = "free space"
_NO_RIGHT = "choose a folder that you may write to, or correct its permissions"
_REMEDIES = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: "lift the limit on file sizes (ulimit -f), or write to a disk that allows such large files",
    errno.EROFS: _NO_RIGHT,
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: _NO_RIGHT,
    errno.ENOTDIR: "choose a path whose parents are all folders",
    errno.EEXIST: "choose a path whose parents are all folders",
    errno.EISDIR: "choose the path of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def why_missing(path: Path) -> str:
    """Why `path` does not exist, as the end of a sentence: "does not exist", or the target of a broken link."""
    path = Path(path)
    if not path.is_symlink():
        return "does not exist"
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself"
    return f"is a link to {shortened(path.readlink())}, which does not exist"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; after the body, the file there is renamed to `path`.

    The body has to create the file and close it. Missing parent folders are created. On any exception the temporary
    file is removed and an existing `path` is unchanged.
    Raises StorageError where the operating system refuses; it names the path, the cause and a remedy.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # Flush the content before the rename: otherwise a power failure after the rename could leave an empty file.
        # Windows flushes only handles that are open for writing.
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        failure = _as_storage_error(path, error)
        if failure is None:
            raise
        raise failure from error
    _sync_folder(path.parent)
    log.debug("wrote %s", shortened(path))


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; after the body, it is renamed to `path`.

    `path` may be missing or an empty folder. On any exception the temporary folder is removed.
    Raises StorageError where the operating system refuses; it names the path, the cause and a remedy.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failure = _as_storage_error(path, error)
        if failure is None:
            raise
        raise failure from error
    _sync_folder(path.parent)
    log.debug("wrote folder %s", shortened(path))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically. Raises StorageError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8 with unchanged line ends. Raises StorageError."""
    write_bytes(path, _encoded(text))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, as JSON in the order of its keys, indented by 2, with a line end.

    Raises StorageError, and ValueError for NaN and infinity, which are not JSON.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append `line` and a line end to `path` and flush it to the operating system.

    Raises StorageError; the file then has its earlier content.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: closing the file would retry a buffer that failed to flush.
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(_encoded(line + "\n"))
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise _storage_error(path, error.errno, error.strerror or str(error)) from error


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`, not in its subfolders."""
    # A file that cannot be deleted only takes space, so errors are ignored.
    with contextlib.suppress(OSError):
        for entry in Path(folder).iterdir():
            if _LEFTOVER.fullmatch(entry.name) and entry.is_file():
                with contextlib.suppress(OSError):
                    entry.unlink()


def _encoded(text: str) -> bytes:
    # Python represents file names that are not UTF-8 with lone surrogates; escaped, they are valid in JSON, too.
    return text.encode("utf-8", errors="backslashreplace")


def _sync_folder(folder: Path) -> None:
    """Flush the rename to disk. The new file is in place either way, so errors are ignored."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _as_storage_error(path: Path, error: BaseException) -> StorageError | None:
    """`error` as a StorageError if it is a failed write, otherwise None."""
    if isinstance(error, OSError) and not isinstance(error, EchoDistillError):
        return _storage_error(path, error.errno, error.strerror or str(error))
    if isinstance(error, SafetensorError) and (match := _OS_ERROR.search(str(error))):
        return _storage_error(path, int(match[1]), str(error))
    return None


def _storage_error(path: Path, code: int | None, cause: str) -> StorageError:
    remedy = _REMEDIES.get(code or 0, "correct that")
    return StorageError(
        f"{path} could not be written: {cause}; {remedy} and run the same command again (earlier files are untouched)."
    )
