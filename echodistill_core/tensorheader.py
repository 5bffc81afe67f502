"""Parser of safetensors headers as untrusted input.

A JSON object {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, end]},
...}, where the offsets count bytes from the end of the header (https://huggingface.co/docs/safetensors).
Written by hand for safety: each flaw is found, and named, before the safetensors library opens the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .messages import quoted

# Bytes per element. safetensors stores the types of a file in the reverse of this order.
# Its 4- and 6-bit types are not supported: no model here uses them, and torch cannot compute with them.
_NAMES_BY_BYTES = {
    1: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    2: "I16 U16 F16 BF16",
    4: "I32 U32 F32",
    8: "C64 F64 I64 U64",
}
ITEM_BYTES = {name: size for size, names in _NAMES_BY_BYTES.items() for name in names.split()}
MAX_DIMENSIONS = 64  # as in torch's and numpy's own operations
MAX_INTEGER = 2**63 - 1
MAX_DEPTH = 3  # the header, a tensor's entry, its shape

METADATA = "__metadata__"

_FIELDS = {"dtype", "shape", "data_offsets"}
_TOKEN = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: safetensors' name of its type, its shape, and its byte range start..end in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Free-form metadata of a safetensors file, and its tensors by name in the file's order."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


class FlawError(Exception):
    """A malformed header, as (found, expected). The caller adds the file and the remedy."""


def parse_header(raw: bytes, data_bytes: int) -> Header:
    """Parse and check the JSON `raw` of a file with `data_bytes` bytes after it. Raises FlawError."""
    entries = _parse_json(raw)
    if not isinstance(entries, dict):
        raise FlawError(f"its header is {quoted(entries)}", "a JSON object")
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FlawError(f"its metadata is {quoted(metadata)}", "a JSON object of texts")
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
        raise FlawError(f"its header is not UTF-8 at byte {8 + error.start}", "UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise FlawError(f"its header is not JSON at character {error.pos} ({error.msg})", "JSON") from error


def _check_depth(raw: bytes) -> None:
    """Refuse deep nesting before parsing: the parser recurses, and a raised recursion limit lets it crash Python."""
    depth, in_text = 0, False
    for match in _TOKEN.finditer(raw):
        token = match[0]
        if token == b'"':
            in_text = not in_text
        elif not in_text and token in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise FlawError("its header is nested too deep", f"{MAX_DEPTH} levels")
        elif not in_text and token in b"]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Refuses duplicate names and lone surrogates, which JSON readers treat differently."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise FlawError(f"its header gives {quoted(name)} twice", "each name once")
        for text in (name, value):
            if isinstance(text, str) and not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise FlawError(f"its header holds the text {quoted(text)}", "Unicode text")
        result[name] = value
    return result


def _integer(digits: str) -> int:
    # Check the length first: converting a million digits takes minutes.
    if digits.startswith("-") or len(digits) > 19 or int(digits) > MAX_INTEGER:
        _no_number(digits)
    return int(digits)


def _no_number(digits: str) -> None:
    raise FlawError(f"its header holds the number {digits[:24]}", f"whole numbers from 0 to {MAX_INTEGER}")


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    tensor = f"tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise FlawError(f"{tensor} is described by {quoted(entry)}", f"the fields {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FlawError(f"{tensor} has the type {quoted(dtype)}", f"one of {', '.join(ITEM_BYTES)}")
    # type() rather than isinstance(): bool is a subclass of int.
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or any(type(n) is not int for n in shape):
        raise FlawError(f"{tensor} has the shape {quoted(shape)}", f"a list of at most {MAX_DIMENSIONS} whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise FlawError(f"{tensor} has the offsets {quoted(offsets)}", "two whole numbers")
    # Zeros count as ones: strides overflow for shapes that combine 0 with huge lengths.
    if math.prod(max(n, 1) for n in shape) * ITEM_BYTES[dtype] > MAX_INTEGER:
        raise FlawError(f"{tensor} has the shape {quoted(shape)}", f"at most {MAX_INTEGER} bytes")
    start, end = offsets
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != size:
        raise FlawError(f"{tensor} takes bytes {start} to {end}", f"{size} bytes for {dtype} of shape {quoted(shape)}")
    return TensorInfo(dtype, tuple(shape), start, end)


def _check_cover(tensors: Mapping[str, TensorInfo], header_bytes: int, data_bytes: int) -> None:
    """Require that the tensors cover the data once: overlaps let a small file fill the memory, gaps hide data."""
    covered = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != covered:
            flaw = "overlaps the one before it" if info.start < covered else "leaves a gap before it"
            raise FlawError(f"tensor {quoted(name)} {flaw}: it starts at byte {info.start}", f"byte {covered}")
        covered = info.end
    if covered != data_bytes:
        flaw = "truncated: " if covered > data_bytes else "longer than its header says: "
        raise FlawError(f"{flaw}found {header_bytes + data_bytes} bytes", f"{header_bytes + covered} bytes")
