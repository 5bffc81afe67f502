"""Recognises a file's format by its first bytes, and the advice for unreadable formats."""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD = 4096  # bytes that `recognise` reads at most


@dataclass(frozen=True)
class Content:
    """The content of a file. name: with its article, as in "it is ...". readable: Pillow's format name, or "".

    advice: remedy where it cannot be read, as in "export it as JPEG"; empty for none.
    """

    name: str
    readable: str = ""
    advice: str = ""


_EXPORT = "export it as JPEG, PNG or TIFF"
RAW = Content("a camera raw file", advice=_EXPORT)
_HEIF = Content("a HEIC/HEIF picture", "HEIF", "install pillow-heif, or export it as JPEG")
_AVIF = Content("an AVIF picture", "AVIF", "install pillow-avif-plugin or Pillow 11.3 or newer, or export it as JPEG")
_JXL = Content("a JPEG XL picture", "JXL", "install pillow-jxl-plugin, or export it as JPEG")
_VIDEO = Content("a video", advice="save single frames as JPEG or PNG")
_ARCHIVE = Content("an archive", advice="unpack it")
_PAGE = Content("a web page or XML", advice="download the picture itself")

# Magic bytes. A pattern matches from the first byte.
_PATTERNS: list[tuple[bytes, Content]] = [
    (rb"\xff\xd8\xff", Content("a JPEG picture", "JPEG")),
    (rb"\x89PNG\r\n\x1a\n", Content("a PNG picture", "PNG")),
    (rb"GIF8[79]a", Content("a GIF picture", "GIF")),
    (rb"RIFF....WEBP", Content("a WebP picture", "WEBP")),
    (rb"BM.{4}\0{4}.{4}(?:\x0c|\x28|\x34|\x38|\x40|\x6c|\x7c)\0\0\0", Content("a BMP picture", "BMP")),
    (rb"P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s+\d+\s", Content("a PPM picture", "PPM")),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", Content("a JPEG 2000 picture", "JPEG2000", _EXPORT)),
    (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", _JXL),
    (rb"(?:II\*\0|MM\0\*).{4}CR|IIRO|IIRS|MMOR|IIU\0|FUJIFILMCCD-RAW|FOVb|\0MRM", RAW),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", Content("a TIFF picture", "TIFF")),
    (rb"8BPS", Content("a Photoshop document", advice=_EXPORT)),
    (rb"v/1\x01|#\?RADIANCE", Content("a high-dynamic-range picture", advice=_EXPORT)),
    (rb"%PDF-", Content("a PDF document", advice="export its picture as JPEG or PNG")),
    (rb"%!PS|\xc5\xd0\xd3\xc6", Content("a PostScript drawing", advice="export it as PNG")),
    (rb"version https://git-lfs", Content("a Git LFS pointer, not the picture itself", advice="run 'git lfs pull'")),
    (rb"\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|\0\0\x01\xba|OggS", _VIDEO),
    (rb"PK\x03\x04|PK\x05\x06|\x1f\x8b|Rar!|7z\xbc\xaf|BZh|\xfd7zXZ\0", _ARCHIVE),
]

# The first box of an ISO base media file names its brands (ISO 14496-12, 4.3).
_BRANDS = {b"avif": _AVIF, b"avis": _AVIF, b"crx ": RAW}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"}


def recognise(head: bytes) -> Content | None:
    """The content of a file that begins with these bytes; HEAD bytes are enough. None for an unknown format."""
    if head[4:8] == b"ftyp":
        return _media(head)
    for pattern, content in _PATTERNS:
        if re.match(pattern, head, re.DOTALL):
            return content
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    if b"<svg" in text and text.startswith(b"<"):
        return Content("an SVG drawing", advice="export it as PNG")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return _PAGE
    if not head:
        return None
    return Content("text, not a picture") if _is_text(head) else None


def _media(head: bytes) -> Content:
    """The content of a file with a box `ftyp`, by its major brand, then its compatible brands."""
    size = int.from_bytes(head[:4], "big")
    compatible = [head[at : at + 4] for at in range(16, min(size, len(head) - 3), 4)]
    if head[8:12] in _BRANDS:
        return _BRANDS[head[8:12]]
    if head[8:12] in _HEIF_BRANDS:  # mif1 is only the container; the compatible brands name the codec
        return _AVIF if {b"avif", b"avis"} & set(compatible) else _HEIF
    return next((_BRANDS[brand] for brand in compatible if brand in _BRANDS), _VIDEO)


def _is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters; the last character may be cut."""
    try:
        text = head[: len(head) - 3].decode() if len(head) >= HEAD else head.decode()
    except UnicodeDecodeError as error:
        if len(head) < HEAD or error.start < len(head) - 8:
            return False
        text = head[: error.start].decode()
    return not any(character < " " and character not in "\t\n\r\f" for character in text)
