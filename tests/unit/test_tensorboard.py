"""TensorBoard event files, read back by tensorboard itself."""

import builtins
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from echodistill_core.errors import InputError, StorageError
from echodistill_core.tensorboard import TensorBoard
from echodistill_core.training.events import CheckpointSaved, LossesLogged, PreviewReady, StepDone


def read(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def scalars(events, tag):
    return [(e.step, e.value) for e in events.Scalars(tag)]


@pytest.fixture
def board(tmp_path):
    pytest.importorskip("tensorboard")
    listener = TensorBoard(tmp_path / "board")
    yield listener
    listener.close()


def test_losses_and_previews_are_read_back(board, tmp_path):
    board(LossesLogged("distil", ({"step": 1, "recon_teacher": 0.5, "swd": 2.0}, {"step": 2, "recon_teacher": 0.25})))
    images = torch.full((2, 3, 8, 6), -1.0)
    images[1, 0] = 1.0
    board(PreviewReady("distil", 2, images))
    board(StepDone("distil", 2, 2, {}))
    board(CheckpointSaved("distil", 2, tmp_path))
    events = read(tmp_path / "board" / "distil")
    assert scalars(events, "loss/recon_teacher") == [(1, 0.5), (2, 0.25)]
    assert scalars(events, "loss/swd") == [(1, 2.0)]
    assert set(events.Tags()["scalars"]) == {"loss/recon_teacher", "loss/swd"}
    assert set(events.Tags()["images"]) == {"samples/0", "samples/1"}
    (preview,) = events.Images("samples/1")
    picture = Image.open(io.BytesIO(preview.encoded_image_string))
    assert (preview.step, picture.size) == (2, (6, 8))
    assert (np.asarray(picture) == (255, 0, 0)).all()


def test_stages_are_runs_of_their_own(board, tmp_path):
    board(LossesLogged("distil", ({"step": 1, "recon_teacher": 1.0},)))
    board(LossesLogged("echo", ({"step": 1, "recon_teacher": 2.0},)))
    board.close()
    assert scalars(read(tmp_path / "board" / "distil"), "loss/recon_teacher") == [(1, 1.0)]
    assert scalars(read(tmp_path / "board" / "echo"), "loss/recon_teacher") == [(1, 2.0)]


def test_a_resumed_stage_discards_what_it_computes_again(board, tmp_path):
    board(LossesLogged("distil", ({"step": 1, "recon_teacher": 1.0}, {"step": 2, "recon_teacher": 9.0})))
    board.close()
    resumed = TensorBoard(tmp_path / "board")
    resumed(LossesLogged("distil", ({"step": 2, "recon_teacher": 2.0}, {"step": 3, "recon_teacher": 3.0})))
    resumed.close()
    assert scalars(read(tmp_path / "board" / "distil"), "loss/recon_teacher") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_preview_before_the_first_log_of_a_resumed_stage_leaves_no_point_twice(board, tmp_path):
    board(LossesLogged("distil", tuple({"step": i, "recon_teacher": 1.0} for i in range(1, 15))))
    board.close()
    resumed = TensorBoard(tmp_path / "board")
    resumed(StepDone("distil", 11, 20, {}))
    resumed(PreviewReady("distil", 12, torch.zeros(1, 3, 4, 4)))
    resumed(LossesLogged("distil", tuple({"step": i, "recon_teacher": 2.0} for i in range(11, 15))))
    resumed.close()
    found = scalars(read(tmp_path / "board" / "distil"), "loss/recon_teacher")
    assert found == [(i, 1.0 if i < 11 else 2.0) for i in range(1, 15)]


def test_the_folder_is_not_there_before_the_first_event(tmp_path):
    pytest.importorskip("tensorboard")
    TensorBoard(tmp_path / "run" / "board").close()
    assert list(tmp_path.iterdir()) == []


def test_it_follows_a_run(tmp_path, train_tiny):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path / "board")
    run = train_tiny(tmp_path / "run", listen=board, preview_every=2)
    board.close()
    events = read(tmp_path / "board" / "distil")
    logged = [(row["step"], row["recon_teacher"]) for row in run.read_log("distil")]
    assert len(logged) == 2
    np.testing.assert_allclose(scalars(events, "loss/recon_teacher"), logged, rtol=1e-6)
    assert [e.step for e in events.Images("samples/0")] == [2]


def test_without_the_package_it_says_how_to_install_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **named):
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"--tensorboard needs .*pip install tensorboard"):
        TensorBoard(tmp_path / "board")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    pytest.importorskip("tensorboard")
    Path(tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        TensorBoard(tmp_path / "file" / "board")
