"""Files that are no safetensors file, and truncated ones, are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from tensor_files import F32, raw_file

from echodistill_core.errors import InputError
from echodistill_core.tensorfile import read_header, read_tensors, write_tensors


@pytest.mark.parametrize("size", [0, 1, 7])
def test_files_too_short_for_a_length(tmp_path, size):
    (tmp_path / "a").write_bytes(b"\1" * size)
    with pytest.raises(InputError, match=f"holds {size} bytes"):
        read_header(tmp_path / "a")


def test_header_length_of_zero(tmp_path):
    with pytest.raises(InputError, match="length 0"):
        read_header(raw_file(tmp_path / "a", b""))


def test_missing_files_folders_and_pipes(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_header(tmp_path / "missing")
    with pytest.raises(InputError, match="is not a file"):
        read_header(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError, match="is not a file"):
            read_header(tmp_path / "pipe")


def test_a_disk_that_cannot_be_read(tmp_path, monkeypatch):
    path = raw_file(tmp_path / "a", {"a": F32})

    def broken(*arguments, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read_header(path)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, (os.environ["HARMFUL_TARGET"],))


@pytest.mark.parametrize("kind", ["zip", "legacy", 2, 3, 4, 5])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_pickles_are_refused_and_never_opened(tmp_path, monkeypatch, kind, suffix):
    import pickle

    monkeypatch.setenv("HARMFUL_TARGET", str(tmp_path / "harmed"))
    path = tmp_path / f"a{suffix}"
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps({"a": Harmful()}, protocol=kind))
    else:
        torch.save({"a": Harmful()}, path, _use_new_zipfile_serialization=kind == "zip")
    for read in (read_header, read_tensors):
        with pytest.raises(InputError, match=r"is a pickle.*\.safetensors"):
            read(path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".CKPT"])
def test_unknown_content_under_a_pickles_suffix(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"(lp0\nI1\na." * 10)
    with pytest.raises(InputError, match="is a pickle"):
        read_header(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_header_lengths_that_look_like_a_pickle_are_read(tmp_path, length):
    header = json.dumps({"a": F32}).encode().ljust(length)
    path = raw_file(tmp_path / "a", header)
    assert path.read_bytes()[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5", b"PK")
    assert list(read_tensors(path)) == ["a"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="truncated"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
        (b"\n <html lang='en'>", "web page"),
        (b"Entry not found, and some more text", "truncated, or no safetensors at all"),
    ],
)
def test_other_files_saved_by_mistake(tmp_path, content, words):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_tensors(tmp_path / "a.safetensors")


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.uint8)}, {"key": "é"})
    data = path.read_bytes()
    assert read_tensors(path).keys() == {"a", "b"}
    for size in range(len(data)):
        path.write_bytes(data[:size])
        for read in (read_header, read_tensors):
            with pytest.raises(InputError):
                read(path)
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"truncated: .*{len(data) - 1} bytes.*{len(data)} bytes"):
        read_header(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(InputError, match=f"longer .*{len(data) + 1} bytes.*{len(data)} bytes"):
        read_header(path)
