"""Listeners for runs, and the files of a run, for tests of training.

silent(event)                      a listener that ignores every event
stop_at(kind, error=..., **where)  a listener that raises at the first event of this kind with these attributes
StopError                          an error of a listener's own
stage_files(run, stage="distil")   the bytes of a stage's adapters and checkpoint, by file name
tree(folder)                       the bytes of every file in a folder and below, by path with "/"
"""

from pathlib import Path


class StopError(Exception):
    """An error that no part of the package raises or catches by name."""


def silent(event):
    pass


def stop_at(kind, error=KeyboardInterrupt, **where):
    def listen(event):
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in where.items()):
            raise error

    return listen


def stage_files(run, stage="distil"):
    return {p.name: p.read_bytes() for p in sorted(run.path(stage).glob("*.safetensors"))}


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
