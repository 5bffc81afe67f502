"""safetensors files: written so that equal content gives equal bytes, and read without trusting a byte of them.

The format is 8 bytes with the length n of the header (little-endian), n bytes of JSON, then the tensors' data:
{"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, end]}, ...}, where
the offsets count bytes from the end of the header (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError
from .files import replacing
from .settings import nearest

# Bytes of one element, in the order by which safetensors lays out a file (the last comes first).
# Its 4- and 6-bit types are left out: no model here has them, and torch cannot compute with them.
_NAMES_BY_BYTES = {
    1: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    2: "I16 U16 F16 BF16",
    4: "I32 U32 F32",
    8: "C64 F64 I64 U64",
}
ITEM_BYTES = {name: size for size, names in _NAMES_BY_BYTES.items() for name in names.split()}
_WRITTEN_AS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMENSIONS = 64  # as in torch's and numpy's own operations
MAX_INTEGER = 2**63 - 1
MAX_DEPTH = 3  # the header, a tensor's entry, its shape

_LAYOUT = {name: i for i, name in enumerate(ITEM_BYTES)}
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_TOKEN = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its type by safetensors' name, its shape, and its bytes start..end of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself: free-form metadata, and its tensors by name in the file's order."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


class _FlawError(Exception):
    """(what was found, what was expected); the reader adds the file and the remedy."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Equal content gives equal bytes, whatever the order of the mappings.

    Tensors may lie on any device, share storage and be strided; each is copied to the CPU alone, while it is written.
    Raises StorageError where it cannot be written, and InputError for a tensor or text that the format cannot hold.
    """
    # safetensors' own save_file writes the same bytes, except that it orders metadata at random, makes the file
    # readable by its owner only, leaves a nameless hidden file when it is killed, and copies all tensors at once.
    for name, tensor in tensors.items():
        if name == _METADATA or tensor.dtype not in _WRITTEN_AS or tensor.layout != torch.strided:
            raise InputError(
                f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) cannot be written to {path}; expected a dense "
                f"tensor of a common type, not named {_METADATA}; convert or rename it."
            )
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise InputError(f"the metadata for {path} are {_short.repr(metadata)}; expected only text; convert them.")
    # The widest types come first, so that every tensor is aligned to its type.
    names = sorted(sorted(tensors), key=lambda name: -_LAYOUT[_WRITTEN_AS[tensors[name].dtype]])
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _WRITTEN_AS[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    try:
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path} cannot hold the text {_short.repr(error.object[error.start : error.end])} in its header; "
            "expected Unicode text; rename the file or setting that it comes from."
        ) from error
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            # numpy has no bfloat16: the bytes go through uint8.
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def read_header(path: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check everything in a safetensors file but the tensors' values, which are not touched.

    Stricter than safetensors: it also refuses duplicate names, unknown fields, and headers over `max_header_bytes`.
    Raises InputError for a file that cannot be read, is of another kind (a pickle is named as such) or is malformed.
    """
    path = Path(path)
    try:
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {found}; expected a .safetensors file; check the path.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(1024)
            length = int.from_bytes(head[:8], "little")
            if 8 + length > size or length > max_header_bytes or head[8:9] != b"{":
                _refuse_other_kinds(path, head)
            _check_length(length, size, max_header_bytes)
            file.seek(8)
            raw = file.read(length)
        return _parse_header(raw, size - 8 - length)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}; expected a readable file; "
            "check its disk and permissions."
        ) from error
    except _FlawError as error:
        found, expected = error.args
        raise InputError(
            f"{path} is not a sound safetensors file: {found}; expected {expected}; download or copy it again."
        ) from error


def read_tensors(path: Path, names: Iterable[str] | None = None, check_finite: bool = False) -> dict[str, Tensor]:
    """Read the named tensors, or all, to the CPU, after the checks of `read_header`.

    The tensors are views of the mapped file: writing into them leaves the file alone, but where the same file is to be
    replaced while they live, Windows wants them cloned first.
    Raises InputError as `read_header` does, for a name that is not there, and with `check_finite` for NaN and infinity.
    """
    header = read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    for name in wanted:
        if name not in header.tensors:
            raise InputError(
                f"{path} has no tensor {_short.repr(name)} among its {len(header.tensors)}"
                f"{nearest(name, header.tensors)}; choose a file of the right kind."
            )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read by safetensors: {error}; expected what its header says; download or copy it again."
        ) from error
    if check_finite:
        for name, tensor in tensors.items():
            _check_finite(path, name, tensor)
    return tensors


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # torch tests most 8-bit floats not at all or wrongly; as float32 they keep their NaN.
    bad = int((~torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)).sum())
    if bad:
        raise InputError(
            f"{path}: tensor {_short.repr(name)} holds {bad} values that are NaN or infinite, of {tensor.numel()}; "
            "expected finite numbers; download it again or take an earlier file."
        )


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Name the usual files that are mistaken for safetensors, by their first bytes. For files that cannot be one."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is a git-LFS pointer, not the file it points to; expected safetensors; run `git lfs pull` or "
            "download the file itself."
        )
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise InputError(
            f"{path} is a web page saved in place of the file; expected safetensors; download the file itself, which "
            "may need a login or another link."
        )
    # The first bytes of a pickle are also those of a safetensors header of some length (640 bytes begins with
    # b"\x80\x02"); that has zeros in the higher bytes of its length, and a pickle has not.
    is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and any(head[3:8])
    is_zip = head.startswith(b"PK\3\4")
    if is_pickle or is_zip or (path.suffix.lower() in _PICKLE_SUFFIXES and head[8:9] != b"{"):
        raise InputError(
            f"{path} is a pickle, which can run code when opened; expected safetensors; convert it to .safetensors "
            "(for instance by loading it in a tool you trust and saving as safetensors)."
        )


