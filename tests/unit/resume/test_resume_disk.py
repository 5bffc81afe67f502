"""Full disks, folders with other contents, and leftovers of killed processes."""

import errno
import os

import pytest
from resumed_runs import CHECKPOINT, difference, state_of, train
from run_files import stop_at, tree

from echodistill_core.errors import InputError, StorageError
from echodistill_core.tensorfile import read_header
from echodistill_core.training import run
from echodistill_core.training.checkpoint import load_checkpoint
from echodistill_core.training.events import CheckpointSaved, StepDone

# Full disks


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace", "limit"])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, reference, monkeypatch, call):
    resource = pytest.importorskip("resource") if call == "limit" else None
    kept = {}

    def fill(event):
        if isinstance(event, CheckpointSaved):
            kept["checkpoint"] = event.path.read_bytes()
        if isinstance(event, StepDone) and event.step == 4:
            if resource:
                resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            else:
                monkeypatch.setattr(os, call, no_space)

    try:
        with pytest.raises(StorageError, match=r"checkpoint\.safetensors .*(free space|limit)"):
            train(tmp_path, fill)
    finally:
        monkeypatch.undo()
        if resource:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    found = tree(tmp_path)
    assert found[CHECKPOINT] == kept["checkpoint"]
    assert not [name for name in found if name.endswith(".tmp")]
    state = state_of()
    load_checkpoint(tmp_path / CHECKPOINT, state, run.open_run(tmp_path).fingerprint("distil"))
    assert state.step == 2
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []


def test_a_log_that_could_not_be_written_loses_no_rows(tmp_path, reference, monkeypatch):
    # The stop's own checkpoint succeeds here, and must not leave the iterations before it out of the log.
    append, calls = run.append_line, iter(range(100))
    monkeypatch.setattr(run, "append_line", lambda path, line: no_space() if next(calls) == 1 else append(path, line))
    with pytest.raises(OSError, match="No space"):
        train(tmp_path, log_every=2)
    assert read_header(tmp_path / CHECKPOINT).metadata["step"] == "4"
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []


# Folders


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    for path, reason in ((tmp_path / "file", "is a file"), (tmp_path / "full", "is not empty")):
        if "file" in reason:
            path.write_text("mine")
        else:
            path.mkdir()
            (path / "mine.txt").write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(InputError, match=f"out folder .*{path.name} {reason}"):
            train(path)
        assert tree(tmp_path) == before


def test_the_leftovers_of_a_killed_start_are_no_obstacle(tmp_path, reference):
    (tmp_path / ".run.json.4711.tmp").write_text('{"format_ver')
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at(StepDone, step=1))
    for place in (".", "photographs", "distil", "distil/samples"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / ".something.4711.tmp").write_bytes(b"\0" * 100)
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []


def test_reading_a_run_leaves_what_another_process_is_writing(folder):
    (folder / "distil" / ".checkpoint.safetensors.4711.tmp").write_bytes(b"half")
    before = tree(folder)
    run.open_run(folder)
    assert tree(folder) == before


def test_a_failed_start_leaves_no_folder(tmp_path):
    for overrides in ({"resolution": 96 + 1}, {"placeholder": "dog"}, {"class_noun": " "}):
        with pytest.raises(InputError):
            train(tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()
