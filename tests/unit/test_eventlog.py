"""Log records of a run's events."""

import logging
from pathlib import Path

import torch

from echodistill_core.eventlog import EventLog
from echodistill_core.training.events import CheckpointSaved, PoolProgress, PreviewReady, StepDone


def test_stages_checkpoints_and_pools_are_logged_once(caplog):
    caplog.set_level(logging.INFO, "echodistill")
    listen = EventLog()
    for step in (1, 2, 3):
        listen(StepDone("distil", step, 3, {}))
    listen(CheckpointSaved("distil", 3, Path("c")))
    listen(PreviewReady("distil", 3, torch.zeros(4, 3, 8, 8)))
    for done in (1, 2):
        listen(PoolProgress(done, 2))
    listen(StepDone("echo", 5, 9, {}))
    assert [record.getMessage() for record in caplog.records] == [
        "stage distil: begun, 3 iterations in all",
        "stage distil: all 3 iterations done",
        "stage distil: checkpoint of iteration 3 in c",
        "stage distil: preview of 4 images at step 3",
        "pool: all 2 images made",
        "stage echo: resumed at iteration 5, 9 iterations in all",
    ]
    assert {record.name for record in caplog.records} == {"echodistill.eventlog"}
