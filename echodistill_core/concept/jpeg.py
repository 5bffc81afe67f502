"""Detects damage in a JPEG's entropy-coded data, which libjpeg decodes to garbage with warnings that Pillow hides.

Written here because no library reports it. Four tests, which an intact file passes: no forbidden markers inside or
after a scan; restart markers in order and of the right number; no long runs of 0x00 or 0xFF bytes that the Huffman
tables do not allow; and, for a single baseline scan, data that end with the last row.

Not detected: overwritten bytes that decode to about the same number of blocks, and most damage in progressive images
without restart markers, where only markers and runs are tested.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image

MAX_BYTES = 256_000_000  # read at most; later bytes, such as a phone's video, are not part of the image

_MARKER = re.compile(rb"\xff+([\x01-\xfe])")
_ZEROS = re.compile(rb"\x00{65}")  # a block of 63 coefficients takes 24 bytes of zeros at most, three blocks take 72
_LONG_ZEROS = re.compile(rb"\x00{257}")  # refinement scans: up to 1000 zero correction bits are legal (libjpeg)
_FILL = b"\xff" * 16  # fill bytes may precede a marker, one or two in practice
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BETWEEN_SCANS = {0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # markers that ITU-T T.81 B.2 allows
_SLACK = 64  # bytes of padding after a scan, as some encoders write
_READ_AHEAD = b"\0" * 16  # libjpeg asks for up to 8 bytes more than it decodes


@dataclass
class _Frame:
    """The declarations in the segments before a scan. sampling: component to (horizontal, vertical) factors."""

    kind: int = 0  # the low byte of its SOF marker
    width: int = 0
    height: int = 0
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    first_symbols: dict[tuple[int, int], int] = field(default_factory=dict)  # (class, table) to symbol
    interval: int = 0  # MCUs between restart markers, 0 for none


def find_damage(data: bytes) -> str | None:
    """Why the first image of a JPEG file is damaged, as the end of a sentence; None without detected damage.

    Decodes with Pillow: ImageFile.LOAD_TRUNCATED_IMAGES has to be False.
    """
    frame, position, scans = _Frame(), 2, 0
    last = (0, 0)
    try:
        while True:
            found = _MARKER.search(data, position)
            if found is None:  # Pillow reports a truncated file
                return "the segments after its pixels are broken" if position > len(data) else None
            if scans and found.start() != position:
                return "there are stray bytes between two scans"
            marker, position = found[1][0], found.end()
            if marker == 0xD9:
                break
            if 0xD0 <= marker <= 0xD8 or marker == 0x01:
                if scans:
                    return f"marker FF{marker:02X} stands outside of a scan"
                continue
            if scans and marker not in _BETWEEN_SCANS:
                return f"marker FF{marker:02X} stands inside its pixels"
            length = int.from_bytes(data[position : position + 2], "big")
            body = data[position + 2 : position + length]
            position += length
            if marker != 0xDA:
                _read_segment(frame, marker, body)
                continue
            end = _end_of_scan(data, position)
            if end is None:
                return None
            reason = _damage_in_scan(frame, body, data, position, end)
            if reason:
                return reason
            last, position, scans = (position, end), end, scans + 1
    except (IndexError, KeyError, ValueError, ZeroDivisionError):
        # Malformed segments; libjpeg reports those before the first scan.
        return "a segment between its scans is broken" if scans else None
    if scans == 1 and frame.kind in (0xC0, 0xC1):
        return _damage_in_length(data, *last)
    return None


def _read_segment(frame: _Frame, marker: int, body: bytes) -> None:
    """Read one segment into `frame`. Raises IndexError where it is too short."""
    if marker in _FRAMES:
        frame.kind = marker
        frame.height, frame.width = (int.from_bytes(body[at : at + 2], "big") for at in (1, 3))
        for at in range(6, 6 + 3 * body[5], 3):
            frame.sampling[body[at]] = (body[at + 1] >> 4, body[at + 1] & 15)
    elif marker == 0xC4:
        at = 0
        while at < len(body):
            # Codes are assigned in increasing order, so the first listed symbol has the all-zeros code.
            frame.first_symbols[body[at] >> 4, body[at] & 15] = body[at + 17]
            at += 17 + sum(body[at + 1 : at + 17])
    elif marker == 0xDD:
        frame.interval = int.from_bytes(body[:2], "big")


def _end_of_scan(data: bytes, start: int) -> int | None:
    """Position of the first marker after the scan other than a restart marker, or None."""
    for found in _MARKER.finditer(data, start):
        if not 0xD0 <= found[1][0] <= 0xD7:
            return found.start()
    return None


def _damage_in_scan(frame: _Frame, header: bytes, data: bytes, start: int, end: int) -> str | None:
    """Damage in the entropy-coded bytes start..end, or None. header: the body of the scan's SOS segment."""
    count = header[0]
    components = {header[at]: header[at + 1] for at in range(1, 1 + 2 * count, 2)}
    restarts = [(found.end(), found[1][0] & 7) for found in _MARKER.finditer(data, start, end)]
    mcus = _mcus(frame, list(components))
    expected = (mcus - 1) // frame.interval if frame.interval else 0
    content = len(data[start:end].rstrip(b"\0\xff")) + start  # some encoders pad the last scan
    if len(restarts) == expected + 1 and restarts[-1][0] >= content and frame.interval:
        restarts.pop()  # and some end it with a restart marker
    if frame.height and (len(restarts) != expected or any(n != i % 8 for i, (_, n) in enumerate(restarts))):
        return f"its pixels hold {len(restarts)} restart markers, or their order is wrong; {expected} are expected"
    after = data[end:].lstrip(b"\xff")[:1] if data[end : end + len(_FILL)] == _FILL else b"\xd9"
    if data.find(_FILL, start, end) >= 0 or after != b"\xd9":  # an encoder may pad up to the end of the image
        return "its pixels hold a long run of FF bytes"
    if zeros_are_illegal(frame.kind, components, header[1 + 2 * count :], frame.first_symbols):
        run = _ZEROS if not (frame.kind == 0xC2 and header[3 + 2 * count] >> 4) else _LONG_ZEROS
        if run.search(data, start, content):
            return "its pixels hold a long run of zero bytes"
    return None


