"""A view of a PNG file without its text chunks, for Pillow.

Pillow inflates compressed text and colour profiles on opening, and refuses the image where they are large, as a ComfyUI
workflow is. Text chunks are removed here, except the two kinds with an orientation. Written here to bound memory.
"""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_METADATA = 1_000_000  # bytes inflated, of Exif data or XMP: less than Pillow's own limit of 1 MiB
MAX_PROFILE = 16_000_000  # bytes inflated, of a colour profile; the largest in use hold some 3 MB

_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")


class ProfileError(ValueError):
    """A colour profile that cannot be extracted; the message is the end of a sentence."""


def strip_text(file: BinaryIO) -> tuple[BinaryIO, bytes | ProfileError | None]:
    """A view of an open PNG file without text, colour profile and oversized Exif data; and the profile's bytes.

    The profile is None where the file has none, and a ProfileError where it cannot be inflated to at most MAX_PROFILE
    bytes. Only chunk headers and the profile are read, for files of any size. Reading the view moves the file's
    position. From the first malformed chunk on, the view equals the file.
    """
    end = file.seek(0, io.SEEK_END)
    pieces = [(0, len(SIGNATURE))]
    profile: bytes | ProfileError | None = None
    kept: set[bytes] = set()
    position = len(SIGNATURE)
    while position < end:
        file.seek(position)
        header = file.read(8)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        after = position + 12 + length
        if len(header) < 8 or after > end:
            pieces.append((position, end))
            break
        if kind == b"iCCP":
            profile = _profile(file.read(length)) if profile is None else profile
        elif not _is_oversized(file, kind, length, kept):
            if pieces[-1][1] == position:
                pieces[-1] = (pieces[-1][0], after)
            else:
                pieces.append((position, after))
        position = after
        if kind == b"IEND":
            break
    return io.BufferedReader(_FileSegments(file, pieces)), profile


def _is_oversized(file: BinaryIO, kind: bytes, length: int, kept: set[bytes]) -> bool:
    """Whether to remove a chunk; the file is positioned at its data. kept: text keywords kept so far."""
    if kind == b"eXIf":
        return length > MAX_METADATA
    if kind not in _TEXT:
        return False
    keyword = file.read(min(length, 80)).partition(b"\0")[0]
    if keyword not in _ORIENTATION or keyword in kept or length > MAX_METADATA:
        return True
    file.seek(-min(length, 80), io.SEEK_CUR)
    data = file.read(length)[len(keyword) + 1 :]
    if kind == b"zTXt" and _inflated(data[1:], MAX_METADATA) is None:
        return True
    if kind == b"iTXt" and data[:1] == b"\1":
        compressed = data[2:].split(b"\0", 2)
        if len(compressed) < 3 or _inflated(compressed[2], MAX_METADATA) is None:
            return True
    kept.add(keyword)
    return False


def _profile(data: bytes) -> bytes | ProfileError:
    """The colour profile in the data of an iCCP chunk: name, zero byte, compression method, deflated profile."""
    _, _, packed = data.partition(b"\0")
    found = _inflated(packed[1:], MAX_PROFILE)
    return ProfileError("cannot be unpacked, or is far too large") if found is None else found


def _inflated(data: bytes, limit: int) -> bytes | None:
    """Inflate data; None where they are malformed, incomplete or larger than `limit` bytes."""
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, limit + 1)
    except zlib.error:
        return None
    return found if inflater.eof and len(found) <= limit else None


class _FileSegments(io.RawIOBase):
    """Concatenated byte ranges of an open file, as a file. pieces: (start, end) offsets in the file."""

    def __init__(self, file: BinaryIO, pieces: list[tuple[int, int]]) -> None:
        self._file = file
        self._pieces = pieces
        self._size = sum(end - start for start, end in pieces)
        self._position = 0
        self._piece, self._before = 0, 0  # index of the last piece read, and the size of all pieces before it

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read bytes of one piece into the buffer. Returns their number; 0 at the end of the last piece."""
        if self._position < self._before:
            self._piece, self._before = 0, 0
        while self._piece < len(self._pieces):
            start, end = self._pieces[self._piece]
            inside = self._position - self._before
            if inside < end - start:
                self._file.seek(start + inside)
                data = self._file.read(min(len(buffer), end - start - inside))
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
            self._before += end - start
            self._piece += 1
        return 0
