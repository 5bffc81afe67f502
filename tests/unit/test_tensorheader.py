"""Malformed safetensors headers are refused."""

import json
import os
import tracemalloc

import pytest
import torch
from children import run_child
from safetensors.torch import save_file
from tensor_files import F32, SECOND, raw_file

from echodistill_core.errors import InputError
from echodistill_core.tensorfile import read_header, read_tensors, write_tensors


def with_f32(**changes):
    return {"a": {**F32, **changes}}


def text_of(name, entry=F32):
    return json.dumps(name).encode() + b":" + json.dumps(entry).encode()


MALFORMED = {
    # Published: offsets that overlap let a small file expand without end.
    "overlap": ({"a": F32, "b": F32}, "overlaps"),
    "half overlap": ({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, "overlaps"),
    "gap before": ({"b": SECOND}, "gap"),
    "gap between": ({"a": F32, "b": {**F32, "data_offsets": [6, 10]}}, "gap"),
    "beyond the data": ({"a": F32, "b": SECOND}, "truncated: found"),
    "data left over": ({"a": {**F32, "dtype": "U8", "data_offsets": [0, 1]}}, "longer than its header says"),
    "no tensors, data": ({}, "longer than its header says"),
    "start after end": (with_f32(data_offsets=[4, 0]), "takes bytes 4 to 0"),
    "size of another shape": (with_f32(shape=[2]), "8 bytes for F32 of shape"),
    "size of another type": (with_f32(dtype="F64"), "8 bytes for F64"),
    "bytes beyond its shape": (with_f32(dtype="U8"), "1 bytes for U8"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, "fields data_offsets, dtype, shape"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "fields"),
    "no type": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "fields"),
    "another field": (with_f32(hook="os.system"), "fields"),
    "entry a list": ({"a": ["F32", [1], [0, 4]]}, "fields"),
    "entry null": ({"a": None}, "fields"),
    "one offset": (with_f32(data_offsets=[4]), "two whole numbers"),
    "three offsets": (with_f32(data_offsets=[0, 2, 4]), "two whole numbers"),
    "offsets a text": (with_f32(data_offsets="04"), "two whole numbers"),
    "offset bool": (with_f32(data_offsets=[False, 4]), "two whole numbers"),
    "offset negative": (with_f32(data_offsets=[-4, 0]), "holds the number -4"),
    "offset float": (with_f32(data_offsets=[0.0, 4]), "holds the number 0.0"),
    "offset of 2**63": (with_f32(data_offsets=[2**63, 2**63 + 4]), "holds the number 9223372036854775808"),
    "shape bool": (with_f32(shape=[True]), "has the shape"),
    "shape text": (with_f32(shape=["1"]), "has the shape"),
    "shape nested": (with_f32(shape=[[1]]), "nested too deep"),
    "shape a number": (with_f32(shape=1), "has the shape"),
    "shape negative": (with_f32(shape=[-1]), "holds the number -1"),
    "shape twice negative": (with_f32(shape=[-1, -1]), "holds the number -1"),
    "shape float": (with_f32(shape=[1.0]), "holds the number 1.0"),
    "shape exponent": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', "holds the number 1e400"),
    "shape NaN": (with_f32(shape=[float("nan")]), "holds the number NaN"),
    "shape infinite": (with_f32(shape=[float("inf")]), "holds the number Infinity"),
    "shape minus zero": (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', "holds the number -0"),
    "shape wraps to 4 bytes": (with_f32(shape=[2**62 + 1, 4]), "at most"),
    "shape wraps beside zero": (with_f32(shape=[2**62, 4, 0], data_offsets=[0, 0]), "at most"),
    "shape of 4000 digits": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}',
        "number 999",
    ),
    "shape of 65 lengths": (with_f32(shape=[1] * 65), "at most 64"),
    "type unknown": (with_f32(dtype="F33"), "has the type 'F33'"),
    "type lower case": (with_f32(dtype="f32"), "has the type 'f32'"),
    "type a number": (with_f32(dtype=32), "has the type 32"),
    "type a list": (with_f32(dtype=[]), "has the type"),
    "tensor twice": (b"{" + text_of("a") + b"," + text_of("a") + b"}", "gives 'a' twice"),
    "tensor twice, once escaped": (
        b"{" + text_of("a") + b"," + text_of("a").replace(b"a", b"\\u0061", 1) + b"}",
        "twice",
    ),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "gives 'dtype' twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{},' + text_of("a") + b"}", "gives '__metadata__' twice"),
    "metadata key twice": (b'{"__metadata__":{"k":"1","k":"2"},' + text_of("a") + b"}", "gives 'k' twice"),
    "metadata null": ({"__metadata__": None, "a": F32}, "metadata is None"),
    "metadata a list": ({"__metadata__": [], "a": F32}, "metadata is"),
    "metadata a number": ({"__metadata__": {"k": 1}, "a": F32}, "metadata is"),
    "metadata an object": ({"__metadata__": {"k": {}}, "a": F32}, "metadata is"),
    "metadata a tensor": ({"__metadata__": F32}, "metadata is"),
    "half a surrogate pair": (b'{"__metadata__":{"k":"\\ud800"},' + text_of("a") + b"}", "Unicode"),
    "not UTF-8": (b'{"\xff":' + json.dumps(F32).encode() + b"}", "not UTF-8 at byte 10"),
    "overlong UTF-8": (b'{"\xc0\xaf":' + json.dumps(F32).encode() + b"}", "not UTF-8"),
    "UTF-16": (json.dumps({"a": F32}).encode("utf-16"), "UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps({"a": F32}).encode(), "not JSON"),
    "not JSON": (b"{'a': 1}", "not JSON"),
    "JSON cut off": (json.dumps({"a": F32}).encode()[:-3], "not JSON"),
    "two objects": (json.dumps({"a": F32}).encode() + b"{}", "not JSON"),
    "zeros after it": (json.dumps({"a": F32}).encode() + b"\0", "not JSON"),
    "only spaces": (b"        ", "not JSON"),
    "a list": (b"[]", "JSON object"),
    "a number": (b"7", "JSON object"),
    "null": (b"null", "JSON object"),
    "deep list": (b"[" * 200_000, "nested too deep"),
    "deep object": (b'{"a":' * 200_000, "nested too deep"),
    "deep in metadata": (b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deep"),
    "deep after brackets in a text": (b'{"' + b"]" * 300_000 + b'":' + b"[" * 200_000, "nested too deep"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers_are_refused_in_one_sentence(tmp_path, case):
    header, words = MALFORMED[case]
    path = raw_file(tmp_path / "a.safetensors", header)
    for read in (read_header, read_tensors):
        with pytest.raises(InputError) as caught:
            read(path)
        message = str(caught.value)
        assert words in message
        assert message.startswith(str(path))
        assert "; expected " in message
        assert "download" in message
        assert "\n" not in message
        assert len(message) < 700


@pytest.mark.parametrize("length", [10, 1000, 2**32, 2**53, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_without_reserving_it(tmp_path, length):
    path = tmp_path / "a"
    save_file({"weight": torch.zeros(2, 2)}, path)
    data = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(InputError, match=r"truncated|not JSON"):
        read_tensors(path)


def test_a_header_over_the_limit_is_refused_unread(tmp_path):
    path = raw_file(tmp_path / "a", b"{", b"", length=100_000_001)
    os.truncate(path, 200_000_000)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"100000001 bytes.*16777216"):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    small = raw_file(tmp_path / "b", {"a": F32})
    size = int.from_bytes(small.read_bytes()[:8], "little")
    assert read_header(small, max_header_bytes=size).tensors
    with pytest.raises(InputError, match=f"at most {size - 1}"):
        read_header(small, max_header_bytes=size - 1)


def test_many_tensors_on_the_same_bytes_do_not_expand(tmp_path):
    entry = {"dtype": "F32", "shape": [200, 200], "data_offsets": [0, 160_000]}
    path = raw_file(tmp_path / "a", {f"weight_{i}": entry for i in range(20_000)}, b"\0" * 160_000)
    with pytest.raises(InputError, match="overlaps"):
        read_tensors(path)


@pytest.mark.slow
def test_a_raised_recursion_limit_does_not_let_deep_json_crash_python(tmp_path):
    path = raw_file(tmp_path / "a", b"[" * 1_000_000)
    code = "from echodistill_core.tensorfile import read_header; read_header(sys.argv[1])"
    child = run_child(f"import sys; sys.setrecursionlimit(10**9); {code}", path)
    assert child.returncode == 1
    assert "nested too deep" in child.stderr


def test_brackets_in_texts_are_not_nesting(tmp_path):
    metadata = {"[[[[[[{{{{{": '"[[[[[[', "\\": '\\"{{{{{{{', '"': "]]]]}}}}"}
    write_tensors(tmp_path / "a", {"[[[[": torch.zeros(1)}, metadata)
    assert read_header(tmp_path / "a").metadata == metadata