def _check_length(length: int, size: int, limit: int) -> None:
    if size < 8:
        raise _FlawError(f"it holds {size} bytes", "at least 8")
    if length == 0:
        raise _FlawError("its header has length 0", "a header of at least 2 bytes")
    if 8 + length > size:
        raise _FlawError(f"truncated, or no safetensors at all: {size} bytes", f"{8 + length} bytes or more")
    if length > limit:
        raise _FlawError(f"its header has {length} bytes", f"at most {limit}")


def _parse_header(raw: bytes, data_bytes: int) -> Header:
    """Check the JSON `raw` of a file with `data_bytes` bytes after it. Raises _FlawError."""
    entries = _parse_json(raw)
    if not isinstance(entries, dict):
        raise _FlawError(f"its header is {_short.repr(entries)}", "a JSON object")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _FlawError(f"its metadata is {_short.repr(metadata)}", "a JSON object of texts")
    tensors = {name: _tensor_info(name, entry) for name, entry in entries.items()}
    _check_cover(tensors, 8 + len(raw), data_bytes)
    return Header(metadata, tensors)


def _parse_json(raw: bytes) -> Any:
    _check_depth(raw)
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        raise _FlawError(f"its header is not UTF-8 at byte {8 + error.start}", "UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise _FlawError(f"its header is not JSON at character {error.pos} ({error.msg})", "JSON") from error


def _check_depth(raw: bytes) -> None:
    """Refuse deep nesting before the parser, which recurses: a raised recursion limit would let it crash Python."""
    depth, in_text = 0, False
    for match in _TOKEN.finditer(raw):
        token = match[0]
        if token == b'"':
            in_text = not in_text
        elif not in_text and token in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _FlawError("its header is nested too deep", f"{MAX_DEPTH} levels")
        elif not in_text and token in b"]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refusing what readers disagree about: a name given twice, and half of a surrogate pair."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _FlawError(f"its header gives {_short.repr(name)} twice", "each name once")
        for text in (name, value):
            if isinstance(text, str) and not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise _FlawError(f"its header holds the text {_short.repr(text)}", "Unicode text")
        result[name] = value
    return result


def _integer(digits: str) -> int:
    # Length first: turning a million digits into a number takes minutes.
    if digits.startswith("-") or len(digits) > 19 or int(digits) > MAX_INTEGER:
        _no_number(digits)
    return int(digits)


def _no_number(digits: str) -> None:
    raise _FlawError(f"its header holds the number {digits[:24]}", f"whole numbers from 0 to {MAX_INTEGER}")


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    tensor = f"tensor {_short.repr(name)}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _FlawError(f"{tensor} is described by {_short.repr(entry)}", f"the fields {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _FlawError(f"{tensor} has the type {_short.repr(dtype)}", f"one of {', '.join(ITEM_BYTES)}")
    # type() rather than isinstance(): to Python, true is an integer.
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or any(type(n) is not int for n in shape):
        raise _FlawError(
            f"{tensor} has the shape {_short.repr(shape)}", f"a list of at most {MAX_DIMENSIONS} whole numbers"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise _FlawError(f"{tensor} has the offsets {_short.repr(offsets)}", "two whole numbers")
    # Strides overflow where a tensor has a length of 0 beside huge ones, so zeros count as ones here.
    if math.prod(max(n, 1) for n in shape) * ITEM_BYTES[dtype] > MAX_INTEGER:
        raise _FlawError(f"{tensor} has the shape {_short.repr(shape)}", f"at most {MAX_INTEGER} bytes")
    start, end = offsets
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != size:
        raise _FlawError(
            f"{tensor} takes bytes {start} to {end}", f"{size} bytes for {dtype} of shape {_short.repr(shape)}"
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def _check_cover(tensors: Mapping[str, TensorInfo], header_bytes: int, data_bytes: int) -> None:
    """The tensors have to cover the data once: overlaps let a small file fill the memory, gaps hide something."""
    covered = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != covered:
            flaw = "overlaps the one before it" if info.start < covered else "leaves a gap before it"
            raise _FlawError(f"tensor {_short.repr(name)} {flaw}: it starts at byte {info.start}", f"byte {covered}")
        covered = info.end
    if covered != data_bytes:
        flaw = "truncated: " if covered > data_bytes else "longer than its header says: "
        raise _FlawError(f"{flaw}found {header_bytes + data_bytes} bytes", f"{header_bytes + covered} bytes")
