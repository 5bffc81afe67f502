"""A listener that logs the course of a run: stages begun, resumed and finished, checkpoints, pools."""

from __future__ import annotations

import logging

from .logs import logger
from .training.events import CheckpointSaved, Event, PoolProgress, PreviewReady, StepDone

log = logger(__name__)


class EventLog:
    """Writes INFO records to the logger "echodistill.eventlog", or to `target`."""

    def __init__(self, target: logging.Logger = log) -> None:
        self.target = target
        self._stage = ""

    def __call__(self, event: Event) -> None:
        """Log what the event reports; iterations are logged only where a stage begins or ends."""
        if isinstance(event, StepDone):
            if event.stage != self._stage:
                how = "begun" if event.step == 1 else f"resumed at iteration {event.step}"
                self.target.info("stage %s: %s, %d iterations in all", event.stage, how, event.iterations)
                self._stage = event.stage
            if event.step == event.iterations:
                self.target.info("stage %s: all %d iterations done", event.stage, event.iterations)
        elif isinstance(event, CheckpointSaved):
            self.target.info("stage %s: checkpoint of iteration %d in %s", event.stage, event.step, event.path)
        elif isinstance(event, PreviewReady):
            self.target.info("stage %s: preview of %d images at step %d", event.stage, len(event.images), event.step)
        elif isinstance(event, PoolProgress) and event.done == event.size:
            self.target.info("%s: all %d images made", event.name, event.size)
