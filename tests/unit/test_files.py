"""Atomic writing: after a failure or a kill there is the old file or the new one, and nothing else."""

import errno
import json
import os
import signal

import pytest
from children import posix_only, run_child
from safetensors import SafetensorError

from echodistill_core.errors import InputError, StorageError
from echodistill_core.files import (
    append_line,
    remove_leftovers,
    replacing,
    why_missing,
    write_bytes,
    write_json,
    write_text,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_what_it_was_given_and_makes_parents(tmp_path):
    write_bytes(tmp_path / "a" / "b" / "data.bin", b"\0\r\n\xff")
    assert (tmp_path / "a" / "b" / "data.bin").read_bytes() == b"\0\r\n\xff"
    write_text(tmp_path / "text.txt", "größe\n")
    assert (tmp_path / "text.txt").read_bytes() == "größe\n".encode()
    assert names(tmp_path) == ["a", "text.txt"]


def test_json_keeps_order_indents_by_two_and_ends_the_line(tmp_path):
    write_json(tmp_path / "run.json", {"b": 1, "a": ["é"]})
    assert (tmp_path / "run.json").read_bytes() == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'.encode()


def test_json_holds_file_names_that_are_not_unicode(tmp_path):
    write_json(tmp_path / "run.json", {"photo": "dog\udcff.jpg"})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"photo": "dog\udcff.jpg"}


def test_json_refuses_nan_before_it_touches_the_file(tmp_path):
    write_text(tmp_path / "run.json", "old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "run.json", {"loss": float("nan")})
    assert (tmp_path / "run.json").read_text() == "old"


def test_append_line_adds_whole_lines(tmp_path):
    append_line(tmp_path / "logs" / "log.jsonl", "one")
    append_line(tmp_path / "logs" / "log.jsonl", "zwei ü")
    assert (tmp_path / "logs" / "log.jsonl").read_bytes() == "one\nzwei ü\n".encode()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("1/0"), InputError("bad"), StorageError("b")])
def test_an_exception_passes_unchanged_and_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(type(error)) as caught, replacing(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        assert temporary.parent == tmp_path
        raise error
    assert caught.value is error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EFBIG, "limit on file sizes"),
        (errno.EROFS, "choose a folder"),
        (errno.EACCES, "choose a folder"),
        (errno.EIO, "run the same command again"),
    ],
)
def test_a_refusal_of_the_system_becomes_one_sentence(tmp_path, code, remedy):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(StorageError) as caught, replacing(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError(code, os.strerror(code))
    message = str(caught.value)
    assert str(target) in message
    assert os.strerror(code) in message
    assert remedy in message
    assert "earlier files are untouched" in message
    assert "\n" not in message
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_safetensors_write_failure_counts_as_one_and_its_other_errors_do_not(tmp_path):
    with pytest.raises(StorageError, match="free space"), replacing(tmp_path / "file"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="header"), replacing(tmp_path / "file"):
        raise SafetensorError("Error while deserializing header: header too large")


def test_a_failing_fsync_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free space"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


@posix_only
def test_file_then_folder_are_flushed_around_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), rename(a, b)))
    write_text(tmp_path / "file", "new")
    assert events == [(tmp_path / "file").stat().st_ino, "rename", tmp_path.stat().st_ino]


def test_a_file_in_place_of_the_parent_folder(tmp_path):
    (tmp_path / "runs").write_text("a file")
    for write in (write_text, append_line):
        with pytest.raises(StorageError, match="parents are all folders"):
            write(tmp_path / "runs" / "one" / "file", "x")
    assert names(tmp_path) == ["runs"]


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageError, match="could not be written"):
        write_text(tmp_path / "file", "x")
    assert names(tmp_path) == ["file"]
    assert names(tmp_path / "file") == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from echodistill_core.errors import StorageError
from echodistill_core.files import append_line, write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if sys.argv[1] == "write":
        write_bytes(Path(sys.argv[2]), b"x" * 5000)
    else:
        append_line(Path(sys.argv[2]), "x" * 5000)
except StorageError as error:
    sys.exit(f"StorageError: {error}")
"""


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("how", ["write", "append"])
def test_a_real_write_failure_leaves_the_old_content(tmp_path, how):
    target = tmp_path / "file"
    target.write_text("old\n")
    child = run_child(LIMITED, how, target)
    assert child.returncode == 1
    assert child.stderr.startswith(f"StorageError: {target} could not be written: File too large")
    assert target.read_text() == "old\n"
    assert names(tmp_path) == ["file"]


KILLED = """
import os, signal, sys
from pathlib import Path
from echodistill_core.files import write_text
setattr(os, sys.argv[1], lambda *arguments, **named: os.kill(os.getpid(), signal.SIGKILL))
write_text(Path(sys.argv[2]), "new")
"""


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file_and_a_leftover_that_can_be_removed(tmp_path, where):
    target = tmp_path / "file"
    target.write_text("old")
    child = run_child(KILLED, where, target)
    assert child.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(names(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["file"]
    assert target.read_text() == "old"


def test_remove_leftovers_takes_nothing_else(tmp_path):
    kept = ["file", ".hidden", "a.1.tmp", ".tmpAbC123", ".x.tmp"]
    for name in [*kept, ".file.123.tmp", ".a b.c.4.tmp"]:
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.1.tmp").mkdir()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".file.123.tmp").write_text("")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*kept, ".folder.1.tmp", "below"])
    assert names(tmp_path / "below") == [".file.123.tmp"]
    remove_leftovers(tmp_path / "missing")


def test_a_link_that_leads_nowhere_says_where_it_would(tmp_path):
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "self").symlink_to("self")
    assert why_missing(tmp_path / "absent") == "does not exist"
    assert why_missing(tmp_path / "nowhere") == "is a link to gone, which does not exist"
    assert why_missing(tmp_path / "self") == "is a link that leads to itself"
