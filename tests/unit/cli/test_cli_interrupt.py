"""Ctrl-C during a command."""

import os
import shutil
import signal
from pathlib import Path

from command_line import adapter_of, train_command

from echodistill_core.cli import commands, main
from echodistill_core.training.events import StepDone


class Interrupter:
    """A progress bar that presses Ctrl-C once, after this many iterations of the stage."""

    def __init__(self, stage, step):
        self.stage, self.step, self.done = stage, step, []

    def __call__(self, event):
        if isinstance(event, StepDone):
            self.done.append(event.step)
            if (event.stage, event.step) == (self.stage, self.step):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_after_the_iteration_and_resumes_to_the_same_bytes(photographs, undisturbed, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    train = train_command(photographs, "RUN", iterations=2)
    interrupter = Interrupter("distil", 1)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "ProgressBar", lambda: interrupter)
        assert main(train) == 130
    assert interrupter.done == [1]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "stopping after this iteration" in printed.err
    assert "interrupted; the same command" in printed.err
    assert "Traceback" not in printed.err
    assert signal.getsignal(signal.SIGINT) is before
    assert not adapter_of(Path("RUN")).exists()

    again = Interrupter("distil", 99)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "ProgressBar", lambda: again)
        assert main(train) == 0
    assert again.done == [2]  # it went on rather than began anew
    shutil.copytree(undisturbed, "CONTROL")

    echo = ["--iterations", "2", "--pool-size", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "ProgressBar", lambda: Interrupter("echo", 1))
        assert main(["echo", "RUN", *echo]) == 130
    assert main(["echo", "RUN", *echo]) == 0
    assert main(["echo", "CONTROL", *echo]) == 0
    files = [
        f"{s}/{n}" for s in ("distil", "echo") for n in ("student.safetensors", "teacher.safetensors", "log.jsonl")
    ]
    for name in [*files, "distil/checkpoint.safetensors", "echo/checkpoint.safetensors", "echo/pool/001.png"]:
        assert Path("RUN", name).read_bytes() == Path("CONTROL", name).read_bytes(), name


def test_a_second_ctrl_c_stops_at_once(photographs, capsys, monkeypatch):
    def twice(event):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(commands, "ProgressBar", lambda: twice)
    assert main(train_command(photographs, "RUN", iterations=4)) == 130
    assert capsys.readouterr().err.count("stopping after this iteration") == 1


def test_ctrl_c_elsewhere_promises_no_checkpoint(capsys, monkeypatch):
    def press(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "read_adapter", press)
    assert main(["info", "a.safetensors"]) == 130
    assert capsys.readouterr().err == "echodistill: interrupted.\n"
