"""The errors a user can cause, each worded as one sentence that says what to do."""

from __future__ import annotations


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
    """A loss or a picture became NaN or infinite; nothing of it is written, and the last good checkpoint is kept."""


class Notice(UserWarning):
    """What a user should know though nothing fails. The command line prints it as a line, a node shows it."""
