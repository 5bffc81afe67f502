"""A run whose run.json was lost resumes with the command that trained it, and ends with the same bytes."""

import json
import shutil

import pytest
from run_files import StopError, stop_at, tree

from echodistill_core.errors import DamagedRunError, InputError
from echodistill_core.settings import EchoSettings
from echodistill_core.training import session
from echodistill_core.training.fork import fork_for_echo
from echodistill_core.training.run import open_run

WITHOUT_IDENTITY = {
    **{key: {} for key in ("settings", "sources", "finished")},
    "format_version": 1,
    "fingerprint": "a",
    "identity": None,
    "photographs": [],
    "echo": None,
}
DAMAGE = [
    b"",
    b"\0" * 500,
    b'{"format_version": 1, "fing',
    b"[]",
    b'{"format_version": 1}',
    b"\xff\xfe",
    json.dumps(WITHOUT_IDENTITY).encode(),
]


@pytest.fixture(scope="module")
def finished(train_tiny, tmp_path_factory):
    """A run of two iterations. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_tiny(folder, iterations=2)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_same_training_restores_a_damaged_record(finished, tmp_path, train_tiny, damage):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "run.json").write_bytes(damage)
    with pytest.raises(DamagedRunError, match=r"--adapter .*student\.safetensors"):
        open_run(run)
    with pytest.warns(UserWarning, match="written anew"):
        train_tiny(run, iterations=2)
    after = tree(run)
    assert after.pop("run.json.damaged") == damage
    assert after == tree(finished)


def test_a_run_that_was_not_finished_goes_on_from_its_checkpoint(finished, tmp_path, train_tiny):
    from echodistill_core.training.events import StepDone

    with pytest.raises(StopError):
        train_tiny(tmp_path / "run", iterations=2, listen=stop_at(StepDone, StopError, step=1))
    (tmp_path / "run" / "run.json").write_bytes(b"")
    steps = []
    with pytest.warns(UserWarning, match="written anew"):
        train_tiny(
            tmp_path / "run", iterations=2, listen=lambda e: steps.append(e.step) if isinstance(e, StepDone) else None
        )
    assert steps == [2]
    for name in ("distil/student.safetensors", "distil/checkpoint.safetensors", "run.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_another_training_is_refused_in_the_same_folder(finished, tmp_path, train_tiny):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "run.json").write_bytes(b"")
    before = tree(run)
    with pytest.raises(DamagedRunError):
        train_tiny(run, iterations=3)
    assert tree(run) == before


def test_an_echos_copy_gets_its_record_back_from_the_run(finished, tmp_path, tiny_family):
    shutil.copytree(finished, tmp_path / "run")
    run = open_run(tmp_path / "run")
    settings = EchoSettings(iterations=1, pool_size=2)
    echoed = session.echo(fork_for_echo(run, settings), tiny_family(), settings, lambda _: None)
    before = tree(echoed.folder)
    (echoed.folder / "run.json").write_bytes(b"")
    again = session.echo(fork_for_echo(run, settings), tiny_family(), settings, lambda _: None)
    assert again.is_finished("echo")
    assert tree(again.folder) == before


def test_without_a_checkpoint_nothing_of_the_earlier_files_is_used(tmp_path, train_tiny, make_photographs):
    """Photographs, class images and pools of other inputs would be taken for the new run's own."""
    from echodistill_core.training.events import PoolProgress

    weights = {"prior_weight": 1.0, "prior_images": 3, "iterations": 1}
    with pytest.raises(StopError):
        train_tiny(tmp_path / "run", listen=stop_at(PoolProgress, StopError, done=2), seed=5, **weights)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*.png")}
    assert kept
    (tmp_path / "run" / "run.json").write_bytes(b"")
    with pytest.warns(UserWarning, match="run-damaged-1"):
        train_tiny(tmp_path / "run", seed=6, **weights)
    clean = train_tiny(tmp_path / "clean", seed=6, **weights)
    assert tree(tmp_path / "run") == tree(clean.folder)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run-damaged-1").rglob("*.png")} == kept


def test_an_echo_whose_record_was_lost_goes_on_with_its_own_settings_only(finished, tmp_path, train_tiny, tiny_family):
    run = open_run(shutil.copytree(finished, tmp_path / "run"))
    settings = EchoSettings(iterations=1, pool_size=2)
    session.echo(run, tiny_family(), settings, lambda _: None)
    before = tree(run.folder)
    (run.folder / "run.json").write_bytes(b"")
    with pytest.warns(UserWarning, match="written anew"):
        run = train_tiny(run.folder, iterations=2)
    with pytest.raises(InputError, match="was begun with other settings"):
        session.echo(run, tiny_family(), EchoSettings(iterations=1, pool_size=3), lambda _: None)
    again = session.echo(run, tiny_family(), settings, lambda _: None)
    assert again.is_finished("echo")
    after = tree(run.folder)
    after.pop("run.json.damaged")
    assert after == before


def test_a_log_with_bytes_that_are_no_rows_is_read_without_them(finished, tmp_path):
    """As a power cut leaves it: zero bytes, half a row, bytes that are no text."""
    run = open_run(shutil.copytree(finished, tmp_path / "run"))
    rows = run.read_log("distil")
    path = run.path("distil", "log.jsonl")
    path.write_bytes(b"\0" * 50 + path.read_bytes() + b'\xff\xfe\n"text"\n{"teacher": 1}\n{"step": 3, "teac')
    assert run.read_log("distil") == rows
