"""Log records: silent without --verbose, complete with it."""

import logging
import re
import shutil
from pathlib import Path

from command_line import adapter_of, train_command

from echodistill_core import logs
from echodistill_core.cli import commands, main
from echodistill_core.models.open import open_family
from echodistill_core.tensorfile import read_tensors


def test_verbose_logs_models_folder_stage_and_files(photographs, capsys, monkeypatch):
    monkeypatch.setattr(commands, "open_family", open_family)  # not the fixtures' copy of an opened one
    assert main(train_command(photographs, "RUN", "-v", iterations=2)) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = "\n".join(re.split(r"[\r\n]+", printed.err))
    for line in (
        r"echodistill\.models\.open: student: .*, epsilon, fingerprint [0-9a-f]{16}",
        r"echodistill\.models\.open: teacher: .*, v_prediction",
        r"run folder RUN: created",
        r"stage distil: begun, 2 iterations",
        r"stage distil: checkpoint of iteration 2 in RUN.distil.checkpoint\.safetensors",
        r"stage distil: all 2 iterations done",
        r"echodistill\.files: wrote RUN.run\.json",
        r"echodistill\.files: wrote RUN.distil.student\.safetensors",
    ):
        assert re.search(rf"^\d\d:\d\d:\d\d .*{line}", lines, re.MULTILINE), line
    assert "Traceback" not in printed.err


def test_a_resumed_stage_is_logged_as_resumed(undisturbed, photographs, capsys):
    run = shutil.copytree(undisturbed, Path("RUN"))
    for file in ("student", "teacher"):
        adapter_of(run, role=file).unlink()
    assert main(train_command(photographs, "RUN", "--verbose", iterations=2)) == 0
    assert "run folder RUN: reopened" in capsys.readouterr().err


def test_without_verbose_nothing_is_logged(undisturbed, capfd):
    before = list(logging.getLogger("echodistill").handlers)
    assert main(["info", str(adapter_of(undisturbed)), "--verbose"]) == 0
    assert "echodistill.tensorfile: read" in capfd.readouterr().err
    read_tensors(adapter_of(undisturbed))
    assert main(["info", str(adapter_of(undisturbed))]) == 0
    assert capfd.readouterr().err == ""
    assert logging.getLogger("echodistill").handlers == before


def test_loggers_do_not_depend_on_the_name_of_the_pack():
    assert logs.logger("echodistill_core.models.open").name == "echodistill.models.open"
    assert logs.logger("custom_nodes.EchoDistill.echodistill_core.models.open").name == "echodistill.models.open"
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("echodistill").handlers)
