"""safetensors files are written and read as safetensors itself does."""

import json
import os
import signal

import pytest
import torch
from children import posix_only, run_child
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tensor_files import F32, ODD_TEXTS, assert_same, raw_file, some_tensors

from echodistill_core.errors import InputError, StorageError
from echodistill_core.files import remove_leftovers
from echodistill_core.tensorfile import read_header, read_tensors, write_tensors
from echodistill_core.tensorheader import TensorInfo


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


def test_what_safetensors_refuses_on_reading_is_an_input_error(tmp_path, monkeypatch):
    path = raw_file(tmp_path / "a", {"a": F32})

    def refuse(*arguments, **named):
        raise SafetensorError("Dtype not understood: F32")

    monkeypatch.setattr("echodistill_core.tensorfile.safe_open", refuse)
    with pytest.raises(InputError, match="Dtype not understood"):
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
    with pytest.raises(StorageError, match="free space"):
        write_tensors(path, {"a": torch.ones(3)}, {"k": "new"})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@posix_only
def test_a_written_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a", {"a": torch.zeros(1)}, {})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
