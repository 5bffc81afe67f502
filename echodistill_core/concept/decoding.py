"""Decodes common image formats to upright 8-bit sRGB without alpha. Size limits are checked before decoding.

Alpha is composited on white. 16-bit grey is scaled, not clipped; of 16-bit colour Pillow keeps the upper eight bits.
Embedded colour profiles are applied to the 8-bit values before alpha (see `profiles`); colour spaces named only in Exif
data or the PNG chunks gAMA, cHRM and cICP are ignored. The EXIF orientation is applied. An animation gives its first
frame.
"""

from __future__ import annotations

import importlib
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..messages import shortened
from . import jpeg, png, profiles
from .contents import HEAD, RAW, Content, recognise

MAX_PIXELS = 64_000_000  # per image; below Pillow's MAX_IMAGE_PIXELS, which some host programs disable
MIN_SIDE = 64  # pixels; the model would learn the blur of smaller images, enlarged eightfold or more

# Pillow's names of photograph formats. HEIF and JXL need a plugin. An allow-list for safety: Pillow's other formats
# include PostScript, which it passes to an interpreter, and video and data containers.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF", "JXL")

# Pillow opens most camera raw files as TIFF and returns the small preview, so they are never opened.
RAW_SUFFIXES = frozenset(
    {".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".rwl", ".pef"}
    | {".srw", ".3fr", ".iiq", ".erf", ".kdc", ".mrw", ".x3f"}
)
# Pillow plugins by format, imported on the first file of the format.
_PLUGINS = {"HEIF": "pillow_heif", "AVIF": "pillow_avif", "JXL": "pillow_jxl"}

_decoding = threading.Lock()


class UnusableError(InputError):
    """A file that cannot be used as a photograph. A run with other usable files leaves it out.

    reason: the end of a sentence.
    """

    def __init__(self, path: Path, reason: str, message: str = "") -> None:
        super().__init__(message or f"photograph {shortened(path)} could not be read: {reason}.")
        self.path = path
        self.reason = reason


def decode(path: Path) -> tuple[Image.Image, list[str]]:
    """Decode a regular file to mode RGB without metadata. Returns the image and notes for the user.

    Raises UnusableError for a file that cannot be decoded or is damaged, has a side under MIN_SIDE pixels, or has more
    than MAX_PIXELS pixels (or more than Pillow's own limit, where that is lower).
    """
    if path.suffix.lower() in RAW_SUFFIXES:
        raise _raw(path)
    content = None
    try:
        # An open file, not a path: with a path, Pillow memory-maps grey and CMYK TIFFs and scrambles rotated ones.
        with _strict_pillow(), path.open("rb") as file:
            content = recognise(file.read(HEAD))
            file.seek(0)
            _import_plugin(content)
            return _decode(path, file, content)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow raises these before returning an image, so the size is only in the message.
        found = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(path, f"{int(found[1]):,}" if found else "far too many") from error
    except Exception as error:  # Pillow's decoders raise many types on malformed files
        raise UnusableError(path, _reason(path, content, error)) from error


def readable_suffixes() -> set[str]:
    """Lower-case extensions, with the dot, of the formats that this Pillow can open."""
    readable = _readable_formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in readable}


def _decode(path: Path, file: BinaryIO, content: Content | None) -> tuple[Image.Image, list[str]]:
    """`decode` for an open file, within `_strict_pillow`. Raises UnusableError and Pillow's exceptions."""
    embedded: bytes | png.ProfileError | None = None
    kind = content.readable if content else ""
    view, embedded = png.strip_text(file) if kind == "PNG" else (file, None)
    with Image.open(view, formats=_readable_formats()) as opened:
        _check_size(path, *opened.size)
        if opened.format == "TIFF" and _is_raw(opened):
            raise _raw(path)
        if kind != "PNG" and "icc_profile" in opened.info:
            embedded = opened.info["icc_profile"] or png.ProfileError("has parts missing")
        full_scale, inverted = _grey_scale(opened)
        opened.load()
        if kind == "JPEG":
            file.seek(0)
            damage = jpeg.find_damage(file.read(jpeg.MAX_BYTES))
            if damage:
                raise UnusableError(path, f"it is damaged: {damage}")
        image = _plain_mode(ImageOps.exif_transpose(opened), full_scale, inverted)
    note = ""
    if isinstance(embedded, bytes):
        image, note = profiles.to_srgb(image, embedded)
    elif embedded is not None:
        note = f"its colour profile was ignored, because it {embedded}"
    return _on_white(image), [note] if note else []


