"""safetensors files against safetensors itself: the same bytes written, the same reading, and attacks refused."""

import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import echodistill_core
from echodistill_core.errors import InputError, StorageError
from echodistill_core.files import remove_leftovers
from echodistill_core.tensorfile import read_header, read_tensors, write_tensors
from echodistill_core.tensorheader import TensorInfo

PACKAGE_PARENT = Path(echodistill_core.__file__).parents[1]
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")

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


def run_child(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=PACKAGE_PARENT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


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


def test_round_trip_through_both_readers(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    write_tensors(path, some_tensors(), dict.fromkeys(ODD_TEXTS, 'vä"l'))
    assert_same(read_tensors(path), some_tensors())
    assert_same(load_file(path), some_tensors())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == read_header(path).metadata == dict.fromkeys(ODD_TEXTS, 'vä"l')


@pytest.mark.parametrize("metadata", [{}, {'kéy\x01"': "va\\lue\n"}])
def test_bytes_are_those_of_safetensors_own_writer(tmp_path, metadata):
    write_tensors(tmp_path / "ours", some_tensors(), metadata)
    save_file(some_tensors(), tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_shared_storage_parameters_and_gradients_are_written_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "again": base,
        "transposed": base.t(),
        "row": base[1],
        "every_other": base[:, ::2],
        "expanded": torch.tensor([2.0]).expand(3),
        "parameter": torch.nn.Parameter(base[:2]),
        "with_graph": torch.nn.Parameter(base[:1]) * 2,
    }
    write_tensors(tmp_path / "a", tensors, {})
    loaded = load_file(tmp_path / "a")
    assert_same(loaded, {name: tensor.detach().clone() for name, tensor in tensors.items()})


def test_order_of_the_mappings_does_not_show(tmp_path):
    tensors, metadata = some_tensors(), {text: text for text in ODD_TEXTS}
    write_tensors(tmp_path / "a", tensors, metadata)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_tensors(tmp_path / "c", {**tensors, "step": torch.tensor(18)}, metadata)
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()


REPEATED = """
import hashlib, json, sys
from pathlib import Path
import torch
from echodistill_core.tensorfile import write_tensors
path, texts = Path(sys.argv[1]), json.loads(sys.argv[2])
digests = set()
for _ in range(10):
    write_tensors(path, {name: torch.full((3,), 0.5) for name in set(texts)}, {text: text for text in set(texts)})
    digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
print(*digests)
"""


@pytest.mark.slow
def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    path = tmp_path / "a.safetensors"
    children = [run_child(REPEATED, path, json.dumps(ODD_TEXTS), PYTHONHASHSEED=seed) for seed in "123"]
    assert [child.returncode for child in children] == [0, 0, 0], children[0].stderr
    assert len({child.stdout for child in children}) == 1
    assert len(children[0].stdout.split()) == 1


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"__metadata__": torch.zeros(1)}, {}, "not named __metadata__"),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, {}, "complex128"),
        ({"a": torch.eye(2).to_sparse()}, {}, "sparse"),
        ({"a": torch.zeros(1)}, {"photo": "dog\udcff.jpg"}, "Unicode"),
        ({"a": torch.zeros(1)}, {"steps": 3}, "only text"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path, tensors, metadata, words):
    with pytest.raises(InputError, match=words):
        write_tensors(tmp_path / "a", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_header_says_where_tensors_lie(tmp_path):
    save_file({"b": torch.zeros(2, 3), "a": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "a", {"k": "v"})
    header = read_header(tmp_path / "a")
    assert header.metadata == {"k": "v"}
    assert header.tensors == {"b": TensorInfo("F32", (2, 3), 0, 24), "a": TensorInfo("U8", (4,), 24, 28)}


def test_header_alone_is_read_of_a_file_too_large_for_memory(tmp_path):
    path = raw_file(tmp_path / "a", {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b"")
    try:
        os.truncate(path, path.stat().st_size + 2**42)
    except OSError:
        pytest.skip("this file system has no sparse files of 4 TiB")
    assert read_header(path).tensors["a"].shape == (2**40,)


def test_named_tensors_only_and_a_missing_name(tmp_path):
    write_tensors(tmp_path / "a", {"to_k": torch.ones(2), "to_v": torch.zeros(2)}, {})
    assert list(read_tensors(tmp_path / "a", ["to_v"])) == ["to_v"]
    assert read_tensors(tmp_path / "a", []) == {}
    with pytest.raises(InputError, match=r"no tensor 'to_kk'.*did you mean to_k"):
        read_tensors(tmp_path / "a", ["to_v", "to_kk"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_values_that_are_not_finite_are_counted(tmp_path, dtype):
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0]).to(dtype)
    write_tensors(tmp_path / "a", {"good": torch.zeros(3), "step": torch.tensor(1), "worse": values}, {})
    assert len(read_tensors(tmp_path / "a")) == 3
    with pytest.raises(InputError, match=r"'worse' holds 3 values .* of 5"):
        read_tensors(tmp_path / "a", check_finite=True)
    assert len(read_tensors(tmp_path / "a", ["good", "step"], check_finite=True)) == 2


def test_nan_is_found_in_a_type_that_torch_cannot_test(tmp_path):
    # This type has no infinity.
    values = torch.tensor([1.0, float("nan"), 448.0]).to(torch.float8_e4m3fn)
    write_tensors(tmp_path / "a", {"weight": values}, {})
    with pytest.raises(InputError, match=r"'weight' holds 1 values .* of 3"):
        read_tensors(tmp_path / "a", check_finite=True)


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
    with pytest.raises(InputError, match="100000001 bytes; expected at most 16777216"):
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
        with pytest.raises(
            InputError, match=r"is a pickle, which can run code when opened.*convert it to \.safetensors"
        ):
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
    with pytest.raises(InputError, match=f"truncated: found {len(data) - 1} bytes; expected {len(data)} bytes"):
        read_header(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(InputError, match=f"longer .* found {len(data) + 1} bytes; expected {len(data)} bytes"):
        read_header(path)


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


def test_what_safetensors_refuses_on_reading_is_an_input_error(tmp_path, monkeypatch):
    path = raw_file(tmp_path / "a", {"a": F32})

    def refuse(*arguments, **named):
        raise SafetensorError("Dtype not understood: F32")

    monkeypatch.setattr("echodistill_core.tensorfile.safe_open", refuse)
    with pytest.raises(InputError, match="cannot be read by safetensors: Dtype not understood"):
        read_tensors(path)


LIMITED = """
import resource, signal, sys
import torch
from pathlib import Path
from echodistill_core.errors import StorageError
from echodistill_core.tensorfile import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_tensors(Path(sys.argv[1]), {"a": torch.ones(1_000_000)}, {})
except StorageError as error:
    sys.exit(f"StorageError: {error}")
"""


KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from echodistill_core.tensorfile import write_tensors
os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
write_tensors(Path(sys.argv[1]), {"a": torch.ones(1_000_000)}, {})
"""


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("code", [LIMITED, KILLED], ids=["limit", "kill"])
def test_a_write_that_fails_or_is_killed_leaves_the_old_file(tmp_path, code):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(3)}, {"k": "old"})
    before = path.read_bytes()
    child = run_child(code, path)
    if code is LIMITED:
        assert child.returncode == 1
        assert child.stderr.startswith(f"StorageError: {path} could not be written: File too large")
    else:
        assert child.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 2
        remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_full_disk_while_writing_tensors(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(3)}, {"k": "old"})
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="free space and run the same command again"):
        write_tensors(path, {"a": torch.ones(3)}, {"k": "new"})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@posix_only
def test_a_written_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a", {"a": torch.zeros(1)}, {})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
