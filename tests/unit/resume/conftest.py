"""Uninterrupted and stopped runs, shared by the tests of resuming."""

import gc
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import resume_worker
import torch
from resumed_runs import drawn_next, echo, train
from run_files import stop_at, tree

from echodistill_core.models.text import TextEncoder
from echodistill_core.tensorfile import read_header
from echodistill_core.training import session
from echodistill_core.training.events import StepDone


@contextmanager
def recorded_sessions():
    """One thread, since sums depend on how many there are; `state` of the result is the last that a session made."""
    live, make, threads = SimpleNamespace(state=None), session.new_state, torch.get_num_threads()

    def remember(*arguments):
        live.state = make(*arguments)
        return live.state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "with_placeholders", resume_worker.with_placeholders)
        patch.setattr(session, "new_state", remember)
        torch.set_num_threads(1)
        resume_worker.opened_family()
        gc.freeze()  # a vocabulary and the modules of three libraries: collecting takes longer than an iteration
        yield live
        gc.unfreeze()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def live():
    """live.state is the last state that a session made."""
    with recorded_sessions() as live:
        yield live


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Both stages without interruption: their files, and the random numbers that would come next. Read only."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with recorded_sessions() as live:
        train(folder)
        kept = SimpleNamespace(distil_folder=folder, distil=tree(folder), distil_numbers=drawn_next(live.state))
        kept.folder = shutil.copytree(folder, folder.with_name("echoed"))
        echo(kept.folder)
        kept.echo, kept.echo_numbers = tree(kept.folder), drawn_next(live.state)
    assert len(kept.echo) == 14
    assert all("checkpoint" not in n or len(read_header(kept.folder / n).tensors) == 166 for n in kept.echo)
    return kept


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after its second iteration. Copy it before use."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with recorded_sessions(), pytest.raises(KeyboardInterrupt):
        train(folder, stop_at(StepDone, step=2))
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")