def zeros_are_illegal(
    kind: int, components: dict[int, int], spectral: bytes, first_symbols: dict[tuple[int, int], int]
) -> bool:
    """Whether a long run of zero bits decodes to blocks whose every coefficient is -1, which no real image has.

    Where the all-zeros code is "end of block", a long run is a flat area and legal.
    kind: the SOF marker's low byte. components: component to its table numbers (DC in the high half). spectral: first
    and last coefficient, and the approximation bits. first_symbols: (class, table) to the symbol of the all-zeros code.
    """
    if kind not in (0xC0, 0xC1, 0xC2):  # arithmetic coding
        return False
    first, final = spectral[0], spectral[1]
    if kind == 0xC2 and (first == 0 or final - first < 4):
        return False
    symbols = [first_symbols[1, tables & 15] for tables in components.values()]
    return any(symbol & 15 for symbol in symbols)  # the low half is a coefficient's size; 0 is an end of block


def _mcus(frame: _Frame, components: list[int]) -> int:
    """Number of minimum coded units in a scan of these components (T.81 A.2)."""
    across, down = (max(factors[i] for factors in frame.sampling.values()) for i in (0, 1))
    if len(components) > 1:
        return -(-frame.width // (8 * across)) * -(-frame.height // (8 * down))
    horizontal, vertical = frame.sampling[components[0]]
    width, height = -(-frame.width * horizontal // across), -(-frame.height * vertical // down)
    return -(-width // 8) * -(-height // 8)


def _damage_in_length(data: bytes, start: int, end: int) -> str | None:
    """Whether a single baseline scan, bytes start..end, ends before the image's last row or continues after it."""
    try:
        return _compare_last_rows(data, start, end)
    except (OSError, SyntaxError):  # Pillow reports the malformed header when it opens the image
        return None


def _compare_last_rows(data: bytes, start: int, end: int) -> str | None:
    kept = start + len(data[start:end].rstrip(b"\0\xff"))
    if kept - _SLACK > start and _last_row(data[: kept - _SLACK]).getbbox():
        return "more data follow its last row of pixels"
    if not _last_row(data[:end] + _READ_AHEAD).getbbox() and _last_row(data[:end] + b"\xff\xd9").getbbox():
        return "its pixels end before the last row"
    return None


def _last_row(data: bytes) -> Image.Image:
    """The last row of a truncated image at an eighth of its size; black where libjpeg did not reach it."""
    with Image.open(BytesIO(data), formats=["JPEG"]) as image:
        image.draft("L", (max(image.width // 8, 1), max(image.height // 8, 1)))
        try:
            image.load()
        except OSError:
            image.tile = []  # keeps the decoded part
        return image.crop((0, image.height - 1, image.width, image.height))
