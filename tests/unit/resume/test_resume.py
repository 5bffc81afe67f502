"""A run that was stopped resumes and ends with the same bytes as one that was not.

Every comparison is of whole run folders, byte by byte: trained weights, AdamW's moments and step counts, learning rates
and generators (all in checkpoint.safetensors), adapters, logs, pool and run.json. Controls show that it can fail.
"""

import json
import shutil

import pytest
from resume_worker import complete, fresh_family
from resumed_runs import CHECKPOINT, STEPS, difference, drawn_next, echo, times, train
from run_files import stop_at, tree

from echodistill_core.tensorfile import read_header
from echodistill_core.training import run, session, steps
from echodistill_core.training.checkpoint import load_checkpoint
from echodistill_core.training.events import CheckpointSaved, LossesLogged, PoolProgress, StepDone

# Stopped


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_by_the_user_at_any_step_it_ends_the_same(tmp_path, reference, live, step):
    # Checkpoints so rare that the stop itself has to make one, and other previews and logs, which may not matter.
    rare = {"checkpoint_every": 1000, "log_every": 3, "preview_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at(StepDone, step=step), **rare)
    assert difference(tree(tmp_path), reference.distil)
    events = []
    train(tmp_path, events.append)
    assert [e.step for e in events if isinstance(e, StepDone)] == list(range(step + 1, STEPS + 1))
    assert difference(tree(tmp_path), reference.distil) == []
    assert drawn_next(live.state) == reference.distil_numbers


def test_stopped_at_every_step_it_ends_the_same(tmp_path, reference, live):
    for step in range(1, STEPS + 1):
        kind = (StepDone, LossesLogged, CheckpointSaved)[step % 3]
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stop_at(kind), checkpoint_every=1)
        assert read_header(tmp_path / CHECKPOINT).metadata["step"] == str(step)
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []
    assert drawn_next(live.state) == reference.distil_numbers


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (PoolProgress, {"done": 1}),
        (PoolProgress, {"done": 2}),
        (StepDone, {"step": 1}),
        (StepDone, {"step": 2}),
        (StepDone, {"step": 3}),
        (CheckpointSaved, {"step": 2}),
    ],
)
def test_an_echo_stopped_at_any_step_ends_the_same(tmp_path, reference, live, kind, where):
    shutil.copytree(reference.distil_folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        echo(tmp_path, stop_at(kind, **where))
    assert difference(tree(tmp_path), reference.echo)
    echo(tmp_path)
    assert difference(tree(tmp_path), reference.echo) == []
    assert drawn_next(live.state) == reference.echo_numbers


def test_iterations_that_a_stop_lost_are_logged_once(tmp_path, reference):
    # An exception out of the computation leaves no checkpoint: step 3 is logged, but the checkpoint is of step 2.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "critic_step", _failing_at(4, steps.critic_step))
        with pytest.raises(ZeroDivisionError):
            train(tmp_path)
    assert [row["step"] for row in run.open_run(tmp_path).read_log("distil")] == [1, 2, 3]
    assert read_header(tmp_path / CHECKPOINT).metadata["step"] == "2"
    train(tmp_path)
    assert difference(tree(tmp_path), reference.distil) == []


def _failing_at(call, function):
    calls = iter(range(1, 100))

    def failing(*arguments):
        if next(calls) == call:
            raise ZeroDivisionError
        return function(*arguments)

    return failing


# Controls: the comparison can fail


def test_another_seed_ends_with_other_bytes(tmp_path, reference, live):
    train(tmp_path, seed=1)
    assert {CHECKPOINT, "distil/student.safetensors", "distil/teacher.safetensors", "distil/log.jsonl"} <= set(
        difference(tree(tmp_path), reference.distil)
    )
    numbers = drawn_next(live.state)
    assert all(numbers[name] != reference.distil_numbers[name] for name in ("data", "noise"))


FORGETTING = {
    "nothing": lambda state, fresh: None,
    # Learning rates follow from the settings and the step, whatever the checkpoint holds.
    "learning rates": lambda state, fresh: state.trainables.optimizers["critics"].param_groups[0].update(lr=2e-4),
    "data generator": lambda state, fresh: state.random.generators["data"].set_state(fresh["data"]),
    "noise generator": lambda state, fresh: state.random.generators["noise"].set_state(fresh["noise"]),
    "moments of teacher": lambda state, fresh: state.trainables.optimizers["teacher"].state.clear(),
    "moments of student": lambda state, fresh: state.trainables.optimizers["student"].state.clear(),
    "moments of critics": lambda state, fresh: state.trainables.optimizers["critics"].state.clear(),
    "step counts": lambda state, fresh: [
        m["step"].fill_(1) for m in state.trainables.optimizers["student"].state.values()
    ],
    "weight decay": lambda state, fresh: (
        state.trainables.optimizers["critics"].param_groups[0].update(weight_decay=0.5)
    ),
    "one row": lambda state, fresh: state.trainables.token_embeddings["teacher"].data[0, :1].add_(1e-3),
}


@pytest.mark.parametrize("what", FORGETTING)
def test_a_resume_that_loses_a_part_of_the_state_ends_with_other_bytes(folder, reference, monkeypatch, what):
    def forgetful(path, state, fingerprint):
        fresh = {name: g.get_state() for name, g in state.random.generators.items()}
        load_checkpoint(path, state, fingerprint)
        FORGETTING[what](state, fresh)

    monkeypatch.setattr(session, "load_checkpoint", forgetful)
    train(folder)
    differing = difference(tree(folder), reference.distil)
    if what in ("nothing", "learning rates"):
        assert differing == []
    else:
        assert {CHECKPOINT, "distil/log.jsonl"} <= set(differing)


# Finished


def test_a_finished_run_is_found_finished_and_left_alone(reference, tmp_path):
    shutil.copytree(reference.folder, tmp_path, dirs_exist_ok=True)
    before = times(tmp_path)
    events = []
    complete(tmp_path, fresh_family(), events.append)
    assert events == []
    assert times(tmp_path) == before
    assert difference(tree(tmp_path), reference.echo) == []


@pytest.mark.parametrize("gone", [[], ["distil/student.safetensors"], ["distil/student.safetensors", CHECKPOINT]])
def test_results_that_were_written_but_not_recorded_are_completed(reference, tmp_path, gone):
    shutil.copytree(reference.distil_folder, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "run.json").read_text())
    record["finished"] = {}
    (tmp_path / "run.json").write_text(json.dumps(record))
    for name in gone:
        (tmp_path / name).unlink()
    events = []
    train(tmp_path, events.append)
    assert len([e for e in events if isinstance(e, StepDone)]) == (STEPS if CHECKPOINT in gone else 0)
    assert difference(tree(tmp_path), reference.distil) == []
