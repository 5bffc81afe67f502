"""Log records of a run: which facts are logged, at which level, and how often."""

import logging
import re

import pytest

from echodistill_core.errors import Notice
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources
from echodistill_core.training.events import StepDone


@pytest.fixture
def records(caplog):
    """records(level) -> "module: message" of the package's records of this level since the previous call."""
    caplog.set_level(logging.DEBUG, "echodistill")

    def read(level):
        found = [
            f"{r.name.removeprefix('echodistill.')}: {r.getMessage()}" for r in caplog.records if r.levelno == level
        ]
        caplog.clear()
        return found

    return read


def only(lines, pattern):
    """The single line that matches the pattern."""
    matching = [line for line in lines if re.search(pattern, line)]
    assert len(matching) == 1, (pattern, lines)
    return matching[0]


def test_a_run_is_logged_as_created_and_finished(train_tiny, tmp_path, records):
    run = train_tiny(tmp_path / "run", iterations=3)
    info = records(logging.INFO)
    assert run.fingerprint("distil") in only(info, r"training\.resume: run folder .*run: created")
    assert "adapters of teacher, student" in only(info, r"training\.run: run folder .*run: stage distil finished")
    for role in ("clip", "dino", "dinov2"):
        only(info, rf"perception\.load: backbone {role}: tiny random .*, \d+ features, torch\.float32")
    # The number of records must not depend on the number of iterations.
    train_tiny(tmp_path / "longer", iterations=9)
    assert len(records(logging.INFO)) == len(info)


def test_a_resumed_run_is_logged_once_with_its_checkpoint(train_tiny, tmp_path, records):
    def stop(event):
        if isinstance(event, StepDone) and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", iterations=3, listen=stop)
    debug = records(logging.DEBUG)
    only(debug, r"training\.checkpoint: checkpoint .*checkpoint\.safetensors: stage distil, step 2, digest \w{16}")
    train_tiny(tmp_path / "run", iterations=3)
    info = records(logging.INFO)
    only(info, r"training\.resume: run folder .*run: reopened")
    only(info, r"training\.session: loaded checkpoint .*checkpoint\.safetensors: stage distil, step 2")
    assert not any("created" in line for line in info)


@pytest.mark.parametrize("keeps_checkpoint", [True, False])
def test_a_damaged_record_is_logged_with_its_new_name(train_tiny, tmp_path, records, keeps_checkpoint):
    run = train_tiny(tmp_path / "run", iterations=1)
    (run.folder / "run.json").write_text("")
    if not keeps_checkpoint:
        (run.folder / "distil" / "checkpoint.safetensors").unlink()
    records(logging.INFO)
    with pytest.warns(Notice):
        train_tiny(tmp_path / "run", iterations=1)
    renamed = (
        r"damaged .*run\.json: renamed run\.json\.damaged"
        if keeps_checkpoint
        else r"damaged folder .*: renamed run-damaged-1"
    )
    only(records(logging.INFO), rf"training\.resume: {renamed}")


def test_opening_a_family_logs_its_models(records):
    family = open_family(ModelSources(family="tiny"))
    info = records(logging.INFO)
    only(info, r"models\.open: family tiny: opened")
    assert family.student.fingerprint in only(info, r"models\.open: student: .*, epsilon")
    assert family.teacher.fingerprint in only(info, r"models\.open: teacher: .*, v_prediction")
