"""The errors a user can cause, each worded as one sentence that says what to do."""

from __future__ import annotations

import reprlib

short = reprlib.Repr()
short.maxstring = short.maxother = 100


class EchoDistillError(Exception):
    """Something a user can mend. The command line prints it as one sentence and exits with `exit_status`."""

    exit_status = 1


class InputError(EchoDistillError, ValueError):
    """A setting, file or folder is not what it has to be. Raised before any training starts."""

    exit_status = 2


class DamagedRunError(InputError):
    """A run's run.json cannot be read. The command that trained the run writes it anew and goes on."""


class StorageError(EchoDistillError, OSError):
    """A file could not be written; nothing half-written remains and earlier files are untouched."""

    exit_status = 2


class DivergedError(EchoDistillError, ArithmeticError):
    """A loss became NaN or infinite; the last good checkpoint is kept."""


def quoted(value: object) -> str:
    """A value from outside as it may stand in a message: repr, so that control characters are escaped, and about 100
    characters of it at most, since a file can hold a name of a megabyte.
    """
    return short.repr(value)


def plain(value: object) -> str:
    """The same without quotation marks, for names and fingerprints."""
    return short.repr(str(value))[1:-1]
