"""A stage's events on its node: progress bar, live preview, losses and time left as text, and Cancel."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import comfy.model_management as mm
from comfy.utils import ProgressBar

from ...echodistill_core.reporting import contact_sheet
from ...echodistill_core.training.events import Event, LossesLogged, PoolProgress, PreviewReady, StepDone, latest
from .node_text import say

PREVIEW_SIDE = 512  # pixels; the front end shows it smaller
TEXT_INTERVAL = 0.5  # seconds


class NodeProgress:
    """A listener that shows a stage on its node, and raises ComfyUI's interruption as soon as Cancel was pressed.

    The loop then leaves a checkpoint before it passes the exception on.
    """

    def __init__(self, node_id: str | None, title: str, iterations: int) -> None:
        self.node_id = node_id
        self.title = title
        self.bar = ProgressBar(iterations, node_id=node_id)
        self.began: tuple[float, int] | None = None
        self.at: StepDone | None = None
        self.losses: Mapping[str, float] = {}
        self.said = 0.0

    def __call__(self, event: Event) -> None:
        """Show what the event tells."""
        try:
            self._show(event)
            # At every event: newer ComfyUIs look at Cancel in the progress bar only now and then.
            mm.throw_exception_if_processing_interrupted()
        except mm.InterruptProcessingException:
            # The loop leaves a checkpoint of this step before it passes the exception on.
            self._cancelled(event)
            raise

    def _show(self, event: Event) -> None:
        if isinstance(event, PoolProgress):
            self._text(f"{event.name}: {event.done} of {event.size} images", last=event.done == event.size)
        elif isinstance(event, LossesLogged) and event.rows:
            self.losses = {**self.losses, **latest(event.rows)}
        elif isinstance(event, PreviewReady):
            self.bar.update_absolute(event.step, None, ("JPEG", contact_sheet(event.images, 2), PREVIEW_SIDE))
        elif isinstance(event, StepDone):
            self.at = event
            self.bar.update_absolute(event.step, event.iterations)
            self._step(event)

    def _step(self, event: StepDone) -> None:
        now = time.monotonic()
        if self.began is None:
            self.began = (now, event.step)
        began, first = self.began
        done = event.step - first
        left = f", {_minutes((now - began) / done * (event.iterations - event.step))} left" if done else ""
        went_on = f" (going on from {first - 1})" if first > 1 else ""
        lines = [f"{self.title}: {event.step} of {event.iterations}{went_on}{left}", figures(self.losses)]
        self._text("\n".join(filter(None, lines)), last=event.step == event.iterations)

    def _cancelled(self, event: Event) -> None:
        if isinstance(event, PoolProgress):
            say(
                self.node_id,
                f"{event.name}: cancelled at {event.done} of {event.size} images, kept: Run goes on",
                is_final=True,
            )
        elif self.at is not None:
            step, iterations = self.at.step, self.at.iterations
            say(
                self.node_id,
                f"{self.title}: cancelled at {step} of {iterations}, kept: Run goes on from there",
                is_final=True,
            )

    def _text(self, text: str, *, last: bool) -> None:
        now = time.monotonic()
        if last or now - self.said >= TEXT_INTERVAL:
            self.said = now
            say(self.node_id, text)


def figures(losses: Mapping[str, float]) -> str:
    """The three figures that tell how training goes; all others are in the run's log and the picture of losses."""
    fooled = [value for name, value in losses.items() if name.startswith("fool_")]
    shown = {n: losses[n] for n in ("teacher", "alignment") if n in losses}
    if fooled:
        shown["critics"] = sum(fooled)
    return ", ".join(f"{name} {value:.3g}" for name, value in shown.items())


def several(*listeners: Any) -> Any:
    """One listener that tells each event to all of these, in order."""

    def listen(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return listen


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
