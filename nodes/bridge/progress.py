"""Shows a stage's events on its node: progress bar, preview, losses, remaining time; and handles Cancel."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import comfy.model_management as mm
from comfy.utils import ProgressBar

from ...echodistill_core.reporting import contact_sheet
from ...echodistill_core.training.events import (
    Event,
    LossesLogged,
    PoolProgress,
    PreviewReady,
    StepDone,
    current_names,
    latest,
)
from .node_text import set_status

PREVIEW_SIDE = 512  # pixels; the front end shows it smaller
TEXT_INTERVAL = 0.5  # seconds


class NodeProgress:
    """A listener that shows a stage on its node, and raises ComfyUI's interruption after Cancel.

    The training loop saves a checkpoint before it re-raises the exception.
    """

    def __init__(self, node_id: str | None, title: str, iterations: int) -> None:
        self.node_id = node_id
        self.title = title
        self.bar = ProgressBar(iterations, node_id=node_id)
        self.start: tuple[float, int] | None = None
        self.last_step: StepDone | None = None
        self.losses: Mapping[str, float] = {}
        self.last_shown = 0.0

    def __call__(self, event: Event) -> None:
        """Show the event, then raise InterruptProcessingException if Cancel was pressed."""
        try:
            self._show(event)
            # At every event: the progress bar of newer ComfyUI versions does not check for Cancel every time.
            mm.throw_exception_if_processing_interrupted()
        except mm.InterruptProcessingException:
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
            self.last_step = event
            self.bar.update_absolute(event.step, event.iterations)
            self._step(event)

    def _step(self, event: StepDone) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start = (now, event.step)
        start, first = self.start
        done = event.step - first
        left = f", {_minutes((now - start) / done * (event.iterations - event.step))} left" if done else ""
        resumed = f" (going on from {first - 1})" if first > 1 else ""
        lines = [f"{self.title}: {event.step} of {event.iterations}{resumed}{left}", figures(self.losses)]
        self._text("\n".join(filter(None, lines)), last=event.step == event.iterations)

    def _cancelled(self, event: Event) -> None:
        if isinstance(event, PoolProgress):
            set_status(
                self.node_id,
                f"{event.name}: cancelled at {event.done} of {event.size} images, kept: Run goes on",
                is_final=True,
            )
        elif self.last_step is not None:
            step, iterations = self.last_step.step, self.last_step.iterations
            set_status(
                self.node_id,
                f"{self.title}: cancelled at {step} of {iterations}, kept: Run goes on from there",
                is_final=True,
            )

    def _text(self, text: str, *, last: bool) -> None:
        now = time.monotonic()
        if last or now - self.last_shown >= TEXT_INTERVAL:
            self.last_shown = now
            set_status(self.node_id, text)


def figures(losses: Mapping[str, float]) -> str:
    """The three main losses as text; the others are in the run's log and loss plot."""
    losses = current_names(losses)
    titles = {"recon_teacher": "teacher", "alignment": "alignment"}
    shown = {title: losses[name] for name, title in titles.items() if name in losses}
    adversarial = [value for name, value in losses.items() if name.startswith("adv_")]
    if adversarial:
        shown["critics"] = sum(adversarial)
    return ", ".join(f"{name} {value:.3g}" for name, value in shown.items())


def combine_listeners(*listeners: Any) -> Any:
    """One listener that passes each event to all given listeners, in order."""

    def listen(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return listen


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
