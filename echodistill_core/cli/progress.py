"""Terminal output of a running command: progress bar, warnings, log records; Ctrl-C stops between two iterations."""

from __future__ import annotations

import logging
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
from ..logs import NAME
from ..training.events import Event, Listener, LossesLogged, PoolProgress, StepDone, latest

SHOWN = ("recon_teacher", "alignment", "recon_student", "adv_dino", "adv_dinov2", "adv_clip")


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
            # A resumed stage starts the bar at its checkpoint, so that the remaining time is estimated correctly.
            self.bar = tqdm(desc=name, total=total, initial=done - 1, unit=unit, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@contextmanager
def stoppable(listeners: list[Listener]) -> Iterator[Listener]:
    """Yield one listener that calls all of these. The first Ctrl-C stops training after the running iteration.

    The loop then saves a checkpoint. A second Ctrl-C stops at once. Listeners with a `close` method are closed at the
    end.
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
            close = getattr(listener, "close", None)
            if close is not None:
                close()


def say(text: str) -> None:
    """Print a line to standard error, above the progress bar if one is shown."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print each Notice as one line, without Python's source line. Other warnings are shown as usual."""
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


class _TerminalHandler(logging.Handler):
    """Prints log records with `say`, so that they do not break the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        say(self.format(record))


@contextmanager
def shown_logs(verbose: bool) -> Iterator[None]:
    """Print the package's log records of level DEBUG and above to standard error, if `verbose`."""
    if not verbose:
        yield
        return
    target, handler = logging.getLogger(NAME), _TerminalHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    level, propagate = target.level, target.propagate
    target.addHandler(handler)
    target.setLevel(logging.DEBUG)
    target.propagate = False
    try:
        yield
    finally:
        target.removeHandler(handler)
        target.setLevel(level)
        target.propagate = propagate


def has_display() -> bool:
    """Whether a browser window can be shown: not in a remote shell, nor on a server without a display."""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
