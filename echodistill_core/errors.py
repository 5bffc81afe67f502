"""Errors that a user can correct. Each message is one sentence and says what to do."""

from __future__ import annotations


class EchoDistillError(Exception):
    """An error that the user can correct. The command line prints its message and exits with `exit_status`."""

    exit_status = 1


class InputError(EchoDistillError, ValueError):
    """A setting, file or folder is invalid. Raised before any training starts."""

    exit_status = 2


class DamagedRunError(InputError):
    """A run's run.json cannot be read. The train command that made the run rewrites it and resumes."""


class StorageError(EchoDistillError, OSError):
    """A file could not be written. No partial file remains, and existing files are unchanged."""

    exit_status = 2


class DivergedError(EchoDistillError, ArithmeticError):
    """A loss or an image became NaN or infinite. It is not written, and the last good checkpoint is kept."""


class Notice(UserWarning):
    """A warning for the user. The command line prints it as one line; a ComfyUI node shows it as a note."""
