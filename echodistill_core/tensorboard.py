"""A listener that writes a run's losses and previews as TensorBoard event files.

Needs the optional extra: pip install 'echodistill[tensorboard]'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError, StorageError
from .training.events import CheckpointSaved, Event, LossesLogged, PreviewReady, StepDone


class TensorBoard:
    """Scalars "loss/<term>" and images "samples/<i>" over the iterations; each stage is a run of its own in `folder`.

    A stage that resumes discards the events after its checkpoint, since those iterations are computed again.
    `folder` is created with the first event of a stage. Raises InputError where the tensorboard package is not
    installed, StorageError where `folder` cannot be created.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f"--tensorboard needs a package that is not installed ({error}); run: python -m pip install tensorboard"
            ) from error
        self.folder = Path(folder)
        existing = next((path for path in (self.folder, *self.folder.absolute().parents) if path.exists()), None)
        if existing is not None and not existing.is_dir():
            raise StorageError(
                f"tensorboard folder {self.folder} cannot be created ({existing} is a file); choose another folder."
            )
        self._make: Any = SummaryWriter
        self._writers: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        """Write the event's numbers or images; other events are ignored."""
        if isinstance(event, StepDone):
            self._writer(event.stage, event.step)  # a resumed stage starts here
        elif isinstance(event, LossesLogged):
            for row in event.rows:
                step = int(row["step"])
                writer = self._writer(event.stage, step)
                for term, value in row.items():
                    if term != "step":
                        writer.add_scalar(f"loss/{term}", value, step)
        elif isinstance(event, PreviewReady):
            writer = self._writer(event.stage, event.step)
            for i, image in enumerate(((event.images.float() + 1) / 2).clamp(0, 1).cpu()):
                writer.add_image(f"samples/{i}", image, event.step)
        elif isinstance(event, CheckpointSaved) and event.stage in self._writers:
            self._writers[event.stage].flush()

    def _writer(self, stage: str, step: int) -> Any:
        if stage not in self._writers:
            try:
                self._writers[stage] = self._make(str(self.folder / stage), purge_step=step)
            except OSError as error:
                raise StorageError(
                    f"tensorboard folder {self.folder} cannot be written ({error.strerror}); choose another folder."
                ) from error
        return self._writers[stage]

    def close(self) -> None:
        """Write out and close the event files. May be called more than once."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
