"""What a terminal shows while a command runs, and how Ctrl-C stops training between two iterations."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm

from ..errors import Notice
from ..training.events import Event, Listener, LossesLogged, PoolProgress, StepDone, latest

SHOWN = ("teacher", "alignment", "student", "fool_dino", "fool_dinov2", "fool_clip")


class ProgressBar:
    """A listener that draws one bar for each stage, with the last logged loss terms and the time left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.name = ""
        self.losses: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Advance the bar."""
        if isinstance(event, StepDone):
            self._advance(event.stage, event.step, event.iterations, " it")
        elif isinstance(event, PoolProgress):
            self._advance(event.name, event.done, event.size, " images")
        elif isinstance(event, LossesLogged) and self.bar is not None and event.rows:
            self.losses |= latest(event.rows)
            self.bar.set_postfix({n: f"{self.losses[n]:.3g}" for n in SHOWN if n in self.losses}, refresh=False)

    def _advance(self, name: str, done: int, total: int, unit: str) -> None:
        if self.bar is None or self.name != name:
            self.close()
            self.name, self.losses = name, {}
            # A resumed stage starts the bar where it resumes, so that the time left is that of what is left.
            self.bar = tqdm(desc=name, total=total, initial=done - 1, unit=unit, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@contextmanager
def stoppable(listeners: list[Listener]) -> Iterator[Listener]:
    """One listener that calls all of these and turns the first Ctrl-C into a stop after the running iteration.

    The loop then saves a checkpoint. A second Ctrl-C stops at once.
    """
    stop = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal stop
        if stop:
            raise KeyboardInterrupt
        stop = True
        say("stopping after this iteration; Ctrl-C again stops at once")

    def listen(event: Event) -> None:
        for listener in listeners:
            listener(event)
        if stop and isinstance(event, (StepDone, PoolProgress)):
            raise KeyboardInterrupt

    previous: Callable[[int, FrameType | None], object] | int | None = signal.signal(signal.SIGINT, request)
    try:
        yield listen
    finally:
        signal.signal(signal.SIGINT, previous)
        for listener in listeners:
            if isinstance(listener, ProgressBar):
                listener.close()


def say(text: str) -> None:
    """Print a line to standard error, above a progress bar where there is one."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print this package's notices, as they come, as one line each instead of Python's two with a source line."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                say(f"warning: {message}")
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield


def has_display() -> bool:
    """Whether a browser's window could appear here: not in a remote shell, nor on a server."""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
