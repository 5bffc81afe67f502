"""Helpers for tests of the command line."""

import errno
import os
import re
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file

import echodistill_core
from echodistill_core.cli import main
from echodistill_core.models.architectures import TINY
from echodistill_core.models.tiny import tiny_checkpoint

PACKAGE_PARENT = Path(echodistill_core.__file__).parents[1]
QUICK = ["--batch-size", "1", "--swd-projections", "8", "--device", "cpu", "--log-every", "1", "--preview-every", "0"]


def train_command(photos, out, *more, noun="dog", iterations=1):
    command = ["train", "--family", "tiny", "--photos", str(photos), "--class-noun", noun]
    return [*command, "--iterations", str(iterations), "--out", str(out), *QUICK, *map(str, more)]


def adapter_of(run, stage="distil", role="student"):
    return run / stage / f"{role}.safetensors"


def sample_command(run, *more):
    return ["sample", str(run), "--prompt", "a <my-mug> coffee mug", "--device", "cpu", *map(str, more)]


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def refused(capsys, command, *reasons, out="RUN"):
    """Check that a command ends with status 2 and one sentence, and leaves no out folder behind."""
    capsys.readouterr()
    existed = {p: p.stat().st_mtime_ns for p in Path(out).rglob("*")} if out and Path(out).exists() else None
    assert main([str(a) for a in command]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *before, sentence = printed.err.strip("\n").splitlines()
    assert all(re.fullmatch(r"[\w ]+: \d photographs? -> .*", line) for line in before), printed.err
    assert re.fullmatch(r"echodistill: \S.*\.", sentence)
    for reason in reasons:
        assert str(reason) in sentence
    now = {p: p.stat().st_mtime_ns for p in Path(out).rglob("*")} if out and Path(out).exists() else None
    assert now == existed


def whole_checkpoint(path):
    from echodistill_core.models.layout import to_original

    parts = tiny_checkpoint("student")
    save_file(to_original(parts["unet"], parts["text_encoder"], parts["vae"], TINY), path)


def full_disk_for(monkeypatch, name):
    """Make the final rename of files of this name fail as on a full disk."""
    replace = Path.replace

    def fail(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
