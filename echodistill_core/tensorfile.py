"""safetensors files: written deterministically (equal content gives equal bytes) and read as untrusted input.

The format is 8 bytes with the length n of the header (little-endian), n bytes of JSON, then the tensors' data:
{"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, end]}, ...}, where
the offsets count bytes from the end of the header (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError
from .files import replacing, why_missing
from .logs import logger
from .messages import quoted, shortened
from .settings import nearest
from .tensorheader import ITEM_BYTES, METADATA, FlawError, Header, parse_header

log = logger(__name__)

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
_LAYOUT = {name: i for i, name in enumerate(ITEM_BYTES)}
_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Equal content gives equal bytes; the order of the mappings has no effect.

    Tensors may be on any device, share storage and be strided; they are copied to the CPU one at a time.
    Raises StorageError where the write fails, and InputError for a tensor or text that the format cannot hold.
    """
    # safetensors.torch.save_file writes the same format, but orders metadata randomly, makes the file readable by its
    # owner only, leaves a hidden temporary file when it is killed, and copies all tensors at once.
    for name, tensor in tensors.items():
        if name == METADATA or tensor.dtype not in _WRITTEN_AS or tensor.layout != torch.strided:
            raise InputError(
                f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) cannot be written to {path}; expected a dense "
                f"tensor of a common type, not named {METADATA}; convert or rename it."
            )
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise InputError(f"the metadata for {path} are {quoted(metadata)}; expected only text; convert them.")
    # The widest types come first, so that every tensor is aligned to its element size.
    names = sorted(sorted(tensors), key=lambda name: -_LAYOUT[_WRITTEN_AS[tensors[name].dtype]])
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _WRITTEN_AS[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    try:
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path} cannot hold the text {quoted(error.object[error.start : error.end])} in its header; "
            "expected Unicode text; rename the file or setting that it comes from."
        ) from error
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            # numpy has no bfloat16, so the bytes are viewed as uint8.
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def read_header(path: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of a safetensors file; the tensors' values are not read.

    Stricter than safetensors: it also refuses duplicate names, unknown fields, and headers over `max_header_bytes`.
    Raises InputError for a file that is unreadable, malformed or of another format (pickles are named as such).
    """
    path = Path(path)
    try:
        if not path.is_file():
            found = "is not a file" if path.exists() else why_missing(path)
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
        return parse_header(raw, size - 8 - length)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}; expected a readable file; "
            "check its disk and permissions."
        ) from error
    except FlawError as error:
        found, expected = error.args
        raise InputError(
            f"{path} is not a sound safetensors file: {found}; expected {expected}; download or copy it again."
        ) from error


def read_tensors(path: Path, names: Iterable[str] | None = None, check_finite: bool = False) -> dict[str, Tensor]:
    """Read the named tensors, or all, to the CPU, after the checks of `read_header`.

    The tensors are copy-on-write views of the memory-mapped file: writing to them does not change the file. On Windows,
    clone them before the same file is replaced.
    Raises InputError as `read_header` does, for a missing name, and with `check_finite` for NaN and infinity.
    """
    header = read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    for name in wanted:
        if name not in header.tensors:
            raise InputError(
                f"{path} has no tensor {quoted(name)} among its {len(header.tensors)}"
                f"{nearest(name, header.tensors)}; choose a file of the right kind."
            )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read by safetensors: {error}; expected what its header says; download or copy it again."
        ) from error
    log.debug("read %d of %d tensors of %s", len(tensors), len(header.tensors), shortened(path))
    if check_finite:
        for name, tensor in tensors.items():
            _check_finite(path, name, tensor)
    return tensors


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # torch.isfinite does not support most 8-bit floats; converted to float32, NaN stays NaN.
    bad = int((~torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)).sum())
    if bad:
        raise InputError(
            f"{path}: tensor {quoted(name)} holds {bad} values that are NaN or infinite, of {tensor.numel()}; "
            "expected finite numbers; download it again or take an earlier file."
        )


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise InputError for common other formats, recognised by their first bytes. Call it for invalid files only."""
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
    # A safetensors header can start with the bytes of a pickle: a length of 640 is b"\x80\x02". The higher bytes of
    # such a length are zero; those of a pickle are not.
    is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and any(head[3:8])
    is_zip = head.startswith(b"PK\3\4")
    if is_pickle or is_zip or (path.suffix.lower() in _PICKLE_SUFFIXES and head[8:9] != b"{"):
        raise InputError(
            f"{path} is a pickle, which can run code when opened; expected safetensors; convert it to .safetensors "
            "(for instance by loading it in a tool you trust and saving as safetensors)."
        )


def _check_length(length: int, size: int, limit: int) -> None:
    if size < 8:
        raise FlawError(f"it holds {size} bytes", "at least 8")
    if length == 0:
        raise FlawError("its header has length 0", "a header of at least 2 bytes")
    if 8 + length > size:
        raise FlawError(f"truncated, or no safetensors at all: {size} bytes", f"{8 + length} bytes or more")
    if length > limit:
        raise FlawError(f"its header has {length} bytes", f"at most {limit}")
