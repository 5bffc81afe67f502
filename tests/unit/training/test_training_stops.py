"""A run that diverges or is cancelled stops and keeps its last good checkpoint."""

import pytest
from run_files import stage_files

from echodistill_core.errors import DivergedError
from echodistill_core.training import session, steps
from echodistill_core.training.events import CheckpointSaved, StepDone
from echodistill_core.training.run import open_run


@pytest.mark.parametrize(("log_every", "value"), [(1, "nan"), (2, "nan"), (1, "inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tiny_family, train_tiny, snapshot, changed, tmp_path, monkeypatch, log_every, value
):
    calls, checkpoints, family = [], [], tiny_family()
    before, original = snapshot(family), steps.ms_swd_along

    def broken(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float(value) if len(calls) >= 3 else 1)

    def listen(event):
        if isinstance(event, CheckpointSaved):
            checkpoints.append((event.step, event.path.read_bytes()))

    monkeypatch.setattr(steps, "ms_swd_along", broken)
    settings = {"iterations": 4, "log_every": log_every, "checkpoint_every": 2}
    with pytest.raises(DivergedError, match=rf"^swd is {value} at step 3"):
        train_tiny(tmp_path / "run", family, listen, **settings)
    assert [step for step, _ in checkpoints] == [2]
    run = open_run(tmp_path / "run")
    assert stage_files(run) == {"checkpoint.safetensors": checkpoints[0][1]}
    assert not run.is_finished("distil")
    assert changed(before, snapshot(family)) == set()
    if log_every == 2 or value == "inf":
        return
    # Without the cause it resumes from the checkpoint and ends with the same bytes.
    monkeypatch.setattr(steps, "ms_swd_along", original)
    resumed = train_tiny(tmp_path / "run", **settings)
    assert stage_files(resumed) == stage_files(train_tiny(tmp_path / "whole", **settings))
    assert [row["step"] for row in resumed.read_log("distil")] == [1, 2, 3, 4]


def test_a_diverged_run_that_is_also_cancelled_keeps_its_checkpoint(train_tiny, tmp_path, monkeypatch):
    calls, checkpoints, original = [], [], steps.masked_mse

    def broken(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 3 else 1)

    def listen(event):
        if isinstance(event, CheckpointSaved):
            checkpoints.append(event.path.read_bytes())
        if isinstance(event, StepDone) and event.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps, "masked_mse", broken)
    with pytest.raises((DivergedError, KeyboardInterrupt)):
        train_tiny(tmp_path / "run", listen=listen, iterations=6, log_every=10, checkpoint_every=2)
    assert stage_files(open_run(tmp_path / "run")) == {"checkpoint.safetensors": checkpoints[-1]}


def test_weights_that_are_not_finite_are_never_saved(train_tiny, tmp_path, monkeypatch):
    states, checkpoints = [], []
    original = session.train_stage

    def keep(state, *args):
        states.append(state)
        return original(state, *args)

    def listen(event):
        if isinstance(event, CheckpointSaved):
            checkpoints.append(event.path.read_bytes())
        if isinstance(event, StepDone) and event.step == 2:
            next(iter(states[0].trainables.critics.parameters())).data[0, 0] = float("nan")

    monkeypatch.setattr(session, "train_stage", keep)
    with pytest.raises(DivergedError, match=r"critics/clip\.hidden\.weight .* step 2"):
        train_tiny(tmp_path / "run", listen=listen, iterations=4, checkpoint_every=1)
    assert stage_files(open_run(tmp_path / "run")) == {"checkpoint.safetensors": checkpoints[-1]}
    assert len(checkpoints) == 1