def _check_size(path: Path, width: int, height: int) -> None:
    """Raise UnusableError for a side under MIN_SIDE or an area over MAX_PIXELS, in pixels."""
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} = {width * height:,}")
    if min(width, height) < MIN_SIDE:
        raise UnusableError(
            path,
            f"it is {width}x{height} pixels; expected at least {MIN_SIDE} on each side",
            f"photograph {shortened(path)} is {width}x{height} pixels; expected at least {MIN_SIDE} on each side: "
            "use a larger picture, or take this one out.",
        )


def _too_large(path: Path, pixels: str) -> UnusableError:
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    return UnusableError(
        path,
        f"it has {pixels} pixels; expected at most {limit:,}",
        f"photograph {shortened(path)} has {pixels} pixels; expected at most {limit:,}: make it smaller.",
    )


def _raw(path: Path) -> UnusableError:
    return UnusableError(path, "it is a camera raw file, to be exported as JPEG, PNG or TIFF first")


def _is_raw(image: Any) -> bool:
    """Whether an opened TIFF is a camera raw file: a DNG, or a file whose first image is a preview."""
    tags = image.tag_v2
    # DNGVersion; or NewSubfileType 1 (reduced image) with the full image in a SubIFD (TIFF/EP).
    return 50706 in tags or (tags.get(254) == 1 and 330 in tags)


def _import_plugin(content: Content | None) -> None:
    """Register an installed Pillow plugin for the file's format; the registration is process-wide."""
    Image.init()
    name = content.readable if content else ""
    if name not in _PLUGINS or name in Image.OPEN:
        return
    try:
        plugin = importlib.import_module(_PLUGINS[name])
        if name == "HEIF":  # the others register on import
            plugin.register_heif_opener()
    except Exception:  # not installed or broken: the file is then reported as unreadable
        return


def _readable_formats() -> list[str]:
    """Those of FORMATS that this Pillow can open."""
    Image.init()  # fills Image.OPEN
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Make truncated files and Pillow's decompression-bomb warning errors."""
    # Host programs may set LOAD_TRUNCATED_IMAGES, which fills missing parts with grey; the model would learn the grey.
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """The largest grey value of an opened file of mode I or I;16, and whether 0 is white (TIFF 6.0)."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample; Pillow widens 12 bits to 16 without scaling them
    return (4095 if bits == 12 else 65535), tags.get(262) == 0  # PhotometricInterpretation: WhiteIsZero


def _plain_mode(image: Image.Image, full_scale: int, inverted: bool) -> Image.Image:
    """An image of any mode as L, LA, RGB, RGBA or CMYK with 8 bits per channel, in the file's colour space.

    full_scale: white in modes I and I;16, Pillow's modes of 12- and 16-bit grey. inverted: 0 is white in these modes.
    Raises ValueError with a reason for floating-point images (mode F), grey values outside 0..full_scale, and modes
    without a conversion in Pillow.
    """
    if image.mode == "F":
        raise ValueError("it holds floating-point values, which name no white; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = _grey_to_8_bits(image, full_scale, inverted)
    if image.mode == "La":  # Pillow converts mode La to LA only
        image = image.convert("LA")
    if image.mode == "LA":
        return image
    if image.has_transparency_data:
        grey = image.mode in ("1", "L")
        image = image.convert("RGBA")
        return Image.merge("LA", (image.getchannel("R"), image.getchannel("A"))) if grey else image
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """An image as RGB, alpha composited on white, without metadata."""
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # privacy: place and time of a photograph must not reach derived files
    return image


def _grey_to_8_bits(image: Image.Image, full_scale: int, inverted: bool) -> Image.Image:
    """Mode I or I;16 as L, 0..full_scale scaled to 0..255 and rounded; LA for declared transparency."""
    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > full_scale:
        # 32-bit integers have no standard white, and a white from the values would differ between images.
        raise ValueError(f"its grey values span {low} to {high} instead of 0 to {full_scale}; save it with 8 bits")
    scaled = ((grey.astype(np.uint32) * 255 + full_scale // 2) // full_scale).astype(np.uint8)
    if inverted:
        scaled = 255 - scaled
    transparent = image.info.get("transparency")  # compared before scaling: only the exact value is transparent
    if transparent is None:
        return Image.fromarray(scaled)
    alpha = np.where(grey == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(scaled), Image.fromarray(alpha)))


def _reason(path: Path, content: Content | None, error: Exception) -> str:
    """The reason why a file could not be read, as the end of a sentence."""
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "it is empty"
        if content is None:
            return "it is damaged, or no image of a format that is read here"
        if content is RAW:
            return "it is a camera raw file, to be exported as JPEG, PNG or TIFF first"
        if content.readable in _readable_formats():
            return f"it is {content.name}, but damaged"
        return f"it is {content.name}" + (f"; {content.advice}" if content.advice else "")
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the operating system's message, such as permission denied
    reason = shortened(error).rstrip(".") or type(error).__name__
    return reason if isinstance(error, ValueError) else f"it is damaged or cut off ({reason})"
