"""Randomly changed safetensors files are refused, or read as safetensors reads them."""

import random

import torch
from safetensors import safe_open
from tensor_files import F32, SECOND, raw_file, some_tensors

from echodistill_core.errors import InputError
from echodistill_core.tensorfile import read_header, read_tensors, write_tensors


def agrees_with_safetensors(path):
    """Read a file with both; True if both read the same, False if ours refuses it. Anything else fails the test."""
    try:
        tensors, header = read_tensors(path), read_header(path)
    except InputError:
        return False
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == header.metadata
        assert set(file.keys()) == set(header.tensors) == set(tensors)
        for name, info in header.tensors.items():
            part = file.get_slice(name)
            assert part.get_dtype() == info.dtype
            assert tuple(part.get_shape()) == info.shape == tuple(tensors[name].shape)
            data = path.read_bytes()[-max(i.end for i in header.tensors.values()) :] if info.end else b""
            assert (
                bytes(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()) == data[info.start : info.end]
            )
    return True


def test_flipped_bytes_are_refused_or_read_as_safetensors_reads_them(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, some_tensors(), {"key": "välue", "step": "12"})
    data, dice, read = path.read_bytes(), random.Random(0), 0
    assert agrees_with_safetensors(path)
    header_end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 8))):
            changed[dice.randrange(header_end)] = dice.choice((dice.randrange(256), *b'{}[]",:0129\\ tn'))
        path.write_bytes(changed)
        read += agrees_with_safetensors(path)
    # Changes within names and texts are no flaw; both outcomes have to occur for the test to mean anything.
    assert 50 < read < 1900


def test_changed_json_is_refused_or_read_as_safetensors_reads_it(tmp_path):
    path, dice, read = tmp_path / "a.safetensors", random.Random(1), 0
    values = [
        0,
        1,
        2,
        4,
        8,
        -1,
        2**31,
        2**62,
        2**63,
        2**64,
        True,
        None,
        1.5,
        "F32",
        "F16",
        "U8",
        "BOOL",
        [],
        {},
        [1],
        [0, 4],
    ]
    for _ in range(2000):
        first, second = (
            {**F32, "shape": [1], "data_offsets": [0, 4]},
            {**SECOND, "shape": [1, 1], "data_offsets": [4, 8]},
        )
        for entry in (first, second):
            field = dice.choice(list(entry))
            if dice.random() < 0.3:
                entry[field] = dice.choice(values)
            elif dice.random() < 0.5 and isinstance(entry[field], list):
                entry[field][dice.randrange(len(entry[field]))] = dice.choice(values)
        raw_file(path, {"__metadata__": {"k": dice.choice(["v", "v", 1])}, "a": first, "b": second}, b"\0" * 8)
        read += agrees_with_safetensors(path)
    assert 50 < read < 1900
