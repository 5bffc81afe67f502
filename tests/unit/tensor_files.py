"""Helpers for tests of safetensors files."""

import json

import torch

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
SECOND = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
ODD_TEXTS = [
    "plain",
    "é",
    '"quoted"',
    "back\\slash",
    "new\nline",
    "\x01\x1f\x7f",
    "\u2028",
    "😀",
    "a/b",
    "",
    "zz",
    "\t",
]


def raw_file(path, header, data=b"\0" * 4, length=None):
    """A file of the format from its parts, wrong ones too."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "f16": torch.randn(2, 2, generator=generator).half(),
        "double": torch.randn(2, generator=generator, dtype=torch.float64),
        "step": torch.tensor(17),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        'näme "q"\n': torch.ones(1, 1),
    }


def assert_same(left, right):
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
