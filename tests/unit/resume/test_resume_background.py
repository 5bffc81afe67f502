"""Checkpoints that a thread writes while training continues, as on a GPU."""

import threading

import pytest
from run_files import StopError, stop_at

from echodistill_core.errors import StorageError
from echodistill_core.training import run
from echodistill_core.training.events import CheckpointSaved, StepDone


@pytest.fixture
def behind(monkeypatch):
    """Every checkpoint is written in a thread, on this CPU too."""
    from echodistill_core.training import loop
    from echodistill_core.training.checkpoint import CheckpointWriter

    writers = []

    def make(background):
        writers.append(CheckpointWriter(background=True))
        return writers[-1]

    monkeypatch.setattr(loop, "CheckpointWriter", make)
    return writers


def test_a_checkpoint_written_behind_training_holds_its_own_step(train_tiny, tmp_path, behind, monkeypatch):
    """The bytes are written during a later step, but hold the state of their own step."""
    from echodistill_core.training import checkpoint

    write, gate, seen = checkpoint.write_tensors, threading.Event(), []

    def slow(path, tensors, metadata):
        gate.wait(60)
        write(path, tensors, metadata)
        seen.append((int(metadata["step"]), path.read_bytes()))

    monkeypatch.setattr(checkpoint, "write_tensors", slow)

    def listen(event):
        if isinstance(event, StepDone) and event.step == 2:
            gate.set()  # only now may the checkpoint of step 1 be written

    train_tiny(tmp_path / "run", iterations=3, checkpoint_every=1, listen=listen)
    assert len(behind) == 1
    assert [step for step, _ in seen] == [1, 2, 3]
    monkeypatch.undo()
    kept = []

    def keep(event):
        if isinstance(event, CheckpointSaved):
            kept.append((event.step, event.path.read_bytes()))

    train_tiny(tmp_path / "at once", iterations=3, checkpoint_every=1, listen=keep)
    assert seen == kept


def test_a_disk_that_is_full_behind_training_stops_it(train_tiny, tmp_path, behind, monkeypatch):
    from echodistill_core.training import checkpoint

    def full(path, tensors, metadata):
        raise StorageError(f"{path} could not be written: no space left; free space.")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(StorageError, match="no space left"):
        train_tiny(tmp_path / "run", iterations=3, checkpoint_every=1)
    assert not run.open_run(tmp_path / "run").is_finished("distil")


def test_a_stop_waits_for_the_checkpoint_behind_it(train_tiny, tmp_path, behind):
    with pytest.raises(StopError):
        train_tiny(tmp_path / "run", iterations=4, listen=stop_at(StepDone, StopError, step=2))
    steps = []
    again = train_tiny(
        tmp_path / "run", iterations=4, listen=lambda e: steps.append(e.step) if isinstance(e, StepDone) else None
    )
    assert steps == [3, 4]
    control = train_tiny(tmp_path / "control", iterations=4)
    for name in ("student.safetensors", "teacher.safetensors", "checkpoint.safetensors"):
        assert again.path("distil", name).read_bytes() == control.path("distil", name).read_bytes()
